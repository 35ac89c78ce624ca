"""Fixtures of all tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from toy_project import Project


@pytest.fixture
def project(pytester: pytest.Pytester) -> Project:
    """A user's project, with a task, models and backends of its own."""
    return Project(pytester)


@pytest.fixture(scope="session")
def suite_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of a real session: oracle and no-op on one training instance of all 19 tasks, in the sandbox."""
    return play_suite(tmp_path_factory.mktemp("suite"), "--pocket-split=train")


def play_suite(folder: Path, *options: str) -> Path:
    """Play oracle and no-op on the shipped tasks, in a process of its own; the run directory."""
    command = [sys.executable, "-m", "pytest", "--pyargs", "pytest_pocket.tasks", "-q", "--tb=no"]
    command += ["--pocket-model=oracle,noop", "--pocket-records=run", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "run"
