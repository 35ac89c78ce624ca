"""pytest-pocket: ``play`` as a session plays, bubblewrap on, each episode scored and recorded."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import toy

import pytest_pocket
from pytest_pocket import records
from pytest_pocket.episode import Workshop
from pytest_pocket.sandbox.bubblewrap import BubblewrapProvider

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench_episodes

WORKSHOP = Workshop(BubblewrapProvider())


def play(numbers: Sequence[int], in_flight: int) -> list[str]:
    """Play on ``in_flight`` threads, into one run directory.  Its instances have ports of their own, checked there."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(in_flight) as pool:
        run = records.start(Path(folder, "run"), {"schema": records.SCHEMA})
        list(pool.map(lambda number: bench_episodes.one(number, WORKSHOP, run), numbers))
        run.close()
    return [toy.port(number) for number in numbers]


if __name__ == "__main__":
    isolation = "bubblewrap, one an episode: no network, own processes, memory and file limits, seccomp"
    toy.report(pytest_pocket.__version__, isolation, play)
