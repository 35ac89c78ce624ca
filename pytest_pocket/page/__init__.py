"""The page: runs as one HTML file that needs no network, with every episode behind its numbers.

The numbers are those of :mod:`pytest_pocket.report`.  Tables are rendered here, with autoescape; charts are drawn by
Apache ECharts, which is part of the file; episodes are packed in compressed chunks that the browser opens one by
one, and their text is put in as text only.  A Content-Security-Policy forbids every other script and all loading.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from pytest_pocket import comparison, records, report, statistics
from pytest_pocket.records import Recorded
from pytest_pocket.registry import MANIFEST, Model

CHUNK = 64
"""Episodes that are unpacked together when one of them is opened."""
FIRST_WORDS = 120
"""How much of a prompt the list of episodes holds, to be searched."""
CHARTS = "echarts.common.min.js"

Row = Mapping[str, Any]
Line = tuple[tuple[str, ...], Sequence[Row]]


class PageError(Exception):
    """A page that cannot be made, said in one line: what, the value, what to do."""


def build(runs: Sequence[Recorded], models: Mapping[str, Model] = {}) -> str:
    """The page of some runs.  ``models`` are those whose manifests say what their training cost.

    Raises PageError where Jinja is missing, RecordsError for a foreign record.
    """
    try:
        import jinja2
    except ModuleNotFoundError:
        raise PageError("the page needs jinja2: pip install 'pytest-pocket[report]'") from None
    with records.of_this_version():
        rows = comparison.together({run.name: report.rows(run.found) for run in runs})
        rows = [{**row, "model": _told_apart(row), "weights": row["model"]} for row in rows]
        index, chunks = _episodes(runs, {row["model"] for row in rows})
        lines = sorted(report.subjects(rows).items(), key=lambda line: -_value(_mean(line[1])))
        data = {
            "episodes": index,
            "arc": _arc(runs, lines),
            "pareto": _pareto(lines),
        }
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("pytest_pocket", "page"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        script, charts, style = map(_file, ("page.js", CHARTS, "page.css"))
        return environment.get_template("page.html").render(
            names=", ".join(report.printable(run.name) for run in runs),
            script=_trusted(script),
            charts=_trusted(charts),
            style=_trusted(style),
            hashes=[_csp_hash(script), _csp_hash(charts)],
            data=_trusted(_inert(json.dumps(data, separators=(",", ":")))),
            chunks=chunks,
            board=_board(rows, lines),
            notes=report.notes(rows),
            published=json.loads(_file("published.json")),
            tasks=_tasks(rows, lines),
            wall=_wall(rows),
            effects=_effects(rows),
            ledger=_ledger(lines),
            costs=_costs(runs, models, lines),
            arc=data["arc"],
            pareto=data["pareto"],
            runs=[_provenance(run) for run in runs],
        )


def write(path: Path, text: str) -> None:
    """Write a page, whole or not at all; an older one is replaced.  Raises PageError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, "utf-8", "surrogatepass")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise PageError(f"cannot write {path}: {error.strerror or error}; give another --output") from error


def _file(name: str) -> str:
    return (resources.files("pytest_pocket.page") / name).read_text("utf-8")


def _trusted(text: str) -> Any:
    """Text of ours, which is not escaped."""
    from markupsafe import Markup

    return Markup(text)  # nosec B704


def _inert(text: str) -> str:
    """JSON that cannot end the element in which it stands."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _csp_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _told_apart(row: Mapping[str, Any]) -> str:
    """The model's name, with the run's where two runs hold the same model and condition."""
    where = f" ({row['run_directory']})" if row["run_directory"] else ""
    return f"{row['model']}{where}"


def _number(estimate: statistics.Estimate | None, sign: str = "") -> dict[str, Any]:
    """A cell: what is shown, and what it is sorted by."""
    if estimate is None:
        return {"text": "-", "value": "", "half": None}
    half = None if math.isnan(estimate.half) else estimate.half
    text = f"{estimate.value:{sign}.3f}" + ("" if half is None else f" ± {half:.3f}")
    return {"text": text, "value": f"{estimate.value:.6f}", "half": half}


def _value(estimate: statistics.Estimate | None) -> float:
    return estimate.value if estimate else 0.0


def _mean(rows: Iterable[Mapping[str, Any]], prompt: str = "") -> statistics.Estimate | None:
    return report.mean(report.valid_of(row for row in rows if prompt in ("", row["prompt"])), report.REWARD)


def _find(rows: Sequence[Row], **asked: str) -> str:
    """The address of the episodes that rows of one model and condition count."""
    row = rows[0]
    wanted = {"model": str(row["model"]), "condition": report.asked(row), **asked}
    return f"#find?{urlencode(wanted, errors='replace')}"


def _board(rows: Sequence[Row], lines: Sequence[Line]) -> dict[str, Any]:
    """The leaderboard: a line for each model and condition, a column for each prompt."""
    prompts = report.prompts_of(rows)
    gap = set(report.GAP) <= set(prompts)
    ranks = comparison.ranks(dict(lines)) if len(lines) > 1 else {}
    return {
        "prompts": prompts,
        "gap": gap,
        "lines": [
            {
                "model": name[0],
                "found": _find(mine),
                "lost": _find(mine, outcome="not passed"),
                "asked": name[1],
                "rank": ranks.get(name) or "-",
                "means": [
                    {**_number(_mean(mine, prompt)), "found": _find(mine, prompt=prompt)}
                    for prompt in prompts
                ],
                "gap": _number(report.gap_of(mine, report.REWARD), "+"),
                "tokens": round(
                    sum(row["prompt_tokens"] + row["completion_tokens"] for row in mine) / len(mine)
                ),
                "seconds": sum(row["seconds"] for row in mine) / len(mine),
                "episodes": len(mine),
                "invalid": len(mine) - len(report.valid_of(mine)),
                "failed": sum(row["outcome"] != "passed" for row in mine),
            }
            for name, mine in lines
        ],
    }


def _tasks(rows: Sequence[Row], lines: Sequence[Line]) -> dict[str, Any]:
    """The heat map: pass rates by task, with their intervals."""
    columns = [
        (f"{name[0]} {name[1]} {prompt}", [row for row in mine if row["prompt"] == prompt])
        for name, mine in lines
        for prompt in report.prompts_of(mine)
    ]
    names = sorted({(row["group"], row["task"]) for row in rows}, key=report.place)
    return {
        "heads": [report.printable(head) for head, _ in columns],
        "lines": [
            {
                "group": group,
                "task": task,
                "cells": [_heat([row for row in mine if row["task"] == task]) for _, mine in columns],
                "found": f"#find?{urlencode({'task': task}, errors='replace')}",
            }
            for group, task in names
        ],
    }


def _heat(rows: Sequence[Row]) -> dict[str, Any]:
    valid = report.valid_of(rows)
    passed = sum(row["outcome"] == "passed" for row in valid)
    return {
        "text": f"{passed / len(valid):.2f}" if valid else "-",
        "title": f"{report.rate(valid)}, {passed} of {len(valid)} episodes",
        "step": round(10 * passed / len(valid)) if valid else "none",
        "found": _find(rows, prompt=rows[0]["prompt"], task=rows[0]["task"]) if rows else "",
    }


def _wall(rows: Sequence[Row]) -> list[str]:
    """The tasks that no model passed under any condition."""
    passed = {row["task"] for row in rows if row["outcome"] == "passed"}
    return sorted({str(row["task"]) for row in rows} - passed)


def _effects(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every two lines that differ in one thing."""
    try:
        pairs = comparison.pairings([{**row, "run_directory": ""} for row in rows])
    except comparison.ComparisonError:
        return []
    return [
        {
            "what": pair.what.replace("_", "-"),
            "first": pair.first,
            "second": pair.second,
            "with": _words(pair.common),
            "difference": _number(pair.result.difference, "+"),
            "p": pair.p_holm,
            "pairs": pair.result.pairs,
            "verdict": "differs" if pair.separated else "no difference found",
            "smallest": pair.result.smallest,
        }
        for pair in pairs
    ]


def _words(common: Mapping[str, str]) -> str:
    """What two sides have in common."""
    said = {
        "think": {"on": "think", "off": "no-think"}.get(common.get("think", ""), ""),
        "temperature": f"t{float(common['temperature']):g}" if "temperature" in common else "",
        "best_of": f"best of {common['best_of']}" if common.get("best_of", "1") != "1" else "",
    }
    return " ".join(filter(None, (said.get(key, value) for key, value in common.items())))


def _ledger(lines: Sequence[Line]) -> dict[str, Any]:
    seen = {row["outcome"] for _, mine in lines for row in mine}
    outcomes = [name for name in report.LEDGER if name in seen] + sorted(seen - set(report.LEDGER))
    return {
        "outcomes": outcomes,
        "lines": [
            {
                "model": name[0],
                "asked": name[1],
                "prompt": prompt,
                "counts": [
                    {"text": counts[outcome], "found": _find(mine, prompt=prompt, outcome=outcome)}
                    for outcome in outcomes
                ],
            }
            for name, mine in lines
            for prompt in report.prompts_of(mine)
            for counts in [Counter(row["outcome"] for row in mine if row["prompt"] == prompt)]
        ],
    }


def _arc(runs: Sequence[Recorded], lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The stages of each family, parents first, at the first condition of each model."""
    known = {name: model for run in runs for name, model in run.info.get("models", {}).items()}
    shown: dict[str, Line] = {}
    for line in sorted(lines, key=lambda line: -len(line[1])):
        shown.setdefault(line[1][0]["weights"], line)

    def depth(name: str, below: frozenset[str] = frozenset()) -> int:
        parent = known.get(name, {}).get("parent", "")
        return 1 + depth(parent, below | {name}) if parent and parent not in below else 0

    stages = sorted((name for name in shown if known.get(name, {}).get("stage")), key=depth)
    if len(stages) < 2:
        return []
    return [
        {
            "model": name,
            "stage": known[name]["stage"],
            "parent": known[name]["parent"],
            "means": {
                prompt: _number(_mean(shown[name][1], prompt)) for prompt in report.prompts_of(shown[name][1])
            },
        }
        for name in stages
    ]


def _pareto(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Reward against tokens of each line, when best-of-N was among the conditions; ``front`` marks the front."""
    if len({row["best_of"] for _, mine in lines for row in mine}) < 2:
        return []
    points = []
    for name, mine in lines:
        if (estimate := _mean(mine)) is not None:
            tokens = sum(row["prompt_tokens"] + row["completion_tokens"] for row in mine) / len(mine)
            points.append({"name": f"{name[0]} {name[1]}", "tokens": tokens, "reward": _number(estimate)})
    for point in points:
        point["front"] = not any(
            other["tokens"] <= point["tokens"]
            and float(other["reward"]["value"]) >= float(point["reward"]["value"])
            and other is not point
            for other in points
        )
    return sorted(points, key=lambda point: float(point["tokens"]))


def _costs(
    runs: Sequence[Recorded], models: Mapping[str, Model], lines: Sequence[Line]
) -> list[dict[str, Any]]:
    """What each stage gained over its parent, and what it cost: minutes of training, tokens and seconds an episode."""
    known = {name: model for run in runs for name, model in run.info.get("models", {}).items()}
    shown: dict[str, Sequence[Row]] = {}
    for _, mine in sorted(lines, key=lambda line: -len(line[1])):
        shown.setdefault(mine[0]["weights"], mine)
    costs = []
    for name, mine in shown.items():
        parent = known.get(name, {}).get("parent", "")
        if parent not in shown:
            continue
        pair = statistics.paired(
            *(comparison.side(report.valid_of(side), comparison.reward) for side in (shown[parent], mine))
        )
        manifest = _manifest(models.get(name), known[name].get("digest", ""))
        costs.append(
            {
                "model": name,
                "parent": parent,
                "gain": _number(pair, "+"),
                "minutes": manifest.get("minutes"),
                "trained": manifest.get("tokens"),
                "tokens": [round(_per_episode(side, "tokens")) for side in (shown[parent], mine)],
                "seconds": [_per_episode(side, "seconds") for side in (shown[parent], mine)],
            }
        )
    return costs


def _per_episode(rows: Sequence[Row], what: str) -> float:
    keys = ("prompt_tokens", "completion_tokens") if what == "tokens" else (what,)
    return sum(float(row[key]) for row in rows for key in keys) / len(rows)


def _manifest(model: Model | None, digest: str) -> Mapping[str, Any]:
    """The manifest of the very weights that were run; nothing when they are not here."""
    if model is None or not digest or model.digest != digest:
        return {}
    path = Path(model.adapter or model.target, MANIFEST)
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _provenance(run: Recorded) -> dict[str, Any]:
    info = run.info
    git, hardware = info.get("git", {}), info.get("hardware", {})
    facts = {
        "command": " ".join(map(str, info.get("command", ()))),
        "started": info.get("started", ""),
        "episodes": str(len(run.found)),
        "suite": info.get("suite", ""),
        "split and seed": f"{info.get('options', {}).get('split', '')}, {info.get('seed', '')}",
        "commit": f"{git.get('commit', 'none')}{' and changes' if git.get('dirty') else ''}",
        "versions": ", ".join(f"{name} {version}" for name, version in info.get("versions", {}).items()),
        "machine": ", ".join(str(hardware[key]) for key in ("cpu", "system") if key in hardware)
        + f", {hardware.get('cores', '?')} cores",
        "models": "; ".join(
            f"{name} {model.get('digest', '')[:12]}".strip() for name, model in info.get("models", {}).items()
        ),
        "resumed": f"{len(info['resumed'])} times" if info.get("resumed") else "",
        "merged from": ", ".join(str(part.get("run", "")) for part in info.get("merged", ())),
    }
    return {
        "name": report.printable(run.name),
        "facts": {name: report.printable(fact) for name, fact in facts.items() if fact},
    }


def _episodes(runs: Sequence[Recorded], shown: set[str]) -> tuple[dict[str, Any], list[str]]:
    """What the list of episodes needs, by column, and the episodes themselves, packed."""
    columns: dict[str, list[Any]] = {
        key: []
        for key in (
            "id",
            "run",
            "task",
            "group",
            "model",
            "prompt",
            "condition",
            "number",
            "counted",
            "outcome",
            "reward",
            "words",
        )
    }
    episodes = []
    for number, run in enumerate(runs):
        counted = set(map(id, report.counted(run.found)))
        for record in run.found:
            condition = report.asked(record)
            apart = _told_apart({"model": record["model"], "run_directory": run.name})
            said = records.messages(record)
            prompt = next((message.content for message in said if message.role == "user"), "")
            values = {
                "id": _identity(number, record, f"{record['prompt']} {condition}"),
                "run": number,
                "task": record["task"],
                "group": record["group"],
                "model": apart if apart in shown else record["model"],
                "prompt": record["prompt"],
                "condition": condition,
                "number": record["run"],
                "counted": int(id(record) in counted),
                "outcome": record["outcome"],
                "reward": record["reward"],
                "words": f"{prompt[:FIRST_WORDS]} {record['answer'][:FIRST_WORDS]}",
            }
            for key, value in values.items():
                columns[key].append(value)
            episodes.append(_readable(record, said))
    names = {
        key: list(dict.fromkeys(columns[key]))
        for key in ("task", "group", "model", "prompt", "condition", "outcome")
    }
    places = {key: {name: place for place, name in enumerate(found)} for key, found in names.items()}
    packed = {
        key: [places[key][value] for value in values] if key in names else values
        for key, values in columns.items()
    }
    parts = iter(episodes)
    chunks = []
    while part := list(islice(parts, CHUNK)):
        data = json.dumps(part, separators=(",", ":")).encode()
        chunks.append(base64.b64encode(gzip.compress(data, 9, mtime=0)).decode())
    return {"names": names, "columns": packed, "chunk": CHUNK, "runs": [run.name for run in runs]}, chunks


def _identity(run: int, record: Mapping[str, Any], condition: str) -> str:
    """What the address of an episode ends with."""
    parts = (run + 1, record["task"], record["model"], condition.replace(" ", "-"), f"r{record['run']:02}")
    numbers = (("s", record["sample"]), ("c", record["candidate"]), ("again", record["rerun"]))
    return "/".join([*map(str, parts), *(f"{name}{number}" for name, number in numbers if number)])


def _readable(record: Mapping[str, Any], said: Sequence[Any]) -> dict[str, Any]:
    """An episode to be read turn by turn."""
    return {
        "turns": [
            {
                "role": message.role,
                "name": message.name,
                "text": message.content,
                "thinking": message.thinking,
                "calls": [{"name": call.name, "arguments": dict(call.arguments)} for call in message.calls],
            }
            for message in said
        ],
        "checks": record["checks"],
        "factors": record["factors"],
        "stop": record["stop"],
        "detail": record["detail"],
        "unseen": record["unseen"],
        "seed": record["seed"],
        "seconds": record["seconds"],
        "chosen": record["chosen"],
        "tokens": [
            sum(reply[key] for reply in record["replies"]) for key in ("prompt_tokens", "completion_tokens")
        ],
    }
