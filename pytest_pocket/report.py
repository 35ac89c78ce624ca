"""The report: the table that closes a session, from one row of plain values an episode.

A row has ``model backend task group prompt think temperature best_of run sample seed reward outcome stop
turns prompt_tokens completion_tokens seconds``, and optionally ``unseen`` and ``candidates_passed``: what pytest
keeps as properties of a test, and what :func:`rows` makes of records.  Names come from users and are treated as
hostile: nothing in them can style, move or break a line.
"""

from __future__ import annotations

import io
import math
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, get_args

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pytest_pocket import comparison, statistics
from pytest_pocket.comparison import reward, valid
from pytest_pocket.conditions import SYSTEM_PROMPTS
from pytest_pocket.episode import Ending
from pytest_pocket.task_list import GROUPS

Value = str | int | float
Row = Mapping[str, Value]
Cells = list[str]

LEDGER: tuple[str, ...] = get_args(Ending)
SUBJECT = ("model", "think", "temperature", "best_of")
"""What makes a line of the table; the prompts are its columns."""
GAP = ("raw", "full")


def render(rows: Sequence[Row], width: int, *, ascii_only: bool = False) -> str:
    """The session's table, the failure ledger and what they mean, as plain text without colour codes.

    A table is wider than ``width`` where the names are long: nothing is cut or folded.
    """
    if not rows:
        return "no episodes\n"
    return "\n".join(
        [
            _text_table(_scores(rows), width, ascii_only),
            _text_table(_ledger(rows), width, ascii_only),
            *(textwrap.fill(_ascii(note) if ascii_only else note, max(width, 40)) for note in notes(rows)),
            "",
        ]
    )


def tasks(rows: Sequence[Row], width: int, *, ascii_only: bool = False) -> str:
    """The pass rate by task, a column for each model and condition, and over seen and unseen kinds."""
    if not rows:
        return "no episodes\n"
    return _text_table(_by_task(rows), width, ascii_only)


def markdown(rows: Sequence[Row]) -> str:
    """The same as :func:`render`, for a README."""
    if not rows:
        return "no episodes\n"
    parts = [
        _markdown_table(_scores(rows)),
        _markdown_table(_ledger(rows)),
        "\n\n".join(map(quoted, notes(rows))),
    ]
    return "\n\n".join(parts) + "\n"


def tasks_markdown(rows: Sequence[Row]) -> str:
    """The same as :func:`tasks`, for a README."""
    return _markdown_table(_by_task(rows)) + "\n" if rows else "no episodes\n"


def compared(pairings: Sequence[comparison.Pairing], width: int, *, ascii_only: bool = False) -> str:
    """The paired differences, and what may be concluded from each."""
    grid = _Grid(
        "second - first, ± 95% over tasks",
        ["what", "first", "second", "with", "difference", "p", "n", ""],
        left=4,
    )
    for pair in pairings:
        words = [printable(value) for value in (pair.what, pair.first, pair.second)]
        common = " ".join(printable(value) for value in pair.common.values() if value)
        smallest = pair.result.smallest
        verdict = "differs" if pair.separated else "no difference found"
        if not pair.separated and smallest > 0:
            verdict += f"\n(could see {smallest:.3f})"
        if pair.dropped:
            verdict += "\n{} invalid: {:+.3f} to {:+.3f}".format(pair.dropped, *pair.bounds)
        estimate = _estimated(pair.result.difference, sign="+")
        grid.lines.append([*words, common, estimate, f"{pair.p_holm:.4f}", str(pair.result.pairs), verdict])
    note = (
        f"p: sign-flip permutation over tasks, Holm-corrected for {len(pairings)} comparisons. A difference that "
        '"could see" names would be found 4 times in 5; a smaller one needs more tasks.'
    )
    return "\n".join([_text_table(grid, width, ascii_only), textwrap.fill(note, max(width, 40)), ""])


def rows(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Value]]:
    """The rows of records: the chosen episodes, with the tokens, seconds and passes of all their candidates.

    A cell that was played again (a rerun) counts once, as it ended last.
    """
    spent: dict[tuple[object, ...], Counter[str]] = {}
    found = list(records)
    for record in found:
        replies = record["replies"]
        cost = spent.setdefault(_cell(record), Counter())
        cost["prompt_tokens"] += sum(reply["prompt_tokens"] for reply in replies)
        cost["completion_tokens"] += sum(reply["completion_tokens"] for reply in replies)
        cost["seconds"] += record["seconds"]
        if record["candidate"] == 0:  # a rerun: what passed before no longer counts, what was spent does
            cost["candidates_passed"] = 0
        cost["candidates_passed"] += record["outcome"] == "passed"
    return [_row(record, spent[_cell(record)]) for record in counted(found)]


def counted(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records that make the rows: not the candidates that lost, and of a cell's reruns the last."""
    return list({_cell(record): record for record in records if record["chosen"]}.values())


def _cell(record: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple(record[key] for key in (*SUBJECT, "prompt", "task", "run", "sample"))


def _row(record: Mapping[str, Any], cost: Mapping[str, Value]) -> dict[str, Value]:
    same = ("model", "backend", "task", "group", "prompt", "temperature", "best_of", "run", "sample", "seed")
    return {
        **{key: record[key] for key in same},
        "think": "on" if record["think"] else "off",
        "reward": record["reward"] or 0.0,
        "outcome": record["outcome"],
        "stop": record["stop"],
        "turns": len(record["replies"]),
        "unseen": ",".join(record["unseen"]),
        **cost,
    }


def printable(value: object) -> str:
    """A user's text on one line, with every control, format and unassigned character replaced by "?"."""
    return "".join(map(_printable, str(value)))


def _printable(char: str) -> str:
    category = unicodedata.category(char)
    if char in "\t\n\r" or category in ("Zl", "Zp"):
        return " "
    return "?" if category.startswith("C") else char


class _Grid:
    """A table before it has a look: rows of cells, in which a newline separates two lines of one cell."""

    def __init__(self, title: str, head: Cells, left: int) -> None:
        self.title = title
        self.head = head
        self.left = left  # how many columns, from the first, hold text
        self.lines: list[Cells] = []


def subjects(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """The rows of each model and condition but the prompt: models as they come, conditions sorted."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    keys = {(models.index(row["model"]), *_condition(row)): row for row in rows}
    ordered = sorted(keys)
    return {
        (printable(models[key[0]]), asked(keys[key])): [
            row for row in rows if (models.index(row["model"]), *_condition(row)) == key
        ]
        for key in ordered
    }


def _condition(row: Mapping[str, Any]) -> tuple[bool, float, int]:
    return _thinks(row), float(row["temperature"]), int(row["best_of"])


def _thinks(row: Mapping[str, Any]) -> bool:
    return str(row["think"]) in ("on", "True", "1", "true")


def asked(row: Mapping[str, Any]) -> str:
    """The condition of a row or a record, but for the prompt, in words."""
    think, temperature, best_of = _condition(row)
    words = f"{'think' if think else 'no-think'} t{temperature:g}"
    return f"{words} best of {best_of}" if best_of > 1 else words


def prompts_of(rows: Iterable[Row]) -> list[str]:
    """The prompts there are, in the order of the suite."""
    known = {prompt: place for place, prompt in enumerate(SYSTEM_PROMPTS)}
    found = dict.fromkeys(str(row["prompt"]) for row in rows)
    return sorted(found, key=lambda prompt: known.get(prompt, len(known)))


def valid_of(rows: Iterable[Row]) -> list[Row]:
    """The rows that say anything of their model."""
    return list(filter(valid, rows))


def _passed(row: Row) -> float:
    return float(row["outcome"] == "passed")


def _passes(rows: Iterable[Row]) -> int:
    return sum(row["outcome"] == "passed" for row in rows)


Metric = Callable[[Iterable[Row]], comparison.Side]
"""From valid rows to the value of each instance and repeat, or of each instance."""


def _each(value: Callable[[Row], float]) -> Metric:
    return lambda rows: {comparison.instance(row): value(row) for row in rows}


def _of_samples(estimator: Callable[[int, int, int], float], k: int) -> Metric:
    """A metric of k samples of one instance; an instance with fewer valid ones says nothing of it."""

    def values(rows: Iterable[Row]) -> comparison.Side:
        found: dict[tuple[str, object], list[Row]] = {}
        for row in rows:
            found.setdefault((str(row["task"]), row["seed"]), []).append(row)
        return {key: estimator(len(mine), _passes(mine), k) for key, mine in found.items() if len(mine) >= k}

    return values


REWARD: Metric = _each(reward)
METRICS: tuple[tuple[str, Metric], ...] = (("reward", REWARD), ("pass@1", _each(_passed)))


def _metrics(rows: Sequence[Row]) -> tuple[tuple[str, Metric], ...]:
    """The metrics that these rows of one line allow.

    Where instances were sampled k times, pass@k and pass^k too; where the best of N was chosen, whether any passed.
    """
    found = list(METRICS)
    if (k := len({row["sample"] for row in rows})) > 1:
        sampled = (("pass@", statistics.pass_at_k), ("pass^", statistics.pass_hat_k))
        found += [(f"{name}{k}", _of_samples(estimator, k)) for name, estimator in sampled]
    if _best_of(rows) > 1 and all("candidates_passed" in row for row in rows):
        found.append(
            (f"any of {_best_of(rows)}", _each(lambda row: float(int(row["candidates_passed"]) > 0)))
        )
    return tuple(found)


def _best_of(rows: Iterable[Row]) -> int:
    return max((int(row["best_of"]) for row in rows), default=1)


def _scores(rows: Sequence[Row]) -> _Grid:
    prompts = prompts_of(rows)
    gap = set(GAP) <= set(prompts)
    named = [printable(prompt) for prompt in prompts]
    lines = subjects(rows)
    ranks = comparison.ranks(lines) if len(lines) > 1 else {}
    places = ["rank"] if ranks else []
    tokens = ["tokens"] if _best_of(rows) > 1 else []
    head = ["model", "", *named, *(["full - raw"] if gap else []), *places, "n", *tokens, "invalid"]
    grid = _Grid("mean reward and pass@1, ± 95% over tasks", head, left=2)
    for (model, asked), mine in lines.items():
        metrics = _metrics(mine)
        columns = []
        for prompt in prompts:
            part = valid_of(row for row in mine if row["prompt"] == prompt)
            columns.append("\n".join(_estimated(mean(part, metric)) for _, metric in metrics))
        if gap:
            columns.append("\n".join(_estimated(gap_of(mine, metric), sign="+") for _, metric in metrics))
        invalid = len(mine) - len(valid_of(mine))
        names = "\n".join(name for name, _ in metrics)
        place = [str(ranks[model, asked] or "-")] if ranks else []
        spent = [f"{_tokens(mine):.0f}"] if tokens else []
        counts = [str(len(mine)), *spent, str(invalid)]
        grid.lines.append([f"{model}\n{asked}", names, *columns, *place, *counts])
    return grid


def _tokens(rows: Sequence[Row]) -> float:
    """What an attempt wrote, in tokens, all candidates together."""
    return sum(int(row["completion_tokens"]) for row in rows) / len(rows)


def mean(rows: Iterable[Row], metric: Metric) -> statistics.Estimate | None:
    """The mean of a metric over tasks; None without rows."""
    values: dict[str, list[float]] = {}
    for (task, _), value in metric(rows).items():
        values.setdefault(task, []).append(value)
    return statistics.mean(values) if values else None


def gap_of(rows: Iterable[Row], metric: Metric) -> statistics.Estimate | None:
    """What the full prompt adds to raw, over the instances that both attempted and neither lost."""
    whole = valid_of(rows)
    return statistics.paired(*(metric(row for row in whole if row["prompt"] == prompt) for prompt in GAP))


def _estimated(estimate: statistics.Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return "-"
    value = f"{estimate.value:{sign}.3f}"
    return value if math.isnan(estimate.half) else f"{value} ± {estimate.half:.3f}"


def _ledger(rows: Sequence[Row]) -> _Grid:
    """How the episodes of each model ended, by prompt."""
    seen = {str(row["outcome"]) for row in rows}
    outcomes = [name for name in LEDGER if name in seen or name in ("passed", "wrong")]
    outcomes += sorted(map(printable, seen - set(LEDGER)))
    grid = _Grid("how the episodes ended", ["model", "prompt", *outcomes], left=2)
    for (model, asked), mine in subjects(rows).items():
        prompts = prompts_of(mine)
        counts = [
            Counter(printable(row["outcome"]) for row in mine if row["prompt"] == prompt)
            for prompt in prompts
        ]
        columns = ["\n".join(str(count[outcome]) for count in counts) for outcome in outcomes]
        grid.lines.append([f"{model}\n{asked}", "\n".join(map(printable, prompts)), *columns])
    return grid


def notes(rows: Sequence[Row]) -> list[str]:
    """What the numbers of a table mean, and what may not be concluded from them."""
    count = len({row["task"] for row in valid_of(rows)})
    notes = []
    if count > 1:
        notes.append(
            f"Means over {count} tasks, each counting the same. ± is the 95% interval for tasks in general "
            f"(Student's t over task means, {count - 1} degrees of freedom), not for these tasks alone."
        )
        if alike := {round(each.freedom) + 1 for each in _shown(rows) if each.error == 0}:
            shares = " or ".join(
                f"{statistics.unseen_share(tasks):.1%} ({tasks} seen)" for tasks in sorted(alike)
            )
            notes.append(
                "Where all tasks give the same value, ± is what that leaves open: up to "
                f"{shares} of tasks in general may lie at an end of the scale."
            )
    elif count == 1:
        notes.append("One task says nothing of tasks in general: no interval is given.")
    if _best_of(rows) > 1:
        notes.append(
            "any of N: whether one of the N candidates passed (pass@N), as a perfect choice would have it; "
            "tokens: written an attempt, all candidates together."
        )
    for what, found in _smallest_differences(rows).items():
        extent = " to ".join(dict.fromkeys(f"{difference:.3f}" for difference in (min(found), max(found))))
        notes.append(f"Smallest {what} in reward that this design finds 4 times in 5: {extent}.")
    invalid = len(rows) - len(valid_of(rows))
    if invalid:
        share = f"{invalid} of {len(rows)} episodes ({invalid / len(rows):.1%}) are invalid and in no mean"
        ranked = "the models are not ranked" if invalid / len(rows) > statistics.INVALID_SHARE else ""
        notes.append("; ".join(filter(None, [share, ranked])) + ".")
    return notes


def _shown(rows: Sequence[Row]) -> Iterator[statistics.Estimate]:
    """The estimates that the table of scores shows."""
    for mine in subjects(rows).values():
        parts = [valid_of(row for row in mine if row["prompt"] == prompt) for prompt in prompts_of(mine)]
        for _, metric in _metrics(mine):
            yield from filter(None, (gap_of(mine, metric), *(mean(part, metric) for part in parts)))


def _smallest_differences(rows: Sequence[Row]) -> dict[str, list[float]]:
    """What this design can find, by what is compared: prompts, lines of the table, else a line and a fixed value."""
    lines = list(subjects(rows).values())
    found: dict[str, list[statistics.Estimate | None]] = {
        "full - raw difference": [gap_of(mine, REWARD) for mine in lines],
        "difference between two lines": [
            statistics.paired(one, other)
            for one, other in combinations([comparison.side(valid_of(mine), reward) for mine in lines], 2)
        ],
    }
    if not any(found["full - raw difference"]) and len(lines) == 1:
        found = {"difference from a fixed value": [mean(valid_of(rows), REWARD)]}
    sizes = {
        what: [size for each in estimates if each and (size := statistics.smallest_difference(each)) > 0]
        for what, estimates in found.items()
    }
    return {what: each for what, each in sizes.items() if each}


def _by_task(rows: Sequence[Row]) -> _Grid:
    """Pass rates by task, in the order of the groups, then mean rewards over seen and unseen kinds."""
    columns = [
        (f"{model}\n{asked}\n{printable(prompt)}", [row for row in mine if row["prompt"] == prompt])
        for (model, asked), mine in subjects(rows).items()
        for prompt in prompts_of(mine)
    ]
    title = "pass@1 by task, with its 95% Wilson interval; mean reward over seen and unseen kinds"
    grid = _Grid(title, ["group", "task", *(head for head, _ in columns)], left=2)
    for group, task in sorted({(str(row["group"]), str(row["task"])) for row in rows}, key=place):
        rates = [rate(valid_of(row for row in mine if row["task"] == task)) for _, mine in columns]
        grid.lines.append([printable(group), printable(task), *rates])
    if any("unseen" in row for row in rows):
        for name, wanted in (("seen", False), ("unseen", True)):
            parts = [[row for row in mine if bool(row.get("unseen")) is wanted] for _, mine in columns]
            grid.lines.append(
                ["all", f"{name} kinds", *(_estimated(mean(valid_of(part), REWARD)) for part in parts)]
            )
    return grid


def place(task: tuple[str, str]) -> tuple[int, str, str]:
    """Where a task, given as group and name, stands in a table: by group, then by name."""
    group, name = task
    return GROUPS.index(group) if group in GROUPS else len(GROUPS), group, name


def rate(rows: Sequence[Row]) -> str:
    """The pass rate of one task; without an interval where samples of one instance depend on each other."""
    if not rows:
        return "-"
    passes = _passes(rows)
    rate = f"{passes / len(rows):.2f}"
    if len({row["seed"] for row in rows}) < len(rows):
        return rate
    low, high = statistics.wilson(passes, len(rows))
    return f"{rate} ({low:.2f} to {high:.2f})"


def _text_table(grid: _Grid, width: int, ascii_only: bool) -> str:
    look = box.ASCII_DOUBLE_HEAD if ascii_only else box.SIMPLE_HEAD
    shown = _ascii if ascii_only else str
    padding = (0, 1) if ascii_only else (0, 1, 0, 0)
    table = Table(box=look, show_edge=False, pad_edge=False, padding=padding)
    for index, name in enumerate(grid.head):
        # Nothing folds: a number or a name broken over two lines would be read as another one.
        longest = max(
            cell_len(part) for line in (grid.head, *grid.lines) for part in shown(line[index]).split("\n")
        )
        justify: Literal["left", "right"] = "left" if index < grid.left else "right"
        table.add_column(Text(shown(name)), justify=justify, no_wrap=True, min_width=longest)
    for line in grid.lines:
        table.add_row(*(Text(shown(cell)) for cell in line))
    out = io.StringIO()
    needed = Console(file=out, width=10_000).measure(table).minimum
    console = Console(file=out, width=max(width, needed), color_system=None, force_terminal=False)
    console.print(table)
    return "\n".join([shown(grid.title), *(line.rstrip() for line in out.getvalue().splitlines()), ""])


def _markdown_table(grid: _Grid) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(quoted(cell).replace("\n", "<br>") for cell in cells) + " |"

    rule = ["---"] * grid.left + ["--:"] * (len(grid.head) - grid.left)
    return "\n".join([line(grid.head), f"| {' | '.join(rule)} |", *map(line, grid.lines)])


def quoted(text: str) -> str:
    """Text that Markdown and HTML show as it is."""
    for char, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(char, entity)
    return "".join(f"\\{char}" if char in "\\`*_[]|~#!" else char for char in text)


def _ascii(text: str) -> str:
    return text.replace("±", "+/-").encode("ascii", "replace").decode()
