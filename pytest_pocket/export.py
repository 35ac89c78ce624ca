"""Exports: a run as training data, or as a flat table.

``sft`` and ``dpo`` are lines in TRL's conversational formats, with tools.  They are made of training instances
only, and of none whose prompt and files equal those of an instance that models are tested on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from pytest_pocket import records, report, task_list, tools
from pytest_pocket.chat import Message
from pytest_pocket.episode import INVALID
from pytest_pocket.task import split_of

Row = Mapping[str, Any]

SIMILAR = 0.95
"""Two trajectories that share more than this of their words are near-identical: preferring one teaches nothing."""


class ExportError(Exception):
    """A run of which nothing can be made, or a file that cannot be written, said in one line."""


@dataclass(frozen=True)
class Export:
    """The bytes of a file, how many rows it has, and what was left out, by reason."""

    data: bytes
    rows: int
    left_out: Mapping[str, int]


def export(found: Sequence[Row], kind: str) -> Export:
    """The records as one of KINDS.  Raises ExportError, RecordsError."""
    left_out: Counter[str] = Counter()
    with records.of_this_version():
        made = KINDS[kind](found, left_out)
    if not made:
        raise ExportError(
            f"nothing to export as {kind}: {listed(left_out) or 'the run holds no such episodes'}"
        )
    data = _parquet(made) if kind == "parquet" else b"".join(map(records.to_line, made))
    return Export(data, len(made), dict(left_out))


def sampling(found: Iterable[Row]) -> list[dict[str, Any]]:
    """The models that played some episodes, each with the conditions it did so under."""
    keys = ("model", "prompt", "think", "temperature", "best_of")
    return [
        dict(zip(keys, each, strict=True))
        for each in sorted({tuple(record[key] for key in keys) for record in found})
    ]


def card_of(path: Path) -> Path:
    """Where the data card of a file lies: beside it."""
    return path.with_suffix(".card.json")


def card(made: Export, found: Sequence[Row]) -> bytes:
    """What a set of training data comes from: rows, what was left out and why, who played, and its hash."""
    facts = {
        "rows": made.rows,
        "left_out": made.left_out,
        "sampling": sampling(found),
        "sha256": hashlib.sha256(made.data).hexdigest(),
    }
    return (json.dumps(facts, indent=2) + "\n").encode()


def write(path: Path, data: bytes) -> None:
    """A new file, whole or not at all.  Raises ExportError when there is one of that name."""
    try:
        with path.open("xb") as file:
            try:
                file.write(data)
            except OSError:
                path.unlink()
                raise
    except FileExistsError:
        raise ExportError(f"{path} exists: give another --output") from None
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}; give another --output") from error


def _sft(found: Sequence[Row], left_out: Counter[str]) -> list[Row]:
    """The conversations of the episodes that passed, each once."""
    rows: dict[str, Row] = {}
    for record in trainable(found, left_out):
        if not record["passed"]:
            left_out["not passed"] += 1
            continue
        row = {"messages": _conversation(records.messages(record)), "tools": list(tools.SCHEMAS)}
        if rows.setdefault(json.dumps(row), row) is not row:
            left_out["the same as another"] += 1
    return list(rows.values())


def _dpo(found: Sequence[Row], left_out: Counter[str]) -> list[Row]:
    rows: dict[str, Row] = {}
    for best, worse in pairs(found, left_out):
        row = _pair(best, worse)
        if rows.setdefault(json.dumps(row), row) is not row:
            left_out["the same as another"] += 1
    return list(rows.values())


def pairs(
    found: Sequence[Row], left_out: Counter[str], similar: float = SIMILAR
) -> Iterator[tuple[Row, Row]]:
    """The best episode of each instance and prompt, with each that scored lower, whatever the models.

    Pairs whose words agree by more than ``similar`` are left out; 1 keeps all.  Raises ExportError.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for record in trainable(found, left_out):
        groups.setdefault(tuple(record[key] for key in ("task", "seed", "prompt", "think")), []).append(
            record
        )
    for group in groups.values():
        # Of several that score as high, the shortest.
        best = max(group, key=lambda record: (record["reward"], -len(_spoken(record))))
        for record in group:
            if record is best:
                continue
            if record["reward"] == best["reward"]:
                left_out["no worse than the best"] += 1
            elif _likeness(best, record) > similar:
                left_out["near-identical"] += 1
            else:
                yield best, record


def _flat(found: Sequence[Row], left_out: Counter[str]) -> list[Row]:
    """One row an attempt, as the tables are made of."""
    rows = report.rows(found)
    if other := len(found) - len(rows):
        left_out["candidates not chosen, or played again"] = other
    return list(rows)


KINDS: Mapping[str, Callable[[Sequence[Row], Counter[str]], list[Row]]] = {
    "sft": _sft,
    "dpo": _dpo,
    "jsonl": _flat,
    "parquet": _flat,
}
TRAINING = ("sft", "dpo")
"""Those that are training data, and get a data card."""


def trainable(found: Sequence[Row], left_out: Counter[str]) -> list[Row]:
    """The valid episodes.  Raises ExportError where any is of an instance that models are tested on."""
    from pytest_pocket.training.data import fingerprint, guarded

    for record in found:
        for split in (record["split"], split_of(record["seed"])):
            if split != "train":
                raise ExportError(
                    f"the run holds episodes of the {split} split: what models are tested on is not trained on; "
                    "play with --pocket-split=train"
                )
    shipped = task_list.shipped()
    names = {record["task"] for record in found}
    if foreign := sorted(names - shipped.keys()):
        raise ExportError(
            f"task {foreign[0]!r} does not ship: whether its instances are tested on cannot be told"
        )
    forbidden = guarded(sorted(names))
    kept = []
    for record in found:
        if record["outcome"] in INVALID:
            left_out["invalid"] += 1
        elif fingerprint(shipped[record["task"]].build(record["seed"])) in forbidden:
            left_out["equal to a held-out instance"] += 1
        else:
            kept.append(record)
    return kept


def _pair(best: Row, worse: Row) -> Row:
    chosen, rejected = (records.messages(record) for record in (best, worse))
    start = next(number for number, message in enumerate(chosen) if message.role == "assistant")
    if chosen[:start] != rejected[:start]:
        raise ValueError(f"two prompts of {best['task']} seed {best['seed']}")
    return {
        "prompt": _conversation(chosen[:start]),
        "chosen": _conversation(to_last_word(chosen[start:])),
        "rejected": _conversation(to_last_word(rejected[start:])),
        "tools": list(tools.SCHEMAS),
    }


def to_last_word(messages: Sequence[Message]) -> Sequence[Message]:
    """Without what came after the model's last reply, where a limit ended the episode."""
    last = max(number for number, message in enumerate(messages) if message.role == "assistant")
    return messages[: last + 1]


def _conversation(messages: Iterable[Message]) -> list[dict[str, Any]]:
    return [message.to_dict() for message in messages]


def _likeness(one: Row, other: Row) -> float:
    return SequenceMatcher(None, _spoken(one), _spoken(other), autojunk=False).ratio()


def _spoken(record: Row) -> list[str]:
    """The words that the model itself wrote, whatever their case and spacing."""
    spoken = [message for message in records.messages(record) if message.role == "assistant"]
    text = json.dumps(_conversation(spoken), ensure_ascii=False)
    return re.findall(r"\w+|[^\w\s]", text.casefold())


def _parquet(rows: Sequence[Row]) -> bytes:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ExportError("parquet needs pyarrow: pip install 'pytest-pocket[export]'") from None
    buffer = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), buffer)
    return bytes(buffer.getvalue().to_pybytes())


def listed(left_out: Mapping[str, int]) -> str:
    """What was left out, for a line."""
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items())
