"""What the stages of training share: their options, and how they fail: in one line, the last good state intact."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pytest_pocket.export import ExportError
from pytest_pocket.records import RecordsError
from pytest_pocket.registry import ModelError
from pytest_pocket.sandbox import SandboxUnavailable
from pytest_pocket.training.data import DataError
from pytest_pocket.training.fit import TrainingError
from pytest_pocket.training.recipe import RecipeError

EXPECTED = (DataError, ExportError, ModelError, RecipeError, RecordsError, SandboxUnavailable, TrainingError)
USAGE = 2
Main = Callable[[Sequence[str] | None], None]


def arguments(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options that every stage that makes a checkpoint has."""
    parser = argparse.ArgumentParser(prog=f"pocket train {name}", description=description)
    parser.add_argument("--recipe", default="tiny", help="a name that ships, or the path of a TOML file")
    parser.add_argument("--out", type=Path, default=Path(".pocket/checkpoints"), help="where checkpoints go")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--evaluations", type=int, default=0, help="dev evaluations along the way")
    return parser


def run(main: Main, argv: Sequence[str] | None = None) -> None:
    """Run a stage.  What goes wrong by bad input, a full disk or too little memory ends it with one line and 2."""
    try:
        main(argv)
    except EXPECTED as error:
        _stop(str(error))
    except MemoryError as error:
        _stop(f"out of memory{f' ({error})' if str(error) else ''}: lower batch_tokens in the recipe")
    except RuntimeError as error:
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        _stop(f"out of memory: lower batch_tokens in the recipe ({str(error).splitlines()[0]})")
    except OSError as error:
        _stop(f"{error.filename or 'a file'}: {error.strerror or error}; what was saved before is whole")
    except KeyboardInterrupt:
        _stop("interrupted: the same command goes on from the last saved state")


def _stop(line: str) -> None:
    print(f"pocket train: {line}", file=sys.stderr)
    raise SystemExit(USAGE)
