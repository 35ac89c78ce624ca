"""The tally: what the reports of a session say, added up where all of them arrive.

Under xdist that is the controller, which plays nothing; so the table is made of the properties on reports, and
a serial session and one with workers show the same.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

Row = Mapping[str, str | int | float]


@dataclass
class Tally:
    """The last row of each test, and whether anything failed that no mean reward can outweigh."""

    models: tuple[str, ...]
    prompts: tuple[str, ...]
    _rows: dict[str, Row] = field(default_factory=dict)
    hard_failure: bool = False
    _unplayed: dict[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """One row a test: models and prompts in the order they were asked for, whatever ran first."""
        return sorted(self._rows.values(), key=self._place)

    def unplayed(self, lost: Container[str]) -> int:
        """How many tests failed before their episode had ended, and have no row: a timeout of theirs, a broken task.

        Those of a lost model are left out: a line of its own says what became of them all.
        """
        return sum(model not in lost for model in self._unplayed.values())

    def add(self, test: str, row: Row, failed: bool, phase: str) -> None:
        """Take in one report.  A rerun's row replaces the one before."""
        if "outcome" in row and "model" in row:
            self._rows[test] = row
            self._unplayed.pop(test, None)
        elif failed and "model" in row:
            self._unplayed[test] = str(row["model"])
        if failed and not (test in self._rows and phase == "call"):
            self.hard_failure = True

    def _place(self, row: Row) -> tuple[int, int, str, str]:
        model, prompt = self.models.index(str(row["model"])), self.prompts.index(str(row["prompt"]))
        return model, prompt, str(row["group"]), str(row["task"])
