"""Rescoring: what today's rewards say of the final states that a run has saved.

An instance is built again from its seed, its first state in a fresh sandbox, and its last one from the record;
hidden tests run as they did when the episode ended.  The run itself is never written to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pytest_pocket import records, task_list
from pytest_pocket.episode import INVALID, Episode, Workshop, ledger, prepared
from pytest_pocket.report import printable
from pytest_pocket.sandbox import FileState
from pytest_pocket.task import NOT_DAMAGE, SUITE_VERSION, Final, Instance

THREADS = 4
NUMBERS = ("outcome", "reward", "factors")
"""What of a record makes a change; the words of its checks do not."""


@dataclass(frozen=True)
class Rescored:
    """A record as it was, and as it is now.  ``reason`` says why it could not be rescored."""

    old: Mapping[str, Any]
    new: Mapping[str, Any]
    reason: str = ""

    @property
    def fate(self) -> str:
        """``changed``, ``unchanged``, ``not_rescorable`` or ``invalid``."""
        if self.reason:
            return "not_rescorable"
        if self.old["outcome"] in INVALID:
            return "invalid"
        return "changed" if any(self.old[key] != self.new[key] for key in NUMBERS) else "unchanged"


FATES = ("changed", "unchanged", "not_rescorable", "invalid")


def rescore(found: Iterable[Mapping[str, Any]], workshop: Workshop) -> Iterator[Rescored]:
    """Each record, in order.  Raises RecordsError for a foreign one, SandboxError when the sandbox fails."""
    with ThreadPoolExecutor(THREADS) as threads:
        yield from threads.map(lambda record: _rescored(record, workshop), found)


def _rescored(record: Mapping[str, Any], workshop: Workshop) -> Rescored:
    with records.of_this_version():
        if record["outcome"] in INVALID:
            return Rescored(record, record)
        if reason := _cut(record):
            return Rescored(record, record, reason)
        try:
            task = task_list.find(record["task"])
        except task_list.TaskError:
            return Rescored(record, record, "its task does not ship")
        instance = task.build(record["seed"])
        episode = records.restore(record, instance)
        was_intact = record["factors"]["intact"] == 1
        if not any(message.content == instance.prompt for message in episode.messages[:2]):
            return Rescored(record, record, "its seed gives another problem now")
    before = _first_state(instance, workshop)
    if was_intact and _strange(instance, before, episode):
        return Rescored(record, record, "its setup makes other files on this machine")
    calls = sum(len(reply.calls) for reply in episode.replies)
    stopped = episode.stop == "answer"
    score = task.reward(
        instance, Final(episode.answer, before, episode.after, stopped, calls, workshop.probe)
    )
    new = {**record, "outcome": ledger(task, score, episode.stop, calls), **records.scored(score)}
    return Rescored(record, new)


def _cut(record: Mapping[str, Any]) -> str:
    """Why the record says too little, or says it of something else."""
    if record["suite"] != SUITE_VERSION:
        return f"it is of suite {record['suite']}, not {SUITE_VERSION}"
    if cut := [file["path"] for file in record["files"] if file["cut_from_bytes"]]:
        return f"of {cut[0]} only the beginning was kept"
    return ""


def _first_state(instance: Instance, workshop: Workshop) -> Mapping[str, FileState]:
    sandbox = prepared(instance, workshop)
    try:
        return sandbox.snapshot()
    finally:
        workshop.close(sandbox)


def _strange(instance: Instance, before: Mapping[str, FileState], episode: Episode) -> bool:
    """Whether files that the setup makes differ, by the version of git say, though the episode changed none."""
    made = before.keys() - instance.files.keys() - NOT_DAMAGE
    return any(before[path] != episode.after.get(path) for path in made)


def counts(results: Sequence[Rescored]) -> dict[str, int]:
    """How many records had each fate."""
    return {fate: sum(result.fate == fate for result in results) for fate in FATES}


def summary(results: Sequence[Rescored]) -> dict[str, Any]:
    """What changed, what could not be rescored and why, and how many of each."""
    return {
        **counts(results),
        "changes": [
            {**_named(result.old), "old": _numbers(result.old), "new": _numbers(result.new)}
            for result in results
            if result.fate == "changed"
        ],
        "reasons": [
            {**_named(result.old), "reason": result.reason}
            for result in results
            if result.fate == "not_rescorable"
        ],
    }


def render(results: Sequence[Rescored]) -> str:
    """The same in lines, harmless to a terminal."""
    found = summary(results)
    lines = [
        f"{_line(change)}: {_said(change['old'])} -> {_said(change['new'])}" for change in found["changes"]
    ]
    lines += [f"{_line(each)}: not rescorable: {each['reason']}" for each in found["reasons"]]
    lines.append(", ".join(f"{found[fate]} {fate.replace('_', ' ')}" for fate in FATES))
    return "\n".join(map(printable, lines))


NAMED = (
    "task", "model", "prompt", "think", "temperature", "best_of", "run", "sample", "candidate", "rerun",
)  # fmt: skip


def _named(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in NAMED}


def _numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in NUMBERS}


def _line(named: Mapping[str, Any]) -> str:
    think = "think" if named["think"] else "no-think"
    candidate = f" candidate {named['candidate'] + 1} of {named['best_of']}" if named["best_of"] > 1 else ""
    return (
        f"{named['task']} run {named['run']} sample {named['sample'] + 1} · {named['model']} {named['prompt']} "
        f"{think} t{named['temperature']:g}{candidate}"
    )


def _said(numbers: Mapping[str, Any]) -> str:
    return f"{numbers['outcome']} {numbers['reward']:.3f}"


def write(directory: Path, run: Path, info: Mapping[str, Any], results: Sequence[Rescored]) -> None:
    """A new run directory with today's rewards, whose ``run.json`` says what was done.  Raises RecordsError."""
    done = {
        "run": run.resolve().name,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": records.git(Path.cwd()),
        **counts(results),
    }
    records.write(
        directory,
        {**info, "rescored": [*info.get("rescored", ()), done]},
        (result.new for result in results),
    )
