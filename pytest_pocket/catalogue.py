"""The catalogue: the models, tasks and conditions there are, as ``--pocket-list`` shows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pytest_pocket import __version__, task_list
from pytest_pocket.conditions import SYSTEM_PROMPTS, THINK
from pytest_pocket.registry import Model, Registry
from pytest_pocket.task import SUITE_VERSION
from pytest_pocket.trajectory import safe


def catalogue(registry: Registry) -> Iterator[str]:
    """The lines to print."""
    yield f"pytest-pocket {__version__}, suite {SUITE_VERSION} (scores of different suites are not compared)"
    yield ""
    yield "models (--pocket-model)"
    yield from _columns(registry.models.values())
    direct = [name for name in registry.backends if name not in ("oracle", "noop")]
    yield f"  or unregistered: {', '.join(f'{name}:...' for name in direct)}, or a checkpoint directory"
    yield ""
    yield "tasks (-m GROUP, -k TASK)"
    groups: dict[str, list[str]] = {}
    for task in (*task_list.shipped().values(), *task_list.added().values()):
        groups.setdefault(task.group, []).append(task.name)
    for group, names in groups.items():
        yield f"  {group:<6} {' '.join(names)}"
    yield ""
    yield "conditions"
    yield f"  --pocket-prompt       {' '.join(SYSTEM_PROMPTS)}"
    yield f"  --pocket-think        {' '.join(THINK)}"
    yield "  --pocket-temperature  0 (greedy) or above"
    yield "  --pocket-best-of      1, or more at a temperature above 0"


def _columns(models: Iterable[Model]) -> Iterator[str]:
    rows = [("name", "backend", "stage", "parent", "")]
    rows += [
        (
            safe(model.name),
            safe(model.backend),
            safe(model.stage),
            safe(model.parent),
            safe(model.description),
        )
        for model in models
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
