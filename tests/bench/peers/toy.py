"""The episode that every framework plays here, and how it is timed.  Standard library only: each framework has its own
environment, and none of them ours.

Three turns: the model asks for ``cat app.ini``, then for ``ls; cat README.md``, then says the port it has
read.  The model is scripted and answers at once, so what is measured is the framework: its loop, its workspace, its calls
and its records.  Every answer is checked.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence

PROMPT = "Which port is in app.ini?"
COMMANDS = ("cat app.ini", "ls; cat README.md")
TOKENS = 20
"""What the scripted model says that each of its replies cost."""


def port(number: int) -> str:
    """The port of an instance, and so the answer to it."""
    return str(1000 + number * 7919 % 9000)


def files(number: int) -> dict[str, str]:
    """The workspace of an instance: the three files of bench_episodes.py."""
    return {
        "app.ini": f"[main]\nport = {port(number)}\n",
        "README.md": "# toy\n" * 20,
        "src/a.py": "x = 1\n" * 50,
    }


def command(results: Sequence[str]) -> str | None:
    """What the model asks for after these results; None when it has what it needs."""
    return COMMANDS[len(results)] if len(results) < len(COMMANDS) else None


def answer(results: Sequence[str]) -> str:
    """What the model says in the end."""
    found = re.search(r"port = (\d+)", results[0])
    return found[1] if found else "unknown"


def report(version: str, isolation: str, play: Callable[[Sequence[int], int], Sequence[str]]) -> None:
    """Time ``play(numbers, in_flight)``, which returns the answers, and print one line of JSON.

    A few episodes are played first: imports, caches and connections are not what is compared.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--in-flight", type=int, nargs="+", required=True)
    parser.add_argument("--episodes", type=int, nargs="+", required=True, help="one for each --in-flight")
    options = parser.parse_args()
    timed(play, 2, 2)
    rates = {
        in_flight: timed(play, episodes, in_flight)
        for in_flight, episodes in zip(options.in_flight, options.episodes, strict=True)
    }
    print(json.dumps({"version": version, "isolation": isolation, "episodes_per_s": rates}))


def timed(play: Callable[[Sequence[int], int], Sequence[str]], episodes: int, in_flight: int) -> float:
    """Episodes per second, all of them right."""
    start = time.perf_counter()
    answers = play(range(episodes), in_flight)
    seconds = time.perf_counter() - start
    wrong = [said for number, said in enumerate(answers) if said.strip() != port(number)]
    if wrong or len(answers) != episodes:
        sys.exit(f"{len(wrong)} of {len(answers)} episodes ended with a wrong answer, such as {wrong[:1]}")
    return episodes / seconds
