"""Which tasks there are: the 19 that ship, and those that a session has added."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType

from pytest_pocket.task import Task

NAME = re.compile(r"\w[\w.-]*")
"""Of a test's id: ``-k`` and the commas of ``--pocket-must-pass`` must find it."""
GROUP = re.compile(r"[A-Za-z]\w*")
"""Of a marker."""
GROUPS = ("read", "run", "write", "react", "stop")

_added: dict[str, Task] = {}


class TaskError(ValueError):
    """A task that cannot be had or added, said in one line."""


def tasks_of(module: ModuleType) -> list[Task]:
    """The tasks whose classes a module defines, in the order of definition."""
    return [
        value()
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Task)
        and value.__module__ == module.__name__
        and hasattr(value, "name")
    ]


@cache
def shipped() -> dict[str, Task]:
    """The 19 tasks by name, in the order of their groups."""
    package = importlib.import_module("pytest_pocket.tasks")
    found = [
        task
        for info in pkgutil.iter_modules(package.__path__)
        for task in tasks_of(importlib.import_module(f"{package.__name__}.{info.name}"))
    ]
    found.sort(key=lambda task: (GROUPS.index(task.group), task.name))
    return {task.name: task for task in found}


def add(tasks: Iterable[Task]) -> None:
    """Add a session's own tasks.  Raises TaskError for what cannot be a test, or has the name of a shipped task."""
    for task in tasks:
        for key, good, what in (
            ("name", NAME, "letters, digits, '_', '.' and '-'"),
            ("group", GROUP, "an identifier"),
        ):
            value = getattr(task, key, None)
            if not isinstance(value, str) or not good.fullmatch(value):
                raise TaskError(f"task {type(task).__name__} has the {key} {value!r}: give {what}")
        if task.name in shipped():
            raise TaskError(f"task {task.name!r} has the name of a shipped task: choose another")
        _added[task.name] = task


def added() -> dict[str, Task]:
    """The session's own tasks by name."""
    return dict(_added)


def find(name: str) -> Task:
    """The task of a name.  Raises TaskError that names the tasks there are."""
    task = shipped().get(name) or _added.get(name)
    if task is None:
        raise TaskError(f"unknown task {name!r}: choose from {', '.join((*shipped(), *_added))}")
    return task


def by_file(tasks: Iterable[Task]) -> dict[Path, list[Task]]:
    """Add tasks, and sort them by the file that defines each.  Raises TaskError for a name given twice."""
    files: dict[Path, list[Task]] = {}
    names: set[str] = set()
    for task in tasks:
        add([task])
        if task.name in names:
            raise TaskError(f"task {task.name!r} is added twice: choose another name")
        names.add(task.name)
        files.setdefault(_source(type(task)), []).append(task)
    return files


def _source(cls: type[Task]) -> Path:
    """The file of a class, by its methods: a conftest's module name may since belong to another conftest."""
    for value in vars(cls).values():
        if isinstance(value, FunctionType):
            return Path(value.__code__.co_filename).resolve()
    return Path(inspect.getfile(cls)).resolve()
