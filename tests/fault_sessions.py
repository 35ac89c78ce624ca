"""Sessions under faults, and what they promise all the same.  For test_faults.py and bench/bench_faults.py.

- An episode that is valid has the reward that it has without the fault; all others are ``infra``.
- Every cell has one record: none is lost, none is there twice.  A session that was ended resumes to that.
- No episode takes longer than its limit.
- The exit status is 0 where nothing is invalid or missing, and else it is not.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fault_proxy
from engine_fixtures import EXACT, kill, started_llama

from pytest_pocket import records
from pytest_pocket.backends import gguf_file
from pytest_pocket.backends.process import Process, free_port
from pytest_pocket.registry import shipped

MODEL = "rlvr-v1"
TASKS = (
    "read_value", "find_definition", "list_files", "run_script", "exit_status",
    "create_file", "append_line", "delete_file", "answer_directly", "report_absent",
)  # fmt: skip
TURNS = 4
GRACE = 3.0
"""Seconds by which an episode may be over its limit: the time of its sandbox's end."""
DISK = "disk"
"""Where the small disk is."""
KEEP = f'"$@"; status=$?; cp -r {DISK}/run run-full; exit $status'
"""Run a command, and save what it left on that disk."""
JUMPING = """
import random, time
now, began = time.time, time.monotonic()
hours = random.Random(0)
time.time = lambda: now() + 3600 * hours.choice([-30, -2, 0, 0, 5, 1000])
"""
"""A plugin with which the wall clock jumps by hours at each look."""

SEED = 1
"""Of which requests meet a fault, and which."""
MIXED = "mixed"
STREAMED = "mixed in a stream"
Cell = tuple[str, str, int]
"""Task, prompt, run."""


@dataclass(frozen=True)
class Session:
    """A session that has ended: its exit status, how long it took, its last lines."""

    status: int
    seconds: float
    said: str


@dataclass
class Row:
    """What became of the episodes under one fault.

    ``same`` are valid and have the reward that they have without the fault; ``other`` are valid and have another
    one; ``lost`` and ``twice`` are cells; ``longest`` and ``limit``, of an episode, are in seconds.  ``status`` are the exit statuses.
    """

    fault: str
    injected: int = 0
    episodes: int = 0
    same: int = 0
    infra: int = 0
    other: int = 0
    lost: int = 0
    twice: int = 0
    longest: float = 0.0
    limit: float = 0.0
    status: list[int] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """Where sessions run, and how: ``select`` are pytest's words for the cells, ``timeout`` is an episode's, in seconds."""

    folder: Path
    select: tuple[str, ...]
    timeout: float
    in_flight: int = 8

    def command(self, model: str, run: str, *more: str) -> list[str]:
        words = ["-m", "pytest", "--pyargs", "pytest_pocket.tasks", "-q", "--tb=no", "-p", "no:randomly"]
        words += ["-p", "no:cacheprovider", f"--pocket-model={model}", f"--pocket-records={run}"]
        words += [f"--pocket-timeout={self.timeout}", f"--pocket-max-turns={TURNS}", "--pocket-fail-under=0"]
        return [sys.executable, *words, f"--pocket-in-flight={self.in_flight}", *self.select, *more]

    def configure(self, url: str) -> None:
        """Let the model ``engine`` be the one behind that address, so that all sessions call it the same."""
        (self.folder / "pyproject.toml").write_text(
            f"[tool.pocket.models.engine]\nbackend = 'openai'\ntarget = '{MODEL}@{url}/v1'\n"
        )

    def start(self, command: Sequence[str], **environment: str) -> Started:
        return Started(command, self.folder, environment)

    def play(self, model: str, run: str, *more: str, **environment: str) -> Session:
        return self.start(self.command(model, run, *more), **environment).end()

    def found(self, run: str) -> list[dict[str, Any]]:
        path = self.folder / run
        return records.load(path)[1] if (path / records.RUN).is_file() else []


class Started:
    """A session that runs."""

    def __init__(self, command: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._began = time.monotonic()
        # What a user has, without what else is installed here; a busy test machine's threads must not starve.
        more = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "pytest_pocket.plugin"}
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **more, **environment},
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def end(self, seconds: float = 3600) -> Session:
        """Wait for its end.  Raises TimeoutExpired."""
        status = self.process.wait(seconds)
        self._output.seek(0)
        said = self._output.read()
        self._output.close()
        return Session(status, time.monotonic() - self._began, said[-3000:])


def cell(record: dict[str, Any]) -> Cell:
    return record["task"], record["prompt"], record["run"]


def judge(
    row: Row, found: list[dict[str, Any]], plain: dict[Cell, float], session: Session, timeout: float
) -> None:
    """Add a session to a row, and note which of the promises were broken."""
    counts = Counter(map(cell, found))
    row.limit = timeout
    row.episodes += len(found)
    row.lost += len(plain.keys() - counts.keys())
    row.twice += sum(count > 1 for count in counts.values())
    infra = 0
    for record in found:
        if record["outcome"] == "infra":
            infra += 1
        elif record["reward"] == plain[cell(record)]:
            row.same += 1
        else:
            row.other += 1
            row.broken.append(
                f"{'-'.join(map(str, cell(record)))}: {record['outcome']}, {record['reward']} and not {plain[cell(record)]}"
            )
    row.infra += infra
    row.longest = max(row.longest, *(record["seconds"] for record in found))
    row.status.append(session.status)
    expected = int(bool(infra))
    if session.status != expected:
        row.broken.append(f"exit status {session.status}, not {expected}: {session.said}")
    if row.lost or row.twice:
        row.broken.append(f"{row.lost} cells lost, {row.twice} there twice: {session.said}")
    if row.longest > timeout + GRACE:
        row.broken.append(f"an episode of {row.longest} s where {timeout} s were allowed")


class Llama:
    """The shipped model in a server that can be killed, as exact as transformers: no reply depends on what else runs."""

    def __init__(self, program: Path, folder: Path) -> None:
        self._program, self._weights = program, folder / f"{MODEL}.gguf"
        gguf_file.write(str(shipped() / MODEL), self._weights, dtype="float32")
        self.deaths = 0
        self._process, self.address = self._start(free_port())

    def _start(self, port: int) -> tuple[Process, str]:
        return started_llama(self._program, self._weights, "-t", "1", *EXACT, seconds=300, port=port)

    def kill(self) -> None:
        """Let the process die."""
        kill(self._process)
        self.deaths += 1

    def revive(self) -> None:
        """Start it again where it was, if it is dead, and wait until it answers."""
        if not self._process.running:
            self._process.close()
            self._process, _ = self._start(int(self.address.rpartition(":")[2]))

    def close(self) -> None:
        """End it."""
        self._process.close()


def rewards(bench: Bench, model: str, run: str, **environment: str) -> dict[Cell, float]:
    """The rewards without faults.  Raises AssertionError where there was one all the same."""
    session = bench.play(model, run, **environment)
    found = bench.found(run)
    assert session.status == 0, session.said
    assert all(record["reward"] is not None for record in found), session.said
    return {cell(record): record["reward"] for record in found}


def engine_fault(
    bench: Bench,
    upstream: str,
    kinds: Sequence[str],
    plain: dict[Cell, float],
    share: float,
    *,
    engine: Llama | None = None,
    streamed: bool = False,
) -> Row:
    """A session with a llama.cpp server behind the proxy, ``engine`` if it may die; ``streamed``: with Ollama there."""
    name = STREAMED if streamed else MIXED if len(kinds) > 1 else kinds[0]
    row, run = Row(name), f"run-{len(list(bench.folder.glob('run-*')))}"
    with fault_proxy.faulty(upstream, kinds, share, SEED, engine) as proxy:
        if streamed:
            session = bench.play(f"ollama:{MODEL}", run, OLLAMA_HOST=proxy.url)
        else:
            bench.configure(proxy.url)
            session = bench.play("engine", run)
        row.injected = sum(proxy.injected.values())
    judge(row, bench.found(run), plain, session, bench.timeout)
    return row


def interrupted(
    name: str,
    bench: Bench,
    model: str,
    plain: dict[Cell, float],
    times: int,
    disturb: Callable[[Started, str], int],
    good: Callable[[int], bool],
    *options: str,
) -> Row:
    """A run that is disturbed so many times, in sessions that go on with it, and then is left alone."""
    row, run = Row(name), f"run-{name.replace(' ', '-')}"
    held: set[str] = set()
    for _ in range(times):
        started = bench.start(bench.command(model, run, "--pocket-resume", *options))
        row.injected += disturb(started, run)
        session = started.end()
        row.status.append(session.status)
        found = bench.found(run)
        lines = {json.dumps(record, sort_keys=True) for record in found}
        if not held <= lines:
            row.broken.append("records that were there have gone")
        held = lines
        finished = len({cell(record) for record in found}) == len(plain)
        if not (good(session.status) or (finished and session.status == 0)):
            row.broken.append(f"exit status {session.status}: {session.said}")
    session = bench.play(model, run, "--pocket-resume")
    judge(row, bench.found(run), plain, session, bench.timeout)
    return row


def count_of(bench: Bench, run: str) -> int:
    path = bench.folder / run / records.EPISODES
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def send(bench: Bench, number: signal.Signals, moments: random.Random) -> Callable[[Started, str], int]:
    """Send a signal at a random moment: in the middle of the start, or some episodes later."""

    def disturb(started: Started, run: str) -> int:
        if moments.random() < 0.3:
            time.sleep(moments.uniform(0.0, 1.5))
        else:
            wait_for_more(bench, started, run, moments.randint(0, 6))
            time.sleep(moments.uniform(0.0, 0.2))
        if started.process.poll() is not None:
            return 0
        started.process.send_signal(number)
        return 1

    return disturb


def kill_workers(bench: Bench, moments: random.Random, times: int) -> Callable[[Started, str], int]:
    """Kill so many of a session's xdist workers, each after some episodes more."""

    def disturb(started: Started, run: str) -> int:
        killed = 0
        for _ in range(times):
            wait_for_more(bench, started, run, moments.randint(1, 6))
            asked = ["pgrep", "-P", str(started.process.pid)]
            told = subprocess.run(asked, capture_output=True, text=True)
            workers = [int(pid) for pid in told.stdout.split() if b"exec(eval(" in _words(pid)]
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(moments.choice(workers), signal.SIGKILL)
                killed += 1
        return killed

    return disturb


def wait_for_more(bench: Bench, started: Started, run: str, episodes: int) -> None:
    """Wait until there are so many records more than now, or the session has ended."""
    wanted = count_of(bench, run) + episodes
    while started.process.poll() is None and count_of(bench, run) < wanted:
        time.sleep(0.01)


def _words(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def full_disk(bench: Bench, model: str, plain: dict[Cell, float]) -> Row:
    """Records on a disk with room for a third of what is needed; then a session that resumes them elsewhere."""
    row, run = Row("full disk"), "run-full"
    plain_run = bench.folder / "run-plain"
    size = (plain_run / records.EPISODES).stat().st_size // 3 + (plain_run / records.RUN).stat().st_size
    small = ["--size", str(size), "--tmpfs", str(bench.folder / DISK), "--chdir", str(bench.folder)]
    # The session's own sandboxes are made inside: where root makes them, it needs its capabilities for that.
    root = [] if os.geteuid() else ["--cap-add", "ALL"]
    command = ["bwrap", *root, "--dev-bind", "/", "/", *small, "--", "sh", "-c", KEEP, "sh"]
    session = bench.start([*command, *bench.command(model, f"{DISK}/run")]).end()
    row.injected, row.status = 1, [session.status]
    if session.status in (0, 1) or "cannot write records" not in session.said:
        row.broken.append(f"exit status {session.status}: {session.said}")
    kept = count_of(bench, run)
    if not 0 < kept < len(plain):
        row.broken.append(f"{kept} records of {len(plain)} on a disk that has room for a third")
    session = bench.play(model, run, "--pocket-resume")
    judge(row, bench.found(run), plain, session, bench.timeout)
    return row


def jumping_clock(bench: Bench, model: str, plain: dict[Cell, float]) -> Row:
    """A wall clock that jumps by hours, back and forth."""
    (bench.folder / "jumping.py").write_text(JUMPING)
    row, run = Row("clock jumps", injected=1), "run-clock"
    session = bench.play(model, run, "-p", "jumping", PYTHONPATH=str(bench.folder))
    judge(row, bench.found(run), plain, session, bench.timeout)
    return row


def failed(status: int) -> bool:
    """A test was reported as failed; or xdist gave up, as it does when a worker dies before it can speak."""
    return status in (1, 3)


def ended_by(number: signal.Signals) -> Callable[[int], bool]:
    """The exit statuses of a session that a signal has ended: pytest's own, and before it was there the signal's."""
    return lambda status: status == -number or (number == signal.SIGINT and status == 2)


def session_faults(bench: Bench, model: str, times: int) -> dict[str, Callable[[], Row]]:
    """What happens to sessions rather than to engines: rows by name.  The run without faults is played once."""
    workers = ("-p", "xdist", "-n", "2")
    plain = functools.cache(lambda: rewards(bench, model, "run-plain"))

    def killed(name: str) -> Row:
        kill = kill_workers(bench, random.Random(7), times)
        return interrupted(name, bench, model, plain(), 1, kill, failed, *workers)

    def ended(name: str, number: signal.Signals, *options: str) -> Row:
        disturb = send(bench, number, random.Random(name))
        return interrupted(name, bench, model, plain(), times, disturb, ended_by(number), *options)

    rows = {
        "full disk": lambda: full_disk(bench, model, plain()),
        "clock jumps": lambda: jumping_clock(bench, model, plain()),
        "worker killed": lambda: killed("worker killed"),
    }
    for number in (signal.SIGINT, signal.SIGTERM):
        rows[number.name] = functools.partial(ended, number.name, number)
        called = f"{number.name} with xdist"
        rows[called] = functools.partial(ended, called, number, *workers)
    return rows
