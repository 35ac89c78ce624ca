"""The processes that train one model together, a GPU each, as ``accelerate launch`` starts them; else this one alone.

Each takes its share of every step and their gradients are averaged, so that all hold the same weights.  By hand
rather than by wrapping the model, because the stages use its parts: a wrapped one averages only what its own
``forward`` did.
"""

from __future__ import annotations

import atexit
import functools
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from pytest_pocket.backends.hf import pick_device

T = TypeVar("T")


@functools.cache
def _state() -> Any:
    from accelerate import PartialState

    state = PartialState(cpu=pick_device(None) == "cpu")
    # A process that ends with the group's threads still there may be aborted, and its work counted as failed.
    if state.num_processes > 1:
        atexit.register(state.destroy_process_group)
    return state


def size() -> int:
    """How many processes there are."""
    return int(_state().num_processes)


def is_first() -> bool:
    """Whether this is the process that evaluates, speaks and saves."""
    return bool(_state().is_main_process)


def device() -> str:
    """Where this process trains."""
    return str(_state().device) if size() > 1 else pick_device(None)


def share(items: Iterable[T]) -> Iterator[T]:
    """This process's part of what all of them see."""
    return islice(items, _state().process_index, None, size())


def gathered(items: list[T]) -> list[T]:
    """The parts of all processes, in the order that ``share`` took them from."""
    if size() == 1:
        return items
    from accelerate.utils import gather_object

    rank = _state().process_index
    counted = gather_object([(place, rank, item) for place, item in enumerate(items)])
    return [item for _, _, item in sorted(counted, key=lambda each: each[:2])]


def total(number: float) -> float:
    """The sum of all processes' numbers."""
    return sum(gathered([number]))


def average_gradients(model: Any) -> None:
    """Give all processes the mean of their gradients; one without any counts as zero."""
    if size() == 1:
        return
    import torch
    from accelerate.utils import reduce

    for parameter in model.parameters():
        if parameter.requires_grad:
            mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = reduce(mine, "mean")
