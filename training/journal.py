"""What a run tells while it goes: its curve, a line for each point, a bar on a terminal, and by option a tracker."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pytest_pocket.training import world

TRACKERS = ("tensorboard", "trackio")


class TrackerMissing(RuntimeError):
    """A tracker that is not installed, said in one line."""


class Journal:
    """The points of a run, kept and told.  ``tracker`` is one of ``TRACKERS``; TensorBoard writes to ``directory``."""

    def __init__(self, name: str = "", tracker: str = "", directory: Path = Path()) -> None:
        self.curve: list[dict[str, float]] = []
        self._spent = 0.0
        self._started = time.monotonic()
        self._shown = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty() or not world.is_first(),
        )
        self._bar = self._shown.add_task(name, total=1.0)
        self._accelerator = _tracking(tracker, name, directory) if tracker and world.is_first() else None

    @contextmanager
    def open(self, saved: Mapping[str, Any]) -> Iterator[None]:
        """A run, from where the saved progress of an earlier one ended."""
        self.curve = list(saved.get("curve", []))
        self._spent, self._started = saved.get("spent", 0.0), time.monotonic()
        with self._shown:
            yield
        if self._accelerator:
            self._accelerator.end_training()

    @property
    def seconds(self) -> float:
        """Spent on this run, before a kill too."""
        return self._spent + time.monotonic() - self._started

    def done(self, share: float) -> None:
        """Move the bar."""
        self._shown.update(self._bar, completed=min(1.0, share))

    def note(self, step: int, point: Mapping[str, float]) -> None:
        """Add a point to the curve, with the minutes; print it; hand it to the tracker."""
        point = {**point, "minutes": self.seconds / 60}
        self.curve.append(point)
        if not world.is_first():
            return
        # A bar on the terminal moves down for what is printed while it is there.
        print(json.dumps({key: round(value, 4) for key, value in point.items()}), file=sys.stderr, flush=True)
        if self._accelerator:
            self._accelerator.log(point, step=step)


def _tracking(tracker: str, name: str, directory: Path) -> Any:
    """What logs to a tracker.  Raises TrackerMissing."""
    if not importlib.util.find_spec(tracker):
        raise TrackerMissing(f"--track {tracker}: the package is not installed: pip install {tracker}")
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=tracker, project_dir=directory, cpu=world.device() == "cpu")
    accelerator.init_trackers(name)
    return accelerator
