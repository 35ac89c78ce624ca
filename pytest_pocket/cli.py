"""The ``pocket`` command: what there is, what a run showed, and the training stages.

Everything heavy is imported by the command that needs it, so that ``pocket --help`` answers at once.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from pytest_pocket.chat import Message
    from pytest_pocket.registry import Model

STAGES = ("data", "tokenizer", "pretrain", "sft")
USAGE = 2
RESULT_LINES = 20
"""How much of one message ``--trace`` shows."""

app = typer.Typer(
    help="How far can a very small language model go as a coding agent? Run it with pytest; look at it here.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _stop(message: object) -> NoReturn:
    """End with one line and the usage exit code."""
    typer.echo(f"pocket: {message}", err=True)
    raise typer.Exit(USAGE)


@app.command("list")
def list_all(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show the models, the tasks and the conditions there are."""
    from pytest_pocket import registry, task_list
    from pytest_pocket.catalogue import catalogue
    from pytest_pocket.conditions import SYSTEM_PROMPTS, THINK

    try:
        known = registry.Registry(registry.from_pyproject(Path("pyproject.toml")))
    except registry.ModelError as error:
        _stop(error)
    if not as_json:
        typer.echo("\n".join(catalogue(known)))
        return
    groups: dict[str, list[str]] = {}
    for task in task_list.shipped().values():
        groups.setdefault(task.group, []).append(task.name)
    conditions = {"prompt": list(SYSTEM_PROMPTS), "think": list(THINK)}
    models = [_about(model) for model in known.models.values()]
    typer.echo(json.dumps({"models": models, "tasks": groups, "conditions": conditions}, indent=2))


def _about(model: Model) -> dict[str, str]:
    keys = ("name", "backend", "stage", "parent", "description")
    return {key: str(getattr(model, key)) for key in keys}


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="A run directory, or its episodes.jsonl.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one row an episode.")] = False,
    task: Annotated[str, typer.Option(help="Only this task.")] = "",
    trace: Annotated[bool, typer.Option("--trace", help="Print the trajectories.")] = False,
) -> None:
    """Show the table of a run, or its trajectories."""
    from pytest_pocket import report

    found = _load(run)
    chosen = [record for record in found if task in ("", record.get("task"))]
    if task and not chosen:
        names = ", ".join(sorted({str(record.get("task")) for record in found}))
        _stop(f"no episode of task {task!r} in {run}: it holds {names}")
    with _foreign_records(run):
        shown: str | list[Any] = chosen if trace else report.rows(chosen)
        if not as_json:
            shown = "\n".join(map(_trajectory, chosen)) if trace else _tables(report.rows(chosen))
    typer.echo(shown if isinstance(shown, str) else json.dumps(shown, indent=2))


@contextmanager
def _foreign_records(run: Path) -> Iterator[None]:
    """What a record lacks, in one line."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        _stop(
            f"a record in {run} is not of this version: {type(error).__name__}: {error}; update pytest-pocket"
        )


def _tables(rows: list[dict[str, str | int | float]]) -> str:
    from pytest_pocket import report

    width = shutil.get_terminal_size().columns
    return "\n".join(
        (report.render(rows, width, ascii_only=_plain()), report.tasks(rows, width, ascii_only=_plain()))
    )


def _trajectory(record: Mapping[str, Any]) -> str:
    """An episode to be read: what was said, called and answered, and how it was scored."""
    from pytest_pocket.records import messages
    from pytest_pocket.report import printable

    think = "think" if record["think"] else "no-think"
    reward = "invalid" if record["reward"] is None else f"reward {record['reward']:.3f}"
    head = (
        f"{record['task']} run {record['run']} · {record['model']} {record['prompt']} {think} "
        f"t {record['temperature']:g} · {record['outcome']}, {reward}"
    )
    lines = [f"=== {printable(head)}"]
    for message in messages(record):
        lines += _message(message)
    lines += [
        printable(f"--- {check['name']}: {check['value']:g} {check['detail']}".rstrip())
        for check in record["checks"]
    ]
    if record["detail"]:
        lines.append(printable(f"--- {record['detail']}"))
    return "\n".join([*lines, ""])


def _message(message: Message) -> Iterator[str]:
    name = f" {message.name}" if message.name else ""
    yield from _indented(f"[{message.role}{name}]", message.content)
    if message.thinking:
        yield from _indented("    (thinking)", message.thinking)
    for call in message.calls:
        for key, value in call.arguments.items():
            yield from _indented(f"  > {call.name} {key}=", str(value))
        if not call.arguments:
            yield from _indented(f"  > {call.name}", "")


def _indented(head: str, text: str) -> Iterator[str]:
    """Text a model or a file wrote, made harmless for a terminal, cut with a mark."""
    from pytest_pocket.report import printable

    first, *rest = text.splitlines() or [""]
    yield printable(f"{head} {first}").rstrip()
    for line in rest[: RESULT_LINES - 1]:
        yield f"    {printable(line)}"
    if len(rest) >= RESULT_LINES:
        yield f"    [{len(rest) - RESULT_LINES + 1} more lines]"


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one object a comparison.")] = False,
) -> None:
    """Compare models, conditions or runs on the instances that they share, two by two."""
    from pytest_pocket import comparison, report

    loaded = {}
    for run in runs:
        with _foreign_records(run):
            loaded[str(run)] = report.rows(_load(run))
    try:
        pairs = comparison.pairings(comparison.together(loaded))
    except comparison.ComparisonError as error:
        _stop(error)
    if not pairs:
        _stop("nothing to compare: give runs of two models, or of one under two conditions")
    if as_json:
        typer.echo(json.dumps([asdict(pair) for pair in pairs], indent=2))
    else:
        typer.echo(report.compared(pairs, shutil.get_terminal_size().columns, ascii_only=_plain()))


def _load(run: Path) -> list[dict[str, Any]]:
    """The records of a run directory, or of its ``episodes.jsonl``."""
    from pytest_pocket import records

    try:
        found = records.load(run.parent if run.name == records.EPISODES else run)[1]
    except records.RecordsError as error:
        _stop(error)
    return found or _stop(f"{run} holds no episodes: nothing has finished there")


def _plain() -> bool:
    """Whether the terminal takes ASCII only."""
    return not (sys.stdout.encoding or "").lower().startswith("utf")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def train(context: typer.Context, stage: Annotated[str, typer.Argument(help="The stage.")] = "") -> None:
    """Train: pocket train STAGE [OPTIONS], where STAGE is one of data, tokenizer, pretrain, sft."""
    if stage in ("-h", "--help"):
        typer.echo(context.get_help())
        return
    if stage not in STAGES:
        _stop(f"unknown training stage {stage!r}: choose from {', '.join(STAGES)}")
    name = f"pytest_pocket.training.{stage}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            _stop(f"training stage {stage!r} is not part of this installation")
        _stop(f"training stage {stage!r} needs {error.name}: pip install 'pytest-pocket[train]'")
    raise typer.Exit(module.main(context.args) or 0)
