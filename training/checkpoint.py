"""Checkpoints: weights, tokenizer, template and the manifest that makes them a model of the suite."""

from __future__ import annotations

import copy
import functools
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
from pytest_pocket.backends.hf import no_bars
from pytest_pocket.registry import (
    MANIFEST,
    Model,
    ModelError,
    Registry,
    check_files,
    file_hash,
    parser_hash,
    sha256_json,
    tool_hashes,
    tools_hash,
)
from pytest_pocket.task import SUITE_VERSION
from pytest_pocket.training import plot, world
from pytest_pocket.training.recipe import RL, Fit, Preference, Recipe, Weights
from pytest_pocket.vetting import vet


def save(
    directory: Path,
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    stage: str,
    parent: Model | None,
    description: str,
    facts: Mapping[str, Any],
    curve: Sequence[Mapping[str, float]],
) -> None:
    """Write a checkpoint: weights or adapter in bf16, tokenizer, chat template, curve, manifest.  Complete or not
    at all.

    ``facts`` are the stage's own; ``sampling`` among them has the models and conditions that played the episodes that
    were learned from, none where oracles did.
    """
    import torch

    if not world.is_first():
        return
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy.deepcopy(model).to(device="cpu", dtype=torch.bfloat16).save_pretrained(partial)
    base = _from(directory, parent.target) if parent and adapted(model) else ""
    if base:
        _name_base(partial / "adapter_config.json", base)
    tokenizer.save_pretrained(partial)
    (partial / "curve.json").write_text(json.dumps(list(curve)) + "\n")
    manifest = {
        "name": name,
        "stage": stage,
        "parent": parent.name if parent else "",
        **({"parent_sha256": parent.digest} if parent else {}),
        **({"adapter_of": base} if base else {}),
        "description": description,
        "suite": SUITE_VERSION,
        "tools_sha256": tools_hash(),
        "tools": tool_hashes(),
        "parser_sha256": parser_hash(),
        "template_sha256": file_hash(partial / "chat_template.jinja"),
        "files": {path.name: file_hash(path) for path in sorted(partial.iterdir())},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **origin(),
        "made": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            **{
                package: version(package)
                for package in ("pytest-pocket", "torch", "transformers", "tokenizers")
            },
        },
        **facts,
    }
    plot.draw(curve, partial / "curve.png")
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in partial.iterdir():
        # safetensors are written for the owner alone, and a checkpoint is to be shared.
        path.chmod(0o644)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)


def adapted(model: Any) -> bool:
    """Whether LoRA matrices are what is trained."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def _from(directory: Path, base: str) -> str:
    """How a manifest in a directory names a base: by a relative path that begins with a dot, or by its hub name."""
    if not Path(base).is_dir():
        return base
    path = os.path.relpath(base, directory)
    return path if path.startswith(".") else f"./{path}"


def _name_base(path: Path, base: str) -> None:
    """Let PEFT's own file name the base as the manifest does, rather than by a path of this machine."""
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": base}, indent=2) + "\n")


@functools.cache
def origin() -> Mapping[str, Any]:
    """The commit of the code, as it was when training first asked."""
    return records.git(Path(__file__).parent)


def load(name: str, weights: Weights) -> tuple[Model, Any, Any]:
    """A model of the suite to train further, where there is a GPU on it, and its tokenizer.

    What has gradients is all of it, or the LoRA matrices: those of the parent, if it is an adapter, else new ones.
    Raises ModelError.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    no_bars()
    origin()
    found = Registry().resolve(name)
    if found.backend != "hf":
        raise ModelError(f"model {name!r} runs on {found.backend}, and training needs weights for hf")
    here = Path(found.target).is_dir()
    try:
        for folder in filter(Path.is_dir, map(Path, filter(None, (found.target, found.adapter)))):
            vet(folder)
        check_files(found)
        words = AutoTokenizer.from_pretrained(
            found.adapter or found.target, local_files_only=here, trust_remote_code=False
        )
        model: Any = AutoModelForCausalLM.from_pretrained(
            found.target,
            dtype=getattr(torch, weights.dtype),
            use_safetensors=True,
            local_files_only=here,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {found.target}: {str(error).splitlines()[0]}") from error
    model.to(world.device())
    if found.adapter:
        model.load_adapter(found.adapter, is_trainable=True)
    elif weights.rank:
        from peft import LoraConfig

        model.add_adapter(
            LoraConfig(
                r=weights.rank,
                lora_alpha=weights.alpha,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            )
        )
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Small steps on LoRA matrices in bfloat16 would be rounded away.
            parameter.data = parameter.data.float()
    if weights.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return found, model, words


def recipe_facts(recipe: Recipe, stage: Fit | Preference | RL) -> dict[str, Any]:
    """What a manifest says of a stage's recipe: its name, all values that the stage depends on, and their hash."""
    values = {
        "scratch": recipe.scratch and asdict(recipe.scratch),
        "weights": asdict(recipe.weights),
        "data": asdict(recipe.data),
        "stage": asdict(stage),
    }
    return {
        "recipe": recipe.name,
        "recipe_sha256": sha256_json(list(values.values())),
        "values": values,
        "seed": stage.seed,
    }
