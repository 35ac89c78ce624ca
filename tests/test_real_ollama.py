"""The opt-in suite against a real Ollama, which CI does not have: nothing here runs unless it is asked for.

    OLLAMA_HOST=http://localhost:11434 pytest tests/test_real_ollama.py -m real_ollama

It makes a model of its own there (a few megabytes), and deletes it in the end.  CI runs the same tests against the
double, so that they are known to run; what they say of Ollama they say only of a real one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import shown, start

pytest.importorskip("ollama")
pytest.importorskip("gguf")

import ollama

from pytest_pocket import records
from pytest_pocket.backends.ollama import OllamaBackend
from pytest_pocket.chat import ChatRequest, Message, Sampling
from pytest_pocket.registry import ModelError, shipped
from pytest_pocket.tools import SCHEMAS

MODEL = "rlvr-v1"
NAME = "pocket-test-of-the-suite"
HOST = os.environ.get("OLLAMA_HOST", "")
ASK = (Message("user", "What is the port in config.toml?"),)

pytestmark = [pytest.mark.real_ollama, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def client(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A client of the server, with our model in it."""
    if "real_ollama" not in request.config.option.markexpr or not HOST:
        pytest.skip("a real Ollama is asked for by OLLAMA_HOST=... and -m real_ollama")
    client = ollama.Client(host=HOST)
    command = [
        sys.executable,
        "-m",
        "pytest_pocket",
        "ollama",
        "create",
        MODEL,
        "--as",
        NAME,
        "--dtype",
        "float32",
    ]
    subprocess.run([*command, "--host", HOST], check=True)
    yield client
    client.delete(NAME)


@pytest.fixture
def backend(client: Any) -> Iterator[OllamaBackend]:
    backend = OllamaBackend(NAME, HOST, num_ctx=2048, reference=str(shipped() / MODEL))
    yield backend
    backend.close()


def test_the_window_is_the_one_that_was_asked_for(client: Any, backend: OllamaBackend) -> None:
    (running,) = [model for model in client.ps().models if model.model == f"{NAME}:latest"]
    assert running.context_length == backend.model_window == 2048
    evidence = backend.chat(ChatRequest(ASK, SCHEMAS, Sampling(max_tokens=8))).evidence
    assert evidence["num_ctx"] == evidence["window"] == 2048


def test_a_prompt_that_it_cuts_without_a_word_is_noticed(client: Any) -> None:
    backend = OllamaBackend(NAME, HOST, num_ctx=1024, reference=str(shipped() / MODEL))
    turns = [Message(role, "word " * 40) for _ in range(20) for role in ("user", "assistant")]  # type: ignore[arg-type]
    reply = backend.chat(ChatRequest((*turns, *ASK), SCHEMAS, Sampling(max_tokens=8)))
    backend.close()
    assert reply.truncated
    assert "num_ctx higher" in str(reply.evidence["mend"])


def test_prompts_are_those_that_the_model_was_trained_on(backend: OllamaBackend) -> None:
    for think in (False, True):
        for tools in ((), SCHEMAS):
            reply = backend.chat(ChatRequest(ASK, tools, Sampling(think=think, max_tokens=4)))
            assert reply.prompt_tokens == reply.evidence["own_prompt_tokens"]


def test_a_model_that_is_not_there_is_one_line(client: Any) -> None:
    with pytest.raises(ModelError, match="has no model 'pocket-nobody': ollama pull pocket-nobody"):
        OllamaBackend("pocket-nobody", HOST)


def test_it_does_what_is_asked_of_it(client: Any, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        f"[tool.pocket.models.mine]\nbackend = 'ollama'\ntarget = '{NAME}'\noptions = {{ reference = '{shipped() / MODEL}' }}\n"
    )
    done = start(tmp_path, "--pocket-conformance", "--pocket-model=mine")
    print(done.stdout)
    found = {name: said for name, said in shown(done).items() if said == "NO"}
    # Its templates write nested arguments, which no tool of the suite has, without spaces.
    assert found.keys() <= {"control tokens are text", "reference prompt"}, done.stdout


def test_it_plays_the_episodes_that_transformers_plays(client: Any, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        f"[tool.pocket.models.mine]\nbackend = 'ollama'\ntarget = '{NAME}'\noptions = {{ reference = '{shipped() / MODEL}' }}\n"
    )
    options = ("--pyargs", "pytest_pocket.tasks", f"--pocket-model={MODEL},mine", "--pocket-fail-under=0")
    done = start(
        tmp_path, *options, "--pocket-records=run", "--pocket-timeout=600", "-k", "stop or read_value"
    )
    assert done.returncode == 0, done.stdout[-3000:]
    _, found = records.load(tmp_path / "run")
    said: dict[Any, set[str]] = {}
    for record in found:
        said.setdefault((record["task"], record["prompt"]), set()).add(json.dumps(record["messages"]))
    assert len(said) == 6
    assert all(len(each) == 1 for each in said.values())


def test_ollama_runs_the_files_that_pocket_writes_for_it(client: Any, tmp_path: Path) -> None:
    program = shutil.which("ollama")
    if program is None:
        pytest.skip("the command `ollama` is not here")
    command = [
        sys.executable,
        "-m",
        "pytest_pocket",
        "ollama",
        "create",
        MODEL,
        "-o",
        str(tmp_path / "m.gguf"),
    ]
    subprocess.run(command, check=True)
    made = f"{NAME}-file"
    subprocess.run(
        [program, "create", made, "--file", str(tmp_path / "m.Modelfile")], check=True, cwd=tmp_path
    )
    reply = client.chat(made, [{"role": "user", "content": "hi"}], think=False, options={"num_predict": 4})
    client.delete(made)
    assert reply.eval_count
