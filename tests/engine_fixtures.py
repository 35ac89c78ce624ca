"""The engines that tests run against.  tests/engines/README.md says which they are and how they are made.

They are looked for in ``.engines`` (``ENGINES_DIR`` overrides it).  Where one is missing, tests that need it are
skipped; with ``POCKET_ENGINES=required``, as in CI, they fail.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from pytest_pocket.backends.process import Process

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "tests" / "engines"
EXACT = ("-np", "8", "-c", "16384", "-ctk", "f32", "-ctv", "f32", "-fa", "off")
"""llama.cpp as exact as transformers: a cache in float32, and attention that sums in the plain order."""


def find(name: str, script: str) -> Path:
    """The path of an engine's program.  Skips or fails the test where there is none."""
    folder = ROOT / os.environ.get("ENGINES_DIR", ".engines")
    program = folder / name
    if not program.is_file():
        missing(f"no {program}: make it with `sh tests/engines/{script}`")
    return program


def start(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A session in a folder of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", *options],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
    )


def shown(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The last column of the table of properties."""
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    return {line[0]: line[-1] for line in lines if line[0] not in ("property", "---")}


def missing(what: str) -> NoReturn:
    """Skip the test, or fail it where the engines are required."""
    if os.environ.get("POCKET_ENGINES") == "required":
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


def go() -> str:
    """The path of ``go``, which renders Ollama's templates.  Skips or fails the test where there is none."""
    return shutil.which("go") or missing("no go: sudo apt install golang-go")


@pytest.fixture(scope="session")
def llama_server_binary() -> Path:
    """llama.cpp's ``llama-server``."""
    return find("llama-server", "llama.sh")


@pytest.fixture(scope="session")
def vllm_command() -> Path:
    """The command ``vllm``, in an environment of its own."""
    return find("vllm/bin/vllm", "vllm.sh")


def kill(process: Process) -> None:
    """End a server as a crash would, and wait for that."""
    found = subprocess.run(["pgrep", "-P", str(process._keeper.pid)], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
    process._keeper.wait(30)


def started_llama(
    program: Path, weights: Path, *options: str, seconds: float = 60, port: int | None = None
) -> tuple[Process, str]:
    """A llama.cpp server of a GGUF file, which is called as the file is, and its address."""
    from pytest_pocket.backends.process import Process, free_port

    address = f"http://127.0.0.1:{port or free_port()}"
    command = [
        str(program),
        "-m",
        str(weights),
        "--alias",
        weights.stem,
        "--port",
        address.rpartition(":")[2],
    ]
    return Process([*command, "--jinja", *options], f"{address}/health", seconds=seconds), address


@contextmanager
def started_double(llama_server: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A double of Ollama that runs: its process and its address, as ``OLLAMA_HOST`` takes it."""
    program = str(SOURCES / "ollama_double.py")
    command = [sys.executable, program, "--llama-server", str(llama_server), "--port", "0", *options]
    # One thread: a tiny model gains nothing from more, and threads that wait for each other starve other tests.
    environment = {**os.environ, "LLAMA_ARG_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://\S+", line)
            assert found, f"the double of Ollama did not start: {line!r}"
            yield process, found[0]
        finally:
            process.terminate()


@pytest.fixture(scope="session")
def ollama_double(llama_server_binary: Path) -> Iterator[str]:
    """The address of a double of Ollama without any models, as ``OLLAMA_HOST`` takes it."""
    with started_double(llama_server_binary) as (_, address):
        yield address
