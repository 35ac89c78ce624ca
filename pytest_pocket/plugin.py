"""The pytest plugin: hooks and little else; what they do stands in the modules that they import.

With hookspecs it is the only module that imports pytest.  Nothing else of ours is imported before it is
needed: in a project that merely has the plugin installed, it compares a path for each collected file.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import pluggy
import pytest

from pytest_pocket import hookspecs

if TYPE_CHECKING:
    from pytest_pocket.attempt import Attempt, Cell, Properties
    from pytest_pocket.conformance import Subject, Subjects
    from pytest_pocket.gate import Gates
    from pytest_pocket.registry import Registry
    from pytest_pocket.session import Session
    from pytest_pocket.task import Task

T = TypeVar("T")
_PLUGGY = str(Path(pluggy.__file__).parent)

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
    "executor": ("NAME", "where episodes are played: local (default), or ray: the cluster of RAY_ADDRESS"),
    "in_flight": ("N", "episodes played at a time without xdist (default 16)"),
    "max_turns": ("N", "replies that an episode may have (default 12)"),
    "timeout": ("SECONDS", "how long an episode may take (default 120)"),
    "sandbox": ("NAME", "auto (default), bwrap, docker, podman, or none"),
    "records": ("DIR", "where the run is recorded (default .pocket/runs/TIME)"),
    "resume": ("force", "go on with the run in --pocket-records: play only what is missing or invalid there"),
    "fail_under": ("X", "the mean reward decides: fail below X, succeed at or above it"),
    "baseline": ("RUN", "compare with this run directory, instance by instance"),
    "fail_worse": (
        "X",
        "fail only on a drop below the baseline of more than X that the paired test supports",
    ),
    "must_pass": ("TASKS", "tasks of which every episode must pass, whatever the means say"),
    "shard": ("I/N", "play only part I of N, each instance whole; pocket merge joins the parts"),
    "summary": ("FILE", "write the tables and what the gates say to a Markdown file"),
}
NEED_MODELS = ("model", "fail_under", "must_pass", "baseline", "fail_worse", "summary")
"""What a command line cannot ask for without a model: an empty variable of a CI must not open its gate."""

NO_MODEL = "no model: give --pocket-model=NAME, one or more of"
MODELS = pytest.StashKey[str]()
SESSION = pytest.StashKey["Session"]()
SUBJECTS = pytest.StashKey["Subjects"]()
MARKED = pytest.StashKey[set[str]]()
HOOKED = pytest.StashKey["tuple[int, dict[Path, list[Task]]]"]()


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Let others add tasks, models and backends."""
    pluginmanager.add_hookspecs(hookspecs)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Each option has an ini twin: ``--pocket-best-of`` is ``pocket_best_of`` there."""
    group = parser.getgroup("pocket", "small language models as coding agents")
    for name, (metavar, text) in OPTIONS.items():
        more: dict[str, Any] = {"action": "append"} if name == "model" else {}
        if name == "resume":
            more = {"nargs": "?", "const": "yes"}
        group.addoption(
            f"--pocket-{name.replace('_', '-')}", dest=f"pocket_{name}", metavar=metavar, help=text, **more
        )
        parser.addini(f"pocket_{name}", text, default="")
    group.addoption(
        "--pocket-conformance",
        action="store_true",
        help="instead of the tasks, ask the models' engines whether they do what is asked of them",
    )
    group.addoption(
        "--pocket-list", action="store_true", help="show the models, tasks and conditions there are, and end"
    )


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Generator[None, Any, Any]:
    """Once every plugin and conftest has its options: ``--runs`` where it is given, unless one of them is called so."""
    known = early_config.known_args_namespace
    if known.pocket_conformance:
        # What will be collected instead has conftests above it, and models may come from the one that is here.
        known.file_or_dir = [*known.file_or_dir, str(_conformance_file()), str(Path.cwd())]
    result = yield
    groups = [parser._anonymous, *parser._groups]
    taken = any("--runs" in option.names() for group in groups for option in group.options)
    # Not before it is asked for: a conftest that comes during collection may have an option of that name.
    # A file of options (@FILE) may ask for it, and is read later; pytest.main takes paths, too.
    if not taken and any(str(arg).partition("=")[0] == "--runs" or str(arg)[:1] == "@" for arg in args):
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
    given = [name for name in NEED_MODELS if config.getoption(f"pocket_{name}") is not None]
    if not (given or config.option.pocket_conformance or any(_value(config, name) for name in OPTIONS)):
        return
    from pytest_pocket import options
    from pytest_pocket.session import Session

    with _usage_errors():
        asked = options.read(functools.partial(_value, config))
        if not asked.models:
            if config.option.pocket_conformance:
                raise options.OptionError("--pocket-conformance needs --pocket-model: the engines to ask")
            if given:
                raise options.OptionError(
                    f"--pocket-{given[0].replace('_', '-')} without a model: give --pocket-model=NAME "
                    "(--pocket-list shows them)"
                )
            return
        if asked.executor == "ray" and _distributed(config):
            raise options.OptionError("--pocket-executor ray plays in Ray's workers: run it without -n")
        _hooked_tasks(config)
        command = ("pytest", *map(str, config.invocation_params.args))
        if added := os.environ.get("PYTEST_ADDOPTS"):
            command = ("env", f"PYTEST_ADDOPTS={added}", *command)
        session = Session(asked, _registry(config), command, config.rootpath)
        if (told := getattr(config, "workerinput", {}).get("pocket")) is not None:
            session.join(told)
    config.stash[SESSION] = session
    if config.option.pocket_conformance:
        _conform(config, session)
        return
    playing = Playing(config, session)
    if not playing.worker and asked.gated:
        from pytest_pocket.gate import Gates

        with _usage_errors():
            playing.gates = Gates(asked, tuple(session.models))
    config.pluginmanager.register(playing, "pocket-playing")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Free the engines."""
    if session := config.stash.get(SESSION, None):
        session.close()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Without a model: where tasks are to name the models there are, these can be named."""
    config = session.config
    # An xdist worker has nobody to tell but by a test.
    if SESSION in config.stash or hasattr(config, "workerinput") or config.option.collectonly:
        return
    if any(isinstance(item.parent, TaskFile) for item in getattr(session, "items", ())):
        _no_model(config)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Without a model: one line that names those there are."""
    # Under xdist the tests were skipped elsewhere: their reports say why.
    for report in terminalreporter.stats.get("skipped", ()):
        if isinstance(report.longrepr, tuple) and NO_MODEL in report.longrepr[2]:
            terminalreporter.write_line(
                f"pocket: tasks skipped, {report.longrepr[2].removeprefix('Skipped: ')}"
            )
            return


# Collection


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(
    file_path: Path, parent: pytest.Collector
) -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """A file of tasks is a module of tests, beside what others make of it."""
    found = yield
    if file_path.suffix == ".py" and not any(isinstance(collector, TaskFile) for collector in found):
        if SUBJECTS in parent.config.stash and file_path == _conformance_file():
            found.append(ConformanceFile.from_parent(parent, path=file_path, nodeid="conformance"))
        elif _is_shipped(file_path):
            found.append(_shipped_file(file_path, parent))
        elif tasks := _collected_tasks(parent.config).get(file_path.resolve()):
            collector = TaskFile.from_parent(parent, path=file_path)
            collector.tasks = tasks
            found.append(collector)
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Where pytest itself would import a shipped task: under its one name."""
    return _shipped_file(module_path, parent) if _is_shipped(module_path) else None


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
        _register_markers(self.config, {task.group for task in self.tasks})
        session = self.config.stash.get(SESSION, None)
        module = types.ModuleType(self.path.stem)
        for task in self.tasks:
            setattr(module, task.name, _test_of(task, session.cells(task.name) if session else [], session))
        return module

    def funcnamefilter(self, name: str) -> bool:
        """Every function here is a test."""
        return True


def _register_markers(config: pytest.Config, groups: Iterable[str]) -> None:
    """Let tests have our marks.  Not before there is one: under ``--strict-markers`` a project's own typo must fail."""
    known = config.stash.setdefault(MARKED, set())
    markers = {group: f"{group}: pocket tasks of the group {group!r}" for group in groups}
    markers |= {
        name: f"{name}(name): the {name} of a pocket test" for name in ("model", "backend", "condition")
    }
    for name in markers.keys() - known:
        config.addinivalue_line("markers", markers[name])
        known.add(name)


def _shipped_file(path: Path, parent: pytest.Collector) -> TaskFile:
    if path.is_relative_to(parent.config.rootpath):
        return TaskFile.from_parent(parent, path=path)
    # pytest would name an installed file by how it was asked for, and --lf would not find it again.
    return TaskFile.from_parent(parent, path=path, nodeid=f"pytest_pocket/tasks/{path.name}")


def _test_of(task: Task, cells: list[Cell], session: Session | None) -> Callable[..., None]:
    def test(_pocket_attempt: Attempt) -> None:
        episode = _pocket_attempt.episode
        if episode.score is None or not episode.score.passed:
            _fail(_pocket_attempt)

    test.__name__ = test.__qualname__ = task.name
    test.__doc__ = type(task).__doc__ or sys.modules[type(task).__module__].__doc__
    test.place_as = _standing(type(task))  # type: ignore[attr-defined]  # where pytest says that it stands
    group = getattr(pytest.mark, task.group)
    if session is None:
        marked: Callable[..., None] = group(test)
        return marked
    parameters = [
        pytest.param(cell, id=cell.id, marks=_marks(cell.model, cell.condition.slug, session))
        for cell in cells
    ]
    marked = group(pytest.mark.parametrize("pocket_cell", parameters)(test))
    return marked


def _standing(task: type[Task]) -> object:
    """What stands where a class does: of a class itself, pytest would parse the file anew for each test."""
    import inspect

    try:
        file, line = inspect.getsourcefile(task), inspect.getsourcelines(task)[1]
    except (OSError, TypeError):
        return task
    return types.FunctionType(_standing.__code__.replace(co_filename=file or "", co_firstlineno=line), {})


@functools.cache
def _marks(model: str, condition: str, session: Session) -> list[pytest.MarkDecorator]:
    """The marks of a cell, which all runs and tasks share: made anew, they were a third of a collection."""
    return [
        pytest.mark.model(name=model),
        pytest.mark.backend(name=session.models[model].backend),
        pytest.mark.condition(name=condition),
    ]


class ConformanceFile(pytest.Module):
    """The properties of the conformance suite as test functions, one parameter set for each engine."""

    def _getobj(self) -> types.ModuleType:
        from pytest_pocket import conformance

        subjects = self.config.stash[SUBJECTS]
        parameters = [pytest.param(name, id=label) for name, label in subjects.labels.items()]
        module = types.ModuleType("conformance")
        for name, ask in conformance.PROPERTIES.items():
            setattr(
                module, name, pytest.mark.parametrize("subject", parameters)(_question(name, ask, subjects))
            )
        return module

    def funcnamefilter(self, name: str) -> bool:
        """Every function here is a test."""
        return True


def _question(name: str, ask: Callable[[Subject], None], subjects: Subjects) -> Callable[..., None]:
    from pytest_pocket.chat import EngineError
    from pytest_pocket.conformance import NotShown
    from pytest_pocket.registry import ModelError

    def test(subject: str) -> None:
        wrong = ""
        try:
            ask(subjects.subject(subject))
        except NotShown as reason:
            pytest.skip(str(reason))
        except (AssertionError, EngineError, ModelError) as error:
            wrong = str(error) or "the property does not hold"
        if wrong:
            pytest.fail(wrong, pytrace=False)

    test.__name__ = test.__qualname__ = name
    test.__doc__ = ask.__doc__
    test.place_as = ask  # type: ignore[attr-defined]  # where pytest says that it stands
    return test


def _conform(config: pytest.Config, session: Session) -> None:
    """Let this run ask engines, and collect nothing else."""
    from pytest_pocket.conformance import Subjects
    from pytest_pocket.options import OptionError
    from pytest_pocket.registry import LOCAL

    with _usage_errors():
        if _distributed(config):
            raise OptionError("--pocket-conformance asks many requests at once by itself: run it without -n")
        if scripted := [model.name for model in session.models.values() if model.backend in LOCAL]:
            raise OptionError(
                f"--pocket-conformance asks engines, and {scripted[0]!r} has none: leave it out"
            )
    config.stash[SUBJECTS] = Subjects(session)
    config.args[:] = [str(_conformance_file())]
    config.pluginmanager.register(Conforming(config), "pocket-conforming")


def _distributed(config: pytest.Config) -> bool:
    """Whether pytest-xdist plays, here or in the process that started this one."""
    # Its own plugin for that comes into being later than some ask.
    return bool(config.getoption("dist", "no") != "no" or hasattr(config, "workerinput"))


class Conforming:
    """The hooks of a session that asks engines."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.results: dict[tuple[str, str], str] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Engine by engine, whatever another plugin has shuffled: one at a time is loaded."""
        order = list(self.config.stash[SUBJECTS].labels)
        items.sort(key=lambda item: order.index(_subject_of(item)))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Note how each question was answered."""
        report = yield
        if report.when == "call":
            self.results[_subject_of(item), item.name.partition("[")[0]] = report.outcome
        return report

    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """Free an engine after its last question."""
        if nextitem is None or _subject_of(nextitem) != _subject_of(item):
            self.config.stash[SUBJECTS].close(_subject_of(item))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The table of engine by property."""
        from pytest_pocket import conformance

        if self.results:
            lines = list(conformance.table(self.results))
            terminalreporter.write_line("")
            for line in lines:
                terminalreporter.write_line(line)
            if summary := self.config.stash[SESSION].options.summary:
                try:
                    summary.write_text("\n".join(lines) + "\n")
                except OSError as error:
                    terminalreporter.write_line(f"pocket: --pocket-summary {summary}: {error.strerror}")


def _subject_of(item: pytest.Item) -> str:
    return str(item.callspec.params["subject"])  # type: ignore[attr-defined]


class Playing:
    """The hooks of a session that has models, registered for it alone."""

    def __init__(self, config: pytest.Config, session: Session) -> None:
        from pytest_pocket.tally import Tally

        self.config = config
        self.session = session
        self.tally = Tally(tuple(session.models), tuple(each.prompt for each in session.options.conditions))
        self.verdict: list[str] = []
        self.gates: Gates | None = None
        self.worker = hasattr(config, "workerinput")
        self.deselected = False
        self.prepared = False

    @property
    def controller(self) -> bool:
        """Whether this process only hands out tests to xdist workers.  It never collects."""
        return self.config.pluginmanager.has_plugin("dsession")

    def pytest_report_header(self) -> str:
        """What this session plays."""
        asked = self.session.options
        conditions = ", ".join(condition.slug for condition in asked.conditions)
        return (
            f"pocket: {', '.join(self.session.models)} · {conditions} · "
            f"{asked.split} split, runs {asked.runs}, samples {asked.samples}, seed {asked.seed}"
            + (f", shard {asked.shard}" if asked.shard else "")
            + (", no sandbox" if asked.sandbox == "none" else "")
        )

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection(self) -> Generator[None, Any, Any]:
        """Tests stay until the end: no search for garbage among tens of thousands, now or later."""
        searching = gc.isenabled()
        gc.disable()
        try:
            return (yield)
        finally:
            gc.freeze()
            if searching:
                gc.enable()

    def pytest_unconfigure(self) -> None:
        """The process may go on: then what was a test is garbage."""
        gc.unfreeze()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what other shards play."""
        if shard := self.session.options.shard:
            kept: list[pytest.Item] = []
            others: list[pytest.Item] = []
            for item in items:
                theirs = any(not shard.holds(cell.task, cell.run) for cell in _cells([item]))
                (others if theirs else kept).append(item)
            items[:] = kept
            self.config.hook.pytest_deselected(items=others)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Note that there are tasks, and that they were not wanted."""
        self.deselected = self.deselected or bool(_cells(items))

    def pytest_report_collectionfinish(self, items: list[pytest.Item]) -> str | None:
        """How much there is to play."""
        if not (cells := _cells(items)):
            where = "" if self.deselected else ": --pyargs pytest_pocket.tasks has the suite's"
            return f"pocket: no task among these tests{where}"
        episodes = sum(cell.condition.best_of for cell in cells)
        what = f"pocket: {episodes} episode{'s' * (episodes != 1)}"
        return (
            what if self.config.option.collectonly else f"{what}, {self.session.options.in_flight} in flight"
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """The controller opens before its workers start."""
        if self.controller:
            with self._opening():
                self.session.open()

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """A session that is refused leaves no record of its own."""
        try:
            with _usage_errors():
                yield
        except pytest.UsageError:
            self.session.discard_empty_records()
            raise

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell an xdist worker where the engines and the records are."""
        node.workerinput["pocket"] = self.session.serve()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        """The controller collects nothing: what can be seen before anything is played, it sees once a worker has."""
        if not self.prepared:
            self.prepared = True
            with self._opening():
                if cells := self._cells_of(ids):
                    if not self._narrowed:
                        self._check_must_pass({cell.task for cell in cells})
                    self.session.prepare(cells)

    @property
    def _narrowed(self) -> bool:
        """Whether tests were left out: then a conftest that only workers read may have tasks that no id names."""
        option = self.config.option
        chosen = (option.keyword, option.markexpr, option.deselect, getattr(option, "lf", False))
        return any(chosen) or bool(self.session.options.shard) or any("::" in arg for arg in self.config.args)

    def _cells_of(self, ids: Sequence[str]) -> list[Cell]:
        """The cells of those tests that are ours, by the tests' ids.  Other plugins may add to these."""
        known = {cell.id: cell for cell in self.session.cells("")}
        found = []
        for each in ids:
            task, _, rest = each.rpartition("::")[2].partition("[")
            words = rest.rpartition("]")[0].split("-")
            ends = ((words[drop:], words[: len(words) - drop]) for drop in range(len(words)))
            parts = ("-".join(part) for pair in ends for part in pair)
            if cell := next(filter(None, map(known.get, parts)), None):
                found.append(replace(cell, task=task))
        return found

    def _check_must_pass(self, known: Container[str] = ()) -> None:
        """Raise TaskError for a task that must pass and is none."""
        from pytest_pocket import task_list

        for name in self.session.options.must_pass:
            if name not in known:
                task_list.find(name)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, Any, Any]:
        """Keep a pool of episodes going while pytest reports them, and end it before anything else ends."""
        option = self.config.option
        broken = session.testsfailed and not option.continue_on_collection_errors
        if self.controller or self.worker or broken or option.collectonly:
            return (yield)
        if not (cells := _cells(session.items)):
            return (yield)
        try:
            with self._opening():
                self._check_must_pass()
                self.session.open(cells)
            self.session.start_pool(cells)
            return (yield)
        finally:
            self.session.cancel()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a report up, whichever process it comes from."""
        row = {name: value for name, value in report.user_properties if isinstance(value, str | int | float)}
        self.tally.add(report.nodeid, row, report.failed, report.when or "")

    def pytest_keyboard_interrupt(self) -> None:
        """End what is in flight, in workers too."""
        self.session.cancel()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, None, None]:
        """Decide the exit status; the session's last line says where the records are."""
        self.session.cancel()
        if not self.worker:
            self._decide(session)
        yield
        reporter = self.config.pluginmanager.getplugin("terminalreporter")
        if reporter and not self.worker:
            self._close(reporter)

    def _close(self, reporter: pytest.TerminalReporter) -> None:
        """The table comes after pytest's own summary, where many failures cannot push it out of sight."""
        if self.tally.rows:
            from pytest_pocket.report import render

            width = self.config.get_terminal_writer().fullwidth
            plain = not (sys.stdout.encoding or "").lower().startswith("utf")
            reporter.write("\n" + render(self.tally.rows, width, ascii_only=plain))
        if tests := self.tally.unplayed(self.session.failures):
            what = f"{tests} test{'s' * (tests != 1)}"
            reporter.write_line(f"pocket: {what} failed before the episode ended: not in the table")
        for line in self.verdict:
            reporter.write_line(f"pocket: {line}")
        if directory := self.session.records_directory:
            if caveat := self.session.caveat:
                reporter.write_line(f"pocket: {caveat}")
            reporter.write_line(f"pocket: records in {directory}")

    def _decide(self, session: pytest.Session) -> None:
        if self.gates and self.tally.rows:
            self._judge(session, self.gates)
        if self.session.records_directory:
            self.verdict += map(str, self.session.failures.values())
            for caveats in self.session.caveats.values():
                self.verdict += caveats
        if self.controller and self.session.hopeless:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR
            self.session.discard_empty_records()

    def _judge(self, session: pytest.Session, gates: Gates) -> None:
        """Let the gates decide, and write the summary."""
        from pytest_pocket.gate import write_summary

        verdict = gates.verdict(self.tally.rows, self.tally.hard_failure)
        self.verdict = [line for _, line in verdict.findings]
        if gates.deciding:
            decided = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
            if decided and not (session.shouldstop or session.shouldfail):
                session.exitstatus = pytest.ExitCode.OK if verdict.good else pytest.ExitCode.TESTS_FAILED
            else:
                self.verdict.append("the session was stopped: the gates decide nothing")
        if summary := self.session.options.summary:
            try:
                write_summary(summary, self.tally.rows, verdict)
            except OSError as error:
                self.verdict.append(f"--pocket-summary {summary}: {error.strerror or error}")


@pytest.fixture
def pocket_cell() -> None:
    """The cell of a pocket test; each test brings its own."""
    return None


@pytest.fixture
def _pocket_attempt(request: pytest.FixtureRequest, pocket_cell: Cell | None) -> Attempt:
    """The attempt at this test's cell.  An invalid one is an error of the test, not a failure."""
    from pytest_pocket.attempt import cell_properties
    from pytest_pocket.chat import Cancelled
    from pytest_pocket.records import RecordsError
    from pytest_pocket.registry import ModelError

    if pocket_cell is None:
        wrong = ""
        try:
            why = _no_model(request.config)
        except pytest.UsageError as error:
            wrong = request.session.shouldstop = str(error)
        if wrong:
            pytest.fail(wrong, pytrace=False)
        pytest.skip(why)
    session = request.config.stash[SESSION]
    # A test that ends before its episode does, by a timeout of its own, still says whose it was.
    _describe(request.node, cell_properties(pocket_cell, session.models[pocket_cell.model].backend))
    reason, ends = "", True
    try:
        attempt = session.result(pocket_cell, functools.partial(_waiting, request))
    except (ModelError, RecordsError, Cancelled) as error:
        reason = str(error) or "cancelled: the session ends"
        # Other models may have their engines.
        ends = not isinstance(error, ModelError) or len(session.models) == 1
    if reason:
        if ends:
            request.session.shouldstop = reason
        pytest.fail(reason, pytrace=False)
    _describe(request.node, attempt.properties())
    if attempt.episode.invalid:
        _fail(attempt)
    return attempt


def _describe(item: pytest.Item, properties: Properties) -> None:
    """Set properties of a test; a rerun has those of the run before."""
    kept = [pair for pair in item.user_properties if pair[0] not in properties]
    item.user_properties[:] = [*kept, *properties.items()]


def _waiting(request: pytest.FixtureRequest, progress: str) -> None:
    """Say how far the session is while pytest, which reports test by test, has nothing to say."""
    manager = request.config.pluginmanager
    reporter, capture = manager.getplugin("terminalreporter"), manager.getplugin("capturemanager")
    if reporter:
        with capture.global_and_fixture_disabled() if capture else nullcontext():
            reporter.ensure_newline()
            reporter.write_line(f"pocket: {progress}, waiting for {request.node.name}")


def _value(config: pytest.Config, name: str) -> str:
    """An option from the command line, else its ini twin; a list joined by commas; empty when not given."""
    given = config.getoption(f"pocket_{name}")
    if given is None:
        given = config.getini(f"pocket_{name}")
    return ",".join(map(str, given)) if isinstance(given, list) else str(given)


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Turn what the user can mend into pytest's usage error: one line, exit status 4."""
    from pytest_pocket.options import OptionError
    from pytest_pocket.records import RecordsError
    from pytest_pocket.registry import ModelError
    from pytest_pocket.sandbox import SandboxUnavailable
    from pytest_pocket.task_list import TaskError

    try:
        yield
    except (
        hookspecs.HookError, OptionError, ModelError, TaskError, RecordsError, SandboxUnavailable,
    ) as error:  # fmt: skip
        raise pytest.UsageError(str(error)) from None


def _registry(config: pytest.Config) -> Registry:
    """The models and backends that this session knows.  Raises ModelError."""
    from pytest_pocket.registry import Model, Registry, from_pyproject

    models = from_pyproject(config.rootpath / "pyproject.toml")
    backends: dict[str, Any] = {}
    for added in _answers(config, "pytest_pocket_backends"):
        if not isinstance(added, Mapping) or not all(map(callable, added.values())):
            raise hookspecs.HookError(
                f"the hook pytest_pocket_backends gave {added!r}: give a dict of names and what builds an engine"
            )
        backends.update(added)
    return Registry([*models, *_given(config, "pytest_pocket_models", Model)], backends)


def _no_model(config: pytest.Config) -> str:
    """Why a task is skipped: the same line for all."""
    if MODELS not in config.stash:
        with _usage_errors():
            config.stash[MODELS] = ", ".join(_registry(config).models)
    return f"{NO_MODEL} {config.stash[MODELS]}"


def _cells(items: Iterable[pytest.Item]) -> list[Cell]:
    """The cells of those items that are ours."""
    return [
        item.callspec.params["pocket_cell"]
        for item in items
        if isinstance(item.parent, TaskFile) and hasattr(item, "callspec")
    ]


def _fail(attempt: Attempt) -> NoReturn:
    from pytest_pocket.trajectory import compact

    pytest.fail(compact(attempt), pytrace=False)


@functools.cache
def _tasks_folder() -> Path | None:
    """Where the shipped tasks are, without importing them."""
    spec = importlib.util.find_spec("pytest_pocket.tasks")
    return Path(spec.origin).parent.resolve() if spec and spec.origin else None


def _conformance_file() -> Path:
    """The module of the conformance suite, which is what is collected for it."""
    return Path(__file__).with_name("conformance.py")


def _is_tasks_folder(path: Path) -> bool:
    folder = _tasks_folder()
    return folder is not None and path.name == folder.name and path.resolve() == folder


def _is_shipped(path: Path) -> bool:
    return not path.name.startswith("_") and _is_tasks_folder(path.parent)


def _hooked_tasks(config: pytest.Config) -> dict[Path, list[Task]]:
    """The tasks of plugins and conftests, by the file that defines them.  Asked again when a conftest has come."""
    count = len(config.hook.pytest_pocket_tasks.get_hookimpls())
    asked, tasks = config.stash.get(HOOKED, (0, {}))
    if asked != count:
        from pytest_pocket import task_list
        from pytest_pocket.task import Task

        tasks = task_list.by_file(_given(config, "pytest_pocket_tasks", Task))
        config.stash[HOOKED] = count, tasks
    return tasks


def _collected_tasks(config: pytest.Config) -> dict[Path, list[Task]]:
    """The same for a collection, which goes on where it can: what is wrong with them is its error, in one line."""
    if not config.hook.pytest_pocket_tasks.get_hookimpls():
        return {}
    try:
        with _usage_errors():
            return _hooked_tasks(config)
    except pytest.UsageError as error:
        raise pytest.Collector.CollectError(str(error)) from None


def _given(config: pytest.Config, hook: str, kind: type[T]) -> list[T]:
    """What plugins and conftests gave to a hook that asks for lists of a kind.  Raises HookError."""
    found = []
    for added in _answers(config, hook):
        several = isinstance(added, Iterable) and not isinstance(added, str)
        for each in added if several else [added]:
            if not several or not isinstance(each, kind):
                raise hookspecs.HookError(f"the hook {hook} gave {each!r}: give a list of {kind.__name__}s")
            found.append(each)
    return found


def _answers(config: pytest.Config, hook: str) -> list[Any]:
    """What each implementation of a hook gave, generators run to their end.  Raises HookError."""
    try:
        given = getattr(config.hook, hook)()
        return [list(added) if isinstance(added, Iterator) else added for added in given]
    except Exception as error:
        from pytest_pocket.registry import ModelError, told
        from pytest_pocket.task_list import TaskError

        if isinstance(error, ModelError | TaskError | pytest.UsageError):
            raise
        raise hookspecs.HookError(
            f"the hook {hook} broke: {told(error, skip=(__file__, _PLUGGY))}"
        ) from error
