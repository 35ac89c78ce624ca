"""pytest-pocket: ``play`` as a session plays, bubblewrap on, each episode scored and recorded."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import suite
import toy

import pytest_pocket
from pytest_pocket import records
from pytest_pocket.episode import Workshop
from pytest_pocket.sandbox.bubblewrap import BubblewrapProvider

WORKSHOP = Workshop(BubblewrapProvider())


def one(number: int, run: records.Run) -> str:
    """One episode."""
    episode = suite.attempt(toy.script(number), WORKSHOP)
    run.append(suite.record(episode))
    return episode.answer


def play(numbers: Sequence[int], in_flight: int) -> list[str]:
    """Play on ``in_flight`` threads, into one run directory."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(in_flight) as pool:
        run = records.start(Path(folder, "run"), {"schema": records.SCHEMA})
        answers = list(pool.map(lambda number: one(number, run), numbers))
        run.close()
    return answers


if __name__ == "__main__":
    isolation = "bubblewrap, one an episode: no network, own processes, memory and file limits, seccomp"
    toy.report(pytest_pocket.__version__, isolation, play)
