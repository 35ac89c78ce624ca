"""How the suite holds up when it grows: 10,000 episodes, 60,800 tests, and no episode at all.

Run as ``python tests/bench/bench_scale.py --out reports/bench/scale.json``.  Everything runs as a user's pytest does, in processes
of its own, with no plugin but ours.  The episodes are the toy's of bench_episodes.py with its instant model and, unless
``--sandbox bwrap`` is given, its sandbox in memory: what is left is what the session itself costs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_episodes import toy_project
from setting import setting, write

LIMITS = {
    "episodes_peak_mib": 300,
    "slowdown_100_to_10000": 1.1,
    "collection_s": 5,
    "collection_peak_mib": 500,
    "import_ms": 60,
    "unused_ms": 20,
}
SIZES = (100, 1_000, 10_000)


@dataclass(frozen=True)
class Cost:
    """What a process took: wall and CPU seconds, and the peak of its memory (MiB)."""

    wall: float
    cpu: float
    peak: float
    output: str


def cost(*command: str, folder: Path | str = ".") -> Cost:
    """Run a command to its end.  Its children's CPU counts, their memory where it is more."""
    # What a user has: compiled modules are kept, and this project's other plugins are not loaded.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command], stdout=output, stderr=output, cwd=folder, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{text[-3000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, text)


def pytest(*words: str, folder: Path | str = ".", plugin: bool = True) -> Cost:
    ours = ("-p", "pytest_pocket.plugin") if plugin else ()
    return cost("-m", "pytest", "-q", "-p", "no:cacheprovider", *ours, *words, folder=folder)


def episodes(count: int, sandbox: str) -> dict[str, float]:
    """A session of so many episodes: how many a second, and its peak of memory."""
    with tempfile.TemporaryDirectory() as name:
        toy_project(Path(name), null=sandbox == "null")
        words = [f"--pocket-runs={count}", "--pocket-model=instant", "--pocket-prompt=raw"]
        words += ["--pocket-records=run", *([] if sandbox == "null" else [f"--pocket-sandbox={sandbox}"])]
        taken = pytest(".", *words, folder=name)
        lines = Path(name, "run", "episodes.jsonl").read_text().count("\n")
        assert lines == count, f"{lines} records of {count} episodes"
        seconds, cpu = map(float, Path(name, "seconds").read_text().split())
    return {
        f"episodes_per_s_{count}": count / seconds,
        f"own_cpu_ms_per_episode_{count}": 1000 * cpu / count,
        f"seconds_{count}": taken.wall,
        f"peak_mib_{count}": taken.peak,
    }


def collection() -> dict[str, float]:
    """19 tasks x 100 runs x 8 conditions x 4 models: as pytest times it, and the command with its start and its list."""
    words = ["--pyargs", "pytest_pocket.tasks", "--collect-only", "--pocket-model=oracle,noop,base,rlvr-v1"]
    words += ["--pocket-runs=100", "--pocket-think=off,on", "--pocket-temperature=0,0.7"]
    with tempfile.TemporaryDirectory() as name:
        taken = pytest(*words, folder=name)
    told = re.search(r"60800 tests collected in ([\d.]+)s", taken.output)
    assert told, taken.output[-500:]
    return {
        "collection_s": float(told[1]),
        "collection_command_s": taken.wall,
        "collection_command_cpu_s": taken.cpu,
        "collection_peak_mib": taken.peak,
    }


def start() -> dict[str, float]:
    """Milliseconds: an import, and what the plugin adds to a pytest that has no use for it."""
    said = cost(
        "-c", "import time; s = time.perf_counter(); import pytest_pocket; print(time.perf_counter() - s)"
    )
    with tempfile.TemporaryDirectory() as name:
        Path(name, "test_one.py").write_text("def test_one():\n    pass\n")
        without, with_it = (pytest(folder=name, plugin=plugin) for plugin in (False, True))
    return {
        "import_ms": 1000 * float(said.output),
        "pytest_ms": 1000 * without.wall,
        "unused_ms": 1000 * (with_it.wall - without.wall),
        "unused_cpu_ms": 1000 * (with_it.cpu - without.cpu),
    }


def measure(repeats: int, sandbox: str, sizes: tuple[int, ...]) -> dict[str, list[float]]:
    """The samples by name.  The largest run and the collection are long, and repeated three times at most."""
    found: dict[str, list[float]] = {}
    start()
    for repeat in range(repeats):
        parts = [start() for _ in range(3)]
        parts += [episodes(count, sandbox) for count in sizes if count < 5_000 or repeat < 3]
        if repeat < 3:
            parts.append(collection())
        for part in parts:
            for name, value in part.items():
                found.setdefault(name, []).append(round(value, 3))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sandbox", choices=("null", "bwrap"), default="null")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    options = parser.parse_args()
    where = setting(sandbox=options.sandbox, repeats=options.repeats)
    samples = measure(options.repeats, options.sandbox, tuple(options.sizes))
    medians = {name: round(statistics.median(values), 3) for name, values in samples.items()}
    small, large = min(options.sizes), max(options.sizes)
    medians["episodes_peak_mib"] = medians[f"peak_mib_{large}"]
    slower = medians[f"episodes_per_s_{small}"] / medians[f"episodes_per_s_{large}"]
    medians[f"slowdown_{small}_to_{large}"] = round(slower, 3)
    report: dict[str, Any] = {
        "medians": medians,
        "limits": LIMITS,
        "kept": {name: medians[name] <= limit for name, limit in LIMITS.items() if name in medians},
        "samples": samples,
        "setting": where,
    }
    print(json.dumps({key: report[key] for key in ("medians", "kept", "setting")}, indent=2))
    write(report, options.out)


if __name__ == "__main__":
    main()
