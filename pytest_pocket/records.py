"""Records: the run directory, which outlives the session and is the source of every number shown.

``run.json`` says what was run and where; ``episodes.jsonl`` holds one line an episode, appended as episodes
finish, so that a killed session loses nothing that had finished.  Several processes (pytest-xdist) and
threads append to one file: each append is one write under a lock.  A line holds everything that is needed
to score the episode again, to read its trajectory, to resume the run, and to train on it.

A field has one type in every record, and no field is named by a model or an engine, so that records load as
a table: what has no shape of its own (the arguments of a call, an engine's evidence) is JSON text.  The shape
is published in ``pytest_pocket/schema``.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pytest_pocket.chat import ChatReply, Message, ToolCall
from pytest_pocket.conditions import Condition
from pytest_pocket.episode import INVALID, Episode
from pytest_pocket.sandbox import FileState
from pytest_pocket.task import SUITE_VERSION, Check, Instance, Score

if TYPE_CHECKING:
    from pytest_pocket.registry import Model

SCHEMA = 1
RUN = "run.json"
EPISODES = "episodes.jsonl"
RUNS = Path(".pocket", "runs")
FILE_BYTES = 64 * 2**10
"""How much of one final file is kept."""
EPISODE_BYTES = 512 * 2**10
"""How much of all final files of one episode is kept."""
LOCK_SECONDS = 3.0
NESTING = 40
KEPT = ("prompt_tokens", "completion_tokens", "finish", "malformed", "truncated", "logprob")
"""What is recorded of a reply beside its message."""
FACTORS = ("outcome", "stopped", "intact")
"""Whose product is the reward."""
SURROGATE = re.compile(r"\\ud[89a-f]")
PACKAGES = ("pytest", "pytest-xdist", "torch", "transformers", "peft", "tokenizers", "vllm")
SECRET = re.compile(r"api.?key|token$|password|passwd|secret|credential|authorization", re.IGNORECASE)
URL_USER = re.compile(r"(?<=://)[^/\s@]*@")
URL_QUERY = re.compile(r"(?<=[?&])([^=&\s]*(?:key|token|pass|secret|sig)[^=&\s]*)=[^&#\s]*", re.IGNORECASE)


class RecordsError(Exception):
    """A run directory that cannot be written or read, said in one line: what, the value, what to do."""


class Cell(Protocol):
    """Where an attempt stands in the run: which instance, which repeat on it."""

    @property
    def run(self) -> int:
        """The run, from 1: which evaluation instance of the task."""
        ...

    @property
    def sample(self) -> int:
        """The repeat on that instance."""
        ...


@dataclass(frozen=True)
class Run:
    """A run directory to which episodes are appended, from any thread or process.

    ``lock`` is the descriptor by which the session that owns it keeps other sessions out; ``made`` are the files
    and folders that were made for it, inner ones first.
    """

    directory: Path
    lock: int | None = None
    made: tuple[Path, ...] = ()

    def close(self) -> None:
        """Let another session have the directory.  The kernel does so too, however this process ends."""
        if self.lock is not None:
            os.close(self.lock)

    def discard(self) -> bool:
        """Close it, and take back what was made for it, if nothing was ever appended.  Says whether that was so."""
        if not self.made or (self.directory / EPISODES).stat().st_size:
            return False
        for path in self.made:
            # A folder may hold another's by now.
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        self.close()
        return True

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line, whole or not at all.  Raises RecordsError."""
        line = to_line(record)
        path = self.directory / EPISODES
        try:
            with _locked(path) as file:
                end = _end_of_last_line(file)
                try:
                    _write(file, line)
                except OSError:
                    os.ftruncate(file, end)
                    raise
        except OSError as error:
            raise _unwritable(path, error) from error


def check(directory: Path | None) -> None:
    """Raise RecordsError where ``start`` plainly would, before anything is made: engines take minutes to load."""
    wanted = Path(os.path.abspath(directory or RUNS))
    there = next(folder for folder in (wanted, *wanted.parents) if os.path.lexists(folder))
    try:
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if directory:
            _check_unused(wanted)
    except OSError as error:
        raise _unwritable(wanted, error) from error


def _check_unused(directory: Path) -> None:
    episodes = directory / EPISODES
    if episodes.exists() and episodes.stat().st_size:
        raise RecordsError(
            f"{directory} already holds a run: give --pocket-records another folder, or add --pocket-resume"
        )


def start(directory: Path | None, info: Mapping[str, Any]) -> Run:
    """Make a run directory and write its ``run.json``.  Raises RecordsError, and then leaves no ``run.json``.

    Without a directory, one is made under ``.pocket/runs``, named by the time (UTC) and a random part.
    """
    if directory is None:
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        directory = RUNS / f"{now}-{secrets.token_hex(3)}"
    directory = Path(os.path.abspath(directory))
    wanted = (directory / EPISODES, directory / RUN, directory, *directory.parents)
    missing = tuple(path for path in wanted if not path.exists())
    run = replace(_own(directory), made=missing)
    try:
        _check_unused(directory)
        (directory / EPISODES).touch()
        _replace(directory / RUN, to_line(info, indent=2))
    except OSError as error:
        run.close()
        raise _unwritable(directory, error) from error
    except RecordsError:
        run.close()
        raise
    return run


def resume(directory: Path, info: Mapping[str, Any], *, force: bool = False) -> Run:
    """Go on with a run, or start it.  Raises RecordsError when what ``info`` says would make other numbers.

    With ``force`` the run goes on all the same; ``run.json`` then says what had changed.
    """
    directory = Path(os.path.abspath(directory))
    if not (directory / RUN).is_file():
        return start(directory, info)
    run = _own(directory)
    try:
        old, _ = load(directory)
        changed = differences(old, info)
        if changed and not force:
            raise RecordsError(
                f"cannot resume {directory}: {'; '.join(changed)}. Start anew, or note it with --pocket-resume=force"
            )
        again = {"started": info["started"], "command": info["command"], "changed": changed}
        merged = {
            **old,
            "options": info["options"],
            "models": {**old["models"], **info["models"]},
            "resumed": [*old.get("resumed", ()), again],
        }
        _replace(directory / RUN, to_line(merged, indent=2))
    except OSError as error:
        run.close()
        raise _unwritable(directory, error) from error
    except RecordsError:
        run.close()
        raise
    return run


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What makes the numbers of two sessions differ, in words; models that only one of them has do not."""
    sides = [_determinants(info) for info in (old, new)]
    shared = sides[0].keys() & sides[1].keys()
    return [
        f"{name} was {_short(sides[0][name])} and is {_short(sides[1][name])}"
        for name in sides[1]
        if name in shared and sides[0][name] != sides[1][name]
    ]


def _determinants(info: Mapping[str, Any]) -> dict[str, Any]:
    options = info.get("options", {})
    found = {
        "the suite's version": info.get("suite"),
        "the seed": info.get("seed"),
        "the split": options.get("split"),
        "the budget": options.get("budget"),
        "the tool set": info.get("tools_sha256"),
        "the commit": info.get("git", {}).get("commit"),
    }
    for name, model in info.get("models", {}).items():
        found[f"the digest of model {name}"] = model.get("digest")
        found[f"the template of model {name}"] = model.get("template_sha256")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


CellKey = tuple[str, str, str, bool, float, int, int, int]
"""Task, model, prompt, think, temperature, best-of, run, sample."""


def by_cell(found: Iterable[Mapping[str, Any]]) -> dict[CellKey, list[Mapping[str, Any]]]:
    """All records of each cell, in their order.  Raises KeyError for a foreign one."""
    cells: dict[CellKey, list[Mapping[str, Any]]] = {}
    for each in found:
        key = (
            each["task"],
            each["model"],
            each["prompt"],
            each["think"],
            each["temperature"],
            each["best_of"],
            each["run"],
            each["sample"],
        )
        cells.setdefault(key, []).append(each)
    return cells


def last_attempt(found: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The candidates, in their order, of the last attempt at a cell; none unless it is whole and valid."""
    candidates: dict[int, Mapping[str, Any]] = {}
    for each in found:
        if each["candidate"] == 0:
            candidates = {}  # a rerun: what was played before no longer counts
        candidates[each["candidate"]] = each
    whole = all(candidates.keys() == set(range(each["best_of"])) for each in candidates.values())
    valid = all(each["outcome"] not in INVALID for each in candidates.values() if each["chosen"])
    return [candidates[number] for number in sorted(candidates)] if whole and valid else []


def finished(directory: Path) -> dict[CellKey, list[Mapping[str, Any]]]:
    """The valid attempts that a run holds, by cell: the records of all candidates, in their order."""
    with of_this_version(f"a record in {directory}"):
        cells = by_cell(load(directory)[1])
        return {key: attempt for key, found in cells.items() if (attempt := last_attempt(found))}


def _own(directory: Path) -> Run:
    """The directory, made if need be, and held against other sessions.  Raises RecordsError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = _lock(directory, fcntl.LOCK_EX)
        # Shared from now on, with this session's own workers: as long as one of them lives, it may still write.
        fcntl.flock(lock, fcntl.LOCK_SH)
    except OSError as error:
        raise _unwritable(directory, error) from error
    return Run(directory, lock)


def _lock(directory: Path, kind: int) -> int:
    """A descriptor that holds the directory, for as long as any process has it open.

    The workers of a killed session need a moment to end, so a lock is waited for a little.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise RecordsError(
                    f"another session is writing to {directory}: wait for its end, or choose another --pocket-records"
                ) from None
            time.sleep(0.1)


def write(directory: Path, info: Mapping[str, Any], found: Iterable[Mapping[str, Any]]) -> None:
    """A whole run at once, made of others, in a directory that is new or empty.  Raises RecordsError."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RecordsError(f"{directory} exists: give -o a new directory")
    run = start(directory, info)
    try:
        for each in found:
            run.append(each)
    finally:
        run.close()


def join(directory: Path) -> Run:
    """The run that another process, the controller, has started.  Raises RecordsError."""
    _check_run(directory)
    return Run(directory, _lock(directory, fcntl.LOCK_SH))


def _check_run(directory: Path) -> None:
    if not (directory / RUN).is_file():
        raise RecordsError(f"{directory} holds no {RUN}: give the directory of a run")


@dataclass(frozen=True)
class Recorded:
    """A run that was read: a name for it, its ``run.json`` and its records."""

    name: str
    info: Mapping[str, Any]
    found: Sequence[Mapping[str, Any]]


def load(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a run directory holds: ``run.json`` and the episodes.  Raises RecordsError.

    A torn last line, as a killed session may leave it, is passed over.
    """
    _check_run(directory)
    info = _object(directory / RUN, 1, _read(directory / RUN))
    path = directory / EPISODES
    lines = _read(path).split(b"\n") if path.exists() else [b""]
    return info, [_object(path, number, line) for number, line in enumerate(lines[:-1], 1) if line.strip()]


def in_order(info: Mapping[str, Any], found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of a run, its models in the order in which they were asked for, else as they were played."""
    asked = list(info.get("options", {}).get("models", ()))
    places = {model: place for place, model in enumerate(asked)}
    return sorted(found, key=lambda each: places.get(each.get("model"), len(asked)))


def record(
    *,
    cell: Cell,
    model: Model,
    episode: Episode,
    split: str,
    group: str,
    chosen: bool = True,
    candidate: int = 0,
    rerun: int = 0,
) -> dict[str, Any]:
    """The record of an episode that has just ended.

    With best-of-N every candidate has a record, numbered by ``candidate``; the one that was picked is
    ``chosen``.  ``rerun`` counts how often the session had played the cell before.
    """
    instance, condition, score = episode.instance, episode.condition, episode.score
    started = datetime.fromtimestamp(time.time() - episode.seconds, UTC)
    return {
        "schema": SCHEMA,
        "suite": SUITE_VERSION,
        "task": instance.task,
        "group": group,
        "model": model.name,
        "backend": model.backend,
        "prompt": condition.prompt,
        "think": condition.think,
        "temperature": condition.temperature,
        "best_of": condition.best_of,
        "split": split,
        "run": cell.run,
        "seed": instance.seed,
        "unseen": list(instance.unseen),
        "sample": cell.sample,
        "candidate": candidate,
        "chosen": chosen,
        "rerun": rerun,
        "outcome": episode.outcome,
        "stop": episode.stop,
        "detail": episode.detail,
        **scored(score),
        "answer": episode.answer,
        "messages": list(map(spoken, episode.messages)),
        "replies": _replies(episode.replies),
        "files": _files(episode.after),
        "started": started.isoformat(timespec="milliseconds"),
        "seconds": round(episode.seconds, 6),
    }


def scored(score: Score | None) -> dict[str, Any]:
    """What a record says of a score; all of it is None, and ``checks`` empty, when the episode is invalid."""
    if score is None:
        return {"reward": None, "passed": None, "factors": None, "checks": []}
    return {
        "reward": float(score.reward),
        "passed": score.passed,
        "factors": {name: float(getattr(score, name)) for name in FACTORS},
        "checks": [
            {"name": check.name, "value": float(check.value), "detail": str(check.detail)}
            for check in score.checks
        ],
    }


def restore(record: Mapping[str, Any], instance: Instance) -> Episode:
    """The episode of a record: all that scores, reports and training ask of it.  Raises RecordsError."""
    with of_this_version():
        return _restored(record, instance)


@contextlib.contextmanager
def of_this_version(what: str = "a record") -> Iterator[None]:
    """Turn what goes wrong in reading something foreign into a RecordsError that says what it lacks."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RecordsError(
            f"{what} is not of this version ({type(error).__name__}: {error}): update pytest-pocket, or record anew"
        ) from error


def _restored(record: Mapping[str, Any], instance: Instance) -> Episode:
    said = messages(record)
    score = record["factors"] and Score(
        tuple(Check(**check) for check in record["checks"]), **record["factors"]
    )
    return Episode(
        instance=instance,
        condition=Condition(record["prompt"], record["think"], record["temperature"], record["best_of"]),
        messages=said,
        replies=tuple(
            ChatReply(
                content=message.content,
                thinking=message.thinking,
                calls=message.calls,
                **{key: reply[key] for key in KEPT},
                evidence=json.loads(reply["evidence"]),
            )
            for message, reply in zip(
                (message for message in said if message.role == "assistant"), record["replies"], strict=True
            )
        ),
        outcome=record["outcome"],
        stop=record["stop"],
        score=score,
        answer=record["answer"],
        after=files(record),
        seconds=record["seconds"],
        detail=record["detail"],
    )


def messages(record: Mapping[str, Any]) -> tuple[Message, ...]:
    """The conversation of a record."""
    return tuple(
        Message(
            said["role"],
            said["content"],
            thinking=said["reasoning_content"],
            calls=tuple(
                ToolCall(call["function"]["name"], json.loads(call["function"]["arguments"]))
                for call in said["tool_calls"]
            ),
            name=said["name"],
        )
        for said in record["messages"]
    )


def files(record: Mapping[str, Any]) -> dict[str, FileState]:
    """The final workspace of a record, by path; see ``cut_from_bytes`` for files of which only a part was kept."""
    return {
        data["path"]: FileState(
            data["kind"],
            base64.b64decode(data["content"]) if data["encoding"] == "base64" else data["content"].encode(),
            data["executable"],
        )
        for data in record["files"]
    }


def describe(
    *,
    command: Sequence[str],
    models: Iterable[Model],
    seed: int,
    options: Mapping[str, Any],
    directory: Path | None = None,
) -> dict[str, Any]:
    """What ``run.json`` says of a session: enough to repeat it, nothing of the environment, no secrets.

    ``directory`` is where the project lies whose commit is noted; the current one if not given.
    """
    from pytest_pocket import __version__
    from pytest_pocket.registry import tools_hash

    info: dict[str, Any] = {
        "schema": SCHEMA,
        "suite": SUITE_VERSION,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [os.path.basename(command[0]), *command[1:]] if command else [],
        "options": dict(options),
        "seed": seed,
        "tools_sha256": tools_hash(),
        "models": {model.name: _model(model) for model in models},
        "git": git(directory or Path.cwd()),
        "versions": {"pytest-pocket": __version__, "python": platform.python_version(), **_versions()},
        "hardware": _hardware(),
    }
    cleaned: dict[str, Any] = without_secrets(info)
    return cleaned


def without_secrets(value: Any) -> Any:
    """The same data, less what looks like a credential: by its key, by an option's name, or inside a URL."""
    if isinstance(value, Mapping):
        return {
            key: "***" if SECRET.search(str(key)) and isinstance(item, str) else without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [
            "***" if _names_secret(before) else without_secrets(item)
            for before, item in zip(["", *value], value, strict=False)
        ]
    if isinstance(value, str):
        name, equals, _ = value.partition("=")
        if equals and _names_secret(name):
            return f"{name}=***"
        return URL_QUERY.sub(r"\1=***", URL_USER.sub("***@", value))
    return value


def to_line(data: Mapping[str, Any], indent: int | None = None) -> bytes:
    """Strict JSON in ASCII, whatever the strings hold, and a newline.

    A lone surrogate becomes U+FFFD: Python's is the only JSON reader that takes one.
    """
    text = _dumps(data, indent)
    if SURROGATE.search(text):
        text = json.dumps(_unicode(json.loads(text)), indent=indent)
    return text.encode("ascii") + b"\n"


def _dumps(data: Any, indent: int | None = None) -> str:
    # From Python 3.12 on, json writes what an older one cannot read back.
    if not _too_deep(data):
        with contextlib.suppress(TypeError, ValueError):
            return json.dumps(data, allow_nan=False, indent=indent)
    return json.dumps(_plain(data), allow_nan=False, indent=indent)


def _too_deep(value: Any, depth: int = 0) -> bool:
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return False
    return depth > NESTING or any(_too_deep(item, depth + 1) for item in value)


def _plain(value: Any, depth: int = 0) -> Any:
    """The nearest JSON value: what a model wrote as an argument may be NaN, or nested without end."""
    if depth > NESTING:
        return "[nested too deeply]"
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth + 1) for item in value]
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _unicode(value: Any) -> Any:
    """The same JSON value without lone surrogates."""
    if isinstance(value, dict):
        return {_unicode(key): _unicode(item) for key, item in value.items()}
    if isinstance(value, list):
        return list(map(_unicode, value))
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return value


def token_ids(record: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """The prompt's and the completion's token ids of each reply, from engines that give them."""
    found: list[tuple[list[int], list[int]]] = []
    for reply in record["replies"]:
        if reply["completion_ids"]:
            before = [*found[-1][0], *found[-1][1]] if found else []
            prompt = before[: reply["prompt_ids_shared"]] + reply["prompt_ids"]
            found.append((prompt, reply["completion_ids"]))
    return found


def _replies(replies: Iterable[ChatReply]) -> list[dict[str, Any]]:
    """What engines said of each reply.  Of a prompt's ids only those are kept that were not there a turn before."""
    found = []
    before: tuple[int, ...] = ()
    for reply in replies:
        data: dict[str, Any] = {key: getattr(reply, key) for key in KEPT}
        data["evidence"] = _dumps(dict(reply.evidence))
        shared = 0
        prompt: Sequence[int] = ()
        if reply.completion_ids:
            shared = len(os.path.commonprefix([before, reply.prompt_ids]))  # noqa: RUF071 - of tuples
            prompt = reply.prompt_ids[shared:]
            before = reply.prompt_ids + reply.completion_ids
        data["prompt_ids_shared"] = shared
        data["prompt_ids"] = list(prompt)
        data["completion_ids"] = list(reply.completion_ids)
        found.append(data)
    return found


def spoken(message: Message) -> dict[str, Any]:
    """A message in the OpenAI shape, every key in its place."""
    return {
        "role": message.role,
        "content": message.content,
        "reasoning_content": message.thinking,
        "tool_calls": [
            {"type": "function", "function": {"name": call.name, "arguments": _dumps(dict(call.arguments))}}
            for call in message.calls
        ],
        "name": message.name,
    }


def _files(states: Mapping[str, FileState]) -> list[dict[str, Any]]:
    """The final workspace.  A file over the caps keeps its beginning, and says how long it was (else 0)."""
    found = []
    room = EPISODE_BYTES
    for path, state in sorted(states.items()):
        kept = state.content[: min(FILE_BYTES, room)]
        room -= len(kept)
        try:
            encoding, content = "utf-8", kept.decode()
        except UnicodeDecodeError:
            encoding, content = "base64", base64.b64encode(kept).decode()
        found.append(
            {
                "path": path,
                "kind": state.kind,
                "encoding": encoding,
                "content": content,
                "cut_from_bytes": len(state.content) if len(kept) < len(state.content) else 0,
                "executable": state.executable,
            }
        )
    return found


def _model(model: Model) -> dict[str, Any]:
    from pytest_pocket.registry import file_hash

    template = Path(model.target, "chat_template.jinja") if model.target else None
    return {
        "backend": model.backend,
        "target": _portable(model.target),
        "adapter": _portable(model.adapter),
        "parent": model.parent,
        "stage": model.stage,
        "digest": model.digest,
        "template_sha256": file_hash(template) if template and template.is_file() else "",
        "options": dict(model.options),
    }


def _portable(target: str) -> str:
    """A target without the folders of this machine: the digest says which weights, and runs are published."""
    return Path(target).name if Path(target).is_absolute() else target


def git(directory: Path) -> dict[str, Any]:
    """The commit of the project, and whether the working tree differs from it; empty outside a repository."""

    def ask(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(directory), *words]
        done = subprocess.run(command, capture_output=True, timeout=10, check=True)
        return done.stdout.decode(errors="replace").strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _hardware() -> dict[str, Any]:
    hardware: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    with contextlib.suppress(ValueError, OSError):
        hardware["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Importing torch takes seconds, so a GPU is named only where an engine has imported it already.
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        hardware["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return hardware


def _cpu() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def _names_secret(word: Any) -> bool:
    """Whether a word of a command line is an option whose value is a credential."""
    return isinstance(word, str) and word.startswith("-") and bool(SECRET.search(word)) and "=" not in word


def _unwritable(path: Path, error: OSError) -> RecordsError:
    reason = error.strerror or str(error)
    return RecordsError(f"cannot write records to {path}: {reason}; choose another --pocket-records")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file, open for reading and appending, held by no other thread or process."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def _end_of_last_line(file: int) -> int:
    """The size of the file, once a torn last line, which a killed writer left, is cut off."""
    end = os.fstat(file).st_size
    if end == 0 or os.pread(file, 1, end - 1) == b"\n":
        return end
    end = os.pread(file, end, 0).rfind(b"\n") + 1
    os.ftruncate(file, end)
    return end


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(data)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecordsError(f"cannot read {path}: {error.strerror or error}") from error


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise RecordsError(f"line {number} of {path} is not JSON ({error}): mend or remove it") from None
    if not isinstance(value, dict):
        raise RecordsError(f"line {number} of {path} holds a {type(value).__name__}, no record: remove it")
    schema = value.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise RecordsError(
            f"{path} is of schema {schema}, and this version reads up to {SCHEMA}: update pytest-pocket"
        )
    return value
