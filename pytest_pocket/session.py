"""The session: what one run of pytest plays, and with what: models, engines, sandboxes, records.

It lives in the main process, or once in each xdist worker; the xdist controller has one that plays nothing but
serves its engines.  Everything expensive is made when it is first needed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_pocket import records, sandbox, task_list
from pytest_pocket.attempt import Attempt, Cell, attempt, kept
from pytest_pocket.backends.memory import out_of_memory
from pytest_pocket.chat import Backend, Cancelled, ChatReply, ChatRequest
from pytest_pocket.episode import Workshop
from pytest_pocket.openings import several
from pytest_pocket.options import Options
from pytest_pocket.pool import Pool
from pytest_pocket.registry import LOCAL, Model, ModelError, Registry
from pytest_pocket.sharing import RemoteBackend, Server, watch

if TYPE_CHECKING:
    from pytest_pocket.cluster import Cluster


class Session:
    """The models and cells of a session.  Raises ModelError for a name that is no model."""

    def __init__(self, options: Options, registry: Registry, command: Sequence[str], directory: Path) -> None:
        self.options = options
        self.registry = registry
        self.models: dict[str, Model] = {}
        for model in map(registry.resolve, options.models):
            if self.models.setdefault(model.name, model) != model:
                raise ModelError(f"two models are called {model.name!r}: run them in two sessions")
        self.labels = _labels(self.models.values())
        self._command = command
        self._directory = directory
        self._engines: dict[str, Backend] = {}
        self.failures: dict[str, ModelError] = {}
        """Why models have no engine, by their names."""
        self.caveats: dict[str, tuple[str, ...]] = {}
        """What must be known of the engines' numbers, by the models' names."""
        self._loading = threading.Lock()
        self._remote: tuple[str, bytes] | None = None
        self._run: records.Run | None = None
        self._workshop: Workshop | None = None
        self._pool: Pool[Cell, Attempt] | None = None
        self._server: Server | None = None
        self._cluster: Cluster | None = None
        self._cancelled = False
        self._played: dict[Cell, int] = {}
        self._kept: dict[records.CellKey, list[Mapping[str, Any]]] = {}

    def cells(self, task: str) -> list[Cell]:
        """The cells of a task: model by model, condition by condition, then runs and samples."""
        options = self.options
        return [
            Cell(task, model, condition, run, sample, options.samples, self.labels[model])
            for model in self.models
            for condition in options.conditions
            for run in range(1, options.runs + 1)
            for sample in range(options.samples)
        ]

    @property
    def caveat(self) -> str:
        """What must be told of the sandbox; nothing before the session has opened."""
        return self._workshop.provider.caveat if self._workshop else ""

    @property
    def records_directory(self) -> Path | None:
        """Where the records are; None before the session has opened."""
        return self._run.directory if self._run else None

    def open(self, cells: Iterable[Cell] = ()) -> None:
        """Find a sandbox that works, load the engines that the cells need, and begin the records.

        A model whose engine cannot be had is left to ``failures``, where another one can be.  Raises
        SandboxUnavailable, ModelError, OptionError or RecordsError.
        """
        cells = tuple(cells)
        workshop = self.furnish(self.options.sandbox)
        if self.options.executor == "ray":
            self._cluster = self._join_cluster(workshop.provider.name, cells)
        asked = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self.options).items()
        }
        info = records.describe(
            command=self._command,
            models=self.models.values(),
            seed=self.options.seed,
            options={
                **asked,
                "sandbox": workshop.provider.name,
            },
            directory=self._directory,
        )
        if self.options.resume and self.options.records:
            self._resume(self.options.records, info)
            self.prepare(cells)
        else:
            records.check(self.options.records)
            self.prepare(cells)
            self._run = records.start(self.options.records, info)

    def furnish(self, name: str) -> Workshop:
        """Find a sandbox that works.  Raises SandboxUnavailable."""
        self._workshop = Workshop(sandbox.select(name))
        return self._workshop

    def _join_cluster(self, provider: str, cells: Iterable[Cell]) -> Cluster:
        from pytest_pocket.cluster import Cluster, packed

        tasks = {cell.task for cell in cells}
        models = tuple(self.models.values())
        kit = packed(self.options, provider, models, self.registry, tasks, self._directory)
        return Cluster(self.options, kit)

    def _resume(self, directory: Path, info: Mapping[str, Any]) -> None:
        self._run = records.resume(directory, info, force=self.options.resume == "force")
        self._kept = records.finished(self._run.directory)

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """The cells that a resumed run does not hold yet."""
        return [cell for cell in cells if cell.key not in self._kept]

    def engine(self, name: str) -> Backend:
        """The engine of a model, loaded once.  Raises ModelError, in words for the user, whatever went wrong."""
        with self._loading:
            if self._cancelled:
                raise Cancelled
            if name in self.failures:
                raise self.failures[name]
            if name not in self._engines:
                try:
                    self._engines[name] = self._build(self.models[name])
                except ModelError as error:
                    self.failures[name] = error
                    raise
                self.caveats[name] = getattr(self._engines[name], "caveats", ())
            return self._engines[name]

    def release(self, name: str) -> None:
        """Free one engine, if it is loaded."""
        with self._loading:
            engine = self._engines.pop(name, None)
        if engine:
            engine.close()

    def start_pool(self, cells: Iterable[Cell]) -> None:
        """From now on, play ahead of what is asked for."""
        self._pool = Pool(self.play, self.missing(cells), self.options.in_flight)

    def result(self, cell: Cell, waiting: Callable[[str], None] = lambda progress: None) -> Attempt:
        """The attempt at a cell: kept, or from the pool where there is one, else played here.  Raises as ``play``.

        While the pool lets it wait, ``waiting`` is told now and then how far the pool has come.
        """
        if (found := self._kept.pop(cell.key, None)) is not None:
            self._played[cell] = found[0]["rerun"] + 1
            return kept(cell, found, self.options.split, self.options.seed)
        if (pool := self._pool) is None:
            return self.play(cell)
        return pool.result(cell, lambda: waiting(f"{pool.played} of {pool.total} played"))

    def attempt(self, cell: Cell) -> Attempt:
        """Play a cell, in the cluster if there is one.  Raises Cancelled, ModelError."""
        engine = self.engine(cell.model)
        if self._cluster:
            return self._cluster.attempt(cell)
        if self._workshop is None:
            raise RuntimeError("the session has no sandbox")
        options = self.options
        return attempt(cell, engine, self._workshop, options.budget, options.seed, options.split)

    def play(self, cell: Cell) -> Attempt:
        """Play a cell and record it.  Raises Cancelled (nothing is recorded), ModelError, RecordsError."""
        run = self._opened()[1]
        options = self.options
        done = self.attempt(cell)
        rerun = self._played.get(cell, 0)
        self._played[cell] = rerun + 1
        for candidate, episode in enumerate(done.episodes):
            line = records.record(
                cell=cell,
                model=self.models[cell.model],
                episode=episode,
                split=options.split,
                group=task_list.find(cell.task).group,
                chosen=candidate == done.chosen,
                candidate=candidate,
                rerun=rerun,
            )
            run.append(line)
        return done

    def serve(self) -> dict[str, str | bytes]:
        """Become the controller of xdist workers: what each must be told, made of plain values."""
        workshop, run = self._opened()
        self._server = self._server or Server(self._chats)
        return {
            "address": self._server.address,
            "authkey": self._server.authkey,
            "records": str(run.directory),
            "sandbox": workshop.provider.name,
        }

    def join(self, told: Mapping[str, Any]) -> None:
        """Become the session of an xdist worker, with what the controller tells."""
        self._remote = told["address"], told["authkey"]
        self.furnish(told["sandbox"])
        self._run = records.join(Path(told["records"]))
        if self.options.resume:
            self._kept = records.finished(self._run.directory)
        watch(*self._remote, self.cancel)

    @property
    def hopeless(self) -> bool:
        """Whether no model has an engine."""
        return len(self.failures) == len(self.models)

    def cancel(self) -> None:
        """End everything that is in flight, at once: requests and sandboxes first.  Idempotent, from any thread."""
        self._cancelled = True
        if self._server:
            self._server.close()
        for engine in tuple(self._engines.values()):
            engine.cancel()
        if self._cluster:
            self._cluster.cancel()
        if self._workshop:
            self._workshop.cancel()
        if self._pool:
            self._pool.cancel()

    def discard_empty_records(self) -> None:
        """Take back the records of a session whose engine could not be loaded before anything was played."""
        if self._run and self._run.discard():
            self._run = None

    def close(self) -> None:
        """Cancel what is left, and free the engines."""
        self.cancel()
        while self._engines:
            self._engines.popitem()[1].close()
        if self._cluster:
            self._cluster.close()
            self._cluster = None
        if self._run:
            self._run.close()
            self._run = None

    def _opened(self) -> tuple[Workshop, records.Run]:
        if self._workshop is None or self._run is None:
            raise RuntimeError("the session has not been opened")
        return self._workshop, self._run

    def prepare(self, cells: Iterable[Cell]) -> None:
        """Load the engines that those cells need which no resumed run holds.  Raises ModelError."""
        wanted: dict[str, bool] = {}
        hot: dict[str, bool] = {}
        cold: dict[str, bool] = {}
        for cell in self.missing(cells):
            wanted[cell.model] = wanted.get(cell.model, False) or cell.condition.think
            hot[cell.model] = hot.get(cell.model, False) or cell.condition.temperature > 0
            cold[cell.model] = cold.get(cell.model, False) or cell.condition.temperature == 0
        for name, think in wanted.items():
            with contextlib.suppress(ModelError):
                self.engine(name)
            if name in self._engines:
                check_conditions(name, self._engines[name], think, hot[name], cold[name])
        if wanted and not wanted.keys() - self.failures.keys():
            raise next(iter(self.failures.values()))

    def _chats(self, name: str, request: ChatRequest, seeds: Sequence[int]) -> list[ChatReply]:
        """Answer a worker.  Raises ModelError."""
        engine = self.engine(name)
        try:
            hot = request.sampling.temperature > 0
            check_conditions(name, engine, request.sampling.think, hot, not hot)
        except ModelError as error:
            self.failures[name] = error
            raise
        return several(engine, request, seeds)

    def _build(self, model: Model) -> Backend:
        if self._cluster:
            return self._cluster.engine(model.name)
        if self._remote and model.backend not in LOCAL:
            return RemoteBackend(*self._remote, model.name)
        try:
            return self.registry.build(model)
        except (ModelError, Cancelled):
            raise
        except Exception as error:
            if out_of_memory(error):
                raise ModelError(
                    f"model {model.name!r} does not fit into memory: choose a smaller one"
                ) from None
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise ModelError(
                f"cannot load model {model.name!r} ({model.backend}:{model.target}): {reason}"
            ) from error


def check_conditions(name: str, engine: Backend, think: bool, hot: bool, cold: bool = False) -> None:
    """Raise ModelError when a model is asked for what its engine is known not to do."""
    if think and getattr(engine, "supports_think", None) is False:
        raise ModelError(
            f"--pocket-think on: model {name!r} has no switch for thinking in its chat template; use off"
        )
    if hot and getattr(engine, "supports_temperature", None) is False:
        raise ModelError(f"--pocket-temperature above 0 changes nothing for model {name!r}; use 0")
    if cold and getattr(engine, "supports_greedy", None) is False:
        raise ModelError(
            f"--pocket-temperature 0: model {name!r} draws another reply for each seed; use a temperature above 0"
        )


def _labels(models: Iterable[Model]) -> dict[str, str]:
    """Each model's part of a test id.  Two names with one slug are told apart by a number."""
    labels: dict[str, str] = {}
    for model in models:
        label, number = model.slug, 1
        while label in labels.values():
            number += 1
            label = f"{model.slug}_{number}"
        labels[model.name] = label
    return labels
