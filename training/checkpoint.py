"""Checkpoints: weights, tokenizer, template and the manifest that makes them a model of the suite."""

from __future__ import annotations

import copy
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pytest_pocket import records
from pytest_pocket.registry import MANIFEST, Model, Registry, file_hash, sha256_json, tools_hash
from pytest_pocket.task import SUITE_VERSION
from pytest_pocket.training.recipe import RL, Fit, Preference, Recipe


def save(
    directory: Path,
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    stage: str,
    parent: str,
    description: str,
    facts: Mapping[str, Any],
    curve: Sequence[Mapping[str, float]],
) -> None:
    """Write a checkpoint: bf16 safetensors, tokenizer, chat template, curve, manifest.  Complete or not at all."""
    import torch

    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy.deepcopy(model).to(device="cpu", dtype=torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "curve.json").write_text(json.dumps(list(curve)) + "\n")
    manifest = {
        "name": name,
        "stage": stage,
        "parent": parent,
        "description": description,
        "suite": SUITE_VERSION,
        "tools_sha256": tools_hash(),
        "template_sha256": file_hash(partial / "chat_template.jinja"),
        "files": {path.name: file_hash(path) for path in sorted(partial.iterdir())},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **records.git(Path(__file__).parent),
        "made": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {package: version(package) for package in ("torch", "transformers", "tokenizers")},
        **facts,
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in partial.iterdir():
        # safetensors are written for the owner alone, and a checkpoint is to be shared.
        path.chmod(0o644)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)


def load(name: str) -> tuple[Model, Any, Any]:
    """A registered model or a checkpoint directory to train further, its weights in float32, and its tokenizer.

    Raises RegistryError.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = Registry().resolve(name)
    words = AutoTokenizer.from_pretrained(found.target, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        found.target, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return found, model, words


def recipe_hash(recipe: Recipe, stage: Fit | Preference | RL) -> str:
    """The hash of all values of a recipe that one stage depends on."""
    return sha256_json([recipe.vocabulary, recipe.model, asdict(recipe.data), asdict(stage)])
