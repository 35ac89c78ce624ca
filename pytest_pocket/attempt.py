"""Attempts: one cell of the experiment, played.

A cell says which model attempts which instance under which condition.  Its attempt is one episode, or N of
them with best-of-N, of which the one that most agree with is chosen: by what the model itself could see (its
answers and workspaces), never by the hidden reward.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_pocket import task_list
from pytest_pocket.answers import normal
from pytest_pocket.chat import Backend, Cancelled
from pytest_pocket.conditions import Condition
from pytest_pocket.episode import Budget, Episode, Workshop, play, reply_seed
from pytest_pocket.openings import Openings
from pytest_pocket.options import MAX_RUNS
from pytest_pocket.records import CellKey, RecordsError, restore
from pytest_pocket.task import SUITE_VERSION, Instance, Split, instance_seed

Properties = dict[str, str | int | float]


@dataclass(frozen=True)
class Cell:
    """Where an attempt stands in the experiment.  ``run`` counts from 1, ``sample`` from 0.

    ``label`` is the model's part of the test id (its slug); ``samples`` how many repeats there are.
    """

    task: str
    model: str
    condition: Condition
    run: int
    sample: int = 0
    samples: int = 1
    label: str = ""

    @property
    def id(self) -> str:
        """The part of a test id between brackets: ``rlvr-v1-raw-think_off-t0-r01``, samples numbered from 1."""
        repeat = f"-s{self.sample + 1}" if self.samples > 1 else ""
        return f"{self.label or self.model}-{self.condition.slug}-r{self.run:02d}{repeat}"

    @property
    def key(self) -> CellKey:
        """The cell as records name it."""
        asked = self.condition
        return (
            self.task, self.model, asked.prompt, asked.think, asked.temperature, asked.best_of, self.run, self.sample,
        )  # fmt: skip

    def instance(self, split: Split, seed: int) -> Instance:
        """The instance to attempt: the same for every model and condition, so that comparisons pair."""
        return task_list.find(self.task).build(instance_seed(split, seed * MAX_RUNS + self.run - 1))


@dataclass(frozen=True)
class Attempt:
    """What came of a cell: all its episodes, and the index of the chosen one."""

    cell: Cell
    episodes: tuple[Episode, ...]
    chosen: int

    @property
    def episode(self) -> Episode:
        """The chosen episode: the one that counts."""
        return self.episodes[self.chosen]

    def properties(self) -> Properties:
        """What a test says of its episode.  Tokens, seconds and how many passed are of all candidates."""
        episode = self.episode
        return {
            "seed": episode.instance.seed,
            "unseen": ",".join(episode.instance.unseen),
            "reward": episode.reward,
            "outcome": episode.outcome,
            "stop": episode.stop,
            "turns": len(episode.replies),
            "candidates_passed": sum(each.outcome == "passed" for each in self.episodes),
            "prompt_tokens": sum(each.prompt_tokens for each in self.episodes),
            "completion_tokens": sum(each.completion_tokens for each in self.episodes),
            "seconds": round(sum(each.seconds for each in self.episodes), 3),
        }


def cell_properties(cell: Cell, backend: str) -> Properties:
    """What a test says of its cell, played or not; with its attempt's, a row of the report and JUnit's properties."""
    condition = cell.condition
    return {
        "model": cell.model,
        "backend": backend,
        "task": cell.task,
        "group": task_list.find(cell.task).group,
        "condition": condition.slug,
        "prompt": condition.prompt,
        "think": "on" if condition.think else "off",
        "temperature": condition.temperature,
        "best_of": condition.best_of,
        "run": cell.run,
        "sample": cell.sample,
        "suite": SUITE_VERSION,
    }


def attempt(
    cell: Cell, backend: Backend, workshop: Workshop, budget: Budget, seed: int, split: Split
) -> Attempt:
    """Play a cell.  Raises Cancelled when the session ends meanwhile: what was played then says nothing."""
    task = task_list.find(cell.task)
    instance = cell.instance(split, seed)
    best_of = cell.condition.best_of
    samples = [cell.sample * best_of + candidate for candidate in range(best_of)]
    if best_of > 1 and hasattr(backend, "chats"):
        backend = Openings(backend, [reply_seed(seed, instance, sample, 0) for sample in samples])
    episodes = []
    for sample in samples:
        episode = play(
            task, instance, backend, workshop, cell.condition, budget=budget, seed=seed, sample=sample
        )
        if workshop.cancelled:
            raise Cancelled
        episodes.append(episode)
    return Attempt(cell, tuple(episodes), choose(episodes))


def kept(cell: Cell, found: Sequence[Mapping[str, Any]], split: Split, seed: int) -> Attempt:
    """The attempt that a run already holds, from its records.  Raises RecordsError when it is not of this instance."""
    instance = cell.instance(split, seed)
    for record in found:
        if record["seed"] != instance.seed:
            raise RecordsError(
                f"{cell.task} run {cell.run} was recorded with seed {record['seed']}, not {instance.seed}: start anew"
            )
    chosen = next(index for index, record in enumerate(found) if record["chosen"])
    return Attempt(cell, tuple(restore(record, instance) for record in found), chosen)


def choose(episodes: list[Episode]) -> int:
    """The index of the episode whose answer and final workspace most others share.

    A tie goes to the highest mean log-probability where every tied episode has one, else to the first.
    Invalid episodes have no vote, and are chosen only when there is nothing else.
    """
    votes = {index: _ballot(episode) for index, episode in enumerate(episodes) if not episode.invalid}
    if not votes:
        return 0
    counts = Counter(votes.values())
    most = max(counts.values())
    tied = [index for index, ballot in votes.items() if counts[ballot] == most]
    known = {index: value for index in tied if (value := episodes[index].logprob) is not None}
    return max(tied, key=known.__getitem__) if len(known) == len(tied) else tied[0]


def _ballot(episode: Episode) -> tuple[str, str]:
    """What an episode votes for: its answer, whatever the case and spacing, and the files it left."""
    digest = hashlib.sha256()
    for path, state in sorted(episode.after.items()):
        for part in (
            path.encode(errors="surrogatepass"),
            state.kind.encode(),
            state.content,
            b"x" * state.executable,
        ):
            digest.update(b"%d:" % len(part) + part)
    return " ".join(normal(episode.answer).casefold().split()), digest.hexdigest()
