"""Backends and models that an installed package brings: by an entry point, or by the hooks of a pytest plugin."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from pytest_pocket import records

MODULE = """
from pytest_pocket import ChatReply
from pytest_pocket.registry import Model


class Parrot:
    def __init__(self, model):
        self.words = model.target

    def chat(self, request):
        return ChatReply(self.words or request.messages[-1].content, prompt_tokens=1, completion_tokens=1)

    def cancel(self): ...

    def close(self): ...


def pytest_pocket_backends():
    return {"cockatoo": Parrot}


def pytest_pocket_models():
    return [Model("polly", "parrot"), Model("rio", "cockatoo", "hello")]
"""
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "pocket-parrot"
version = "1"

[project.entry-points."pytest_pocket.backends"]
parrot = "pocket_parrot:Parrot"

[project.entry-points.pytest11]
parrot = "pocket_parrot"

[tool.setuptools]
py-modules = ["pocket_parrot"]
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment in which the package is installed, beside all that is here."""
    folder = tmp_path_factory.mktemp("parrot")
    (folder / "pocket_parrot.py").write_text(MODULE)
    (folder / "pyproject.toml").write_text(PROJECT)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # An environment sees another's packages by their folders, not by a flag.
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (site / "ours.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in ours))
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(site),
    ]
    subprocess.run([*install, str(folder)], check=True, cwd=folder)
    return folder / "venv" / "bin" / "python"


def test_a_package_brings_a_backend_by_an_entry_point_and_models_by_hooks(
    python: Path, tmp_path: Path
) -> None:
    command = [python, "-m", "pytest", "--pyargs", "pytest_pocket.tasks", "-q", "--pocket-records=run"]
    command += [
        "--pocket-model=polly,parrot:bye,rio,cockatoo:ahoy",
        "--pocket-fail-under=0",
        "-k",
        "answer_directly and raw",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    _, found = records.load(tmp_path / "run")
    said = {record["model"]: record["answer"] for record in found}
    assert said["parrot:bye"] == "bye"
    assert said["rio"] == "hello"
    assert said["cockatoo:ahoy"] == "ahoy"
    assert said["polly"]


def test_they_are_listed(python: Path, tmp_path: Path) -> None:
    command = [python, "-m", "pytest", "--pocket-list", "-p", "no:cacheprovider"]
    listed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "polly" in listed
    assert "rio" in listed
