"""Comparisons: which of several models or conditions differ, as far as their episodes can tell.

Episodes pair by instance and repeat, so that two sides never differ by luck of the draw.  A difference that the
permutation test does not support, corrected for the number of comparisons, is no difference: such models share
a rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from pytest_pocket import statistics
from pytest_pocket.conditions import SYSTEM_PROMPTS
from pytest_pocket.episode import INVALID

Row = Mapping[str, Any]
Metric = Callable[[Row], float]
Side = dict[tuple[str, object], float]

SUBJECT = ("run_directory", "model", "prompt", "think", "temperature", "best_of")
"""What tells two sides apart; ``run_directory`` where rows of several runs are compared."""
SIGNIFICANCE = 0.05


class ComparisonError(ValueError):
    """Sides that cannot be compared, said in one line: what, the value, what to do."""


@dataclass(frozen=True)
class Pairing:
    """Two sides that differ in one thing, ``what``: the values ``first`` and ``second``, all else as in ``common``.

    ``p_holm`` is corrected for all pairings made together.  ``dropped`` counts the pairs with an invalid side;
    were these counted in favour of one side, then of the other, the difference would lie within ``bounds``.
    """

    what: str
    first: str
    second: str
    common: Mapping[str, str]
    result: statistics.Comparison
    p_holm: float
    dropped: int
    bounds: tuple[float, float]

    @property
    def separated(self) -> bool:
        """Whether the difference is supported."""
        return self.p_holm < SIGNIFICANCE


def reward(row: Row) -> float:
    """The metric of most tables."""
    return float(row["reward"])


def valid(row: Row) -> bool:
    """Whether an episode says anything of its model."""
    return row["outcome"] not in INVALID


def together(runs: Mapping[str, Sequence[Row]]) -> list[Row]:
    """The rows of several runs, by a name for each run.  Only what more than one run holds is told apart by it."""

    def subject(row: Row) -> tuple[object, ...]:
        return tuple(row[key] for key in SUBJECT[1:])

    held = Counter(each for rows in runs.values() for each in {subject(row) for row in rows})
    return [
        {**row, "run_directory": name if held[subject(row)] > 1 else ""}
        for name, rows in runs.items()
        for row in rows
    ]


def pairings(rows: Sequence[Row], metric: Metric = reward) -> list[Pairing]:
    """Every two subjects that differ in exactly one of ``SUBJECT``.

    Raises ComparisonError when two of them have no instance in common, as with different seeds or splits.
    """
    known = {prompt: place for place, prompt in enumerate(SYSTEM_PROMPTS)}
    subjects: dict[tuple[str, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: known.get(row["prompt"], len(known))):
        subjects.setdefault(tuple(str(row.get(key, "")) for key in SUBJECT), []).append(row)
    found: list[_Found] = []
    for (one, mine), (other, theirs) in combinations(subjects.items(), 2):
        # A run that is not named is no difference.
        unlike = [
            index
            for index, pair in enumerate(zip(one, other, strict=True))
            if pair[0] != pair[1] and (index > 0 or all(pair))
        ]
        if len(unlike) == 1:
            result, dropped, bounds = _compared(mine, theirs, metric)
            index = unlike[0]
            common = {
                key: value
                for place, (key, value) in enumerate(zip(SUBJECT, one, strict=True))
                if place != index
            }
            found.append((SUBJECT[index], one[index], other[index], common, result, dropped, bounds))
    return _corrected(found)


def against(before: Sequence[Row], after: Sequence[Row], metric: Metric = reward) -> list[Pairing]:
    """Each subject that both hold, ``after`` - ``before``; ``what`` names it.  Raises as :func:`pairings`."""
    sides: list[dict[str, list[Row]]] = [{}, {}]
    for side, rows in zip(sides, (before, after), strict=True):
        for row in rows:
            side.setdefault(_named(row), []).append(row)
    found: list[_Found] = []
    for name in sides[0].keys() & sides[1].keys():
        result, dropped, bounds = _compared(sides[0][name], sides[1][name], metric)
        found.append((name, "before", "after", {}, result, dropped, bounds))
    return _corrected(sorted(found, key=lambda each: each[0]))


_Found = tuple[str, str, str, Mapping[str, str], statistics.Comparison, int, tuple[float, float]]


def _corrected(found: Sequence[_Found]) -> list[Pairing]:
    """Pairings whose p values are corrected for their number."""
    corrected = statistics.holm([result.p for *_, result, _, _ in found])
    return [
        Pairing(what, first, second, common, result, p, dropped, bounds)
        for (what, first, second, common, result, dropped, bounds), p in zip(found, corrected, strict=True)
    ]


def _compared(
    first: Sequence[Row], second: Sequence[Row], metric: Metric
) -> tuple[statistics.Comparison, int, tuple[float, float]]:
    sides = [{instance(row): row for row in rows} for rows in (first, second)]
    both = sides[0].keys() & sides[1].keys()
    whole = [key for key in both if valid(sides[0][key]) and valid(sides[1][key])]
    one, other = ({key: metric(side[key]) for key in whole} for side in sides)
    result = statistics.compare(one, other)
    if result is None:
        raise ComparisonError(
            f"{_named(first[0])} and {_named(second[0])} have no valid instance in common: "
            "compare runs of the same split, seed and tasks"
        )

    def difference(*fills: float) -> float:
        """The mean difference if every invalid side had counted so."""
        means = statistics.paired(
            *(
                {key: metric(side[key]) if valid(side[key]) else fill for key in both}
                for side, fill in zip(sides, fills, strict=True)
            )
        )
        return means.value if means else math.nan

    return result, len(both) - len(whole), (difference(1.0, 0.0), difference(0.0, 1.0))


def instance(row: Row) -> tuple[str, object]:
    """The instance and the repeat on it."""
    return str(row["task"]), (row["seed"], row["sample"])


def side(rows: Iterable[Row], metric: Metric) -> Side:
    """One side of a comparison over instances, repeats and prompts."""
    return {(task, (drawn, row["prompt"])): metric(row) for row in rows for task, drawn in [instance(row)]}


def _named(row: Row) -> str:
    think = "think" if row["think"] == "on" else "no-think"
    best_of = f" best of {row['best_of']}" if row["best_of"] > 1 else ""
    where = f"{row['run_directory']} " if row.get("run_directory") else ""
    return f"{where}{row['model']} {row['prompt']} {think} t{row['temperature']:g}{best_of}"


def ranks(lines: Mapping[Any, Sequence[Row]], metric: Metric = reward) -> dict[Any, int | None]:
    """The rank of each line of a table: 1 and the number of lines that are better by a supported difference.

    None for all where a line has more than ``INVALID_SHARE`` invalid episodes, or two have nothing in common.
    """
    nothing: dict[Any, int | None] = dict.fromkeys(lines)
    if any(
        sum(not valid(row) for row in rows) > statistics.INVALID_SHARE * len(rows) for rows in lines.values()
    ):
        return nothing
    sides = {name: side(filter(valid, rows), metric) for name, rows in lines.items()}
    pairs = list(combinations(sides, 2))
    compared = [statistics.compare(sides[one], sides[other]) for one, other in pairs]
    if None in compared:
        return nothing
    known = [each for each in compared if each is not None]
    found = dict.fromkeys(lines, 1)
    for (one, other), result, p in zip(
        pairs, known, statistics.holm([each.p for each in known]), strict=True
    ):
        if p < SIGNIFICANCE:
            found[one if result.difference.value > 0 else other] += 1
    return dict(found)
