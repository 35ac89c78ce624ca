"""Traces: what the oracles do, or what models did that passed, played through the real loop in the real sandbox.

They are of training seeds only.  A share of the oracles' begins with a mistake, so that the model learns to go on
after an error; the mistake itself is never trained on by SFT.  Every trace that does not reach reward 1 is dropped
and counted, and so is every one whose prompt and files equal those of a dev or eval instance.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pytest_pocket import export, records, sandbox, task_list
from pytest_pocket.backends.scripted import NoopBackend, OracleBackend
from pytest_pocket.chat import ChatReply, ChatRequest, Message, ToolCall
from pytest_pocket.episode import Episode, Workshop, play
from pytest_pocket.task import Instance, instance_seed, split_of
from pytest_pocket.training import recipe as recipes
from pytest_pocket.words import NOUNS

GUARDED = 1000
"""Instances of dev and of eval, per task, that no trace may equal."""
SPACING = 100
"""Training seeds to look through for each trace: some tasks draw six kinds, and all must be among those shown."""


TRACES = Path(".pocket/data/traces.jsonl")


class DataError(ValueError):
    """Data that may not be trained on, said in one line."""


@dataclass(frozen=True)
class Trace:
    """One validated episode.  ``weights`` has a 0 for each assistant message not to learn from, in their order."""

    task: str
    seed: int
    messages: tuple[dict[str, Any], ...]
    weights: tuple[float, ...]


class Teacher(OracleBackend):
    """An oracle that thinks aloud, briefly, and sometimes begins with a call that fails."""

    def __init__(self, stumble: float, seed: int) -> None:
        super().__init__()
        self.stumble = stumble
        self.seed = seed

    def mistake(self, episode: str) -> ToolCall | None:
        """The wrong call that an episode begins with, if it does."""
        choice = random.Random(f"{self.seed}:{episode}")
        if choice.random() >= self.stumble or episode.startswith("answer_directly"):
            return None
        missing = f"{choice.choice(NOUNS)}/{choice.choice(NOUNS)}.txt"
        if choice.random() < 0.5:
            return ToolCall("Read", {"file_path": missing})
        return ToolCall("Bash", {"command": f"cat {missing}"})

    def reply(self, request: ChatRequest) -> ChatReply:
        """The oracle's step, or the mistake before the first."""
        mistake = self.mistake(request.episode)
        results = [message for message in request.messages if message.role == "tool"]
        if mistake and not results:
            return ChatReply("", thinking="I look around first.", calls=(mistake,), completion_tokens=1)
        if mistake:
            first = request.messages.index(results[0])
            request = replace(request, messages=request.messages[:first] + request.messages[first + 1 :])
        reply = super().reply(request)
        if reply.calls:
            thinking = (
                f"I use {reply.calls[0].name}."
                if len(results) <= bool(mistake)
                else f"Now {reply.calls[0].name}."
            )
        else:
            thinking = "I have what I need." if results else "I know this."
        return replace(reply, thinking=thinking)


class Replay(NoopBackend):
    """Says again what an assistant said."""

    def __init__(self, said: Sequence[Message]) -> None:
        super().__init__()
        self.said = said

    def reply(self, request: ChatRequest) -> ChatReply:
        """The turn that comes now; no word where a limit cut the episode."""
        turn = sum(each.role == "assistant" for each in request.messages)
        if turn == len(self.said):
            return ChatReply("")
        message = self.said[turn]
        return ChatReply(message.content, thinking=message.thinking, calls=message.calls, completion_tokens=1)


def fingerprint(instance: Instance) -> str:
    """The hash of all that a model sees of an instance."""
    seen = json.dumps([instance.prompt, sorted(instance.files.items()), instance.setup])
    return hashlib.sha256(seen.encode()).hexdigest()


def guarded(names: Sequence[str]) -> frozenset[str]:
    """The fingerprints of the dev and eval instances that training may not contain."""
    return frozenset(
        fingerprint(task_list.find(name).build(instance_seed(split, index)))
        for name in names
        for split in ("dev", "eval")
        for index in range(GUARDED)
    )


def trace(episode: Episode, stumbled: bool) -> Trace:
    """The trace of a passed episode, without its system prompt: rendering adds the condition's.

    Of one that ``stumbled`` the first turn is not learned from.
    """
    instance = episode.instance
    turns = [message for message in episode.messages if message.role != "system"]
    count = sum(message.role == "assistant" for message in turns)
    weights = tuple(0.0 if stumbled and number == 0 else 1.0 for number in range(count))
    return Trace(instance.task, instance.seed, tuple(map(Message.to_dict, turns)), weights)


def _play(job: tuple[str, int, int, recipes.Data]) -> tuple[list[Trace], Counter[str]]:
    """Traces of one task for a range of training seeds."""
    name, first, count, data = job
    task = task_list.find(name)
    teacher = Teacher(data.stumble, data.seed)
    workshop = Workshop(sandbox.select("auto"))
    counts: Counter[str] = Counter()
    kept = []
    forbidden = guarded([name])
    instances: list[Instance] = []
    for index in range(first, first + SPACING * count):
        if len(instances) == count:
            break
        instance = task.build(instance_seed("train", index))
        if instance.reach >= data.kinds:
            counts["of kinds that traces leave out"] += 1
        elif fingerprint(instance) in forbidden:
            counts["equal to a held-out instance"] += 1
        else:
            instances.append(instance)
    with ThreadPoolExecutor(4) as threads:
        for episode in threads.map(lambda instance: play(task, instance, teacher, workshop), instances):
            counts[episode.outcome] += 1
            if episode.outcome == "passed":
                stumbled = teacher.mistake(f"{name}:{episode.instance.seed}") is not None
                kept.append(trace(episode, stumbled))
    return kept, counts


def generate(
    data: recipes.Data, names: Sequence[str], processes: int, seeds: int = 250
) -> Iterator[tuple[list[Trace], Counter[str]]]:
    """Batches of traces over all tasks, with what became of their episodes."""
    base = data.seed * 1_000_000
    jobs = [
        (name, base + SPACING * first, min(seeds, data.episodes_per_task - first), data)
        for first in range(0, data.episodes_per_task, seeds)
        for name in names
    ]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_play, jobs)


def from_runs(
    directories: Sequence[Path], unvalidated: bool = False
) -> Iterator[tuple[list[Trace], Counter[str]]]:
    """Batches of traces of the episodes that passed, each played again: rejection sampling.

    Of ``unvalidated`` ones those that did not pass, for an experiment: does more data make it worse?

    Raises ExportError, RecordsError.
    """
    workshop = Workshop(sandbox.select("auto"))
    for directory in directories:
        counts: Counter[str] = Counter()
        kept = []
        with records.of_this_version():
            for record in export.trainable(records.load(directory)[1], counts):
                if bool(record["passed"]) == unvalidated:
                    counts["passed" if unvalidated else "not passed"] += 1
                elif any(reply["malformed"] for reply in record["replies"]):
                    counts["with a malformed call"] += 1
                else:
                    said = [each for each in records.messages(record) if each.role == "assistant"]
                    task = task_list.find(record["task"])
                    episode = play(task, task.build(record["seed"]), Replay(said), workshop)
                    counts[episode.outcome] += 1
                    if unvalidated or episode.outcome == "passed":
                        kept.append(trace(episode, False))
        yield kept, counts


def sampling(directories: Sequence[Path]) -> list[dict[str, Any]]:
    """The models that played some runs, each with the conditions it did so under.  Raises RecordsError."""
    return export.sampling(record for directory in directories for record in records.load(directory)[1])


def sampling_of(traces: Sequence[Path]) -> list[dict[str, Any]]:
    """The same, from the cards beside files of traces; of a file without a card nothing is known."""
    cards = filter(Path.is_file, map(export.card_of, traces))
    return [each for card in cards for each in json.loads(card.read_text()).get("sampling", ())]


def write(
    path: Path,
    batches: Iterator[tuple[list[Trace], Counter[str]]],
    sampled: Sequence[Mapping[str, Any]] = (),
) -> Counter[str]:
    """Write traces as JSON lines, and beside them a data card.  Returns what became of the episodes.

    ``sampled`` says what models played them, and how; none where the oracles did.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        for traces, outcomes in batches:
            counts += outcomes
            for each in traces:
                line = json.dumps({**each.__dict__, "messages": _as_text(each.messages)})
                key = hashlib.sha256(json.dumps(each.messages).encode()).hexdigest()
                counts["duplicate"] += key in seen
                if key not in seen:
                    file.write(line + "\n")
                seen.add(key)
            file.flush()
            print(f"{path.name}: {counts['passed']} traces", file=sys.stderr)
    if not seen:
        partial.unlink()
        raise DataError(f"no traces for {path}: of the episodes, {dict(counts)}")
    os.replace(partial, path)
    card = {
        "traces": len(seen),
        "episodes": dict(counts),
        "sampling": list(sampled),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    export.card_of(path).write_text(json.dumps(card, indent=2) + "\n")
    return counts


def _as_text(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose calls have their arguments as JSON text: as a table, all tools' arguments would be merged."""
    return _with_arguments(messages, json.dumps)


def _with_arguments(
    messages: Sequence[Mapping[str, Any]], change: Callable[[Any], Any]
) -> list[dict[str, Any]]:
    changed = [dict(message) for message in messages]
    for message in changed:
        if "tool_calls" in message:
            functions = [call["function"] for call in message["tool_calls"]]
            message["tool_calls"] = [
                {"type": "function", "function": {**each, "arguments": change(each["arguments"])}}
                for each in functions
            ]
    return changed


def read(path: Path, limit: int | None = None) -> list[Trace]:
    """Traces from a file.  Raises DataError when one is not from a training seed."""
    if not path.is_file():
        raise DataError(f"no traces at {path}: make them with `pocket train data --out {path}`")
    traces = []
    with path.open() as file:
        for line in islice(file, limit):
            fields = json.loads(line)
            if split_of(fields["seed"]) != "train":
                raise DataError(
                    f"{path} holds the {split_of(fields['seed'])} seed {fields['seed']}: training refuses it"
                )
            messages = tuple(_with_arguments(fields["messages"], json.loads))
            traces.append(Trace(fields["task"], fields["seed"], messages, tuple(fields["weights"])))
    return traces


def main(argv: Sequence[str] | None = None) -> None:
    """Make the traces of a recipe."""
    from pytest_pocket.training import stage

    parser = argparse.ArgumentParser(prog="pocket train data", description=__doc__)
    stage.recipe_options(parser)
    parser.add_argument("--out", type=Path, default=TRACES)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--run",
        type=Path,
        action="append",
        default=[],
        help="take the episodes that passed in this run directory, instead of the oracles'; repeatable",
    )
    parser.add_argument(
        "--unvalidated",
        action="store_true",
        help="with --run: the episodes that did not pass, for an experiment",
    )
    options = parser.parse_args(argv)
    recipe = recipes.load(options.recipe, options.changes)
    if options.run:
        batches = from_runs(options.run, options.unvalidated)
    else:
        batches = generate(recipe.data, list(task_list.shipped()), options.processes)
    counts = write(options.out, batches, sampling(options.run))
    print(f"{options.out}: {dict(counts)}")


if __name__ == "__main__":
    from pytest_pocket.training import stage

    stage.run(main)
