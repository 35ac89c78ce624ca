"""The Qwen recipe, on Qwen3.5's architecture with random weights and its own template: one step of each stage."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_qwen3_5, qwen3_5_template

from pytest_pocket import records, sandbox
from pytest_pocket.backends.hf import HFBackend
from pytest_pocket.episode import Workshop
from pytest_pocket.registry import read_manifest
from pytest_pocket.training import checkpoint, dpo, fit, recipe, rlvr

RECIPE = "qwen3.5-0.8b-16gb"
SMALLER = {
    "episodes_per_task": 1, "tokens": 3000, "batch_tokens": 3000, "steps": 1, "instances": 1, "group": 2,
    "turns": 1, "reply_tokens": 8, "rank": 4, "pairs": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base, the recipe made small, and its traces."""
    directory = tmp_path_factory.mktemp("qwen")
    make_qwen3_5(directory / "base", window=8192, template=qwen3_5_template())
    text = (Path(str(recipe.__file__)).parent / "recipes" / f"{RECIPE}.toml").read_text()
    for key, value in SMALLER.items():
        text, count = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
        assert count
    (directory / "small.toml").write_text(text)
    trained(directory, "data", "--processes=2", "--out=traces.jsonl")
    return directory


def trained(directory: Path, stage: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "pytest_pocket", "train", stage, "--recipe=small.toml", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=directory)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def played(directory: Path, model: str, *arguments: str) -> list[Any]:
    command = [
        *(sys.executable, "-m", "pytest", "--pyargs", "pytest_pocket.tasks", "-q", "-p", "no:cacheprovider"),
        *("-k", "answer_directly or report_absent", f"--pocket-model={model}", "--pocket-max-turns=1"),
        *("--pocket-fail-under=0", f"--pocket-records={model}-run", *arguments),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return list(records.load(directory / f"{model}-run")[1])


def test_one_step_of_each_stage_makes_adapters_that_the_suite_runs(home: Path) -> None:
    trained(home, "sft", "--traces=traces.jsonl", "--from=hf:base", "--name=sft", "--out=.")
    episodes = played(home, "sft", "--pocket-split=train", "--pocket-samples=2", "--pocket-temperature=1")
    assert {each["model"] for each in episodes} == {"sft"}
    assert all(each["replies"][0]["completion_ids"] for each in episodes)
    trained(home, "rlvr", "--from=sft", "--name=rlvr", "--out=.")
    for name, parent in [("sft", "hf:base"), ("rlvr", "sft")]:
        manifest = json.loads((home / name / "pocket.json").read_text())
        assert (manifest["parent"], manifest["adapter_of"]) == (parent, "../base")
        assert (home / name / "adapter_model.safetensors").is_file()
        assert not (home / name / "model.safetensors").exists()
        assert read_manifest(home / name).adapter == str(home / name)
    assert played(home, "rlvr")


@pytest.fixture
def trainee(home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, recipe.Recipe]:
    monkeypatch.chdir(home)
    chosen = recipe.load("small.toml")
    _, model, words = checkpoint.load("hf:base", chosen.weights)
    return model, words, chosen


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def frozen(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}


def test_only_the_adapter_learns_and_the_base_stays_in_bfloat16(
    trainee: tuple[Any, Any, recipe.Recipe], home: Path, tmp_path: Path
) -> None:
    from pytest_pocket.training import data

    model, words, chosen = trainee
    before, base = adapter(model), frozen(model)
    assert {value.dtype for value in before.values()} == {torch.float32}
    assert {value.dtype for value in base.values()} == {torch.bfloat16}
    steps = fit.steps(words, data.read(home / "traces.jsonl"), (), chosen.sft)
    fit.fit_model(model, steps, chosen.sft, fit.State(tmp_path / "x.state"))
    assert any(not torch.equal(before[name], value) for name, value in adapter(model).items())
    assert all(torch.equal(base[name], value) for name, value in frozen(model).items())
    saved = torch.load(tmp_path / "x.state", weights_only=True)
    assert saved["model"].keys() == before.keys()  # a state holds no copy of the base


def test_preferences_teach_the_adapter(
    trainee: tuple[Any, Any, recipe.Recipe], suite_run: Path, tmp_path: Path
) -> None:
    model, words, chosen = trainee
    before = adapter(model)
    found, _ = dpo.pairs([suite_run], words, chosen.dpo)
    curve = dpo.learn(model, found[:2], chosen.dpo, fit.State(tmp_path / "x.state"))
    assert curve[0]["loss"] > 0
    assert any(not torch.equal(before[name], value) for name, value in adapter(model).items())


def test_rollouts_teach_the_adapter(trainee: tuple[Any, Any, recipe.Recipe]) -> None:
    model, words, chosen = trainee
    backend = HFBackend.around(model.eval(), words)
    try:
        (group,) = rlvr.rollouts(chosen.rlvr, 0, backend, Workshop(sandbox.select("auto")))
    finally:
        backend.close()
    # A random model earns nothing: the rewards of this group are made up, all else is real.
    made_up = [
        replace(each, score=replace(each.score, outcome=n, stopped=1.0, intact=1.0))
        for n, each in enumerate(group)
        if each.score
    ]
    found, _ = rlvr.samples([made_up], chosen.rlvr)
    before = adapter(model)
    optimizers = fit.optimizers_of(model, chosen.rlvr.muon_lr, chosen.rlvr.adam_lr)
    facts = rlvr.update(model, None, optimizers, found, chosen.rlvr, "seed")
    assert facts["entropy"] > 0
    assert any(not torch.equal(before[name], value) for name, value in adapter(model).items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_weights_and_the_batches_are_there(trainee: tuple[Any, Any, recipe.Recipe]) -> None:
    model, _, _ = trainee
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    ids, _ = fit.tensors([fit.Rendered([1, 2, 3], [0, 1, 1])])
    assert fit.next_token_loss(model, ids.to(model.device), ids.to(model.device)).isfinite()
