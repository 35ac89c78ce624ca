"""The cluster: attempts played as Ray tasks, on however many machines Ray has.

What an attempt comes to depends on its cell alone, so it may be played anywhere, and again: Ray plays those of a
lost worker elsewhere, and the session records what comes back, once.  Each worker process makes a session of its
own from what this one tells it, and keeps the engines.  Only who asks for Ray imports this module.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
import os
import platform
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
from ray import cloudpickle
from ray._private import worker
from ray.cloudpickle.cloudpickle import register_pickle_by_value, unregister_pickle_by_value
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pytest_pocket import task_list
from pytest_pocket.attempt import Attempt, Cell
from pytest_pocket.chat import Cancelled, ChatReply, ChatRequest, EngineError, first_line
from pytest_pocket.episode import Episode
from pytest_pocket.options import OptionError, Options
from pytest_pocket.registry import MANIFEST, Factory, Model, ModelError, Registry, shipped
from pytest_pocket.sandbox import SandboxUnavailable
from pytest_pocket.session import Session
from pytest_pocket.task import Task

RETRIES = 3
"""How often an attempt is played again whose worker or machine was lost; what still is not there is ``infra``."""
PACKAGES = ("pytest_pocket", "pytest_pocket.sandbox", "pytest_pocket.tasks", "pytest_pocket.backends")
"""Whose code decides what an attempt comes to."""
ADDRESSES = {"vllm": ("base_url", "VLLM_BASE_URL"), "ollama": ("host", "OLLAMA_HOST")}
"""Backends that start a server where neither the option nor the variable names one."""
ENVIRONMENT = ("OPENAI_BASE_URL", "OPENAI_API_KEY", "VLLM_BASE_URL", "VLLM_API_KEY", "OLLAMA_HOST")
"""What backends read of the session's environment."""


class Unfit(Exception):
    """A machine that cannot play for this session, said in one line."""


@dataclass(frozen=True)
class Kit:
    """What a worker is told: what it cannot know from its own installation."""

    options: Options
    sandbox: str
    models: tuple[Model, ...]
    backends: Mapping[str, Factory]
    tasks: tuple[Task, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Distant:
    """An engine that the workers have: what it supports, as they found it.  It answers nothing here."""

    supports_think: bool | None
    supports_temperature: bool | None
    supports_greedy: bool | None
    caveats: tuple[str, ...]

    def chat(self, request: ChatRequest) -> ChatReply:
        """Raises EngineError."""
        raise EngineError("the engines of this session are the workers'")

    def cancel(self) -> None:
        """The cluster cancels its tasks."""

    def close(self) -> None:
        """The engine ends with its worker."""


class Cluster:
    """Plays attempts on the Ray cluster of ``RAY_ADDRESS``, or on a local Ray that ends with it.

    ``kit`` is what ``packed`` made.  Raises OptionError when there is no cluster.
    """

    def __init__(self, options: Options, kit: bytes) -> None:
        self._options = options
        self._code = code_digest()
        self._kit = kit
        self._lock = threading.Lock()
        self._playing: set[Any] = set()
        self._cancelled = False
        self._mine = not ray.is_initialized()
        if self._mine:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
            except Exception as error:
                raise OptionError(f"--pocket-executor ray: no cluster: {first_line(error)}") from None
            # Whatever log_to_driver says, Ray prints pages about a lost machine into the session's output.
            worker.print_to_stdstream = lambda *_, **__: None
        self._ready = ray.remote(num_cpus=0, max_retries=RETRIES)(ready)
        self._play = ray.remote(num_cpus=1, max_retries=RETRIES)(play)

    def engine(self, name: str) -> Distant:
        """A model's engine, loaded on every machine.

        Raises ModelError where one cannot load it, OptionError where one cannot play at all: before anything is
        played, for such a machine would take the most episodes and make them all invalid.
        """
        asked = [
            self._ready.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
            ).remote(self._code, self._kit, name)
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU")
        ]
        if not asked:
            raise OptionError("--pocket-executor ray: the cluster has no machine with a CPU to play on")
        try:
            found: list[Distant] = ray.get(asked)
        except RayTaskError as error:
            if isinstance(error.cause, ModelError):
                raise error.cause from None
            raise OptionError(f"--pocket-executor ray: {first_line(error.cause)}") from None
        except RayError as error:
            raise OptionError(f"--pocket-executor ray: {first_line(error)}") from None
        return found[0]

    def attempt(self, cell: Cell) -> Attempt:
        """The attempt at a cell, played by a worker.  Raises Cancelled, and what a broken task raises there."""
        with self._lock:
            if self._cancelled:
                raise Cancelled
            playing = self._play.remote(self._code, self._kit, cell)
            self._playing.add(playing)
        try:
            done: Attempt = ray.get(playing)
            return done
        except RayError as error:
            if self._cancelled:
                raise Cancelled from None
            if not isinstance(error, RayTaskError):
                return self._invalid(cell, error)
            if isinstance(error.cause, Unfit | ModelError):
                return self._invalid(cell, error.cause)
            raise
        finally:
            with self._lock:
                self._playing.discard(playing)

    def cancel(self) -> None:
        """End what is in flight, with the workers that play it.  Idempotent, from any thread."""
        with self._lock:
            self._cancelled = True
            playing = tuple(self._playing)
        for each in playing:
            ray.cancel(each, force=True)

    def close(self) -> None:
        """Leave the cluster; a local one ends."""
        self.cancel()
        if self._mine:
            ray.shutdown()

    def _invalid(self, cell: Cell, error: BaseException) -> Attempt:
        """An attempt that no worker brought to an end: the cluster's fault."""
        instance = cell.instance(self._options.split, self._options.seed)
        messages = cell.condition.messages(instance.prompt)
        episode = Episode(
            instance, cell.condition, tuple(messages), (), "infra", "infra", None, "", {}, 0.0,
            f"{type(error).__name__}: {first_line(error)}",
        )  # fmt: skip
        return Attempt(cell, (episode,) * cell.condition.best_of, 0)


# What workers run


def ready(code: str, kit: bytes, name: str) -> Distant:
    """Load an engine in this worker.  Raises ModelError, Unfit."""
    session = _session(code, kit)
    try:
        engine = session.engine(name)
    except ModelError as error:
        raise ModelError(f"{error} (on {platform.node()})") from None
    return Distant(
        getattr(engine, "supports_think", None),
        getattr(engine, "supports_temperature", None),
        getattr(engine, "supports_greedy", None),
        tuple(getattr(engine, "caveats", ())),
    )


def play(code: str, kit: bytes, cell: Cell) -> Attempt:
    """Play a cell in this worker.  Raises ModelError, Unfit, and what a broken task raises."""
    return _session(code, kit).attempt(cell)


@functools.cache
def _session(code: str, kit: bytes) -> Session:
    """This worker's session.  Raises Unfit."""
    here = platform.node()
    if code != code_digest():
        raise Unfit(f"{here} has another pytest-pocket: install the same one on every machine")
    try:
        told: Kit = cloudpickle.loads(kit)
    except Exception as error:
        raise Unfit(
            f"{here} lacks what this session's own tasks or backends need: {first_line(error)}; "
            "install it on every machine"
        ) from None
    os.environ.update(told.environment)
    try:
        task_list.add(told.tasks)
        session = Session(told.options, Registry(told.models, told.backends), (), Path.cwd())
        session.furnish(told.sandbox)
    except (ModelError, task_list.TaskError, SandboxUnavailable) as error:
        raise Unfit(f"{here} cannot play: {error}") from None
    return session


@functools.cache
def code_digest() -> str:
    """The sha256 of the code that plays and of the manifests of the checkpoints that ship."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        folder = Path(str(importlib.import_module(package).__file__)).parent
        for file in sorted(folder.glob("*.py")):
            digest.update(f"{package}/{file.name}\n".encode() + file.read_bytes())
    for manifest in sorted(shipped().glob(f"*/{MANIFEST}")):
        digest.update(manifest.read_bytes())
    return digest.hexdigest()


# What travels


def packed(
    options: Options,
    sandbox: str,
    models: Sequence[Model],
    registry: Registry,
    tasks: Iterable[str],
    directory: Path,
) -> bytes:
    """The kit of a session, as bytes.  Raises OptionError, in words for the user, when something cannot travel.

    What stands in files below ``directory``, the session's own folder, travels whole, for no worker has these.
    """
    for model in models:
        option, variable = ADDRESSES.get(model.backend, ("", ""))
        if option and not (model.options.get(option) or os.environ.get(variable)):
            raise OptionError(
                f"--pocket-executor ray: model {model.name!r} would start a server in every worker: start one that all "
                f"machines reach, and set {variable} to it"
            )
    theirs = Registry().models
    added = task_list.added()
    kit = Kit(
        replace(
            options, executor="local", models=tuple(model.name for model in models), records=None, resume=""
        ),
        sandbox,
        # A checkpoint that ships lies where the worker's own installation is.
        tuple(_absolute(model) for model in models if theirs.get(model.name) != model),
        {name: registry.added[name] for model in models if (name := model.backend) in registry.added},
        tuple(added[name] for name in sorted(set(tasks)) if name in added),
        {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    )
    own = [module for name, module in tuple(sys.modules.items()) if _is_own(name, module, directory)]
    for module in own:
        register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(kit))
    except Exception as error:
        raise OptionError(
            f"--pocket-executor ray: a task or backend of this session cannot travel: {first_line(error)}; "
            "install it on every machine, as a package"
        ) from None
    finally:
        for module in own:
            unregister_pickle_by_value(module)


def _absolute(model: Model) -> Model:
    """The same model, with paths that hold in any folder."""
    target, adapter = (
        os.path.abspath(path) if path and os.path.exists(path) else path
        for path in (model.target, model.adapter)
    )
    return replace(model, target=target, adapter=adapter)


def _is_own(name: str, module: ModuleType, directory: Path) -> bool:
    file = getattr(module, "__file__", None)
    if not file or name != module.__name__:  # a second name of a module
        return False
    installed = "site-packages" in Path(file).parts or name.partition(".")[0] == "pytest_pocket"
    return not installed and Path(file).is_relative_to(directory)
