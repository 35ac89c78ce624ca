"""pytest-pocket: ``play`` as a session plays, bubblewrap on, each episode scored and recorded."""

from __future__ import annotations

import sys
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

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench_episodes

WORKSHOP = Workshop(BubblewrapProvider())


def one(number: int, run: records.Run) -> str:
    """One episode.  Our toy draws a port of its own, which is checked there."""
    script = toy.script(number)
    if script.origin:
        episode = suite.attempt(script, WORKSHOP)
        run.append(suite.record(episode))
        return episode.answer
    bench_episodes.one(number, WORKSHOP, run)
    return script.answer


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
