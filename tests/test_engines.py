"""The real engines: what each one does with a request, and that all of them give what transformers gives.

vLLM and llama.cpp's server are real, Ollama is a double of its interface; tests/engines/README.md says more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import EXACT, kill, shown, start, started_llama

pytest.importorskip("openai")
pytest.importorskip("gguf")

from pytest_pocket import conformance, records
from pytest_pocket.backends import gguf_file
from pytest_pocket.backends.vllm import VLLMBackend
from pytest_pocket.chat import ChatRequest, EngineError, Sampling
from pytest_pocket.registry import Registry, shipped
from pytest_pocket.tools import SCHEMAS

MODEL = "rlvr-v1"
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "POCKET_VLLM_ARGS": "--dtype float32 --enforce-eager --max-num-seqs 16",
}
"""What vLLM needs on a machine without a GPU; float32, so that replies can be compared token by token."""
NO_LONGER_TEXT = {"control tokens are text": "NO"}
"""What no server does: it would have to tell the suite's text from the template's."""
FORCED = (
    "several calls",
    "unicode arguments",
    "typed arguments",
    "nested arguments",
    "malformed call",
    "unknown tool",
)

pytestmark = pytest.mark.timeout(900)


def expected(**different: str) -> dict[str, str]:
    """All properties hold, but for those given."""
    names = [name.replace("_", " ") for name in conformance.PROPERTIES]
    return (
        dict.fromkeys(names, "yes") | NO_LONGER_TEXT | {k.replace("_", " "): v for k, v in different.items()}
    )


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model as a GGUF file, in float32."""
    path = tmp_path_factory.mktemp("gguf") / f"{MODEL}.gguf"
    gguf_file.write(str(shipped() / MODEL), path, dtype="float32")
    return path


@pytest.fixture(scope="session")
def llama(llama_server_binary: Path, weights: Path) -> Iterator[str]:
    """The model in llama.cpp's server, as ``--pocket-model`` takes it."""
    process, address = started_llama(llama_server_binary, weights, *EXACT)
    yield f"openai:{MODEL}@{address}/v1"
    process.close()


@pytest.fixture(scope="session")
def ollama(ollama_double: str) -> str:
    """The address of a double of Ollama that has the model, put there as a user would."""
    command = [sys.executable, "-m", "pytest_pocket", "ollama", "create", MODEL, "--dtype", "float32"]
    subprocess.run([*command, "--host", ollama_double], check=True, capture_output=True)
    return ollama_double


@pytest.fixture(scope="session")
def vllm(vllm_command: Path) -> dict[str, str]:
    """The environment in which a session starts vLLM."""
    return {**VLLM, "PATH": f"{vllm_command.parent}{os.pathsep}{os.environ['PATH']}"}


def test_vllm_does_what_is_asked_of_it(tmp_path: Path, vllm: dict[str, str]) -> None:
    """The weights and an adapter on them in one server, which the session starts and ends."""
    adapter = random_adapter(tmp_path)
    base = shipped() / MODEL
    tables = [
        f"[tool.pocket.models.{name}]\nbackend = 'vllm'\ntarget = '{base}'\n{more}"
        f"options = {{ served = '{name}', reference = '{base}' }}\n"
        for name, more in (("whole", ""), ("adapted", f"adapter = '{adapter}'\n"))
    ]
    (tmp_path / "pyproject.toml").write_text("\n".join(tables))
    done = start(tmp_path, "--pocket-conformance", "--pocket-model=adapted,whole", **vllm)
    assert shown(done) == expected()
    adapted = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[1]
        for line in done.stdout.splitlines()
        if "yes" in line
    }
    assert adapted["greedy as transformers"] == "yes"
    assert adapted["reference prompt"] == "yes"


def test_vllm_samples_candidates_at_once_ends_in_time_and_is_said_when_it_dies(
    vllm: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One server for all of it: it takes a minute to start."""
    for name, value in {**vllm, "VLLM_BASE_URL": ""}.items():
        monkeypatch.setenv(name, value)
    registry = Registry()
    backend = registry.build(registry.resolve(f"vllm:{MODEL}"))
    assert isinstance(backend, VLLMBackend)
    try:
        seeds = (5, 6, 7)
        sampling = Sampling(1.5, seeds[0], max_tokens=24, logprob=True)
        request = ChatRequest(conformance.GREETING, SCHEMAS, sampling)
        together = backend.chats(request, seeds)
        alone = [
            backend.chat(replace(request, sampling=Sampling(1.5, seed, max_tokens=24))) for seed in seeds
        ]
        assert [reply.completion_ids for reply in together] == [reply.completion_ids for reply in alone]
        assert [reply.evidence["seed"] for reply in together] == list(seeds)
        assert {reply.evidence["sampled_at_once"] for reply in together} == {3}
        assert all(reply.logprob is not None and reply.logprob < 0 for reply in together)
        assert [reply.logprob for reply in alone] == [None] * len(seeds)

        assert backend._started
        endless = VLLMBackend(MODEL, backend._started.base_url, extra={"ignore_eos": True})
        # Ten times what fifty tokens take, on a machine that may be busy, is in the middle of the reply.  Other tests
        # can starve this process for longer than that; the reply is then no reply, rightly, and is asked for again.
        for attempt in range(5):
            began = time.monotonic()
            endless.chat(ChatRequest(conformance.GREETING, (), Sampling(max_tokens=50)))
            limit = 10 * (time.monotonic() - began)
            asked = ChatRequest(conformance.GREETING, (), Sampling(max_tokens=1900), seconds=limit)
            try:
                late = endless.chat(asked)
                break
            except EngineError as error:
                if attempt == 4 or "no reply within" not in str(error):
                    raise
        endless.close()
        assert (late.finish, late.calls, late.evidence["finish_reason"]) == ("time", (), "late")
        assert 0 < late.completion_tokens < 1900

        process = backend._started.process
        kill(process)
        with pytest.raises(EngineError, match=f"the vLLM server of '{MODEL}' has died: "):
            backend.chat(request)
    finally:
        backend.close()


def test_llama_cpp_does_what_is_asked_of_it(tmp_path: Path, llama: str) -> None:
    done = start(tmp_path, "--pocket-conformance", f"--pocket-model={llama}")
    # It answers to any model's name; the suite looks at its list of models before a run.
    assert shown(done) == expected(engine_fault="NO")


def test_ollama_does_what_is_asked_of_it(tmp_path: Path, ollama: str) -> None:
    done = start(tmp_path, "--pocket-conformance", f"--pocket-model=ollama:{MODEL}", OLLAMA_HOST=ollama)
    found, unforced = shown(done), dict.fromkeys(FORCED, "not shown")
    # One call is shown where the model writes one by itself.
    assert found["one call"] != "NO"
    # Its templates write nested arguments, which no tool of the suite has, without spaces.
    assert found == expected(**unforced, reference_prompt="NO", one_call=found["one call"])
    assert "nested arguments: 213 tokens, not 219" in done.stdout


def test_all_engines_play_the_same_episodes(
    tmp_path: Path, vllm: dict[str, str], llama: str, ollama: str
) -> None:
    """The matrix: four engines, the same weights, the same trajectories to the last word."""
    models = [MODEL, f"vllm:{MODEL}", f"ollama:{MODEL}", llama]
    done = start(
        tmp_path,
        *("--pyargs", "pytest_pocket.tasks", f"--pocket-model={','.join(models)}", "--runs=1"),
        *(
            "--pocket-fail-under=0",
            "--pocket-records=run",
            "--pocket-timeout=600",
            "-k",
            "read or stop or exit_status",
        ),
        OLLAMA_HOST=ollama,
        **vllm,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    _, found = records.load(tmp_path / "run")
    played: dict[Any, dict[str, Any]] = {}
    for record in found:
        played.setdefault((record["task"], record["prompt"]), {})[record["model"]] = record
    assert len(played) == 2 * 7
    for of_models in played.values():
        assert of_models.keys() == set(models)
        trajectories = {model: json.dumps(record["messages"]) for model, record in of_models.items()}
        assert set(trajectories.values()) == {trajectories[MODEL]}
        assert len({record["reward"] for record in of_models.values()}) == 1


def test_the_opt_in_suite_against_a_real_ollama_runs(tmp_path: Path, ollama_double: str) -> None:
    """Against the double: it shows that the suite runs, and nothing of Ollama."""
    suite = Path(__file__).with_name("test_real_ollama.py")
    done = start(tmp_path, str(suite), "-m", "real_ollama", "-rs", OLLAMA_HOST=ollama_double)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def random_adapter(folder: Path) -> Path:
    """A LoRA adapter of random weights, large enough to change what the model says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(shipped() / MODEL, dtype=torch.float32)
    plan = LoraConfig(r=8, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, plan).save_pretrained(folder / "adapter")
    return folder / "adapter"
