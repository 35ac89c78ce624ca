"""Recipes: what a training run is told, read from TOML and checked before anything starts."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pytest_pocket.conditions import SYSTEM_PROMPTS

T = TypeVar("T")
DTYPES = ("float32", "bfloat16")
TARGETS = ("assistant", "all")
OVERLONG = ("score", "mask")
"""What to do with episodes that hit a limit."""


class RecipeError(ValueError):
    """A recipe that cannot be run, said in one line: what, the value, what to do."""


@dataclass(frozen=True)
class Data:
    """The traces: how many of each task, and the share that begins with a mistake and its recovery.

    ``kinds`` is the share of each list of wordings, layouts and families that they show: demonstrations are dear,
    and what they leave out is for reinforcement learning to find.
    """

    episodes_per_task: int
    kinds: float
    stumble: float
    seed: int


@dataclass(frozen=True)
class Fit:
    """One stage.  ``prompts`` weighs the conditions of the traces, ``think`` is the share with thinking,
    ``text_share`` that of plain source text among them, ``noise`` that of a request's words that are changed.  The
    first ``copies_alone`` of the ``tokens`` are random names to copy; then a share ``copies`` of the steps has a batch
    of them beside that of traces.  ``targets`` are the tokens of the ``"assistant"``, or ``"all"``, which is for
    pretraining and, in SFT, the broken mask of an experiment."""

    prompts: Mapping[str, float]
    think: float
    text_share: float
    copies_alone: int
    copies: float
    tokens: int
    batch_tokens: int
    muon_lr: float
    adam_lr: float
    seed: int
    noise: float = 0.0
    targets: str = "assistant"


@dataclass(frozen=True)
class Scratch:
    """A model from nothing: its tokenizer, its shape (given to transformers' Qwen3Config as it is), pretraining."""

    vocabulary: int
    model: Mapping[str, Any]
    pretrain: Fit


@dataclass(frozen=True)
class Weights:
    """What of a parent is trained, and in which type.

    A ``rank`` above 0 trains LoRA matrices of that rank on all linear layers, scaled by ``alpha``, and the parent's
    weights, in ``dtype``, stay as they are.  ``checkpointing`` computes activations twice rather than keep them.
    """

    dtype: str = "float32"
    rank: int = 0
    alpha: int = 0
    checkpointing: bool = False


@dataclass(frozen=True)
class Preference:
    """DPO: ``beta`` is the strength of the pull to the parent, ``sft`` weighs the likelihood of the better episode.

    Pairs whose words agree by more than ``similar`` are left out.  A step is of ``pairs`` pairs, ``batch_tokens``
    tokens of them at a time; all are seen ``epochs`` times.
    """

    beta: float
    sft: float
    similar: float
    pairs: int
    batch_tokens: int
    epochs: int
    muon_lr: float
    adam_lr: float
    seed: int


@dataclass(frozen=True)
class RL:
    """Reinforcement learning: in each of ``steps``, ``group`` attempts at each of ``instances`` training instances.

    ``prompts`` and ``think`` as in :class:`Fit`, drawn for each group.  A share ``revisit`` of the instances is of
    those whose last group had variance, as far as there are such, the rest new; a share ``focus`` of the new ones'
    tasks is drawn by how often their groups had variance, the rest evenly, and a share ``left_out`` of them shows a
    kind that the traces do not (``kinds`` of :class:`Data`).  An episode may have ``turns`` replies of
    ``reply_tokens`` each, ``tokens`` in all; one that hits a limit has its reward (``overlong = "score"``) or is
    left out (``"mask"``).  The rollouts of a step give ``updates`` optimizer steps, each of a part of them, ``epochs``
    times over.  The ratio of new to old probability is clipped to [1 - clip_low, 1 + clip_high]; ``kl`` weighs the
    divergence from the parent, and 0 spares computing it.
    """

    prompts: Mapping[str, float]
    think: float
    temperature: float
    steps: int
    instances: int
    group: int
    focus: float
    revisit: float
    turns: int
    reply_tokens: int
    tokens: int
    overlong: str
    updates: int
    clip_low: float
    clip_high: float
    kl: float
    batch_tokens: int
    muon_lr: float
    adam_lr: float
    seed: int
    left_out: float = 0.0
    epochs: int = 1


@dataclass(frozen=True)
class Recipe:
    """All stages of a family.  ``scratch`` is None in one that begins with weights from elsewhere.

    ``name`` is that of the file, with what was changed by ``--set``.
    """

    name: str
    scratch: Scratch | None
    weights: Weights
    data: Data
    sft: Fit
    dpo: Preference
    rlvr: RL


def load(name: str, changes: Sequence[str] = ()) -> Recipe:
    """The recipe of a name that ships, or of a path to a TOML file.  Raises RecipeError.

    ``changes`` are of the form ``TABLE.KEY=VALUE``, the value as in TOML.
    """
    folder = Path(str(resources.files("pytest_pocket.training") / "recipes"))
    path = next((path for path in (folder / f"{name}.toml", Path(name)) if path.is_file()), None)
    if path is None:
        shipped = ", ".join(sorted(file.stem for file in folder.glob("*.toml")))
        raise RecipeError(f"unknown recipe {name!r}: choose from {shipped}, or give the path of a TOML file")
    try:
        table = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is not TOML: {error}") from None
    for change in changes:
        _change(table, change)
    unknown = table.keys() - {"tokenizer", "model", "pretrain", "weights", "data", "sft", "dpo", "rlvr"}
    if unknown:
        raise RecipeError(f"recipe {path} has unknown tables: {', '.join(sorted(unknown))}")
    try:
        recipe = Recipe(
            " ".join([path.stem, *changes]),
            Scratch(table["tokenizer"]["vocabulary"], table["model"], _table(Fit, table["pretrain"]))
            if "pretrain" in table
            else None,
            _table(Weights, table.get("weights", {})),
            _table(Data, table["data"]),
            _table(Fit, table["sft"]),
            _table(Preference, table["dpo"]),
            _table(RL, table["rlvr"]),
        )
    except (KeyError, TypeError) as error:
        raise RecipeError(f"recipe {path}: {error}") from None
    if recipe.rlvr.overlong not in OVERLONG:
        raise RecipeError(
            f"recipe {path}: overlong {recipe.rlvr.overlong!r}: choose from {', '.join(OVERLONG)}"
        )
    if recipe.weights.dtype not in DTYPES:
        raise RecipeError(f"recipe {path}: dtype {recipe.weights.dtype!r}: choose from {', '.join(DTYPES)}")
    fits = [recipe.scratch.pretrain, recipe.sft] if recipe.scratch else [recipe.sft]
    if wrong_targets := {fit.targets for fit in fits}.difference(TARGETS):
        raise RecipeError(f"recipe {path}: targets {min(wrong_targets)!r}: choose from {', '.join(TARGETS)}")
    stages: list[Fit | RL] = [*fits, recipe.rlvr]
    for stage in stages:
        if wrong := stage.prompts.keys() - SYSTEM_PROMPTS.keys():
            raise RecipeError(
                f"recipe {path}: unknown prompt {min(wrong)!r}: choose from {', '.join(SYSTEM_PROMPTS)}"
            )
    return recipe


def _change(table: dict[str, Any], change: str) -> None:
    """Put a changed value into the tables of a recipe."""
    place, _, value = change.partition("=")
    name, _, key = place.strip().partition(".")
    try:
        table.setdefault(name, {})[key.strip()] = tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, AttributeError, TypeError):
        raise RecipeError(f"--set {change!r}: write TABLE.KEY=VALUE, as in --set dpo.beta=0.1") from None


def _table(kind: type[T], table: Mapping[str, Any]) -> T:
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := table.keys() - known:
        raise TypeError(f"unknown key {min(unknown)!r}: choose from {', '.join(sorted(known))}")
    return kind(**table)
