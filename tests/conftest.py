"""Fixtures of all tests."""

from __future__ import annotations

import pytest
from toy_project import Project


@pytest.fixture
def project(pytester: pytest.Pytester) -> Project:
    """A user's project, with a task, models and backends of its own."""
    return Project(pytester)
