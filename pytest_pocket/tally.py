"""The tally: what the reports of a session say, added up where all of them arrive.

Under xdist that is the controller, which plays nothing; so the table is made of the properties on reports, and
a serial session and one with workers show the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pytest_pocket.episode import INVALID

Row = Mapping[str, str | int | float]


@dataclass
class Tally:
    """The last row of each test, and whether anything failed that no mean reward can outweigh."""

    models: tuple[str, ...]
    prompts: tuple[str, ...]
    _rows: dict[str, Row] = field(default_factory=dict)
    hard_failure: bool = False

    @property
    def rows(self) -> list[Row]:
        """One row a test: models and prompts in the order they were asked for, whatever ran first."""
        return sorted(self._rows.values(), key=self._place)

    def add(self, test: str, row: Row, failed: bool, phase: str) -> None:
        """Take in one report.  A rerun's row replaces the one before."""
        if "outcome" in row and "model" in row:
            self._rows[test] = row
        if failed and not (test in self._rows and phase == "call"):
            self.hard_failure = True

    def mean(self) -> float | None:
        """The mean reward over valid episodes; None when there are none."""
        rewards = [float(row["reward"]) for row in self._rows.values() if row["outcome"] not in INVALID]
        return sum(rewards) / len(rewards) if rewards else None

    def verdict(self, fail_under: float) -> tuple[bool, str]:
        """Whether the mean reward is high enough and nothing else is wrong, and a line that says so."""
        mean = self.mean()
        if mean is None:
            return False, f"no valid episode to compare with --pocket-fail-under {fail_under:g}"
        enough = mean >= fail_under
        line = f"mean reward {mean:.4f} is {'at least' if enough else 'below'} --pocket-fail-under {fail_under:g}"
        if enough and self.hard_failure:
            line += ", but the session fails: there are errors, or failures of other tests"
        return enough and not self.hard_failure, line

    def _place(self, row: Row) -> tuple[int, int, str, str]:
        model, prompt = self.models.index(str(row["model"])), self.prompts.index(str(row["prompt"]))
        return model, prompt, str(row["group"]), str(row["task"])
