"""What the stages of training share: their options, and how they fail: in one line, the last good state intact."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError

from pytest_pocket.backends.memory import out_of_memory
from pytest_pocket.export import ExportError
from pytest_pocket.records import RecordsError
from pytest_pocket.registry import ModelError, sha256_json
from pytest_pocket.sandbox import SandboxUnavailable
from pytest_pocket.training import checkpoint
from pytest_pocket.training.data import DataError
from pytest_pocket.training.fit import State, TrainingError
from pytest_pocket.training.journal import TRACKERS, Journal, TrackerMissing
from pytest_pocket.training.recipe import RecipeError

EXPECTED = (
    DataError,
    ExportError,
    ModelError,
    RecipeError,
    RecordsError,
    SandboxUnavailable,
    TrackerMissing,
    TrainingError,
)
USAGE = 2
Main = Callable[[Sequence[str] | None], None]


def arguments(name: str, description: str | None, *, parent: str = "") -> argparse.ArgumentParser:
    """The options that every stage that makes a checkpoint has; with a ``parent``, those of one that has one."""
    parser = argparse.ArgumentParser(prog=f"pocket train {name}", description=description)
    recipe_options(parser)
    parser.add_argument("--out", type=Path, default=Path(".pocket/checkpoints"), help="where checkpoints go")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--evaluations", type=int, default=0, help="dev evaluations along the way")
    parser.add_argument("--track", default="", choices=TRACKERS, help="log the curve to this tracker too")
    if parent:
        parser.add_argument(
            "--from",
            dest="parent",
            default=parent,
            help="a registered model, a checkpoint directory, or hf:PATH",
        )
        parser.add_argument("--name", required=True, help="of the checkpoint")
    return parser


def recipe_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which recipe."""
    parser.add_argument("--recipe", default="tiny", help="a name that ships, or the path of a TOML file")
    parser.add_argument(
        "--set",
        dest="changes",
        default=[],
        action="append",
        metavar="TABLE.KEY=VALUE",
        help="change a value of the recipe; repeatable",
    )


def begin(options: argparse.Namespace, seed: int) -> None:
    """Set threads and seed, note the commit, make the folder for checkpoints."""
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(seed)
    checkpoint.origin()
    _made[:] = [folder for folder in (options.out, *options.out.parents) if not folder.exists()]
    options.out.mkdir(parents=True, exist_ok=True)


def state(options: argparse.Namespace, recipe_sha256: str, *origins: str) -> State:
    """Where a run keeps its state, known by its recipe and the digests of what it comes from."""
    return State(options.out / f"{options.name}.state", sha256_json([recipe_sha256, *origins]))


def journal(options: argparse.Namespace) -> Journal:
    """Where a run's curve is told and kept."""
    return Journal(options.name, options.track, options.out)


def run(main: Main, argv: Sequence[str] | None = None) -> None:
    """Run a stage.  What goes wrong by bad input, a full disk or too little memory ends it with one line and 2."""
    try:
        main(argv)
    except EXPECTED as error:
        _stop(str(error))
    except MemoryError as error:
        _stop(f"out of memory{f' ({error})' if str(error) else ''}: lower batch_tokens in the recipe")
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        _stop(f"out of memory: lower batch_tokens in the recipe ({str(error).splitlines()[0]})")
    except OSError as error:
        _stop(f"{error.filename or 'a file'}: {error.strerror or error}; what was saved before is whole")
    except SafetensorError as error:
        _stop(f"weights: {error}; what was saved before is whole")
    except KeyboardInterrupt:
        _stop("interrupted: the same command goes on from the last saved state")


_made: list[Path] = []


def _stop(line: str) -> None:
    for folder in _made:
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()
    print(f"pocket train: {line}", file=sys.stderr)
    raise SystemExit(USAGE)
