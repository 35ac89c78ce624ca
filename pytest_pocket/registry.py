"""Models: a name bound to a backend, weights, an adapter, its parent and its stage.

A model is found by its registered name or written as ``BACKEND:TARGET``.  Names come from the built-in
scripted models, the checkpoints that ship, ``[tool.pocket.models.NAME]`` in pyproject.toml, hooks, and any
directory that holds a checkpoint manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from pytest_pocket import parsing, tools
from pytest_pocket.chat import Backend, Cancelled, EngineError, first_line
from pytest_pocket.task import SUITE_VERSION
from pytest_pocket.vetting import Refused, stay_inside, vet

MANIFEST = "pocket.json"
HUB_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")
PARSER_PROBES = (
    "",
    "Done.\n",
    "a thought</think>\n\nDone.",
    "<think>a</think>b<think>c",
    "<tool_call><function=Read><parameter=file_path>\na.txt\n</parameter></function></tool_call>",
    "first\n<tool_call>\n<function=Read>\n<parameter=file_path>\n\na\n\n</parameter>\n</function>\n</tool_call>\nthen",
    "<function=Read><parameter=file_path>a</parameter><parameter=limit>3</parameter></function>",
    "<function=Read><parameter=limit>many</parameter></function>",
    "<function=Read></function><function=Glob><parameter=pattern>*</parameter></function>",
    "<function=Nothing><parameter=a>b</parameter></function>",
    "<tool_call><function=Read><parameter=file_path>a",
    "<tool_call></tool_call>",
    '<tool_call>{"name": "Read", "arguments": {"file_path": "a"}}</tool_call>',
    '<tool_call>{"name": "Read", "arguments": "a"}</tool_call>',
    '<tool_call>{"name": "Read"}</tool_call>',
    '<tool_call>{"name": </tool_call>',
    '{"name": "Read", "arguments": {"file_path": "a"}}',
)
"""A parser that reads one of them otherwise is another parser for a model that was trained on the first."""
Factory = Callable[["Model"], Backend]


class ModelError(ValueError):
    """A model that cannot be had, said in one line: what, the value, what to do."""


def fault(error: Exception) -> Exception:
    """What a backend's exception is told as: itself where it says what happened, else an EngineError with its place."""
    if isinstance(error, (EngineError, Cancelled, ModelError)):
        return error
    return EngineError(f"the backend broke: {told(error)}")


def told(error: Exception, skip: tuple[str, ...] | None = None) -> str:
    """An exception that nobody expected, on one line: its kind, what it says, and where it was raised.

    With ``skip`` the place is the outermost in no file that begins with one of these: whose code it was.
    """
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if skip and not frame.filename.startswith(skip)]
    place = mine[0] if mine else frames[-1]
    return f"{type(error).__name__}: {first_line(error)} ({Path(place.filename).name}:{place.lineno})"


@dataclass(frozen=True)
class Model:
    """One model of the suite.

    ``target`` is what the backend loads (a directory or hub name for ``hf``), ``adapter`` a PEFT directory on
    top of it, ``digest`` the sha256 of the weights where a manifest gives it.
    """

    name: str
    backend: str
    target: str = ""
    adapter: str = ""
    parent: str = ""
    stage: str = ""
    digest: str = ""
    description: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The name as part of a test id: only letters, digits, "_", "." and inner "-", so that ``-k`` selects it."""
        return re.sub(r"[^A-Za-z0-9_.-]+", "_", self.name).strip("_.-") or "model"


def sha256_json(value: object) -> str:
    """The hash of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tools_hash() -> str:
    """The hash of the tools' schemas, which checkpoints pin."""
    return sha256_json(tools.SCHEMAS)


def tool_hashes() -> dict[str, str]:
    """The hash of each tool's schema: they say which one differs."""
    return {schema["function"]["name"]: sha256_json(schema) for schema in tools.SCHEMAS}


def parser_hash() -> str:
    """The hash of what the parser makes of some replies, well-formed and not: of what it does, not of its source."""
    return sha256_json(
        [
            asdict(parsing.parse(text, thinking_open=thinking, schemas=tools.SCHEMAS))
            for text in PARSER_PROBES
            for thinking in (False, True)
        ]
    )


def file_hash(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(directory: Path) -> Model:
    """The model that a checkpoint directory holds.  Raises ModelError when the manifest is broken or does not
    match this suite: a checkpoint is trained for one template and one set of tools."""
    manifest = _vetted(directory)
    with _well_formed(directory):
        name, stage, parent = manifest["name"], manifest["stage"], manifest["parent"]
        files: dict[str, str] = manifest["files"]
        pinned = {
            "suite": manifest["suite"],
            "tools": manifest["tools_sha256"],
            "template": manifest["template_sha256"],
            "parser": manifest.get("parser_sha256", "unpinned"),
        }
        known_tools: dict[str, str] = manifest.get("tools", {})
        adapter_of = manifest.get("adapter_of", "")
        told = (name, stage, parent, adapter_of, *pinned.values(), *files.values(), *known_tools.values())
        if not all(isinstance(value, str) for value in told):
            raise TypeError("every value must be a string")
    template = directory / "chat_template.jinja"
    if not template.is_file():
        raise ModelError(f"checkpoint {name!r} in {directory} has no {template.name}: fetch it again")
    actual = {
        "suite": SUITE_VERSION,
        "tools": tools_hash(),
        "template": file_hash(template),
        "parser": parser_hash() if "parser_sha256" in manifest else "unpinned",
    }
    if different := [
        f"{key} {pinned[key][:12]} (here {actual[key][:12]})" for key in pinned if pinned[key] != actual[key]
    ]:
        here = tool_hashes() if known_tools else {}
        changed = [key for key in sorted(known_tools.keys() | here) if known_tools.get(key) != here.get(key)]
        named = f" (schemas that differ: {', '.join(changed)})" if changed else ""
        raise ModelError(
            f"checkpoint {name!r} in {directory} was made for another suite: {', '.join(different)}{named}; "
            f"train it again, or run it unpinned as hf:{directory}"
        )
    target, adapter = str(directory), ""
    if adapter_of:
        target, adapter = _base(directory, name, adapter_of, parent), str(directory)
    return Model(
        name, "hf", target, adapter, parent, stage, sha256_json(files), str(manifest.get("description", ""))
    )


@contextmanager
def _well_formed(directory: Path) -> Iterator[None]:
    """Say what is wrong with a manifest in one line.  Raises ModelError."""
    try:
        yield
    except FileNotFoundError:
        raise ModelError(
            f"{directory} holds no {MANIFEST}: give a checkpoint directory, or hf:{directory}"
        ) from None
    except Refused as reason:
        raise ModelError(str(reason)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"broken manifest {directory / MANIFEST}: {type(error).__name__}: {error}; "
            "train or fetch the checkpoint again"
        ) from None


def _vetted(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory, whose files are there and may be looked at.  Raises ModelError."""
    with _well_formed(directory):
        if (directory / MANIFEST).is_file():
            stay_inside(directory)
            vet(directory)
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
        files = dict(manifest["files"].items())
        outside = [
            file for file in files if "/" in file or file.startswith(".") or not (directory / file).is_file()
        ]
    if outside:
        raise ModelError(
            f"manifest {directory / MANIFEST} lists {outside[0]!r}, which is not a file beside it; "
            "fetch the checkpoint again"
        )
    return manifest


def check_files(model: Model) -> None:
    """Hold the files of a model that has a manifest, and of its base, against it.  Raises ModelError.

    What is recorded of a model is what its manifest says; this is what makes it true of the weights that run.
    """
    if not model.digest:
        return
    for directory in map(Path, filter(None, (model.target, model.adapter))):
        if not (directory / MANIFEST).is_file():
            continue
        for name, digest in _vetted(directory)["files"].items():
            if file_hash(directory / name) != digest:
                raise ModelError(
                    f"{directory / name} is not the file that the manifest beside it was written for: "
                    f"fetch the checkpoint again, or run it unpinned as hf:{directory}"
                )


def _base(directory: Path, name: str, adapter_of: str, parent: str) -> str:
    """The base of an adapter: a hub name, or a folder where a checkpoint's own may be.  Raises ModelError."""
    if not adapter_of.startswith("."):
        if not HUB_NAME.fullmatch(adapter_of):
            raise ModelError(
                f"the base {adapter_of!r} of adapter {name!r} is neither a hub name nor a path like ../base"
            )
        return adapter_of
    base = (directory / adapter_of).resolve()
    homes = (directory.resolve().parent, Path.cwd(), shipped().resolve())
    if not any(base.is_relative_to(home) for home in homes):
        raise ModelError(
            f"the base of adapter {name!r} is far away: {base}; put it beside the adapter, or start where it is below"
        )
    if not base.is_dir():
        raise ModelError(
            f"the base of adapter {name!r} is missing: {base}; put it there, or train {parent!r} first"
        )
    return str(base)


def shipped() -> Path:
    """The directory of the checkpoints that ship."""
    return Path(str(resources.files("pytest_pocket.training") / "checkpoints"))


def from_checkpoints(directory: Path) -> list[Model]:
    """The models of every checkpoint in a directory."""
    return [read_manifest(path.parent) for path in sorted(directory.glob(f"*/{MANIFEST}"))]


def from_pyproject(path: Path) -> list[Model]:
    """The models of ``[tool.pocket.models.NAME]``: keys ``backend`` and ``target``, then as in :class:`Model`.

    A target or adapter that names a folder beside the file is that folder, wherever a session starts.
    """
    if not path.is_file():
        return []
    try:
        tables: Any = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not TOML: {error}") from None
    for key in ("tool", "pocket", "models"):
        tables = tables.get(key, {})
        if not isinstance(tables, dict):
            raise ModelError(f"{key!r} in {path} is no table: write [tool.pocket.models.NAME]")
    models = []
    for name, table in tables.items():
        if not isinstance(table, dict) or not all(
            isinstance(value, dict if key == "options" else str) for key, value in table.items()
        ):
            raise ModelError(
                f"[tool.pocket.models.{name}] in {path}: give each key a string, options a table"
            )
        try:
            models.append(Model(name=name, **{**table, **_beside(path.parent, table)}))
        except TypeError:
            keys = [each.name for each in fields(Model) if each.name != "name"]
            unknown = [key for key in table if key not in keys]
            problem = (
                f"unknown key {unknown[0]!r}: choose from {', '.join(keys)}" if unknown else "give a backend"
            )
            raise ModelError(f"[tool.pocket.models.{name}] in {path}: {problem}") from None
    return models


def _beside(folder: Path, table: Mapping[str, Any]) -> dict[str, str]:
    """Those of a model's directories that are given from a folder, from here."""
    keys = ("target", "adapter") if table.get("backend") in ("hf", "vllm") else ()
    given = {key: table[key] for key in keys if table.get(key)}
    return {key: os.path.relpath(folder / name) for key, name in given.items() if (folder / name).is_dir()}


LOCAL = ("oracle", "noop")
"""Backends that cost nothing, take no target, and run in each worker."""
SCRIPTED = (
    Model("oracle", "oracle", description="solves every task by its own solution: the suite's upper bound"),
    Model("noop", "noop", description="answers without acting: the suite's lower bound"),
)


def _hf(model: Model) -> Backend:
    from pytest_pocket.backends.hf import HFBackend

    # It imports torch and friends as it loads.
    with extra("hf"):
        return HFBackend(model.target, adapter=model.adapter or None, **model.options)


def _openai(model: Model) -> Backend:
    with extra("openai"):
        from pytest_pocket.backends.openai import OpenAIBackend, parse_target

    name, url = parse_target(model.target)
    return OpenAIBackend(name, **{"base_url": url, **model.options})


def _ollama(model: Model) -> Backend:
    with extra("ollama"):
        from pytest_pocket.backends.ollama import OllamaBackend

    return OllamaBackend(model.target, **model.options)


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Say which extra brings a package that is missing.  Raises ModelError."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModelError(
            f"the package {error.name!r} is missing: pip install 'pytest-pocket[{name}]'"
        ) from None


def _oracle(model: Model) -> Backend:
    from pytest_pocket.backends.scripted import OracleBackend

    return OracleBackend()


def _noop(model: Model) -> Backend:
    from pytest_pocket.backends.scripted import NoopBackend

    return NoopBackend()


def _installed() -> dict[str, Factory]:
    """The backends that other packages bring, by the entry points ``pytest_pocket.backends``."""

    def factory(entry: EntryPoint) -> Factory:
        return lambda model: entry.load()(model)

    return {entry.name: factory(entry) for entry in entry_points(group="pytest_pocket.backends")}


class Registry:
    """All models and backends that one session knows.  A later registration of a name replaces an earlier one."""

    def __init__(self, models: Iterable[Model] = (), backends: Mapping[str, Factory] = {}) -> None:
        self.backends: dict[str, Factory] = {
            "hf": _hf,
            "vllm": self._vllm,
            "ollama": _ollama,
            "openai": _openai,
            "oracle": _oracle,
            "noop": _noop,
            **_installed(),
            **backends,
        }
        self.added = dict(backends)
        self._asked: dict[str, Model] = {}
        self.models = {model.name: model for model in (*SCRIPTED, *from_checkpoints(shipped()), *models)}

    def resolve(self, name: str) -> Model:
        """The model of a registered name, of ``BACKEND:TARGET``, or of a checkpoint directory.

        A target that is itself a checkpoint of ours is that checkpoint, served by the other engine.  Raises
        ModelError that names the models there are.
        """
        model = self._found(name)
        self._asked[name] = model
        return model

    def _found(self, name: str) -> Model:
        if model := self.models.get(name):
            return self._known(model)
        backend, colon, target = name.partition(":")
        if colon and backend in self.backends.keys() - LOCAL and target:
            return self._served(name, backend, target)
        if (Path(name) / MANIFEST).is_file():
            return self._known(read_manifest(Path(name)))
        if (Path(name) / "config.json").is_file():
            raise ModelError(f"the folder {name!r} holds no {MANIFEST}: write hf:{name}")
        raise ModelError(
            f"unknown model {name!r}: choose from {', '.join(self.models)}, "
            f"or write {', '.join(f'{backend}:...' for backend in self.backends if backend not in LOCAL)}"
        )

    def build(self, model: Model) -> Backend:
        """The engine of a model, loaded.  Raises ModelError."""
        check_files(model)
        return self.backends[model.backend](model)

    def _served(self, name: str, backend: str, target: str) -> Model:
        """A model written as BACKEND:TARGET."""
        if backend not in ("vllm", "ollama", "openai"):
            return Model(name, backend, target)
        served = target.partition("@")[0] if backend == "openai" else target
        checkpoint = self.models.get(served)
        if checkpoint is None and (Path(served) / MANIFEST).is_file():
            checkpoint = read_manifest(Path(served))
        if checkpoint is None or checkpoint.backend != "hf":
            return Model(name, backend, target)
        if backend == "vllm":
            # The very files: what they are is known.  Another engine's copy only bears the name.
            options = {"served": checkpoint.name, "reference": checkpoint.target}
            return replace(checkpoint, name=name, backend=backend, options=options)
        return Model(
            name,
            backend,
            target,
            parent=checkpoint.parent,
            stage=checkpoint.stage,
            description=checkpoint.description,
            options={"reference": checkpoint.target},
        )

    def _vllm(self, model: Model) -> Backend:
        with extra("vllm"):
            from pytest_pocket.backends import vllm

        siblings = [each for each in self._asked.values() if each.backend == "vllm"]
        return vllm.build(model, siblings or [model])

    def _known(self, model: Model) -> Model:
        if model.backend not in self.backends:
            raise ModelError(
                f"model {model.name!r} wants the backend {model.backend!r}: choose from {', '.join(self.backends)}"
            )
        if not model.target and model.backend in ("hf", "vllm", "ollama", "openai"):
            raise ModelError(f"model {model.name!r} has no target: say what {model.backend} is to load")
        return model
