"""The episodes that every framework plays here, and how they are timed.  Standard library only: each framework has its own
environment, and none of them ours.

The toy has three turns: the model asks for ``cat app.ini``, then for ``ls; cat README.md``, then says the port it has
read.  With ``--suite`` the episodes are those of a file that suite.py wrote: the 19 tasks, each as their oracle solves it.  The
model is scripted and answers at once, so what is measured is the framework: its loop, its workspace, its calls and its records.
It answers rightly only when each of its calls has shown what that call should show; and every answer is checked.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMANDS = ("cat app.ini", "ls; cat README.md")
TOKENS = 20
"""What the scripted model says that each of its replies cost."""
SUITE: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Script:
    """An episode known in advance: a workspace (files, then a shell script), what the model asks for and says in the end.

    ``shown`` holds, for each command, lines that its result must hold.  ``origin`` is the task and seed of a suite's.
    """

    prompt: str
    files: dict[str, str]
    commands: Sequence[str]
    shown: Sequence[Sequence[str]]
    answer: str
    setup: str = ""
    origin: Sequence[Any] = ()


def port(number: int) -> str:
    """The port of an instance of the toy, and so the answer to it."""
    return str(1000 + number * 7919 % 9000)


def script(number: int) -> Script:
    """An episode.  Its prompt ends in its number, by which the scripted model knows it again."""
    if SUITE:
        each = Script(**SUITE[number % len(SUITE)])
        return Script(**{**vars(each), "prompt": f"{each.prompt} [{number}]"})
    # The three files of bench_episodes.py.
    files = {
        "app.ini": f"[main]\nport = {port(number)}\n",
        "README.md": "# toy\n" * 20,
        "src/a.py": "x = 1\n" * 50,
    }
    shown = ((f"port = {port(number)}",), ("app.ini", "# toy"))
    return Script(f"Which port is in app.ini? [{number}]", files, COMMANDS, shown, port(number))


def asked(prompt: str) -> Script:
    """The episode of a prompt."""
    found = re.search(r"\[(\d+)\]\s*$", prompt)
    if not found:
        raise ValueError(f"a prompt without its number: {prompt!r}")
    return script(int(found[1]))


def step(script: Script, results: Sequence[str]) -> tuple[str, str]:
    """What the scripted model does after these results: the next command, or "" and the answer."""
    for result, lines in zip(results, script.shown, strict=False):
        if missing := [line for line in lines if normal(line) not in normal(result)]:
            return "", f"{script.prompt}: {missing[0]!r} is not in {result!r}"
    return (script.commands[len(results)], "") if len(results) < len(script.commands) else ("", script.answer)


def normal(text: str) -> str:
    """A text on one line: frameworks indent and strip results."""
    return " ".join(text.split())


def report(version: str, isolation: str, play: Callable[[Sequence[int], int], Sequence[str]]) -> None:
    """Time ``play(numbers, in_flight)``, which returns the answers, and print one line of JSON.

    A few episodes are played first: imports, caches and connections are not what is compared.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--in-flight", type=int, nargs="+", required=True)
    parser.add_argument("--episodes", type=int, nargs="+", required=True, help="one for each --in-flight")
    parser.add_argument("--suite", type=Path, help="a file of suite.py, instead of the toy")
    options = parser.parse_args()
    if options.suite:
        SUITE.extend(json.loads(options.suite.read_text()))
    timed(play, 2, 2)
    rates = {
        in_flight: rate(play, episodes, in_flight)
        for in_flight, episodes in zip(options.in_flight, options.episodes, strict=True)
    }
    print(json.dumps({"version": version, "isolation": isolation, "episodes_per_s": rates}))


def rate(play: Callable[[Sequence[int], int], Sequence[str]], episodes: int, in_flight: int) -> float:
    """Episodes per second after the first ``in_flight``: what ``play`` costs however many it plays does not count."""
    return (episodes - in_flight) / (timed(play, episodes, in_flight) - timed(play, in_flight, in_flight))


def timed(play: Callable[[Sequence[int], int], Sequence[str]], episodes: int, in_flight: int) -> float:
    """The seconds that so many episodes take, all of them right."""
    start = time.perf_counter()
    answers = play(range(episodes), in_flight)
    seconds = time.perf_counter() - start
    wrong = [said for number, said in enumerate(answers) if normal(said) != normal(script(number).answer)]
    if wrong or len(answers) != episodes:
        sys.exit(f"{len(wrong)} of {len(answers)} episodes ended with a wrong answer, such as {wrong[:1]}")
    return seconds
