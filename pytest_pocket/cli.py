"""The ``pocket`` command: what there is, what a run showed, and the training stages.

Everything heavy is imported by the command that needs it, so that ``pocket --help`` answers at once.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pytest_pocket import ollama_cli

if TYPE_CHECKING:
    from pytest_pocket.chat import Message
    from pytest_pocket.episode import Workshop
    from pytest_pocket.registry import Model

STAGES = ("data", "pretrain", "sft", "dpo", "rlvr")
USAGE = 2
RESULT_LINES = 20
"""How much of one message ``--trace`` shows."""

app = typer.Typer(
    help="How far can a very small language model go as a coding agent? Run it with pytest; look at it here.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(ollama_cli.app, name="ollama")


def _stop(message: object) -> NoReturn:
    """End with one line, harmless whatever it quotes, and the usage exit code."""
    from pytest_pocket.trajectory import safe

    typer.echo(f"pocket: {safe(str(message))}", err=True)
    raise typer.Exit(USAGE)


@app.command("list")
def list_all(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show the models, the tasks and the conditions there are."""
    from pytest_pocket import __version__, registry, task_list
    from pytest_pocket.catalogue import catalogue
    from pytest_pocket.conditions import SYSTEM_PROMPTS, THINK
    from pytest_pocket.task import SUITE_VERSION

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
    said = {"version": __version__, "suite": SUITE_VERSION}
    typer.echo(json.dumps({**said, "models": models, "tasks": groups, "conditions": conditions}, indent=2))


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
    from pytest_pocket import records, report

    info, found = _run(run)
    with _foreign_records(run):
        found = records.in_order(info, found)
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


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write, or write anew.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make one HTML page of runs, with every episode behind its numbers; it opens without a network."""
    from pytest_pocket import page, records, registry

    names = [run.resolve().name for run in runs]
    read = [
        records.Recorded(name if names.count(name) == 1 else str(run), *_run(run))
        for name, run in zip(names, runs, strict=True)
    ]
    if len({each.name for each in read}) < len(read):
        _stop("a run is given twice")
    with _one_line(runs[0], page.PageError, registry.ModelError):
        known = registry.Registry(registry.from_pyproject(Path("pyproject.toml"))).models
        text = page.build(read, known)
        page.write(output, text)
    episodes = sum(len(each.found) for each in read)
    said = {"output": str(output), "episodes": episodes, "bytes": len(text.encode())}
    typer.echo(json.dumps(said, indent=2) if as_json else f"{output}: {episodes} episodes")


@app.command()
def rescore(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write a new run directory with today's rewards.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    sandbox: Annotated[str, typer.Option(help="Where hidden tests run, as --pocket-sandbox.")] = "auto",
) -> None:
    """Replay the saved final states of a run through today's rewards, and say what changes."""
    from pytest_pocket import rescore as rescoring
    from pytest_pocket.sandbox import SandboxError, SandboxUnavailable

    info, found = _run(run)
    if output:
        _refuse_existing(output)
    with _one_line(run, SandboxError, SandboxUnavailable, ValueError):
        results = list(rescoring.rescore(found, _workshop(sandbox)))
        if output:
            rescoring.write(output, run, info, results)
    typer.echo(json.dumps(rescoring.summary(results), indent=2) if as_json else rescoring.render(results))


@app.command()
def verify(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one object a run.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on what could not be shown, too.")] = False,
    sandbox: Annotated[str, typer.Option(help="Where calls are played again, as --pocket-sandbox.")] = "auto",
) -> None:
    """Say whether runs are complete and hold together, by playing what they recorded again; exit 1 if not."""
    from pytest_pocket import verify as verifying
    from pytest_pocket.registry import ModelError, extra
    from pytest_pocket.sandbox import SandboxError, SandboxUnavailable

    said = []
    good = True
    for run in runs:
        with _one_line(run, SandboxError, SandboxUnavailable, ModelError), extra("verify"):
            verdict = verifying.verify(run, _workshop(sandbox))
        good = good and not verdict.failed(strict=strict)
        if as_json:
            said.append(verifying.summary(run, verdict, strict=strict))
        else:
            typer.echo(verifying.render(run, verdict, strict=strict))
    if as_json:
        typer.echo(json.dumps(said, indent=2))
    raise typer.Exit(not good)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory, or its episodes.jsonl.")],
    kind: Annotated[str, typer.Option("--as", help="sft, dpo, jsonl or parquet.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a file of a run: training data for TRL (sft, dpo), or one flat row an episode (jsonl, parquet)."""
    from pytest_pocket import export as exporting

    if kind not in exporting.KINDS:
        _stop(f"--as {kind!r}: choose from {', '.join(exporting.KINDS)}")
    found = _load(run)
    card = exporting.card_of(output) if kind in exporting.TRAINING else None
    _refuse_existing(output)
    if card:
        _refuse_existing(card)
    with _one_line(run, exporting.ExportError):
        made = exporting.export(found, kind)
        exporting.write(output, made.data)
        if card:
            exporting.write(card, exporting.card(made, found))
    if as_json:
        typer.echo(
            json.dumps({"output": str(output), "rows": made.rows, "left_out": made.left_out}, indent=2)
        )
    else:
        typer.echo(_counted(f"{made.rows} rows in {output}", made.left_out))


@app.command()
def merge(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories: of shards, say, or of several machines.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The run directory to write.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Join runs that were played alike to one, and say what was left out."""
    from pytest_pocket import merge as merging
    from pytest_pocket import records

    parts = [merging.Part(run, *_run(run)) for run in runs]
    _refuse_existing(output)
    with _one_line(runs[0], merging.MergeError):
        merged = merging.merge(parts)
        records.write(output, merged.info, merged.found)
    if as_json:
        said = {"output": str(output), "episodes": len(merged.found), "left_out": merged.left_out}
        said |= {"missing_shards": merged.missing, "merged": merged.info["merged"]}
        typer.echo(json.dumps(said, indent=2))
    else:
        typer.echo(_counted(f"{len(merged.found)} episodes in {output}", merged.left_out))
        if merged.missing:
            typer.echo(f"not given: shard {', '.join(merged.missing)}")


@app.command()
def schema(
    name: Annotated[str, typer.Argument(help="run: of run.json; episode: of one line of episodes.jsonl.")],
) -> None:
    """Print the JSON Schema of a run's files."""
    from pytest_pocket import schemas

    if name not in schemas.NAMES:
        _stop(f"unknown schema {name!r}: choose from {', '.join(schemas.NAMES)}")
    typer.echo(schemas.text(name), nl=False)


def _counted(done: str, left_out: Mapping[str, int]) -> str:
    """What was done, and what was left out by reason, on one harmless line."""
    from pytest_pocket.report import printable

    reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
    return printable(f"{done}; left out: {reasons}" if reasons else done)


@contextmanager
def _one_line(run: Path, *errors: type[Exception]) -> Iterator[None]:
    """What the user can mend, in one line: these errors, and those of the records."""
    from pytest_pocket.records import RecordsError

    expected: tuple[type[Exception], ...] = (RecordsError, *errors)
    try:
        with _foreign_records(run):
            yield
    except expected as error:
        _stop(error)


def _workshop(sandbox: str) -> Workshop:
    """Where episodes are played again.  Raises SandboxUnavailable, ValueError."""
    from pytest_pocket import sandbox as sandboxes
    from pytest_pocket.episode import Workshop

    workshop = Workshop(sandboxes.select(sandbox))
    if caveat := workshop.provider.caveat:
        typer.echo(f"pocket: {caveat}", err=True)
    return workshop


def _refuse_existing(output: Path) -> None:
    if os.path.lexists(output):
        _stop(f"{output} exists: give another --output")


def _load(run: Path) -> list[dict[str, Any]]:
    """The records of a run directory, or of its ``episodes.jsonl``."""
    return _run(run)[1]


def _run(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a run directory holds, given by its name or that of its ``episodes.jsonl``."""
    from pytest_pocket import records

    try:
        info, found = records.load(run.parent if run.name == records.EPISODES else run)
    except records.RecordsError as error:
        _stop(error)
    return info, found or _stop(f"{run} holds no episodes: nothing has finished there")


def _plain() -> bool:
    """Whether the terminal takes ASCII only."""
    return not (sys.stdout.encoding or "").lower().startswith("utf")


@app.command()
def push(
    name: Annotated[str, typer.Argument(help="A model of the suite that is a checkpoint.")],
    to: Annotated[
        str, typer.Option("--to", help="A new folder (./NAME), or OWNER/NAME on the Hugging Face hub.")
    ],
    run: Annotated[
        list[Path] | None, typer.Option("--run", help="A run that measured it, for the card; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put a checkpoint with a model card (where it comes from, what it scored) in a folder or on the hub."""
    from pytest_pocket import push as pushing
    from pytest_pocket import records, registry

    try:
        model = registry.Registry(registry.from_pyproject(Path("pyproject.toml"))).resolve(name)
        measured = [records.Recorded(str(each), *_run(each)) for each in run or []]
        done = pushing.push(model, to, measured)
    except (registry.ModelError, pushing.PushError) as error:
        _stop(error)
    typer.echo(
        json.dumps({"model": model.name, "to": done}, indent=2) if as_json else f"{model.name}: {done}"
    )


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def train(context: typer.Context, stage: Annotated[str, typer.Argument(help="The stage.")] = "") -> None:
    """Train: pocket train STAGE [OPTIONS], where STAGE is one of data, pretrain, sft, dpo, rlvr."""
    if stage in ("-h", "--help"):
        typer.echo(context.get_help())
        return
    if stage not in STAGES:
        _stop(f"unknown training stage {stage!r}: choose from {', '.join(STAGES)}")
    from pytest_pocket.registry import ModelError, extra

    try:
        # Some of it is imported only when there is something to do.
        with extra("train"):
            from pytest_pocket.training import stage as stages

            module = importlib.import_module(f"pytest_pocket.training.{stage}")
            stages.run(module.main, context.args)
    except ModelError as error:
        _stop(error)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def data(context: typer.Context) -> None:
    """Make traces to train on: short for pocket train data."""
    train(context, "data")
