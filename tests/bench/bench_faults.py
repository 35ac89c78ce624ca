"""What becomes of episodes when engines, disks, clocks, workers and terminals fail: 1,000 episodes, and more.

Run as ``python tests/bench/bench_faults.py --episodes 1000 --out reports/bench/faults.json``; docs/faults.md is rendered from
that.  Sessions of pytest play the shipped tasks with the shipped model in a real ``llama-server`` (and, streamed, in the double
of Ollama in front of one), a session for each fault of tests/fault_proxy.py.  What is held against a
session without faults, and what it promises, is in tests/fault_sessions.py.  Ends with 1 where something did not hold.
The file is written row by row; ``--only NAME,...`` measures these rows anew and keeps the others that are there: each row says
its commit.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine_fixtures
import fault_proxy
import fault_sessions
from fault_sessions import GRACE, MIXED, MODEL, STREAMED, TASKS, TURNS, Bench, Llama, Row, rewards
from setting import setting, write

ENGINES = (*fault_proxy.FAULTS, MIXED, STREAMED)
CALM = 10
"""By how much the limit of an episode is longer where no fault lasts until it: a busy machine must not decide there."""


@contextmanager
def measured(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Callable[[], Row]]]:
    """The rows by name: faults of engines, then of sessions."""
    program = engine_fixtures.find("llama-server", "llama.sh")
    # An engine that dies is an outage for all that is asked of it, and other faults would not show.
    together = [kind for kind in fault_proxy.FAULTS if kind != "dies"]
    runs = -(-options.episodes // (2 * len(TASKS) * len(ENGINES)))
    bench = Bench(folder, ("-k", " or ".join(TASKS), f"--runs={runs}"), options.timeout)
    calm = replace(bench, timeout=CALM * options.timeout)
    with closing(Llama(program, folder)) as engine:
        bench.configure(engine.address)
        plain = rewards(calm, "engine", "run-plain")

        def behind_a_proxy(*kinds: str) -> Row:
            limited = bench if fault_proxy.ENDLESS.intersection(kinds) else calm
            return fault_sessions.engine_fault(
                limited, engine.address, kinds, plain, options.share, engine=engine
            )

        def streamed() -> Row:
            given = ("--model", f"{MODEL}={folder / MODEL}.gguf")
            with engine_fixtures.started_double(program, *given) as (_, host):
                without = rewards(calm, f"ollama:{MODEL}", "run-streamed", OLLAMA_HOST=host)
                return fault_sessions.engine_fault(
                    bench, host, together, without, options.share, streamed=True
                )

        (folder / "sessions").mkdir()
        small = Bench(
            folder / "sessions", (*bench.select[:2], "--runs=2"), CALM * options.timeout, in_flight=2
        )
        small.configure(engine.address)
        yield {
            **{kind: partial(behind_a_proxy, kind) for kind in fault_proxy.FAULTS},
            MIXED: partial(behind_a_proxy, *together),
            STREAMED: streamed,
            **fault_sessions.session_faults(small, "engine", options.times),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--episodes", type=int, default=1000, help="at least so many under engines' faults")
    parser.add_argument("--share", type=float, default=0.2, help="of the requests that meet a fault")
    parser.add_argument("--timeout", type=float, default=30.0, help="of an episode that may hang, in seconds")
    parser.add_argument("--times", type=int, default=5, help="how often a session is ended, for each way")
    parser.add_argument("--only", help="the rows to measure, comma separated", default="")
    options = parser.parse_args()
    # A shell's background job ignores interrupts, and so would all sessions that it starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    where = setting("openai", "ollama")
    wanted = list(filter(None, options.only.split(",")))
    known: dict[str, dict[str, Any]] = {}
    if wanted and options.out and options.out.is_file():
        known = {row["fault"]: row for row in json.loads(options.out.read_text())["rows"]}

    with tempfile.TemporaryDirectory() as folder, measured(options, Path(folder)) as rows:
        if unknown := set(wanted).difference(rows):
            parser.error(f"unknown rows {', '.join(unknown)}: choose from {', '.join(rows)}")
        for name, row in rows.items():
            if not wanted or name in wanted:
                known[name] = {**asdict(row()), "commit": where["commit"]}
                print(json.dumps(known[name]), flush=True)
                write(report(options, known, list(rows), where), options.out)
        order = list(rows)
    broken = [f"{row['fault']}: {line}" for row in known.values() for line in row["broken"]]
    played = report(options, known, order, where)["episodes"]
    if played < options.episodes:
        broken.append(f"{played} episodes under engines' faults, not {options.episodes}")
    for line in broken:
        print(f"broken: {line}", file=sys.stderr)
    sys.exit(bool(broken))


def report(
    options: argparse.Namespace, known: dict[str, dict[str, Any]], order: list[str], where: dict[str, Any]
) -> dict[str, Any]:
    """What the file holds."""
    return {
        "episodes": sum(row["episodes"] for name, row in known.items() if name in ENGINES),
        "totals": {
            key: sum(row[key] for row in known.values()) for key in ("infra", "other", "lost", "twice")
        },
        "rows": [known[name] for name in order if name in known],
        "setting": {
            "model": MODEL,
            "tasks": len(TASKS),
            "share_of_requests": options.share,
            "grace_s": GRACE,
            "turns": TURNS,
            **where,
        },
    }


if __name__ == "__main__":
    main()
