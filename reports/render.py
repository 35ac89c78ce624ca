"""Render the tables of the documents from the committed runs.

A document says where: everything between ``<!-- reports: KIND RUN -->`` and ``<!-- /reports -->`` is replaced
by the table of that kind (``scores`` or ``tasks``) of the run in that folder of reports/; with ``RUN MODEL MODEL...``
of these models alone.  The kind ``bench`` is the short table of a folder's benches, by its ``headlines.toml``;
``faults FILE`` is the table of what tests/bench/bench_faults.py has measured.

    python reports/render.py            # rewrite the documents
    python reports/render.py --check    # fail, and name them, where one differs from what the records give
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_pocket import records, report

REPORTS = Path(__file__).parent
DOCUMENTS = tuple(
    REPORTS.parent / name
    for name in ("README.md", "docs/tiny-family.md", "docs/experiments.md", "docs/faults.md")
)
KINDS = {"scores": report.markdown, "tasks": report.tasks_markdown}
BLOCK = re.compile(
    r"(?<=<!-- reports: )(\w+) ([\w./-]+)((?: [\w.-]+)*) -->\n.*?(?=<!-- /reports -->)", re.DOTALL
)


def rendered(text: str) -> str:
    """A document with its tables as the records give them now."""

    def table(block: re.Match[str]) -> str:
        kind, run, models = block.groups()
        if kind == "bench":
            return f"{kind} {run} -->\n\n{benches(REPORTS / run)}\n"
        if kind == "faults":
            return f"{kind} {run} -->\n\n{faults(json.loads((REPORTS / run).read_text()))}\n"
        info, episodes = records.load(REPORTS / run)
        chosen = [
            each for each in records.in_order(info, episodes) if not models or each["model"] in models.split()
        ]
        return f"{kind} {run}{models} -->\n\n{KINDS[kind](report.rows(chosen))}\n"

    return BLOCK.sub(table, text)


def benches(folder: Path) -> str:
    """The table of the benches that were run: what, how much, of how much was asked, by which command."""
    known = tomllib.loads((folder / "headlines.toml").read_text())
    lines = ["| figure | measured | asked | command |", "| --- | --: | --: | --- |"]
    for name in sorted(known):
        if not (path := folder / f"{name}.json").is_file():
            continue
        measured = json.loads(path.read_text())
        for row in known[name]["rows"]:
            value = row["of"].format(_place(measured, row["value"]))
            goal = _place(measured, row["goal"]) if "goal" in row else ""
            asked = goal if isinstance(goal, str) else row["of"].format(goal)
            lines.append(f"| {row['figure']} | {value} | {asked} | `{known[name]['command']}` |")
    return "\n".join([*lines, ""])


def _place(measured: Mapping[str, Any], place: str) -> Any:
    """What stands at ``a.b``; the words themselves where no key begins so.  Raises KeyError for half a place."""
    keys = place.split(".")
    return functools.reduce(lambda value, key: value[key], keys, measured) if keys[0] in measured else place


def faults(found: dict[str, Any]) -> str:
    """The table of faults against outcomes, in Markdown."""
    lines = [
        "| fault | times | episodes | as without it | `infra` | scored otherwise | lost | twice | longest (s) | exit |",
        "| --- " + "| --: " * 8 + "| --- |",
    ]
    for row in found["rows"]:
        statuses = ", ".join(map(str, sorted(set(row["status"]), reverse=True)))
        counts = (row[name] for name in ("injected", "episodes", "same", "infra", "other", "lost", "twice"))
        told = f"{row['fault']} | {' | '.join(map(str, counts))}"
        lines.append(f"| {told} | {row['longest']:.1f} of {row['limit']:g} | {statuses} |")
    setting = found["setting"]
    told = f"{found['episodes']:,} episodes under engines' faults, on {setting['cores']} cores;"
    lines += ["", f"{told} {setting['share_of_requests']:.0%} of the requests met one."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrite the documents, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where one differs")
    options = parser.parse_args()
    stale = [path for path in DOCUMENTS if rendered(path.read_text()) != path.read_text()]
    for path in stale:
        if not options.check:
            path.write_text(rendered(path.read_text()))
        print(
            f"{path.relative_to(REPORTS.parent)}: {'differs from its runs' if options.check else 'rendered'}"
        )
    sys.exit(bool(stale and options.check))


if __name__ == "__main__":
    main()
