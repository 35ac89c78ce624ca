"""The same episodes through Inspect AI, mini-swe-agent, verifiers and us, alternating, at equal concurrency.

Run as ``sh tests/bench/peers/setup.sh && python tests/bench/peers/compare.py --out reports/bench/peers.json``.  What each peer
does, and how it was set up to be fast, stands in its script; what isolation it has without Docker stands in the result.  The toy
of toy.py is played at each of IN_FLIGHT, the 19 tasks as suite.py writes them 8 at a time.  Our tasks score workspaces by their
own checks, some by hidden tests in a second sandbox; the peers' are held against the answer alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from setting import setting, write

HERE = Path(__file__).parent
PEERS = HERE.parents[2] / ".peers"
IN_FLIGHT = (1, 8, 32)
SUITE_IN_FLIGHT = 8
SUITE = "19 tasks"
US = "pytest-pocket"
# Commands meet the system's programs, as in our sandbox, and not a version manager's slow python3.
ENVIRONMENT = {**os.environ, "PATH": "/usr/local/bin:/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Peer:
    """A framework: its script and interpreter, and how many toys it plays at each of IN_FLIGHT, about 2 s each.

    ``rounds`` is how often it plays the 19 tasks.
    """

    script: str
    python: Path
    episodes: tuple[int, int, int]
    rounds: int
    environment: dict[str, str] = field(default_factory=dict)

    def rates(self, suite: Path) -> dict[str, Any]:
        """What its script says: version, isolation, and episodes per second by number in flight."""
        toys = self._run("--in-flight", *map(str, IN_FLIGHT), "--episodes", *map(str, self.episodes))
        tasks = self._run(
            *("--in-flight", str(SUITE_IN_FLIGHT), "--episodes", str(19 * self.rounds), "--suite", str(suite))
        )
        toys["episodes_per_s"][SUITE] = tasks["episodes_per_s"][str(SUITE_IN_FLIGHT)]
        return toys

    def _run(self, *options: str) -> dict[str, Any]:
        command = [str(self.python), str(HERE / self.script), *options]
        environment = {**ENVIRONMENT, **self.environment}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def of(environment: str) -> Path:
    return PEERS / environment / "bin" / "python"


ALL = {
    US: Peer("pocket.py", Path(sys.executable), (100, 200, 200), 10),
    "inspect-ai": Peer("inspect_ai_local.py", of("inspect"), (4, 32, 64), 2),
    "mini-swe-agent": Peer("mini_swe_agent_local.py", of("mini_swe_agent"), (60, 120, 120), 10),
    "mini-swe-agent, bubblewrap": Peer(
        "mini_swe_agent_local.py", of("mini_swe_agent"), (30, 60, 96), 5, {"MSWEA_ENVIRONMENT": "bubblewrap"}
    ),
    "verifiers": Peer("verifiers_local.py", of("verifiers"), (3, 16, 64), 2),
    "verifiers, in-process loop": Peer(
        "verifiers_local.py", of("verifiers"), (8, 48, 96), 4, {"VERIFIERS_HARNESS": "in_process"}
    ),
}


def measure(repeats: int, suite: Path) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, str]]]:
    """The samples by peer and number in flight; and what each peer says of itself."""
    samples: dict[str, dict[str, list[float]]] = {
        name: {column: [] for column in (*map(str, IN_FLIGHT), SUITE)} for name in ALL
    }
    about = {}
    order = list(ALL)
    for _ in range(repeats):
        order.append(order.pop(0))  # nobody is always the first
        for name in order:
            found = ALL[name].rates(suite)
            about[name] = {
                "version": found["version"],
                "isolation": found["isolation"],
                "script": ALL[name].script,
            }
            for in_flight, rate in found["episodes_per_s"].items():
                samples[name][in_flight].append(round(rate, 3))
    return samples, about


def table(medians: dict[str, dict[str, float]], about: dict[str, dict[str, str]]) -> str:
    """Episodes per second, and in brackets how many times as fast we are."""
    heads = [*(f"{in_flight} in flight" for in_flight in IN_FLIGHT), f"{SUITE}, {SUITE_IN_FLIGHT}"]
    lines = [" " * 36 + " ".join(f"{head:>18}" for head in heads)]
    for name, rates in medians.items():
        cells = [f"{rate:9.1f} ({medians[US][in_flight] / rate:5.1f}x)" for in_flight, rate in rates.items()]
        lines.append(f"{name + ' ' + about[name]['version']:36}" + " ".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if missing := [name for name, peer in ALL.items() if not peer.python.exists()]:
        sys.exit(f"no environment for {', '.join(missing)}: run sh tests/bench/peers/setup.sh")
    where = setting(repeats=options.repeats, turns=3, calls=2, suite_in_flight=SUITE_IN_FLIGHT)
    with tempfile.TemporaryDirectory() as folder:
        suite = Path(folder, "suite.json")
        subprocess.run([sys.executable, str(HERE / "suite.py"), str(suite)], check=True, env=ENVIRONMENT)
        samples, about = measure(options.repeats, suite)
    medians = {
        name: {in_flight: round(statistics.median(values), 3) for in_flight, values in rates.items()}
        for name, rates in samples.items()
    }
    report = {
        "episodes_per_s": medians,
        "times_as_fast": {
            name: {in_flight: round(medians[US][in_flight] / rate, 2) for in_flight, rate in rates.items()}
            for name, rates in medians.items()
        },
        "peers": about,
        "samples": samples,
        "setting": where,
    }
    print(table(medians, about))
    write(report, options.out)


if __name__ == "__main__":
    main()
