"""The pytest plugin: hooks and little else; what they do stands in the modules that they import.

With hookspecs it is the only module that imports pytest.  Nothing else of ours is imported before it is needed:
in a project that merely has the plugin installed, it costs a comparison of paths for each collected file.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_pocket import hookspecs

if TYPE_CHECKING:
    from pytest_pocket.attempt import Attempt, Cell
    from pytest_pocket.registry import Registry
    from pytest_pocket.session import Session
    from pytest_pocket.tally import Tally
    from pytest_pocket.task import Task

OPTIONS = {
    "model": ("NAME", "models to run, comma separated or repeated; --pocket-list shows them"),
    "runs": ("N", "instances of each task (default 1); --runs is the same unless another plugin has it"),
    "samples": ("N", "repeats on each instance, at a temperature above 0 (default 1)"),
    "split": ("SPLIT", "where instances come from: eval (default), dev or train"),
    "prompt": ("LIST", "system prompts: raw, full, verbose (default raw,full)"),
    "think": ("LIST", "off, on (default off)"),
    "temperature": ("LIST", "temperatures; 0 is greedy (default 0)"),
    "best_of": ("LIST", "play N episodes and choose the one that most agree with (default 1)"),
    "seed": ("N", "which instances, and the seed of sampling (default 0)"),
    "in_flight": ("N", "episodes played at a time without xdist (default 16)"),
    "max_turns": ("N", "replies that an episode may have (default 12)"),
    "timeout": ("SECONDS", "how long an episode may take (default 120)"),
    "sandbox": ("NAME", "auto (default), bwrap, docker, podman, or none"),
    "records": ("DIR", "where the run is recorded (default .pocket/runs/TIME)"),
    "fail_under": ("X", "the mean reward decides: fail below X, succeed at or above it"),
}
GROUPS = ("read", "run", "write", "react", "stop")

SESSION = pytest.StashKey["Session"]()
TALLY = pytest.StashKey["Tally"]()
VERDICT = pytest.StashKey[str]()
HOOKED = pytest.StashKey["tuple[int, dict[Path, list[Task]]]"]()


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Let others add tasks, models and backends."""
    pluginmanager.add_hookspecs(hookspecs)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Each option has an ini twin: ``--pocket-best-of`` is ``pocket_best_of`` there."""
    group = parser.getgroup("pocket", "small language models as coding agents")
    for name, (metavar, text) in OPTIONS.items():
        action = "append" if name == "model" else "store"
        group.addoption(
            f"--pocket-{name.replace('_', '-')}", dest=f"pocket_{name}", metavar=metavar, action=action, help=text
        )
        parser.addini(f"pocket_{name}", text, default="")
    group.addoption(
        "--pocket-list", action="store_true", help="show the models, tasks and conditions there are, and end"
    )


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(parser: pytest.Parser) -> Generator[None, Any, Any]:
    """Once every plugin and conftest has its options: ``--runs``, unless one of them is called so."""
    result = yield
    groups = [parser._anonymous, *parser._groups]
    if not any("--runs" in option.names() for group in groups for option in group.options):
        parser.getgroup("pocket").addoption(
            "--runs", dest="pocket_runs", metavar="N", default=None, help="the same as --pocket-runs"
        )
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """``--pocket-list``."""
    if not config.option.pocket_list:
        return None
    from pytest_pocket.catalogue import catalogue

    with _usage_errors():
        _hooked_tasks(config)
        print("\n".join(catalogue(_registry(config))))
    return 0


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers; with models, check everything that was asked for before anything runs."""
    for group in GROUPS:
        config.addinivalue_line("markers", f"{group}: pocket tasks of the group {group!r}")
    for marker in ("model", "backend", "condition"):
        config.addinivalue_line("markers", f"{marker}(name): the {marker} of a pocket test")
    if not any(_value(config, name) for name in OPTIONS):
        return
    from pytest_pocket import options
    from pytest_pocket.session import Session
    from pytest_pocket.tally import Tally

    with _usage_errors():
        asked = options.read(functools.partial(_value, config))
        if not asked.models:
            return
        _hooked_tasks(config)
        command = ("pytest", *map(str, config.invocation_params.args))
        session = Session(asked, _registry(config), command, config.rootpath)
        if (told := getattr(config, "workerinput", {}).get("pocket")) is not None:
            session.join(told)
    config.stash[SESSION] = session
    config.stash[TALLY] = Tally()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Free the engines."""
    if session := config.stash.get(SESSION, None):
        session.close()


def pytest_report_header(config: pytest.Config) -> str | None:
    """What this session plays."""
    session = config.stash.get(SESSION, None)
    if session is None:
        return None
    asked = session.options
    return (
        f"pocket: {', '.join(session.models)} · {', '.join(condition.slug for condition in asked.conditions)} · "
        f"{asked.runs} of {asked.split}, {asked.samples} of each, seed {asked.seed} · {asked.in_flight} in flight"
    )


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str | None:
    """How much there is to play."""
    cells = _cells(items)
    if config.stash.get(SESSION, None) is None or not cells:
        return None
    return f"pocket: {sum(cell.condition.best_of for cell in cells)} episodes"


# Collection


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(
    file_path: Path, parent: pytest.Collector
) -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """A file of tasks is a module of tests, beside what others make of it."""
    found = yield
    if file_path.suffix == ".py" and not any(isinstance(collector, TaskFile) for collector in found):
        if _is_shipped(file_path):
            found.append(TaskFile.from_parent(parent, path=file_path))
        elif tasks := _hooked_in(parent.config, file_path):
            collector = TaskFile.from_parent(parent, path=file_path)
            collector.tasks = tasks
            found.append(collector)
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Where pytest itself would import a shipped task: under its one name."""
    return TaskFile.from_parent(parent, path=module_path) if _is_shipped(module_path) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """The tasks folder is a package, but not one that pytest should import as ``tasks``."""
    return pytest.Dir.from_parent(parent, path=path) if _is_tasks_folder(path) else None


class TaskFile(pytest.Module):
    """The tasks that a file defines, as test functions, one parameter set for each cell."""

    tasks: list[Task] | None = None

    def _getobj(self) -> types.ModuleType:
        from pytest_pocket import task_list

        if self.tasks is None:
            self.tasks = task_list.tasks_of(importlib.import_module(f"pytest_pocket.tasks.{self.path.stem}"))
        session = self.config.stash.get(SESSION, None)
        module = types.ModuleType(self.path.stem)
        for task in self.tasks:
            setattr(module, task.name, _test_of(task, session.cells(task.name) if session else [], session))
        return module

    def funcnamefilter(self, name: str) -> bool:
        """Every function here is a test."""
        return True


def _test_of(task: Task, cells: list[Cell], session: Session | None) -> Callable[..., None]:
    def test(_pocket_attempt: Attempt) -> None:
        episode = _pocket_attempt.episode
        if episode.score is None or not episode.score.passed:
            _fail(_pocket_attempt)

    test.__name__ = test.__qualname__ = task.name
    test.__doc__ = type(task).__doc__ or sys.modules[type(task).__module__].__doc__
    test.place_as = type(task)  # type: ignore[attr-defined]  # where pytest says that it stands
    group = getattr(pytest.mark, task.group)
    if session is None:
        marked: Callable[..., None] = group(test)
        return marked
    parameters = [
        pytest.param(
            cell,
            id=cell.id,
            marks=[
                pytest.mark.model(name=cell.model),
                pytest.mark.backend(name=session.models[cell.model].backend),
                pytest.mark.condition(name=cell.condition.slug),
            ],
        )
        for cell in cells
    ]
    marked = group(pytest.mark.parametrize("pocket_cell", parameters)(test))
    return marked


# Playing


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """The xdist controller opens before its workers start: it never collects."""
    pocket = session.config.stash.get(SESSION, None)
    if pocket and _is_controller(session.config):
        with _usage_errors():
            pocket.open()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell an xdist worker where the engines and the records are."""
    if pocket := node.config.stash.get(SESSION, None):
        node.workerinput["pocket"] = pocket.serve()


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, Any, Any]:
    """Keep a pool of episodes going while pytest reports them, and end it before anything else ends."""
    pocket = session.config.stash.get(SESSION, None)
    if pocket is None or _is_controller(session.config):
        return (yield)
    cells = _cells(session.items)
    option = session.config.option
    broken = session.testsfailed and not option.continue_on_collection_errors
    if not cells or broken or option.collectonly or _is_worker(session.config):
        return (yield)
    try:
        with _usage_errors():
            pocket.open(cells)
        pocket.start_pool(cells)
        return (yield)
    finally:
        pocket.cancel()


@pytest.fixture
def pocket_cell() -> None:
    """The cell of a pocket test; each test brings its own."""
    return None


@pytest.fixture
def _pocket_attempt(request: pytest.FixtureRequest, pocket_cell: Cell | None) -> Attempt:
    """The attempt at this test's cell.  An invalid one is an error of the test, not a failure."""
    from pytest_pocket.chat import Cancelled
    from pytest_pocket.records import RecordsError
    from pytest_pocket.registry import ModelError

    if pocket_cell is None:
        pytest.skip(_no_model(request.config))
    session = request.config.stash[SESSION]
    try:
        attempt = session.result(pocket_cell)
    except (ModelError, RecordsError, Cancelled) as error:
        request.session.shouldstop = reason = str(error) or "pocket: cancelled, the session ends"
        pytest.fail(reason, pytrace=False)
    properties = attempt.properties(session.models[pocket_cell.model].backend)
    kept = [pair for pair in request.node.user_properties if pair[0] not in properties]
    request.node.user_properties[:] = [*kept, *_harmless(properties)]
    if attempt.episode.invalid:
        _fail(attempt)
    return attempt


# Reporting


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add a report up, wherever the test ran."""
    # The hook has no config, and the fixtures of the reports' tests may be in another process.
    for tally in _tallies:
        tally.add(report.nodeid, dict(report.user_properties), report.failed, report.when)
