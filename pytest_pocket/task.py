"""The task interface: what a task builds, how its oracle solves it, how an attempt is scored.

A task makes an :class:`Instance` from a seed.  The seed alone decides every name, value and text, and its
range decides the split: train, dev or eval.  Wordings, layouts and function families are split too
(:class:`Kinds`), so that a score on what training may have seen can be told from one on what it cannot.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

from pytest_pocket.chat import ToolCall
from pytest_pocket.sandbox import CommandResult, FileState

SUITE_VERSION = "2"
"""Stamped on tasks, prompts, tools and template together; scores of different versions are never compared."""

Split = Literal["train", "dev", "eval"]
SPLITS: tuple[Split, ...] = get_args(Split)
SEEDS_PER_SPLIT = 10**9
HELD_OUT_SHARE = 0.3
"""The share of dev and eval instances that may draw kinds (wordings, layouts, families) which training never shows."""

T = TypeVar("T")

Solution = Generator[ToolCall, str, str]
"""An oracle: yields calls, is sent each result's text, returns the final answer."""


def instance_seed(split: Split, index: int) -> int:
    """The seed of instance ``index`` (from 0) of a split.  Splits never share a seed."""
    if not 0 <= index < SEEDS_PER_SPLIT:
        raise ValueError(f"instance index {index} is not in [0, {SEEDS_PER_SPLIT})")
    return SPLITS.index(split) * SEEDS_PER_SPLIT + index


def split_of(seed: int) -> Split:
    """The split that a seed belongs to."""
    if not 0 <= seed < len(SPLITS) * SEEDS_PER_SPLIT:
        raise ValueError(f"seed {seed} belongs to no split")
    return SPLITS[seed // SEEDS_PER_SPLIT]


@dataclass(frozen=True)
class Kinds(Generic[T]):
    """Alternatives of one sort, such as a task's wordings, divided by who may see them.

    ``train`` alternatives appear in every split; ``dev`` and ``eval`` only in their own.
    """

    train: Sequence[T]
    dev: Sequence[T]
    eval: Sequence[T]


class Draw:
    """The random choices of one instance.  Reproducible: (task, seed) decides all of them."""

    def __init__(self, task: str, seed: int) -> None:
        self.split = split_of(seed)
        self.random = random.Random(f"{task}:{seed}")
        self.unseen: list[str] = []
        self.reach = 0.0
        self._novel = self.split != "train" and self.chance(HELD_OUT_SHARE)

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, uniformly."""
        return self.random.choice(options)

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """``count`` different options, in random order."""
        return self.random.sample(options, count)

    def number(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return self.random.randint(low, high)

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.random.random() < probability

    def kind(self, label: str, kinds: Kinds[T]) -> T:
        """An alternative that this split may see; noted under ``label`` when it is held out from training.

        A novel instance draws every other of its kinds from those held out, so most hold several.
        """
        held_out = {"train": (), "dev": kinds.dev, "eval": kinds.eval}[self.split]
        if held_out and self._novel and self.chance(0.5):
            self.unseen.append(label)
            return self.pick(held_out)
        place = self.number(0, len(kinds.train) - 1)
        self.reach = max(self.reach, place / len(kinds.train))
        return kinds.train[place]


@dataclass(frozen=True)
class Instance:
    """One problem.  ``expect`` is hidden from the model; ``setup`` is a bash script run before it starts.

    ``unseen`` names the kinds that training never shows (of "wording", "layout", "family").  ``reach``, in [0, 1),
    says how far down the lists of the training kinds it went: what lies below 0.7 shows no kind of the last 30%.
    """

    task: str
    seed: int
    prompt: str
    files: Mapping[str, str]
    expect: Mapping[str, Any]
    setup: str = ""
    unseen: tuple[str, ...] = ()
    reach: float = 0.0


@dataclass(frozen=True)
class Final:
    """What an episode left behind: its answer, the workspace before and after, and whether it ended by itself.

    ``probe(files, script)`` runs a script over the given files alone, in a fresh sandbox: for hidden tests.
    """

    answer: str
    before: Mapping[str, FileState]
    after: Mapping[str, FileState]
    stopped: bool
    calls: int
    probe: Callable[[Mapping[str, str], str], CommandResult]

    def text(self, path: str) -> str | None:
        """The text of a regular file at the end; None when it is missing, a link, or not UTF-8."""
        state = self.after.get(path)
        if state is None or state.kind != "file":
            return None
        try:
            return state.content.decode()
        except UnicodeDecodeError:
            return None


@dataclass(frozen=True)
class Check:
    """One verifiable statement: ``value`` in [0, 1] says how far it holds, ``detail`` what was seen."""

    name: str
    value: float
    detail: str = ""


@dataclass(frozen=True)
class Score:
    """reward = outcome x stopped x intact.  ``outcome`` is the mean of the task's own checks."""

    checks: tuple[Check, ...]
    outcome: float
    stopped: float
    intact: float

    @property
    def reward(self) -> float:
        return self.outcome * self.stopped * self.intact

    @property
    def passed(self) -> bool:
        return self.reward == 1.0


NOT_DAMAGE = frozenset({".git/index"})
"""Git rewrites its index when it merely looks (a status refreshes it): not the model's doing."""


def score(final: Final, *checks: Check, may_change: Sequence[str] = ()) -> Score:
    """Combine a task's checks with the two that hold everywhere: it stopped, and damaged nothing.

    ``may_change`` are the paths that the task asked to change, create or delete.
    """
    ignored = (NOT_DAMAGE & final.before.keys()).union(may_change)
    paths = (final.before.keys() | final.after.keys()) - ignored
    damaged = sorted(path for path in paths if final.before.get(path) != final.after.get(path))
    outcome = sum(check.value for check in checks) / len(checks)
    return Score(
        checks=(
            *checks,
            Check("stopped", float(final.stopped), "" if final.stopped else "the episode hit a limit"),
            Check("intact", float(not damaged), f"changed: {', '.join(damaged[:5])}" if damaged else ""),
        ),
        outcome=outcome,
        stopped=1.0 if final.stopped else 0.5,
        intact=0.5 if damaged else 1.0,
    )


@dataclass(frozen=True)
class Problem:
    """What ``Task.make`` draws: an instance without its identity."""

    prompt: str
    files: Mapping[str, str]
    expect: Mapping[str, Any]
    setup: str = ""


class Task:
    """A family of problems.  Subclasses set ``name`` and ``group`` and define the three methods.

    ``acts`` is False where the request alone holds the answer: to end without a call is then not to end early.
    """

    name: ClassVar[str]
    group: ClassVar[str]
    acts: ClassVar[bool] = True

    def build(self, seed: int) -> Instance:
        """The instance that belongs to a seed; the same for every model, machine and process."""
        draw = Draw(self.name, seed)
        instance = self.make(draw)
        return Instance(
            task=self.name,
            seed=seed,
            prompt=instance.prompt,
            files=instance.files,
            expect=instance.expect,
            setup=instance.setup,
            unseen=tuple(dict.fromkeys(draw.unseen)),
            reach=draw.reach,
        )

    def make(self, draw: Draw) -> Problem:
        """Draw a problem."""
        raise NotImplementedError

    def solve(self, instance: Instance) -> Solution:
        """The oracle: calls that reach reward 1 on every seed, then the final answer."""
        raise NotImplementedError

    def reward(self, instance: Instance, final: Final) -> Score:
        """Score what an episode left behind."""
        raise NotImplementedError
