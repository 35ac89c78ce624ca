"""What becomes of episodes when engines, disks, clocks, workers and terminals fail: 1,000 episodes, and more.

Run as ``python tests/bench/bench_faults.py --episodes 1000 --out reports/bench/faults.json``; docs/faults.md is rendered from
that.  Sessions of pytest play the shipped tasks with the shipped model in a real ``llama-server`` (and, streamed, in the double
of Ollama in front of one), a session for each fault of tests/fault_proxy.py.  What is held against a
session without faults, and what it promises, is in tests/fault_sessions.py.  Ends with 1 where something did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine_fixtures
import fault_proxy
import fault_sessions
from fault_sessions import GRACE, MODEL, TASKS, TURNS, Bench, Row, rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument(
        "--episodes", type=int, default=1000, help="at least so many under an engine's faults"
    )
    parser.add_argument("--share", type=float, default=0.08, help="of the requests that meet a fault")
    parser.add_argument("--timeout", type=float, default=30.0, help="of an episode, in seconds")
    parser.add_argument("--times", type=int, default=5, help="how often a session is killed, for each way")
    options = parser.parse_args()
    program = engine_fixtures.find("llama-server", "llama.sh")
    kinds = fault_proxy.FAULTS
    per_run = 2 * len(TASKS)
    runs = -(-options.episodes // (per_run * (len(kinds) + 2)))
    load = os.getloadavg()[0]
    began = time.monotonic()
    rows: list[Row] = []

    def told(row: Row) -> None:
        print(json.dumps(asdict(row)), flush=True)
        rows.append(row)

    with tempfile.TemporaryDirectory() as name:
        chosen = ("-k", " or ".join(TASKS), f"--runs={runs}")
        bench = Bench(Path(name), chosen, options.timeout)
        with fault_sessions.llama(program, bench.folder) as upstream:
            bench.configure(upstream)
            calm = replace(bench, timeout=600.0)
            plain = rewards(calm, "engine", "run-plain")
            for kind in kinds:
                told(fault_sessions.engine_fault(bench, upstream, [kind], plain, options.share))
            told(fault_sessions.engine_fault(bench, upstream, kinds, plain, options.share))
        given = ("--model", f"{MODEL}={bench.folder / MODEL}.gguf")
        with engine_fixtures.started_double(program, *given) as (_, host):
            streamed = rewards(calm, f"ollama:{MODEL}", "run-streamed", OLLAMA_HOST=host)
            told(fault_sessions.streamed_fault(bench, host, kinds, streamed, options.share))
        engines = sum(row.episodes for row in rows)
        (bench.folder / "oracle").mkdir()
        small = Bench(bench.folder / "oracle", ("--runs=3",), options.timeout, in_flight=2)
        for row in fault_sessions.session_faults(
            small, "oracle", rewards(small, "oracle", "run-plain"), options.times
        ):
            told(row)
    broken = [f"{row.fault}: {line}" for row in rows for line in row.broken]
    if engines < options.episodes:
        broken.append(f"{engines} episodes under engines' faults, not {options.episodes}")
    report = {
        "episodes": engines,
        "rows": [asdict(row) for row in rows],
        "setting": {
            "model": MODEL,
            "tasks": len(TASKS),
            "runs": runs,
            "share_of_requests": options.share,
            "timeout_s": options.timeout,
            "grace_s": GRACE,
            "turns": TURNS,
            "seconds": round(time.monotonic() - began),
            "cores": os.cpu_count(),
            "load_before": round(load, 2),
            "python": platform.python_version(),
        },
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["setting"]))
    for line in broken:
        print(f"broken: {line}", file=sys.stderr)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
