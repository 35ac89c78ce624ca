"""``pocket ollama``: a checkpoint as a model of an Ollama server.

Two ways lead there: the server is given the weights and told the rest over its interface, or both are written as
files, for ``ollama create`` on another machine.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pytest_pocket.chat import first_line
from pytest_pocket.registry import extra

if TYPE_CHECKING:
    from pytest_pocket.backends.modelfile import Modelfile
    from pytest_pocket.registry import Model

OLDEST = (0, 30, 0)
"""The first Ollama that hands a GGUF file to llama.cpp's own server.  Those before read it with a pre-tokenizer of
their own choice, and so other tokens than the model was trained on."""

app = typer.Typer(help="Run checkpoints in Ollama.", no_args_is_help=True)


class OllamaError(Exception):
    """A model that Ollama cannot have, said in one line: what, the value, what to do."""


@app.callback()
def ollama() -> None:
    """Run checkpoints in Ollama."""


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="A model of the suite that is a checkpoint.")],
    tag: Annotated[str, typer.Option("--as", help="Its name in Ollama; by default the same.")] = "",
    host: Annotated[
        str, typer.Option(help="The server, as http://HOST:PORT; by default OLLAMA_HOST's or the local one.")
    ] = "",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto: the checkpoint's own.")
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write this GGUF file, and a Modelfile, and ask no server."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a checkpoint a model of Ollama: its weights, chat template and parameters."""
    from pytest_pocket import registry
    from pytest_pocket.cli import _stop

    try:
        model = registry.Registry(registry.from_pyproject(Path("pyproject.toml"))).resolve(name)
        if output:
            modelfile = write(model, output, dtype)
            said = {"model": model.name, "output": str(output), "modelfile": str(modelfile)}
            line = f"{output}, {modelfile}: ollama create {_named(tag, model)} --file {modelfile}"
        else:
            server = register(model, _named(tag, model), host or None, dtype)
            said = {"model": model.name, "ollama": _named(tag, model), "server": server}
            line = f"{said['ollama']} in {server}: run it with --pocket-model=ollama:{said['ollama']}"
    except (registry.ModelError, OllamaError) as error:
        _stop(error)
    typer.echo(json.dumps(said, indent=2) if as_json else line)


def write(model: Model, output: Path, dtype: str = "auto") -> Path:
    """Write the GGUF file and, beside it, the Modelfile, whose path this gives.  Raises OllamaError, ModelError."""
    _refuse_others(model)
    modelfile = output.with_name(f"{output.stem}.Modelfile")
    for path in (output, modelfile):
        if os.path.lexists(path):
            raise OllamaError(f"{path} exists: give another --output")
    if not output.parent.is_dir():
        raise OllamaError(f"{output.parent} is no directory: give another --output")
    described = _convert(model, output, dtype)
    modelfile.write_text(described.text(output))
    return modelfile


def register(model: Model, name: str, host: str | None = None, dtype: str = "auto") -> str:
    """Make the model one of an Ollama server, which this names.  Raises OllamaError, ModelError."""
    _refuse_others(model)
    with extra("hf,ollama"):
        import ollama

    client = ollama.Client(host=host)
    # The client's own methods do not ask for the version.
    http = client._client
    address = str(http.base_url).rstrip("/")
    with _explained(address, name):
        version = str(http.get("/api/version").raise_for_status().json()["version"])
    # A build from source calls itself 0.0.0.
    if (0, 0, 0) < tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise OllamaError(f"Ollama {version} at {address} is too old: update it to {oldest} or newer")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / f"{model.slug}.gguf"
        described = _convert(model, weights, dtype)
        with _explained(address, name):
            client.create(
                model=name,
                files={weights.name: client.create_blob(weights)},
                template=described.template or None,
                parameters=described.parameters,
            )
    return f"Ollama {version} at {address}"


def _convert(model: Model, weights: Path, dtype: str) -> Modelfile:
    """Write a checkpoint's GGUF file; what else Ollama is told of it.  Raises OllamaError, ModelError."""
    with extra("hf,ollama"):
        from pytest_pocket.backends import gguf_file, modelfile

        gguf_file.write(model.target, weights, model.adapter or None, dtype)
        return modelfile.modelfile(model.target)


def _refuse_others(model: Model) -> None:
    if model.backend != "hf":
        raise OllamaError(
            f"model {model.name!r} is no checkpoint (its backend is {model.backend!r}): give one that hf loads"
        )


@contextmanager
def _explained(address: str, name: str) -> Iterator[None]:
    """The server's faults, in one line each."""
    import httpx
    import ollama

    try:
        yield
    except (httpx.TransportError, ConnectionError) as error:
        raise OllamaError(
            f"no Ollama at {address} ({first_line(error)}): start it with `ollama serve`, or give --host"
        ) from error
    except ollama.ResponseError as error:
        raise OllamaError(f"Ollama at {address} refused {name!r}: {first_line(error)}") from error
    except (httpx.HTTPStatusError, ValueError, LookupError, TypeError) as error:
        raise OllamaError(f"what answers at {address} is no Ollama: give its address with --host") from error


def _named(tag: str, model: Model) -> str:
    return tag or model.slug
