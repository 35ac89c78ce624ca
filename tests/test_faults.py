"""Faults of engines, disks, clocks, workers and terminals: no episode is scored for one, lost, or there twice.

A short form of tests/bench/bench_faults.py; the faults and the promises are in fault_proxy.py and fault_sessions.py.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("openai")
pytest.importorskip("gguf")
pytest.importorskip("ollama")

import fault_proxy
import fault_sessions
from engine_fixtures import started_double
from fault_sessions import MODEL, Bench, Cell, Llama, rewards

SECONDS = 8.0
"""The limit of an episode: what a hang costs."""

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def cells() -> tuple[str, ...]:
    return ("-k", "answer_directly or read_value or create_file or report_absent", "--runs=3")


@pytest.fixture
def engine(tmp_path: Path, llama_server_binary: Path) -> Iterator[Llama]:
    with closing(Llama(llama_server_binary, tmp_path)) as server:
        yield server


def test_an_engines_faults_are_waited_out_or_infra_and_never_scored(
    tmp_path: Path, engine: Llama, cells: tuple[str, ...]
) -> None:
    calm = Bench(tmp_path, cells, 120.0)
    calm.configure(engine.address)
    plain = rewards(calm, "engine", "run-plain")
    bench = Bench(tmp_path, cells, SECONDS)
    # One that dies is an outage for all the others, whose own faults would then not show: for itself.
    kinds = [kind for kind in fault_proxy.FAULTS if kind != "dies"]
    row = fault_sessions.engine_fault(bench, engine.address, kinds, plain, share=0.3)
    died = fault_sessions.engine_fault(calm, engine.address, ["dies"], plain, share=0.1, engine=engine)
    assert died.broken == []
    assert engine.deaths > 0
    # Those that it died of time and again, and whoever was there each time.
    assert died.same > died.infra
    assert row.broken == []
    assert row.injected > 10
    assert row.same > 0 < row.infra
    assert row.same + row.infra == len(plain)


def test_a_stream_that_breaks_or_stalls_is_infra_and_never_a_limit(
    tmp_path: Path, llama_server_binary: Path, engine: Llama, cells: tuple[str, ...]
) -> None:
    weights = f"{MODEL}={tmp_path / MODEL}.gguf"
    with started_double(llama_server_binary, "--model", weights) as (_, host):
        calm = Bench(tmp_path, cells, 120.0)
        plain = rewards(calm, f"ollama:{MODEL}", "run-plain", OLLAMA_HOST=host)
        bench = Bench(tmp_path, cells, SECONDS)
        kinds = ["stall", "cut", "garbage", "drip", "hollow"]
        row = fault_sessions.engine_fault(bench, host, kinds, plain, share=0.3, streamed=True)
    assert row.broken == []
    assert row.injected > 0 < row.infra


@pytest.fixture
def oracle(tmp_path: Path, cells: tuple[str, ...]) -> tuple[Bench, dict[Cell, float]]:
    """A bench whose sessions need no engine, with the rewards of its model."""
    bench = Bench(tmp_path, cells, 60.0, in_flight=2)
    return bench, rewards(bench, "oracle", "run-plain")


@pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap makes the small disk")
def test_a_full_disk_ends_the_session_and_what_was_recorded_is_kept(
    oracle: tuple[Bench, dict[Cell, float]],
) -> None:
    bench, plain = oracle
    row = fault_sessions.full_disk(bench, "oracle", plain)
    assert row.broken == []
    assert row.same == len(plain)


def test_a_clock_that_jumps_changes_nothing(oracle: tuple[Bench, dict[Cell, float]]) -> None:
    bench, plain = oracle
    row = fault_sessions.jumping_clock(bench, "oracle", plain)
    assert (row.broken, row.status, row.same) == ([], [0], len(plain))


def test_workers_that_are_killed_cost_failures_and_the_resumed_run_is_whole(
    oracle: tuple[Bench, dict[Cell, float]],
) -> None:
    bench, plain = oracle
    kill = fault_sessions.kill_workers(bench, random.Random(3), 3)
    workers = ("-p", "xdist", "-n", "2")
    row = fault_sessions.interrupted(
        "worker", bench, "oracle", plain, 1, kill, fault_sessions.failed, *workers
    )
    assert row.broken == []
    assert row.same == len(plain)


@pytest.mark.parametrize("workers", [(), ("-p", "xdist", "-n", "2")], ids=["serial", "xdist"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_session_that_is_ended_at_any_time_resumes_to_a_whole_run(
    oracle: tuple[Bench, dict[Cell, float]], name: str, workers: tuple[str, ...]
) -> None:
    bench, plain = oracle
    number = signal.Signals[name]
    disturb = fault_sessions.send(bench, number, random.Random(5))
    good = fault_sessions.ended_by(number)
    row = fault_sessions.interrupted("signal", bench, "oracle", plain, 3, disturb, good, *workers)
    assert row.broken == []
    assert row.same == len(plain)
