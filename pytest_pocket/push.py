"""Pushing: a checkpoint with a model card, to a folder or to the Hugging Face hub.

The card says where the weights come from and what they scored, from records and not by hand.  A manifest may be
anybody's: what it says is quoted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_pocket import report
from pytest_pocket.records import Recorded
from pytest_pocket.registry import MANIFEST, Model

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FACTS = (
    "stage", "parent", "parent_sha256", "recipe", "recipe_sha256", "values", "data_sha256", "sampling", "seed",
    "data_seed", "tokens", "pairs", "minutes", "hardware", "versions", "parameters", "suite", "tools_sha256",
    "template_sha256", "parser_sha256", "commit", "made", "completed",
)  # fmt: skip
"""What a card repeats of a manifest, in this order, where it is there."""


class PushError(Exception):
    """A checkpoint that cannot be pushed, said in one line: what, the value, what to do."""


def push(model: Model, to: str, measured: Sequence[Recorded]) -> str:
    """Put a model's checkpoint and its card where ``to`` says; the folder or the address.  Raises PushError.

    ``OWNER/NAME`` is a repository of the hub, unless a folder OWNER is here; a folder is written with a ``./``,
    a ``/`` or a single name.
    """
    source = Path(model.adapter or model.target)
    if model.backend != "hf" or not (source / MANIFEST).is_file():
        raise PushError(f"model {model.name!r} is no checkpoint with a {MANIFEST}: only such can be pushed")
    manifest = json.loads((source / MANIFEST).read_text())
    if HUB_ID.fullmatch(to) and not Path(to).parent.is_dir():
        if manifest.get("adapter_of", "").startswith("."):
            raise PushError(
                f"adapter {model.name!r} is on a base in a folder, {model.target}, that the hub cannot see: "
                "push the base, and train the adapter from its hub name"
            )
        return _upload(source, manifest, to, card(manifest, model, measured))
    return str(_write(source, manifest, Path(to), model, card(manifest, model, measured)))


def card(manifest: Mapping[str, Any], model: Model, measured: Sequence[Recorded]) -> str:
    """The model card, Markdown with YAML ahead.  Raises PushError where a run did not measure this model."""
    try:
        from huggingface_hub import ModelCardData
    except ModuleNotFoundError:
        raise PushError("a model card needs huggingface_hub: pip install 'pytest-pocket[hf]'") from None
    base = manifest.get("adapter_of", "")
    data = ModelCardData(
        license="apache-2.0",
        library_name="peft" if base else "transformers",
        pipeline_tag="text-generation",
        tags=["pytest-pocket", "agent", "tool-use", str(manifest["stage"])],
        base_model=base if HUB_ID.fullmatch(base) else None,
    )
    facts = "\n".join(
        f"| {key} | {_quoted(manifest[key])} |" for key in FACTS if manifest.get(key) not in (None, "")
    )
    tables = "\n".join(_table(model, run) for run in measured) or "Not measured: no run was given.\n"
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {_quoted(model.name)}\n\n"
        f"{_quoted(model.description)}\n\n"
        "A model of [pytest-pocket](https://pypi.org/project/pytest-pocket/), a suite of agentic coding tasks for "
        "very small language models. To run it:\n\n"
        "```sh\npip install 'pytest-pocket[hf]'\n"
        "pytest --pyargs pytest_pocket.tasks --pocket-model=THIS_FOLDER\n```\n\n"
        f"## Measured\n\n{tables}\n## Made\n\n| | |\n| --- | --- |\n{facts}\n"
    )


def _table(model: Model, run: Recorded) -> str:
    known = run.info.get("models", {}).get(model.name, {})
    if known.get("digest") != model.digest:
        had = "other weights of that name" if known else ", ".join(run.info.get("models", {})) or "no model"
        raise PushError(f"run {run.name} did not measure this {model.name!r} but {had}: give one that did")
    rows = report.rows([record for record in run.found if record["model"] == model.name])
    command = " ".join(run.info["command"]).replace("`", "'").replace("\n", " ")
    return f"`{command}`\n\n{report.markdown(rows)}"


def _quoted(value: object) -> str:
    """A value of a manifest on one line, as text whatever it holds."""
    return report.quoted(report.printable(value if isinstance(value, str) else json.dumps(value)))


def _write(source: Path, manifest: dict[str, Any], folder: Path, model: Model, text: str) -> Path:
    """A new folder with the checkpoint, whole or not at all."""
    if folder.exists() or folder.is_symlink():
        raise PushError(f"{folder} exists: give another --to")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in manifest["files"]:
            shutil.copyfile(source / name, partial / name)
        if (source / "curve.png").is_file():
            shutil.copyfile(source / "curve.png", partial / "curve.png")
        if manifest.get("adapter_of", "").startswith("."):
            manifest = {**manifest, "adapter_of": os.path.relpath(model.target, folder)}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        (partial / "README.md").write_text(text)
        os.replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise PushError(f"cannot write {folder}: {error.strerror or error}; give another --to") from error
    return folder


def _upload(source: Path, manifest: Mapping[str, Any], name: str, text: str) -> str:
    """The checkpoint in a repository of the hub, made if it is not there."""
    from huggingface_hub import CommitOperationAdd, HfApi

    files = [*manifest["files"], MANIFEST, *(["curve.png"] if (source / "curve.png").is_file() else [])]
    try:
        hub = HfApi()
        address = hub.create_repo(name, exist_ok=True)
        hub.create_commit(
            name,
            [
                *(CommitOperationAdd(file, str(source / file)) for file in files),
                CommitOperationAdd("README.md", text.encode()),
            ],
            commit_message=f"pytest-pocket: {manifest['name']}",
        )
    except Exception as error:
        raise PushError(
            f"cannot push to the hub as {name}: {str(error).splitlines()[0]}; log in (`hf auth login`) and be "
            "online, or give a folder"
        ) from error
    return str(address)
