"""The gates: what decides whether a session is good enough for CI, and the words for it.

Without a gate each test decides, as pytest has it.  With one, failed tests are data: the mean reward, the tasks that
must pass, and a baseline decide; errors (invalid episodes) and other people's tests still fail the session.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_pocket import comparison, records, report
from pytest_pocket.comparison import reward, valid
from pytest_pocket.options import OptionError, Options

Row = Mapping[str, Any]


Finding = tuple[bool, str]
"""Whether a gate is passed, and a line that says why."""


@dataclass(frozen=True)
class Verdict:
    """What the gates say.  ``good`` when all are passed and nothing failed that no gate can outweigh."""

    good: bool
    findings: tuple[Finding, ...]


class Gates:
    """The gates that a session was given.

    Reads the baseline at once.  Raises RecordsError when it cannot be read, OptionError when it holds nothing that
    this session plays too.
    """

    def __init__(self, options: Options, models: Sequence[str]) -> None:
        self._options = options
        self._baseline = _baseline(options, models) if options.baseline else []

    @property
    def deciding(self) -> bool:
        """Whether the gates decide, and not each test."""
        asked = self._options
        return asked.fail_under is not None or asked.fail_worse is not None or bool(asked.must_pass)

    def verdict(self, rows: Sequence[Row], hard_failure: bool) -> Verdict:
        """What the gates say of a session's rows; ``hard_failure`` is what no gate can outweigh."""
        findings = [*self._fail_under(rows), *self._must_pass(rows), *self._against_baseline(rows)]
        if hard_failure and self.deciding:
            findings.append((False, "the session fails: there are errors, or failures of other tests"))
        return Verdict(all(good for good, _ in findings), tuple(findings))

    def _fail_under(self, rows: Sequence[Row]) -> list[Finding]:
        least = self._options.fail_under
        if least is None:
            return []
        rewards = [reward(row) for row in rows if valid(row)]
        if not rewards:
            return [(False, f"no valid episode to compare with --pocket-fail-under {least:g}")]
        mean = sum(rewards) / len(rewards)
        enough = mean >= least
        verb = "is at least" if enough else "is below"
        return [(enough, f"mean reward {mean:.4f} {verb} --pocket-fail-under {least:g}")]

    def _must_pass(self, rows: Sequence[Row]) -> list[Finding]:
        found = []
        for task in self._options.must_pass:
            mine = [row for row in rows if row["task"] == task]
            passes = sum(row["outcome"] == "passed" for row in mine)
            if not mine:
                line = f"--pocket-must-pass {report.printable(task)}: no such task was played"
            else:
                line = f"--pocket-must-pass {task}: {passes} of {len(mine)} episodes passed"
            found.append((0 < len(mine) == passes, line))
        return found

    def _against_baseline(self, rows: Sequence[Row]) -> list[Finding]:
        worst = self._options.fail_worse
        if not self._baseline:
            return []
        try:
            pairs = comparison.against(self._baseline, rows)
        except comparison.ComparisonError as error:
            return [(worst is None, f"--pocket-baseline: {error}")]
        if not pairs:
            return [(worst is None, "--pocket-baseline: nothing was played that the baseline holds too")]
        return [_judged(pair, worst) for pair in pairs]


def _judged(pair: comparison.Pairing, worst: float | None) -> Finding:
    """Whether a model is still as good as it was, and a line that says how sure one may be."""
    difference = pair.result.difference
    line = (
        f"{report.printable(pair.what)}: {difference.value:+.3f} against the baseline "
        f"({pair.result.pairs} pairs, p {pair.p_holm:.3f})"
    )
    if worst is None:
        return True, line
    gate = f"--pocket-fail-worse {worst:g}"
    if pair.separated and difference.value < -worst:
        return False, f"{line} is worse than {gate}"
    if not difference.low >= -worst:
        return (
            True,
            f"{line}: too small a run to rule out a drop of {worst:g}; it finds one from {pair.result.smallest:.3f} on",
        )
    return True, f"{line} is within {gate}"


def _baseline(options: Options, models: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the baseline that this session plays again."""
    assert options.baseline is not None
    info, episodes = records.load(options.baseline)
    try:
        for name, mine in (("seed", options.seed), ("split", options.split)):
            theirs = info["seed"] if name == "seed" else info["options"]["split"]
            if theirs != mine:
                raise OptionError(
                    f"--pocket-baseline {options.baseline} was run with --pocket-{name} {theirs}, "
                    f"this session with {mine}: compare runs of the same instances"
                )
        rows = report.rows(episodes)
    except KeyError as missing:
        raise records.RecordsError(
            f"{options.baseline} has no {missing}: it is not of this version"
        ) from None
    asked = {
        (each.prompt, "on" if each.think else "off", each.temperature, each.best_of)
        for each in options.conditions
    }
    shared = [
        row
        for row in rows
        if row["model"] in models
        and (row["prompt"], row["think"], row["temperature"], row["best_of"]) in asked
    ]
    if not shared:
        held = ", ".join(dict.fromkeys(report.printable(row["model"]) for row in rows)) or "nothing"
        raise OptionError(
            f"--pocket-baseline {options.baseline} holds {held} and no model and condition of this session: "
            "run the same ones"
        )
    return shared


def write_summary(path: Path, rows: Sequence[Row], verdict: Verdict) -> None:
    """A summary in Markdown, as a pull request or a job shows it.  Raises OSError."""
    parts = ["## pytest-pocket\n"]
    parts += [f"- {'✅' if good else '❌'} {report.quoted(line)}" for good, line in verdict.findings]
    parts += [""] * bool(verdict.findings)
    parts.append(report.markdown(rows))
    parts.append(f"<details><summary>By task</summary>\n\n{report.tasks_markdown(rows)}\n</details>\n")
    path.write_text("\n".join(parts))
