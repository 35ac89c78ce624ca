"""What Ray costs an episode: the oracle on the 19 tasks, one at a time, in a pool, on one machine of Ray and on two.

Run as ``python tests/bench/bench_ray.py --out reports/bench/ray.json``.  Each figure is the difference of two sessions, the
longer less the shorter, so that starts do not count.  The machines are local: processes of Ray's own with a CPU each,
or one with two, on the same processors, so that two of them show what a second machine costs, not what it gains.
Variants alternate within each repeat, so that a machine's slow moments fall on all of them; take the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from setting import setting, write

TASKS = 19
SESSION = """
import json, re, resource, sys
import pytest
status = pytest.main(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_SELF)
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
print(json.dumps({"cpu": used.ru_utime + used.ru_stime, "mib": peak}), file=open(sys.argv[1], "w"))
sys.exit(status)
"""
"""A session that says what its own process used: not its sandboxes, and not the machines of Ray.

Not ``ru_maxrss``, which begins at what this process, with Ray in it, held when it started the session.
"""


def session(runs: int, *options: str) -> tuple[float, float, float]:
    """Seconds, CPU seconds of the session's own process, its peak in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", SESSION, f"{folder}/used", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "no:randomly", "--pyargs", "pytest_pocket.tasks", "--pocket-model=oracle"]
        command += ["--pocket-prompt=raw", f"--runs={runs}", f"--pocket-records={folder}/run", *options]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        taken = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{command} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        used = json.loads(Path(folder, "used").read_text())
        return taken, used["cpu"], used["mib"]


@contextmanager
def machines(*cpus: int) -> Iterator[None]:
    """A local cluster, which sessions find by RAY_ADDRESS."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for count in cpus:
            cluster.add_node(num_cpus=count, object_store_memory=80 * 2**20, include_dashboard=False)
        os.environ["RAY_ADDRESS"] = cluster.address
        yield
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        cluster.shutdown()


def variants(few: int, many: int) -> dict[str, dict[str, float]]:
    """One measurement of every variant."""

    def between(*options: str) -> dict[str, float]:
        short, long = session(few, *options), session(many, *options)
        count = TASKS * (many - few)
        return {
            "ms_per_episode": 1000 * (long[0] - short[0]) / count,
            "own_cpu_ms_per_episode": 1000 * (long[1] - short[1]) / count,
            "start_s": short[0] - (long[0] - short[0]) * few / (many - few),
            "peak_mib": long[2],
        }

    found = {"serial": between("--pocket-in-flight=1"), "pool_8": between("--pocket-in-flight=8")}
    for name, cpus in {"ray_1_machine": (2,), "ray_2_machines": (1, 1)}.items():
        with machines(*cpus):
            session(few, "--pocket-in-flight=8", "--pocket-executor=ray")  # the machines' own start
            found[name] = between("--pocket-in-flight=8", "--pocket-executor=ray")
    return found


def tasks(count: int) -> dict[str, float]:
    """What an empty task costs with an attempt's freight: milliseconds of wall time, and of this process's CPU."""
    import ray

    from pytest_pocket import options as asked
    from pytest_pocket.cluster import packed
    from pytest_pocket.registry import Registry

    registry = Registry()
    read = asked.read(lambda name: "oracle" if name == "model" else "")
    kit = packed(read, "none", [registry.resolve("oracle")], registry, [], Path.cwd())
    with machines(2):
        ray.init(log_to_driver=False, logging_level="ERROR")
        empty = ray.remote(num_cpus=1)(lambda kit, answer: answer)
        answer = os.urandom(8192)
        ray.get([empty.remote(kit, answer) for _ in range(20)])
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(count // 16):
            ray.get([empty.remote(kit, answer) for _ in range(16)])
        wall, own = time.perf_counter() - start, time.process_time() - cpu
        ray.shutdown()
    played = count // 16 * 16
    return {"empty_task_ms": 1000 * wall / played, "empty_task_own_cpu_ms": 1000 * own / played}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--few", type=int, default=1, help="runs of the shorter session")
    parser.add_argument("--many", type=int, default=11, help="runs of the longer one")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    episodes = TASKS * (options.many - options.few)
    where = setting("ray", episodes=episodes, repeats=options.repeats)
    samples: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        flat = {
            f"{variant}_{name}": value
            for variant, found in variants(options.few, options.many).items()
            for name, value in found.items()
        }
        for name, value in {**flat, **tasks(800)}.items():
            samples.setdefault(name, []).append(round(value, 3))
    medians = {name: round(statistics.median(values), 3) for name, values in samples.items()}
    pool = samples["pool_8_ms_per_episode"]
    report: dict[str, Any] = {
        "medians": medians,
        "ratios_to_pool_8": {
            name: round(statistics.median(a / b for a, b in zip(samples[name], pool, strict=True)), 3)
            for name in samples
            if name.endswith("_ms_per_episode") and "_own_" not in name
        },
        "samples": samples,
        "setting": where,
    }
    print(json.dumps({key: report[key] for key in ("medians", "ratios_to_pool_8", "setting")}, indent=2))
    write(report, options.out)


if __name__ == "__main__":
    main()
