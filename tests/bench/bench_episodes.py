"""How fast the suite itself is: an instant scripted model, three turns, two sandboxed calls an episode.

Run as ``python tests/bench/bench_episodes.py --out reports/bench/episodes.json``; ``--profile`` shows where
the time goes.  Variants alternate within each repeat, so that a machine's slow moments fall on all of them
alike; medians, and ratios to the serial loop, are printed.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setting import setting, write

from pytest_pocket import records
from pytest_pocket.chat import ChatReply, ChatRequest, ToolCall
from pytest_pocket.conditions import Condition
from pytest_pocket.episode import Episode, Workshop, play
from pytest_pocket.registry import Model
from pytest_pocket.sandbox import CommandResult, FileState, Limits
from pytest_pocket.sandbox.bubblewrap import BubblewrapProvider
from pytest_pocket.task import Check, Draw, Final, Instance, Problem, Score, Solution, Task, score

TURNS = 3
XDIST_REPEATS = 5
"""Sessions of pytest are dear."""
EVAL = 2 * 10**9
CALLS = {
    "no_calls": (),
    "two_empty_calls": (":", ":"),
    "two_calls": ("cat app.ini", "ls; cat README.md"),
}
"""What the sandbox itself costs, with calls that start no program, and what the three of the toy's two calls add."""
CONFTEST = """
import sys
import time

import pytest

sys.path.insert(0, {here!r})
import bench_episodes
from pytest_pocket import sandbox

if {null}:
    sandbox.select = lambda name: bench_episodes.NullProvider()


class Toy(bench_episodes.Toy):
    pass


def pytest_pocket_tasks():
    return [Toy()]


def pytest_pocket_models():
    return [bench_episodes.MODEL]


def pytest_pocket_backends():
    return {{"scripted": lambda model: bench_episodes.Instant()}}


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop():
    wall, cpu = time.perf_counter(), time.process_time()
    result = yield
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    open("seconds", "w").write(f"{{wall}} {{cpu}}")
    return result
"""
"""A project whose one task is the toy; it notes how long the tests took, without start and summary."""


class Toy(Task):
    """Read a file, run a command, answer."""

    name = "bench_toy"
    group = "read"

    def make(self, draw: Draw) -> Problem:
        value = str(draw.number(1000, 9999))
        files = {
            "app.ini": f"[main]\nport = {value}\n",
            "README.md": "# toy\n" * 20,
            "src/a.py": "x = 1\n" * 50,
        }
        return Problem("Which port is in app.ini?", files, {"value": value})

    def solve(self, instance: Instance) -> Solution:
        yield ToolCall("Read", {"file_path": "app.ini"})
        yield ToolCall("Bash", {"command": "ls; cat README.md"})
        return str(instance.expect["value"])

    def reward(self, instance: Instance, final: Final) -> Score:
        return score(final, Check("value", float(final.answer == instance.expect["value"])))


class Instant:
    """Knows the three replies of every instance."""

    def chat(self, request: ChatRequest) -> ChatReply:
        results = [message.content for message in request.messages if message.role == "tool"]
        if not results:
            return ChatReply("", calls=(ToolCall("Read", {"file_path": "app.ini"}),), completion_tokens=20)
        if len(results) == 1:
            return ChatReply(
                "", calls=(ToolCall("Bash", {"command": "ls; cat README.md"}),), completion_tokens=20
            )
        found = re.search(r"port = (\d+)", results[0])
        return ChatReply(found[1] if found else "", completion_tokens=5)

    def cancel(self) -> None: ...

    def close(self) -> None: ...


class NullSandbox:
    """Answers at once, from memory: what remains is the loop's own time."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self.files = files
        self.state = {path: FileState("file", text.encode()) for path, text in files.items()}

    def run(self, script: str, *, stdin: bytes = b"", seconds: float | None = None) -> CommandResult:
        return CommandResult(0, self.files["app.ini"].encode())

    def snapshot(self) -> Mapping[str, FileState]:
        return self.state

    def close(self) -> None: ...


class NullProvider:
    name = "null"
    caveat = ""

    def probe(self) -> None: ...

    def open(self, files: Mapping[str, str], limits: Limits = Limits()) -> NullSandbox:
        return NullSandbox(files)


class Cell:
    run, sample = 1, 0


TASK = Toy()
MODEL = Model("instant", "scripted")


def one(number: int, workshop: Workshop, run: records.Run) -> Episode:
    """One whole episode as a session plays it: built, played, recorded."""
    episode = play(TASK, TASK.build(EVAL + number), Instant(), workshop, Condition("full"))
    assert episode.outcome == "passed", (episode.outcome, episode.detail)
    run.append(records.record(cell=Cell(), model=MODEL, episode=episode, split="eval", group="read"))
    return episode


def episodes(count: int, in_flight: int, workshop: Workshop, folder: Path) -> float:
    """Episodes per second."""
    run = records.start(folder / f"{time.monotonic_ns()}", {"schema": records.SCHEMA})
    start = time.perf_counter()
    if in_flight == 1:
        for number in range(count):
            one(number, workshop, run)
    else:
        with ThreadPoolExecutor(in_flight) as pool:
            list(pool.map(lambda number: one(number, workshop, run), range(count)))
    return count / (time.perf_counter() - start)


def own_milliseconds_a_turn(count: int, folder: Path) -> float:
    return 1000 / episodes(count, 1, Workshop(NullProvider()), folder) / TURNS


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def sandbox_milliseconds(count: int, *scripts: str) -> tuple[float, float]:
    """CPU and wall milliseconds of one sandbox: opened with three files, called, closed."""
    provider, files = BubblewrapProvider(), TASK.build(EVAL).files
    cpu, wall = cpu_seconds(), time.perf_counter()
    for _ in range(count):
        sandbox = provider.open(files)
        for script in scripts:
            sandbox.run(script)
        sandbox.close()
    return 1000 * (cpu_seconds() - cpu) / count, 1000 * (time.perf_counter() - wall) / count


def toy_project(folder: Path, *, null: bool) -> None:
    """A project with the toy and its instant model; with ``null`` its sandbox is in memory."""
    (folder / "conftest.py").write_text(CONFTEST.format(here=str(Path(__file__).parent), null=null))


def xdist_episodes(workers: int, count: int) -> float:
    """Episodes per second through pytest, less its start."""

    def seconds(runs: int) -> float:
        with tempfile.TemporaryDirectory() as name:
            toy_project(Path(name), null=False)
            command = [sys.executable, "-m", "pytest", "-q", ".", f"-n{workers}", "--pocket-model=instant"]
            command += ["--pocket-prompt=full", f"--pocket-runs={runs}", "--pocket-records=run"]
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, cwd=name)
            taken = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"pytest -n {workers} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return taken

    return count / (seconds(count + workers) - seconds(workers))


def measure(count: int, repeats: int) -> dict[str, list[float]]:
    """The samples of every variant, by name."""
    workshop = Workshop(BubblewrapProvider())
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        episodes(4, 1, workshop, folder)
        variants: dict[str, Callable[[], float]] = {
            "serial_episodes_per_s": lambda: episodes(count, 1, workshop, folder),
            "in_flight_8_episodes_per_s": lambda: episodes(count, 8, workshop, folder),
            "in_flight_32_episodes_per_s": lambda: episodes(count, 32, workshop, folder),
            "own_ms_per_turn": lambda: own_milliseconds_a_turn(count, folder),
        }
        for repeat in range(repeats):
            for label, variant in variants.items():
                found.setdefault(label, []).append(variant())
            for label, scripts in CALLS.items():
                cpu, wall = sandbox_milliseconds(count // 2, *scripts)
                found.setdefault(f"sandbox_{label}_cpu_ms", []).append(cpu)
                found.setdefault(f"sandbox_{label}_wall_ms", []).append(wall)
            if repeat < XDIST_REPEATS:
                found.setdefault("xdist_2_episodes_per_s", []).append(xdist_episodes(2, 4 * count))
    return found


def profile(count: int) -> None:
    """Print where a serial run spends its time: with a null sandbox, then with the real one."""
    with tempfile.TemporaryDirectory() as name:
        for workshop in (Workshop(NullProvider()), Workshop(BubblewrapProvider())):
            profiler = cProfile.Profile()
            profiler.runcall(episodes, count, 1, workshop, Path(name))
            print(f"\n{workshop.provider.name}")
            pstats.Stats(profiler).sort_stats("tottime").print_stats(18)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--episodes", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if options.profile:
        profile(options.episodes)
        return
    where = setting(episodes=options.episodes, turns=TURNS, sandboxed_calls=2)
    samples = measure(options.episodes, options.repeats)
    medians = {label: round(statistics.median(values), 3) for label, values in samples.items()}
    serial = medians["serial_episodes_per_s"]
    report: dict[str, Any] = {
        "medians": medians,
        "ratios_to_serial": {
            label: round(value / serial, 3)
            for label, value in medians.items()
            if label.startswith(("in_flight", "xdist"))
        },
        "samples": {label: [round(value, 3) for value in values] for label, values in samples.items()},
        "setting": where,
    }
    print(json.dumps({key: report[key] for key in ("medians", "ratios_to_serial", "setting")}, indent=2))
    write(report, options.out)


if __name__ == "__main__":
    main()
