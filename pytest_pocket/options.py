"""Options: what a session is asked to do, read from the command line and the ini file, and checked.

Every value is checked before anything runs, and each complaint is one line that says what was wrong, with the
value, and what to do.  Knows nothing of pytest: values come through one function.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pytest_pocket.conditions import Condition, ConditionError, grid
from pytest_pocket.episode import Budget
from pytest_pocket.sandbox import PROVIDERS
from pytest_pocket.shard import Shard
from pytest_pocket.shard import parse as parse_shard
from pytest_pocket.task import SPLITS, Split

MAX_RUNS = 10_000
"""Each ``--pocket-seed`` owns this many instances of a task."""
MAX_SEED = 99_999


class OptionError(ValueError):
    """An option that cannot be followed, said in one line: what, the value, what to do."""


@dataclass(frozen=True)
class Options:
    """A checked set of options.  ``models`` are names as given, in their order, without repetition."""

    models: tuple[str, ...]
    conditions: tuple[Condition, ...]
    runs: int
    samples: int
    split: Split
    seed: int
    executor: str
    in_flight: int
    budget: Budget
    sandbox: str
    records: Path | None
    resume: str
    fail_under: float | None
    baseline: Path | None
    fail_worse: float | None
    must_pass: tuple[str, ...]
    summary: Path | None
    shard: Shard | None

    @property
    def gated(self) -> bool:
        """Whether anything is asked of the session as a whole."""
        return bool(self.baseline or self.must_pass or self.summary) or self.fail_under is not None


def read(get: Callable[[str], str]) -> Options:
    """The options, by their names without ``--pocket-``; an empty value is the default.  Raises OptionError."""
    models = tuple(dict.fromkeys(_listed(get("model"))))
    if get("model") and not models:
        raise OptionError("--pocket-model names no model: give a name, or see --pocket-list")
    options = Options(
        models=models,
        conditions=_conditions(get),
        runs=_integer("runs", get("runs") or "1", 1, MAX_RUNS),
        samples=_integer("samples", get("samples") or "1", 1, 10_000),
        split=_split(get("split") or "eval"),
        seed=_integer("seed", get("seed") or "0", 0, MAX_SEED),
        executor=_choice("executor", get("executor") or "local", ("local", "ray")),
        in_flight=_integer("in-flight", get("in_flight") or "16", 1, 1024),
        budget=_budget(get),
        sandbox=_choice("sandbox", get("sandbox") or "auto", ("auto", *PROVIDERS)),
        records=Path(directory) if (directory := get("records")) else None,
        resume=_choice("resume", get("resume"), ("yes", "force")) if get("resume") else "",
        fail_under=_number("fail-under", value, 0.0, 1.0) if (value := get("fail_under")) else None,
        baseline=Path(run) if (run := get("baseline")) else None,
        fail_worse=_number("fail-worse", value, 0.0, 1.0) if (value := get("fail_worse")) else None,
        must_pass=tuple(dict.fromkeys(_listed(get("must_pass")))),
        summary=Path(file) if (file := get("summary")) else None,
        shard=_shard(value) if (value := get("shard")) else None,
    )
    if options.samples > 1 and any(condition.temperature == 0 for condition in options.conditions):
        raise OptionError(
            f"--pocket-samples {options.samples} at temperature 0 would repeat one attempt "
            f"{options.samples} times: set --pocket-temperature above 0"
        )
    if options.executor == "ray" and not find_spec("ray"):
        raise OptionError("--pocket-executor ray: the package is missing: pip install 'pytest-pocket[ray]'")
    if options.resume and options.records is None:
        raise OptionError("--pocket-resume needs --pocket-records DIR: the run to go on with")
    if options.fail_worse is not None and options.baseline is None:
        raise OptionError("--pocket-fail-worse needs --pocket-baseline RUN: the run to compare with")
    if options.summary:
        _check_writable("summary", options.summary)
    return options


def _check_writable(name: str, file: Path) -> None:
    """Raise OptionError for a file that plainly cannot be written: the session's end would be late to say so."""
    if os.path.isdir(file):
        raise OptionError(f"--pocket-{name} {file}: this is a folder; give a file")
    there = file if os.path.exists(file) else file.absolute().parent
    if not os.access(there, os.W_OK if there is file else os.W_OK | os.X_OK):
        what = "it" if there is file else "its folder"
        raise OptionError(f"--pocket-{name} {file}: {what} is missing or not writable; give another file")


def _listed(value: str) -> list[str]:
    """The parts of a list as users write one: commas on a command line, lines in an ini file."""
    return [part.strip() for line in value.splitlines() for part in line.split(",") if part.strip()]


def _conditions(get: Callable[[str], str]) -> tuple[Condition, ...]:
    lists: list[Sequence[str]] = []
    for name, default in (("prompt", "raw,full"), ("think", "off"), ("temperature", "0"), ("best_of", "1")):
        values = _listed(get(name) or default)
        if not values:
            raise OptionError(
                f"--pocket-{name.replace('_', '-')} {get(name)!r} holds no value: leave it out, or give one"
            )
        lists.append(values)
    try:
        return tuple(grid(*lists))
    except ConditionError as error:
        raise OptionError(str(error)) from None


def _budget(get: Callable[[str], str]) -> Budget:
    default = Budget()
    return Budget(
        turns=_integer("max-turns", get("max_turns") or str(default.turns), 1, 1000),
        tokens=default.tokens,
        reply_tokens=default.reply_tokens,
        seconds=_number("timeout", get("timeout") or str(default.seconds), 0.1, 86_400.0),
    )


def _split(value: str) -> Split:
    for split in SPLITS:
        if split == value:
            return split
    raise OptionError(f"--pocket-split {value!r}: choose from {', '.join(SPLITS)}")


def _shard(value: str) -> Shard:
    try:
        return parse_shard(value)
    except ValueError as error:
        raise OptionError(f"--pocket-shard {error}") from None


def _choice(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise OptionError(f"--pocket-{name} {value!r}: choose from {', '.join(choices)}")
    return value


def _integer(name: str, value: str, low: int, high: int) -> int:
    try:
        number = int(value)
    except ValueError:
        raise OptionError(f"--pocket-{name} {value!r}: give a whole number from {low} to {high}") from None
    if not low <= number <= high:
        raise OptionError(f"--pocket-{name} {number}: give a whole number from {low} to {high}")
    return number


def _number(name: str, value: str, low: float, high: float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise OptionError(f"--pocket-{name} {value!r}: give a number from {low:g} to {high:g}")
    return number
