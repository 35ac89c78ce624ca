"""Verifying: whether a run that somebody contributes is complete, and holds together.

Everything that can be made again is: instances from their seeds, prompts from the conditions, tool results and final
states by playing the recorded replies again, rewards from what that leaves.  What cannot be made again, the model's
own words above all, is believed; ``BELIEVED`` says so to whoever reads the result.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pytest_pocket import records, registry, replay, schemas, shard, task_list
from pytest_pocket.attempt import Cell, choose
from pytest_pocket.conditions import Condition
from pytest_pocket.episode import INVALID, Budget, Workshop
from pytest_pocket.replay import Finding, Reference
from pytest_pocket.report import printable
from pytest_pocket.task import SUITE_VERSION

THREADS = 4
CHECKS: Mapping[str, str] = {
    "files": "run.json and every line of episodes.jsonl have the published shape",
    "suite": "suite, tools and records are of this version",
    "models": "models of the suite are the ones that ship",
    "design": "every instance of the design is there, once for each model, condition and sample",
    "instances": "seeds are the suite's for that split, and prompts those that the seeds give",
    "evidence": "the engine was asked what the condition says",
    "tokens": "tokens are as many as is said",
    "replay": "the calls, played again in the sandbox, give the recorded results and files",
    "rewards": "rewards, computed again, are the recorded ones",
}
BELIEVED = (
    "not shown by this: that the model wrote these words, and when, where and how fast; that weights which do not "
    "ship are what they are called"
)
ENGINES = ("hf", "vllm", "ollama", "openai")
"""Backends of the suite, whose replies carry evidence; scripted models and other packages' need not."""
SHOWN = 50
"""How many findings the text holds."""


@dataclass(frozen=True)
class Found:
    """A finding and the episode that it is of; "" for the run as a whole."""

    where: str
    finding: Finding


@dataclass
class Verdict:
    """What was found.  ``episodes`` counts records, ``invalid`` those that the run itself calls so."""

    hashes: Mapping[str, str]
    episodes: int = 0
    invalid: int = 0
    found: list[Found] = field(default_factory=list)

    def failed(self, *, strict: bool = False) -> bool:
        """Whether something is not as it must be; with ``strict``, also where something could not be shown."""
        return any(each.finding.grave or strict for each in self.found)


def verify(directory: Path, workshop: Workshop) -> Verdict:
    """Look at a run.  Raises RecordsError where there is none to read, SandboxError when the sandbox fails."""
    info, found = records.load(directory)
    verdict = Verdict(_hashes(directory), len(found))
    problems = list(_shape(directory, info, found))
    if not any(each.finding.check == "files" for each in problems):
        verdict.invalid = sum(each["outcome"] in INVALID for each in found)
        problems += (Found("", each) for each in _about(info))
        problems += _design(info, found)
        with ThreadPoolExecutor(THREADS) as threads:
            for each in threads.map(lambda record: _episode(record, info, workshop), found):
                problems += each
    verdict.found = problems
    return verdict


def _hashes(directory: Path) -> dict[str, str]:
    return {name: registry.file_hash(directory / name) for name in (records.RUN, records.EPISODES)}


def _shape(directory: Path, info: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> Iterator[Found]:
    from jsonschema import Draft202012Validator

    for name, values in (("run", [info]), ("episode", found)):
        validator = Draft202012Validator(schemas.load(name))
        for number, value in enumerate(values, 1):
            for error in itertools.islice(validator.iter_errors(value), 3):
                place = "/".join(map(str, error.absolute_path)) or "it"
                where = records.RUN if name == "run" else f"line {number} of {records.EPISODES}"
                yield Found(where, Finding("files", f"{place}: {error.message[:100]}"))
    if not (directory / records.EPISODES).read_bytes().endswith(b"\n"):
        yield Found(records.EPISODES, Finding("files", "its last line is torn"))


def _about(info: Mapping[str, Any]) -> Iterator[Finding]:
    """What ``run.json`` says of suite and models."""
    if info["suite"] != SUITE_VERSION:
        yield Finding("suite", f"the run is of suite {info['suite']}, and this is suite {SUITE_VERSION}")
    if info["tools_sha256"] != registry.tools_hash():
        yield Finding("suite", "its tools are not those of this version")
    if info["seed"] != info["options"]["seed"]:
        yield Finding("suite", f"its seed is {info['seed']}, and its option {info['options']['seed']}")
    for each in info.get("resumed", ()):
        for changed in each["changed"]:
            yield Finding("suite", f"it was resumed by force: {changed}")
    for name, told in info["models"].items():
        ships = _ships(name)
        if ships is None:
            yield Finding("models", f"{name}: its weights and template do not ship", grave=False)
        elif told["digest"] != ships.digest:
            yield Finding("models", f"{name}: its weights are not those that ship")
        elif ships.target and told["template_sha256"] != _template(ships.target):
            yield Finding("models", f"{name}: its template is not the one that ships")


@cache
def _ships(name: str) -> registry.Model | None:
    """The model of the suite that a name means: by itself, or as served by vLLM from the very files."""
    return registry.Registry().models.get(name.removeprefix("vllm:"))


@cache
def _template(target: str) -> str:
    path = Path(target, "chat_template.jinja")
    return registry.file_hash(path) if path.is_file() else ""


def _design(info: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> Iterator[Found]:
    """Cells that are missing, that do not belong there, or that were played until they passed."""
    cells = records.by_cell(found)
    asked = _asked(info)
    for key, cell in asked.items():
        if key not in cells:
            yield Found(_cell(key), Finding("design", "is missing: play it with --pocket-resume"))
        elif problem := _attempts(cells[key], cell):
            yield Found(_cell(key), Finding("design", problem))
    for key in cells.keys() - asked.keys():
        yield Found(_cell(key), Finding("design", "is not of the design that run.json declares"))


def _asked(info: Mapping[str, Any]) -> dict[records.CellKey, Cell]:
    options = info["options"]
    part = options.get("shard")
    mine = shard.Shard(part["index"], part["count"]) if part else shard.Shard(1, 1)
    product = itertools.product(
        task_list.shipped(),
        info["models"],
        options["conditions"],
        range(options["runs"]),
        range(options["samples"]),
    )
    cells = (
        Cell(task, model, Condition(**condition), run + 1, sample)
        for task, model, condition, run, sample in product
        if mine.holds(task, run + 1)
    )
    return {cell.key: cell for cell in cells}


def _attempts(played: Sequence[Mapping[str, Any]], cell: Cell) -> str:
    """What is wrong with how often a cell was played, and which candidate was chosen; "" if nothing is."""
    attempts = [list(group) for _, group in itertools.groupby(played, key=_attempt_number(played))]
    if any(each["outcome"] not in INVALID for attempt in attempts[:-1] for each in attempt if each["chosen"]):
        return f"was played {len(attempts)} times, again after a valid attempt"
    last = attempts[-1]
    numbers = sorted(each["candidate"] for each in last)
    if numbers != list(range(cell.condition.best_of)):
        return f"has the candidates {numbers} of {cell.condition.best_of}"
    chosen = [each["candidate"] for each in last if each["chosen"]]
    instance = task_list.find(cell.task).build(last[0]["seed"])
    best = choose([records.restore(each, instance) for each in sorted(last, key=_candidate)])
    return "" if chosen == [best] else f"has the candidates {chosen} chosen, and must have {[best]}"


def _candidate(record: Mapping[str, Any]) -> int:
    return int(record["candidate"])


def _attempt_number(played: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], int]:
    """Numbers the attempts of a cell: each begins with its candidate 0."""
    starts = itertools.accumulate(int(each["candidate"] == 0) for each in played)
    numbers = {id(each): number for each, number in zip(played, starts, strict=True)}
    return lambda record: numbers[id(record)]


def _episode(record: Mapping[str, Any], info: Mapping[str, Any], workshop: Workshop) -> list[Found]:
    where = _named(record)
    return [Found(where, each) for each in _findings(record, info, workshop)]


def _findings(record: Mapping[str, Any], info: Mapping[str, Any], workshop: Workshop) -> Iterator[Finding]:
    if record["suite"] != SUITE_VERSION:
        yield Finding("suite", f"it is of suite {record['suite']}, and this is suite {SUITE_VERSION}")
        return
    model = info["models"].get(record["model"])
    if model is None or record["backend"] != model["backend"]:
        yield Finding("models", f"{record['model']} on {record['backend']} is no model of run.json")
        return
    try:
        task = task_list.find(record["task"])
    except task_list.TaskError:
        yield Finding("design", f"the task {record['task']} does not ship")
        return
    options = info["options"]
    condition = Condition(record["prompt"], record["think"], record["temperature"], record["best_of"])
    cell = Cell(record["task"], record["model"], condition, record["run"], record["sample"])
    instance = cell.instance(options["split"], info["seed"])
    right = {
        "split": options["split"],
        "seed": instance.seed,
        "unseen": list(instance.unseen),
        "group": task.group,
    }
    wrong = {key: value for key, value in right.items() if record[key] != value}
    yield from (
        Finding("instances", f"{key} is {record[key]}, and must be {value}") for key, value in wrong.items()
    )
    if "seed" in wrong:
        return
    if record["outcome"] == "infra":
        yield Finding("replay", f"invalid, and so in no mean: {record['detail']}", grave=False)
        return
    has_evidence = record["backend"] in ENGINES
    try:
        yield from replay.replay(
            task,
            record,
            workshop,
            budget=Budget(**options["budget"]),
            seed=info["seed"],
            has_evidence=has_evidence,
            reference=_reference(record, model),
        )
    except records.RecordsError as error:
        yield Finding("files", str(error))


def _reference(record: Mapping[str, Any], model: Mapping[str, Any]) -> Reference | None:
    """Tokenizer and template of what was run, where they ship and its engine takes nothing in a text for a token."""
    ships = _ships(record["model"])
    if record["backend"] != "hf" or ships is None or ships.digest != model["digest"]:
        return None
    return _loaded(ships.target)


@cache
def _loaded(target: str) -> Reference | None:
    with suppress(ImportError, registry.ModelError):
        from pytest_pocket.backends.reference import Reference as Loaded

        return Loaded(target)
    return None


def _cell(key: records.CellKey) -> str:
    task, model, prompt, think, temperature, best_of, run, sample = key
    best = f" best of {best_of}" if best_of > 1 else ""
    return (
        f"{task} run {run} sample {sample + 1} · {model} {prompt} {'think' if think else 'no-think'} "
        f"t{temperature:g}{best}"
    )


def _named(record: Mapping[str, Any]) -> str:
    keys = ("task", "model", "prompt", "think", "temperature", "best_of", "run", "sample")
    task, model, prompt, think, temperature, best_of, run, sample = (record[key] for key in keys)
    candidate = f" candidate {record['candidate'] + 1}" if record["best_of"] > 1 else ""
    return _cell((task, model, prompt, think, temperature, best_of, run, sample)) + candidate


def summary(directory: Path, verdict: Verdict, *, strict: bool = False) -> dict[str, Any]:
    """The verdict as data."""
    return {
        "run": directory.resolve().name,
        "good": not verdict.failed(strict=strict),
        "episodes": verdict.episodes,
        "invalid": verdict.invalid,
        "sha256": dict(verdict.hashes),
        "checks": {check: dict(_counts(verdict.found, check)) for check in CHECKS},
        "findings": [
            {
                "check": each.finding.check,
                "grave": each.finding.grave,
                "where": each.where,
                "what": each.finding.what,
            }
            for each in verdict.found
        ],
        "believed": BELIEVED,
    }


def _counts(found: Iterable[Found], check: str) -> Counter[str]:
    return Counter(
        "problems" if each.finding.grave else "not_shown" for each in found if each.finding.check == check
    )


def render(directory: Path, verdict: Verdict, *, strict: bool = False) -> str:
    """The verdict in lines, harmless to a terminal: one a check, then what was found, then what is believed."""
    lines = [f"{directory}: {verdict.episodes} episodes, {verdict.invalid} of them invalid"]
    ran = not any(each.finding.check == "files" for each in verdict.found)
    for check, meaning in CHECKS.items():
        counts = _counts(verdict.found, check)
        said = [f"{counts[key]} {key.replace('_', ' ')}" for key in ("problems", "not_shown") if counts[key]]
        mark = "FAIL" if counts["problems"] else "ok" if ran else "-"
        lines.append(f"  {mark:<4} {check:<9} {meaning}{': ' * bool(said)}{', '.join(said)}")
    order = sorted(verdict.found, key=lambda each: not each.finding.grave)
    lines += [
        f"  {'problem' if each.finding.grave else 'not shown'} ({each.finding.check}) {each.where or 'the run'}: "
        f"{each.finding.what}"
        for each in order[:SHOWN]
    ]
    if len(order) > SHOWN:
        lines.append(f"  and {len(order) - SHOWN} more: --json has them all")
    lines += [f"  sha256 {digest}  {name}" for name, digest in verdict.hashes.items()]
    lines.append(f"  {BELIEVED}")
    lines.append(f"  {'NOT GOOD' if verdict.failed(strict=strict) else 'good'}")
    return "\n".join(map(printable, lines))
