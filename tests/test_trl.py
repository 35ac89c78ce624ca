"""TRL's trainers take what ``pocket export`` writes, as it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pytest_pocket import registry
from pytest_pocket.cli import app

SETTINGS: dict[str, Any] = {
    "max_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no", "use_cpu": True,
    "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "max_length": None, "logging_steps": 1,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_trainer_takes_an_exported_file(suite_run: Path, tmp_path: Path, kind: str) -> None:
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / f"{kind}.jsonl"
    assert CliRunner().invoke(app, ["export", str(suite_run), "--as", kind, "-o", str(output)]).exit_code == 0
    rows = output.read_text().splitlines()[:4]
    output.write_text("\n".join(rows) + "\n")
    given = datasets.load_dataset(
        "json", data_files=str(output), split="train", cache_dir=str(tmp_path / "cache")
    )
    path = registry.shipped() / "sft-run6"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    config, trainer = {
        "sft": (trl.SFTConfig, trl.SFTTrainer),
        "dpo": (trl.DPOConfig, trl.DPOTrainer),
    }[kind]
    made = trainer(
        model, args=config(str(tmp_path / "out"), **SETTINGS), train_dataset=given, processing_class=tokenizer
    )
    made.train()
    losses = [each["loss"] for each in made.state.log_history if "loss" in each]
    assert len(losses) == 1
    assert math.isfinite(losses[0])
    assert json.loads(rows[0])["tools"]
