"""The hooks by which a conftest or another package adds tasks, models and backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_pocket.chat import Backend
    from pytest_pocket.registry import Model
    from pytest_pocket.task import Task


class HookError(ValueError):
    """What came of one of these hooks cannot be used, said in one line."""


@pytest.hookspec
def pytest_pocket_tasks() -> Iterable[Task]:  # type: ignore[empty-body]
    """Tasks to add.  Each is collected where its class is defined: a conftest, a module, a package's file."""


@pytest.hookspec
def pytest_pocket_models() -> Iterable[Model]:  # type: ignore[empty-body]
    """Models to add, to be named in ``--pocket-model``."""


@pytest.hookspec
def pytest_pocket_backends() -> Mapping[str, Callable[[Model], Backend]]:  # type: ignore[empty-body]
    """Backends to add: a name, as in ``NAME:TARGET``, and what builds the engine of one model."""
