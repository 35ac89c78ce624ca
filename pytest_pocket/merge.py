"""Merging: the runs of several shards, sessions or machines, joined to one.

Only runs that would have given the same numbers are joined.  Of one cell, an attempt that is invalid gives way
to one that is not, and two valid ones that differ are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any

from pytest_pocket import records

Record = Mapping[str, Any]


class MergeError(Exception):
    """Runs that cannot be joined, said in one line."""


@dataclass(frozen=True)
class Part:
    """A run to be joined: its directory, its ``run.json`` and its episodes."""

    directory: Path
    info: Mapping[str, Any]
    found: Sequence[Record]


@dataclass(frozen=True)
class Merged:
    """A joined run, how many records were left out, by reason, and which shards of it were not given."""

    info: Mapping[str, Any]
    found: Sequence[Record]
    left_out: Mapping[str, int]
    missing: Sequence[str]


def merge(parts: Sequence[Part]) -> Merged:
    """The joined run.  Raises MergeError, or RecordsError for a foreign record."""
    for one, other in combinations(parts, 2):
        with records.of_this_version(f"{one.directory / records.RUN} or {other.directory / records.RUN}"):
            changed = records.differences(one.info, other.info)
        if changed:
            raise MergeError(f"cannot merge {one.directory} and {other.directory}: {'; '.join(changed)}")
    taken: dict[records.CellKey, tuple[Part, list[Record]]] = {}
    left_out = {"duplicate": 0, "invalid": 0}
    for part in parts:
        with records.of_this_version(f"a record in {part.directory}"):
            _take(part, taken, left_out)
    counts = {
        index: sum(len(kept) for owner, kept in taken.values() if owner is part)
        for index, part in enumerate(parts)
    }
    found = list(chain.from_iterable(kept for _, kept in taken.values()))
    with records.of_this_version(" or ".join(str(part.directory / records.RUN) for part in parts)):
        return Merged(_info(parts, counts), found, left_out, _missing(parts))


def _take(
    part: Part, taken: dict[records.CellKey, tuple[Part, list[Record]]], left_out: dict[str, int]
) -> None:
    for key, attempts in records.by_cell(part.found).items():
        if key not in taken:
            taken[key] = part, attempts
            continue
        before, known = taken[key]
        reason, kept = _one_of(known, attempts)
        if kept is None:
            raise MergeError(
                f"{before.directory} and {part.directory} hold different episodes of {_named(key)}: "
                "leave one of the runs out"
            )
        left_out[reason] += len(known if kept is attempts else attempts)
        taken[key] = (part if kept is attempts else before), kept


def _one_of(known: list[Record], new: list[Record]) -> tuple[str, list[Record] | None]:
    """Which of two histories of a cell is kept, and why the other is not; None when both count."""
    if known == new:
        return "duplicate", known
    finished = [bool(records.last_attempt(each)) for each in (known, new)]
    if all(finished):
        return "", None
    return "invalid", new if finished[1] else known


def _missing(parts: Sequence[Part]) -> list[str]:
    """The shards that complete those which were given; none where a part is no shard of as many."""
    shards = [part.info["options"].get("shard") for part in parts]
    counts = {shard["count"] if shard else 1 for shard in shards}
    if len(counts) > 1:
        return []
    (count,) = counts
    given = {shard["index"] for shard in shards if shard} or {1}
    return [f"{index}/{count}" for index in range(1, count + 1) if index not in given]


def _info(parts: Sequence[Part], counts: Mapping[int, int]) -> dict[str, Any]:
    """What ``run.json`` says of a joined run: what the parts have in common, and each part."""
    infos = [part.info for part in parts]
    options = [info["options"] for info in infos]
    conditions = list(chain.from_iterable(each["conditions"] for each in options))
    models: dict[str, Any] = {}
    for info in infos:
        models.update(info["models"])
    said = ("started", "command", "git", "versions", "hardware")
    return {
        **{key: value for key, value in infos[0].items() if key not in ("resumed", "rescored")},
        "started": min(info["started"] for info in infos),
        "command": ["pocket", "merge", *(_name(part) for part in parts)],
        "options": {
            **options[0],
            "models": list(models),
            "conditions": [each for index, each in enumerate(conditions) if each not in conditions[:index]],
            "runs": max(each["runs"] for each in options),
            "samples": max(each["samples"] for each in options),
            "shard": None,
        },
        "models": models,
        "merged": [
            {
                "run": _name(part),
                "episodes": counts[index],
                "shard": part.info["options"].get("shard"),
                **{key: part.info[key] for key in said},
            }
            for index, part in enumerate(parts)
        ],
        **{
            key: list(chain.from_iterable(info[key] for info in infos if key in info))
            for key in ("resumed", "rescored")
            if any(key in info for info in infos)
        },
    }


def _name(part: Part) -> str:
    return part.directory.resolve().name


def _named(key: records.CellKey) -> str:
    task, model, prompt, think, temperature, best_of, run, sample = key
    return (
        f"{task} run {run} sample {sample + 1}, {model} {prompt} {'think' if think else 'no-think'} "
        f"t{temperature:g} best of {best_of}"
    )
