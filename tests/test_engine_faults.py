"""Servers that are not there, refuse, or fail in the middle of a run: one line says so, and other models finish."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import SOURCES, start, started_llama
from toy_project import wait_for

pytest.importorskip("openai")
pytest.importorskip("gguf")
pytest.importorskip("ollama")

import ollama
import openai_server
from openai_server import Said, honest

from pytest_pocket import records
from pytest_pocket.backends import gguf_file
from pytest_pocket.backends.process import Process, free_port
from pytest_pocket.registry import shipped

MODEL = "rlvr-v1"
TASKS = ("--pyargs", "pytest_pocket.tasks", "--tb=line", "--pocket-records=run")
MUTE = "{% for message in messages %}{{ message.content }}{% endfor %}"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / f"{MODEL}.gguf"
    gguf_file.write(str(shipped() / MODEL), path)
    return path


def llama(program: Path, weights: Path, *options: str) -> tuple[Process, str]:
    """A llama.cpp server of the shipped model, and its address."""
    process, address = started_llama(program, weights, "-t", "1", *options)
    return process, f"{address}/v1"


def beside_the_oracle(folder: Path, model: str, *options: str, **environment: str) -> str:
    """The one line of a session in which a model has no engine, and the oracle finishes."""
    chosen = ("-k", "answer_directly and raw", f"--pocket-model={model},oracle")
    done = start(folder, *TASKS, *chosen, *options, **environment)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout[-3000:] + done.stderr[-3000:]
    _, found = records.load(folder / "run")
    assert [(record["model"], record["outcome"]) for record in found] == [("oracle", "passed")]
    lines = [line for line in done.stdout.splitlines() if line.startswith("pocket: ")]
    lines = [line for line in lines if not re.search("episodes, |records in ", line)]
    assert len(lines) == 1, done.stdout[-3000:]
    return lines[0]


def test_a_wrong_port(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    said = beside_the_oracle(tmp_path, f"openai:tiny@{url}")
    assert said.startswith(
        f"pocket: server {url} (for 'tiny') cannot be reached: start it (llama.cpp: `llama-server"
    )


def test_alone_it_is_a_usage_error(tmp_path: Path) -> None:
    done = start(tmp_path, *TASKS, f"--pocket-model=openai:tiny@http://127.0.0.1:{free_port()}/v1")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "cannot be reached: start it" in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()


def test_no_vllm_at_the_address_and_no_command_to_start_one(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    said = beside_the_oracle(tmp_path, "vllm:tiny", VLLM_BASE_URL=url)
    assert f"vLLM {url} (for 'tiny') cannot be reached: start it with `vllm serve MODEL" in said
    shutil.rmtree(tmp_path / "run")
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "VLLM_BASE_URL": ""}
    assert "pip install 'pytest-pocket[vllm]'" in beside_the_oracle(tmp_path, "vllm:tiny", **environment)


def test_no_ollama(tmp_path: Path) -> None:
    host = f"http://127.0.0.1:{free_port()}"
    said = beside_the_oracle(tmp_path, "ollama:qwen3.5:0.8b", OLLAMA_HOST=host)
    assert said == (
        f"pocket: Ollama at {host} (for 'qwen3.5:0.8b') cannot be reached: start it with `ollama serve`, or set OLLAMA_HOST"
    )


def test_a_model_that_was_not_pulled(tmp_path: Path, ollama_double: str) -> None:
    said = beside_the_oracle(tmp_path, "ollama:qwen3.5:0.8b", OLLAMA_HOST=ollama_double)
    assert said == f"pocket: Ollama at {ollama_double} has no model 'qwen3.5:0.8b': ollama pull qwen3.5:0.8b"


def test_a_model_without_tools(tmp_path: Path, ollama_double: str) -> None:
    shutil.copytree(shipped() / MODEL, tmp_path / "mute", ignore=shutil.ignore_patterns("*.png"))
    (tmp_path / "mute" / "chat_template.jinja").write_text(MUTE)
    gguf_file.write(str(tmp_path / "mute"), tmp_path / "mute.gguf")
    client = ollama.Client(host=ollama_double)
    client.create("speechless", files={"mute.gguf": client.create_blob(tmp_path / "mute.gguf")})
    said = beside_the_oracle(tmp_path, "ollama:speechless", OLLAMA_HOST=ollama_double)
    client.delete("speechless")
    assert (
        f"model 'speechless' of Ollama at {ollama_double} does not support tools: use a model whose" in said
    )


def test_a_window_that_is_too_small_makes_episodes_truncated_not_wrong(
    tmp_path: Path, llama_server_binary: Path, weights: Path, ollama_double: str
) -> None:
    (tmp_path / "conftest.py").write_text(LONG_TASK)
    (tmp_path / "pyproject.toml").write_text(
        "[tool.pocket.models.narrow]\nbackend = 'ollama'\ntarget = 'narrow'\noptions = { num_ctx = 512 }\n"
    )
    client = ollama.Client(host=ollama_double)
    client.create("narrow", files={weights.name: client.create_blob(weights)})
    process, url = llama(llama_server_binary, weights, "-c", "768", "-np", "1")
    models = f"--pocket-model=openai:{MODEL}@{url},narrow,oracle"
    options = (models, "--pocket-prompt=raw", "--pocket-records=run", "--tb=short")
    done = start(tmp_path, *options, ".", OLLAMA_HOST=ollama_double)
    process.close()
    client.delete("narrow")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    _, found = records.load(tmp_path / "run")
    assert {record["model"]: record["outcome"] for record in found} == {
        f"openai:{MODEL}@{url}": "truncated",
        "narrow": "truncated",
        "oracle": "passed",
    }, done.stdout[-3000:]
    assert f"model '{MODEL}' at {url} has a window of 768 tokens, and a prompt did not fit" in done.stdout
    assert f"model 'narrow' of Ollama at {ollama_double} has a window of 512 tokens" in done.stdout


LONG_TASK = """
from pytest_pocket import Check, Final, Instance, Problem, Score, Task, score


class Long(Task):
    name = "long"
    group = "read"

    def make(self, draw):
        return Problem("word " * 1200 + "Reply with yes.", {}, {})

    def solve(self, instance):
        return "yes"
        yield

    def reward(self, instance, final):
        return score(final, Check("answer", float(final.answer == "yes")))


def pytest_pocket_tasks():
    return [Long()]
"""


def test_a_wrong_key(tmp_path: Path, llama_server_binary: Path, weights: Path) -> None:
    process, url = llama(llama_server_binary, weights, "--api-key", "right")
    said = beside_the_oracle(tmp_path, f"openai:{MODEL}@{url}", OPENAI_API_KEY="wrong")
    assert said == f"pocket: server {url} refuses the key for '{MODEL}': set OPENAI_API_KEY"
    done = start(
        tmp_path,
        *TASKS[:2],
        f"--pocket-model=openai:{MODEL}@{url}",
        "--pocket-records=keyed",
        "--pocket-fail-under=0",
        *("-k", "answer_directly and raw"),
        OPENAI_API_KEY="right",
    )
    process.close()
    assert done.returncode == 0, done.stdout[-3000:]
    assert "right" not in (tmp_path / "keyed" / "episodes.jsonl").read_text().replace("copyright", "")


@pytest.fixture
def old_ollama() -> Iterator[str]:
    """A server that says that it is an Ollama of long ago."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            self._send({"version": "0.5.7"})

        def do_POST(self) -> None:
            self._send({"capabilities": ["completion", "tools"], "model_info": {}, "details": {}})

        def _send(self, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_version_that_is_too_old(tmp_path: Path, old_ollama: str) -> None:
    said = beside_the_oracle(tmp_path, "ollama:tiny", OLLAMA_HOST=old_ollama)
    assert f"Ollama 0.5.7 at {old_ollama} (for 'tiny') is too old: update it to 0.10.0 or newer" in said


def test_a_server_that_dies_in_mid_run_leaves_invalid_episodes_and_the_others_finish(
    tmp_path: Path, llama_server_binary: Path, weights: Path
) -> None:
    process, url = llama(llama_server_binary, weights, "-np", "1", "-c", "2048")
    command = [sys.executable, "-m", "pytest", "-q", *TASKS, f"--pocket-model=openai:{MODEL}@{url},oracle"]
    command += ["--runs=3", "--pocket-in-flight=2", "-p", "no:cacheprovider", "-p", "no:randomly"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as session:
        lines = tmp_path / "run" / "episodes.jsonl"
        wait_for(lambda: lines.is_file() and len(lines.read_text().splitlines()) >= 3, seconds=120)
        process.close()
        output = session.communicate(timeout=300)[0]
    assert session.returncode == pytest.ExitCode.TESTS_FAILED
    _, found = records.load(tmp_path / "run")
    outcomes: dict[str, list[str]] = {}
    for record in found:
        outcomes.setdefault(record["model"], []).append(record["outcome"])
    assert outcomes["oracle"] == ["passed"] * 19 * 2 * 3
    assert "infra" in outcomes[f"openai:{MODEL}@{url}"]
    assert f"server {url} (for '{MODEL}') cannot be reached: start it" in output


def test_a_server_that_is_too_slow_leaves_invalid_episodes_that_say_so(tmp_path: Path) -> None:
    release = threading.Event()
    with openai_server.serving() as server:

        def answer(body: Said) -> tuple[int, object]:
            if body["max_tokens"] > 100:  # an episode's
                release.wait(60)
            return honest(body)

        server.answer = answer
        options = (f"--pocket-model=openai:tiny@{server.url},oracle", "--pocket-timeout=2")
        done = start(tmp_path, *TASKS, "-k", "answer_directly and raw", *options)
        release.set()
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    _, found = records.load(tmp_path / "run")
    assert {record["model"]: record["outcome"] for record in found} == {
        f"openai:tiny@{server.url}": "infra",
        "oracle": "passed",
    }
    assert f"model 'tiny' at {server.url}" in done.stdout
    assert "raise --pocket-timeout, or lower --pocket-in-flight" in done.stdout


@pytest.fixture
def installed_ollama(tmp_path: Path, llama_server_binary: Path, weights: Path) -> Path:
    """A folder with a command ``ollama`` whose ``serve`` starts the double, and notes each start."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command = [sys.executable, SOURCES / "ollama_double.py", "--llama-server", llama_server_binary]
    shown = " ".join(map(str, [*command, "--model", f"{MODEL}={weights}"]))
    (folder / "ollama").write_text(
        f'#!/bin/sh\n[ "$1" = serve ] || exit 2\necho $$ >>"{tmp_path}/starts"\n'
        f'exec {shown} --port "${{OLLAMA_HOST##*:}}"\n'
    )
    (folder / "ollama").chmod(0o755)
    return folder


def test_ollama_is_started_for_the_session_once_for_all_workers_and_ended_with_it(
    tmp_path: Path, installed_ollama: Path
) -> None:
    if shutil.which("ollama"):
        pytest.skip("an Ollama of the user's own is there")
    environment = {"PATH": f"{installed_ollama}{os.pathsep}{os.environ['PATH']}", "OLLAMA_HOST": ""}
    options = ("-n", "2", "--pocket-fail-under=0", f"--pocket-model=ollama:{MODEL}", "-k", "stop")
    done = start(tmp_path, *TASKS, *options, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    _, found = records.load(tmp_path / "run")
    assert len(found) == 4
    assert all(record["outcome"] not in ("infra", "truncated") for record in found)
    (pid,) = map(int, (tmp_path / "starts").read_text().split())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_ollama_of_the_sessions_own_that_dies_is_said_with_its_log(
    tmp_path: Path, installed_ollama: Path
) -> None:
    environment = {"PATH": f"{installed_ollama}{os.pathsep}{os.environ['PATH']}", "OLLAMA_HOST": ""}
    command = [sys.executable, "-m", "pytest", "-q", *TASKS, f"--pocket-model=ollama:{MODEL}", "--runs=9"]
    command += ["--pocket-in-flight=1", "-p", "no:cacheprovider", "-p", "no:randomly"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as session:
        lines = tmp_path / "run" / "episodes.jsonl"
        wait_for(lambda: lines.is_file() and len(lines.read_text().splitlines()) >= 1, seconds=120)
        os.kill(int((tmp_path / "starts").read_text()), signal.SIGKILL)
        time.sleep(1)
        output = session.communicate(timeout=300)[0]
    assert session.returncode == pytest.ExitCode.TESTS_FAILED
    assert f"the Ollama server of '{MODEL}' has died" in output
