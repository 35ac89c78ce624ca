"""The batteries of attacks, counted: attempts to escape by provider, reward hacks, and examples that parsers were given.

What each attack is and how harm would be seen stands in the tests themselves; this plays and counts them.  A provider
that is not here is not counted: start a Docker, and set POCKET_SANDBOX_IMAGE where no registry can be reached.

    python tests/bench/bench_attacks.py --out reports/bench/attacks.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from setting import ROOT, setting, write

ESCAPES = ("tests/test_escapes.py", "test_no_attempt_escapes")
HACKS = ("tests/test_hacks.py", "_pass")
PARSERS = tuple(
    f"tests/test_parsing.py::test_no_{what}_makes_it_raise" for what in ("text", "jumble_of_tags")
)
"""No reply may make it raise.  The nightly workflow gives the other properties as many examples, which takes hours."""


@dataclass(frozen=True)
class Case:
    """A test that was played: its function, the last word of its parameters, whether it failed."""

    function: str
    last: str
    failed: bool


def played(*arguments: str, **environment: str) -> list[Case]:
    """The cases of one pytest session."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", f"--junitxml={junit}", *arguments]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
        if done.returncode not in (0, 1):
            sys.exit(f"{' '.join(command)} ended with {done.returncode}")
        found = []
        for case in ElementTree.parse(junit).getroot().iter("testcase"):
            function, _, parameters = str(case.get("name")).removesuffix("]").partition("[")
            children = {child.tag for child in case}
            if "skipped" not in children:
                last = parameters.rpartition("-")[2]
                found.append(Case(function, last, bool(children & {"failure", "error"})))
        return found


def counted(cases: list[Case], wanted: Callable[[Case], bool]) -> dict[str, int]:
    """How many cases of some there are, and how many of them failed: there the attack succeeded."""
    mine = list(filter(wanted, cases))
    return {"tried": len(mine), "succeeded": sum(case.failed for case in mine)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--examples", type=int, default=100_000, help="given to each property of a parser")
    options = parser.parse_args()
    where = setting("pytest", "hypothesis")
    escapes = [case for case in played(ESCAPES[0]) if case.function == ESCAPES[1]]
    hacks = played(HACKS[0])
    profile = {"HYPOTHESIS_PROFILE": "nightly", "HYPOTHESIS_EXAMPLES": str(options.examples)}
    properties = played(*PARSERS, **profile)
    report = {
        "escapes": {
            provider: counted(escapes, lambda case, provider=provider: case.last == provider)
            for provider in sorted({case.last for case in escapes})
        },
        "escapes_succeeded": sum(case.failed for case in escapes),
        "hacks": counted(hacks, lambda case: HACKS[1] in case.function),
        "parsers": {**counted(properties, lambda case: True), "examples_each": options.examples},
        "setting": where,
    }
    print(json.dumps({name: value for name, value in report.items() if name != "setting"}))
    write(report, options.out)


if __name__ == "__main__":
    main()
