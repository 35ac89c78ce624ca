"""The embedded model through the 19 tasks, raw and full, three runs: a whole session's seconds and memory.

python tests/bench/bench_embedded.py --out reports/bench/embedded.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from bench_scale import pytest
from setting import setting, write

MODEL = "sft-run6"
LIMITS = {"seconds": 60.0, "peak_mib": 2048.0}


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    where = setting("torch", "transformers", model=MODEL)
    samples: dict[str, list[float]] = {"seconds": [], "peak_mib": []}
    episodes = 0
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            words = ("--pyargs", "pytest_pocket.tasks", f"--pocket-model={MODEL}", "--pocket-prompt=raw,full")
            # The models' failures are no failure of the session here.
            spent = pytest(*words, "--runs=3", "--pocket-fail-under=0", folder=folder)
            records = next(Path(folder).glob(".pocket/runs/*/episodes.jsonl"))
            episodes = len(records.read_text().splitlines())
        samples["seconds"].append(round(spent.wall, 2))
        samples["peak_mib"].append(round(spent.peak, 1))
    result = {
        "episodes": episodes,
        "samples": samples,
        "medians": {name: statistics.median(values) for name, values in samples.items()},
        "limits": LIMITS,
        "setting": where,
    }
    write(result, options.out)
    print(json.dumps(result["medians"]))


if __name__ == "__main__":
    main()
