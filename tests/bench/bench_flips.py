"""How often batching flips an outcome: the same greedy episodes one at a time and many in flight.

Batching changes the order of floating-point sums, so a near tie between two tokens may fall the other way.

    python tests/bench/bench_flips.py --model sft-run6 --runs 3 --out reports/bench/flips.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from setting import setting, write

from pytest_pocket.backends.hf import HFBackend
from pytest_pocket.conditions import Condition
from pytest_pocket.registry import Registry
from pytest_pocket.training.evaluate import episodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sft-run6")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    where = setting("torch", "transformers")
    backend = HFBackend(Registry().resolve(options.model).target)
    counts = {
        "model": options.model,
        "in_flight": options.in_flight,
        "episodes": 0,
        "outcomes_flipped": 0,
        "texts_differ": 0,
    }
    for prompt in ("raw", "full"):
        one, many = (
            episodes(backend, "eval", options.runs, Condition(prompt), in_flight)
            for in_flight in (1, options.in_flight)
        )
        counts["episodes"] += len(one)
        counts["outcomes_flipped"] += sum(a.outcome != b.outcome for a, b in zip(one, many, strict=True))
        counts["texts_differ"] += sum(a.messages != b.messages for a, b in zip(one, many, strict=True))
    backend.close()
    counts["flip_rate"] = round(counts["outcomes_flipped"] / counts["episodes"], 4)
    write({**counts, "setting": where}, options.out)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
