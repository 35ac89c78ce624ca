"""What is looked at in a folder of model files before any library opens one of them.

The libraries keep most of what a hostile checkpoint may try from happening: only safetensors are read, no code that
comes with a model runs, templates are rendered in a sandbox.  What they do not limit is sizes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIB = 2**20
MAX_BYTES = {
    "tokenizer.json": 64 * MIB,
    "vocab.json": 64 * MIB,
    "merges.txt": 64 * MIB,
    "chat_template.jinja": MIB,
}
"""The largest tokenizers that are published have about half of it."""
MAX_OTHER_BYTES = 16 * MIB
TEXTS = (".json", ".jinja", ".txt", ".model")
MAX_HEADER = 100 * MIB
"""As the safetensors library has it."""
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_experts", "num_local_experts")
"""Numbers of modules, each of which is made, with nothing in it, before a weight is looked at."""
EXPERTS = 4096
MAX_NUMBER = 2**40


class Refused(ValueError):
    """A folder that is not loaded, said in one line."""


def vet(folder: Path) -> None:
    """Look at the files of a model's folder.  Raises Refused."""
    for path in sorted(folder.iterdir()):
        if path.suffix in TEXTS:
            allowed = MAX_BYTES.get(path.name, MAX_OTHER_BYTES)
            if (size := path.stat().st_size) > allowed:
                raise Refused(
                    f"{path} has {size} bytes, more than {allowed}: that is no {path.name} of a model"
                )
    config = folder / "config.json"
    if config.is_file():
        weights = sorted(folder.glob("*.safetensors"))
        _vet_config(config, sum(map(_tensors, weights)) if weights else None)


def stay_inside(folder: Path) -> None:
    """Refuse links that lead out of a folder, but for those of the hub's cache.  Raises Refused."""
    home = folder.resolve()
    # The hub's cache: models--OWNER--NAME/snapshots/COMMIT/FILE is a link to models--OWNER--NAME/blobs/HASH.
    allowed = (home, home.parents[1] / "blobs") if home.parent.name == "snapshots" else (home,)
    for path in sorted(folder.iterdir()):
        if not any(path.resolve().is_relative_to(each) for each in allowed):
            raise Refused(
                f"{path} leads out of its folder, to {path.resolve()}: put a copy there, or delete it"
            )


def _vet_config(path: Path, tensors: int | None) -> None:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path} is broken: {type(error).__name__}; save or fetch it again") from None
    for name, value in _numbers(config):
        if tensors is not None and name in LAYERS and value > max(tensors, EXPERTS * ("experts" in name)):
            raise Refused(f"{path} says {name} {value}, and its weights hold {tensors} tensors")
        if abs(value) > MAX_NUMBER:
            raise Refused(f"{path} says {name} {value:.3g}: no model has that")


def _numbers(value: Any) -> Iterator[tuple[str, float]]:
    """The numbers of a configuration by their key, those of its parts (``text_config``) too."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting.extend(part)
        elif isinstance(part, dict):
            for name, inner in part.items():
                if isinstance(inner, int | float) and not isinstance(inner, bool):
                    yield str(name), inner
                else:
                    waiting.append(inner)


def _tensors(path: Path) -> int:
    """How many tensors the header of a safetensors file names.  Raises Refused."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > min(MAX_HEADER, path.stat().st_size):
                raise Refused(
                    f"{path} says that its header has {size} bytes: it is cut, or no safetensors file"
                )
            header = json.loads(file.read(size))
        return len(header.keys() - {"__metadata__"})
    except (OSError, struct.error, ValueError, RecursionError, AttributeError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"{path} is no safetensors file: {type(error).__name__}") from None
