"""Models: found by name, by backend and by directory; broken ones are one clear line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_pocket import registry
from pytest_pocket.backends.scripted import NoopBackend
from pytest_pocket.registry import Model, ModelError, Registry
from pytest_pocket.task import SUITE_VERSION

TEMPLATE = "{{ messages }}"


def checkpoint(directory: Path, **changes: Any) -> Path:
    """A checkpoint directory, as training leaves it; a change of None removes a key."""
    directory.mkdir(parents=True)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "model.safetensors").write_bytes(b"weights")
    manifest = {
        "name": directory.name,
        "stage": "sft",
        "parent": "base",
        "suite": SUITE_VERSION,
        "tools_sha256": registry.tools_hash(),
        "template_sha256": registry.file_hash(directory / "chat_template.jinja"),
        "files": {"model.safetensors": registry.file_hash(directory / "model.safetensors")},
    } | changes
    kept = {key: value for key, value in manifest.items() if value is not None}
    (directory / registry.MANIFEST).write_text(json.dumps(kept))
    return directory


def test_scripted_models_are_always_there() -> None:
    assert {"oracle", "noop"} <= Registry().models.keys()


def test_an_unregistered_model_is_backend_and_target() -> None:
    assert Registry().resolve("hf:some/dir:tag") == Model("hf:some/dir:tag", "hf", "some/dir:tag")


@pytest.mark.parametrize("name", ["nobody", "hf:", ":x", "", "warp:x", "oracle2"])
def test_an_unknown_model_names_those_there_are(name: str) -> None:
    with pytest.raises(
        ModelError, match=r"unknown model .*: choose from oracle, noop.*or write hf:\.\.\."
    ) as caught:
        Registry().resolve(name)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_directory_is_a_model(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "mine")
    model = Registry().resolve(str(directory))
    assert (model.name, model.backend, model.target, model.parent) == ("mine", "hf", str(directory), "base")
    assert len(model.digest) == 64
    assert [found.name for found in registry.from_checkpoints(tmp_path)] == ["mine"]


@pytest.mark.parametrize("changed", ["base", "mine"])
def test_weights_that_are_not_the_manifests_are_refused(tmp_path: Path, changed: str) -> None:
    checkpoint(tmp_path / "base")
    directory = checkpoint(tmp_path / "mine", adapter_of="../base")
    (tmp_path / changed / "model.safetensors").write_bytes(b"others")
    known = Registry(backends={"hf": lambda model: NoopBackend()})
    with pytest.raises(ModelError, match=r"is not the file that the manifest .*: fetch .* hf:/") as caught:
        known.build(known.resolve(str(directory)))
    assert str(tmp_path / changed / "model.safetensors") in str(caught.value)


def test_a_base_whose_manifest_names_a_file_outside_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "base", files={"../../dev/zero": "0"})
    model = Registry().resolve(str(checkpoint(tmp_path / "mine", adapter_of="../base")))
    with pytest.raises(ModelError, match="which is not a file beside it"):
        registry.check_files(model)


def test_a_checkpoint_of_another_suite_runs_unpinned(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "old", suite="0")
    with pytest.raises(ModelError, match=f"or run it unpinned as hf:{directory}"):
        Registry().resolve(str(directory))
    assert Registry().resolve(f"hf:{directory}") == Model(f"hf:{directory}", "hf", str(directory))


def test_a_folder_of_weights_without_a_manifest_says_how_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=f"holds no pocket.json: write hf:{tmp_path}"):
        Registry().resolve(str(tmp_path))


def test_an_adapter_is_put_on_its_base(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    model = registry.read_manifest(checkpoint(tmp_path / "dpo", adapter_of="../base"))
    assert (model.target, model.adapter) == (str(base), str(tmp_path / "dpo"))


def test_an_adapter_without_its_base_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the base of adapter 'dpo' is missing: .*train 'base' first"):
        registry.read_manifest(checkpoint(tmp_path / "dpo", adapter_of="../gone"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parent": None}, "KeyError: 'parent'"),
        ({"stage": 3}, "every value must be a string"),
        ({"files": ["model.safetensors"]}, "AttributeError"),
        ({"files": {"../outside": "0"}}, r"'\.\./outside', which is not a file beside it"),
        ({"files": {"gone.safetensors": "0"}}, "fetch the checkpoint again"),
        ({"suite": "0"}, "made for another suite: suite 0"),
        ({"tools_sha256": "0" * 64}, "made for another suite: tools"),
        (
            {"tools_sha256": "0" * 64, "tools": {**registry.tool_hashes(), "Read": "0", "Fly": "1"}},
            r"tools 000000000000 \(here .*\) \(schemas that differ: Fly, Read\)",
        ),
        ({"tools": ["Read"]}, "AttributeError"),
        ({"template_sha256": "0" * 64}, "made for another suite: template"),
        ({"parser_sha256": "0" * 64}, "made for another suite: parser 000000000000"),
    ],
)
def test_a_broken_or_foreign_manifest_is_one_clear_line(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        registry.read_manifest(checkpoint(tmp_path / "mine", **changes))
    assert "\n" not in str(caught.value)


def test_a_parser_that_reads_a_call_otherwise_is_another_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    before = registry.parser_hash()
    assert before == registry.parser_hash()
    monkeypatch.setattr("pytest_pocket.parsing._FUNCTION", re.compile(r"<function:([^<>\n]+)>"))
    assert registry.parser_hash() != before


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\udcff", '"text"'])
def test_a_manifest_that_is_no_object_is_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / registry.MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match="broken manifest"):
        registry.read_manifest(tmp_path)


def test_models_of_pyproject(tmp_path: Path) -> None:
    path = tmp_path / "pyproject.toml"
    assert registry.from_pyproject(path) == []
    path.write_text('[tool.pocket.models.mine]\nbackend = "hf"\ntarget = "dir"\nparent = "base"\n')
    assert registry.from_pyproject(path) == [Model("mine", "hf", "dir", parent="base")]


def test_a_folder_that_pyproject_names_is_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text('[tool.pocket.models.mine]\nbackend = "hf"\ntarget = "dir"\nadapter = "owner/name"\n')
    (tmp_path / "dir").mkdir()
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert registry.from_pyproject(path) == [Model("mine", "hf", "../dir", "owner/name")]


def test_a_model_without_a_target_is_one_clear_line() -> None:
    with pytest.raises(ModelError, match="model 'mine' has no target: say what hf is to load"):
        Registry([Model("mine", "hf")]).resolve("mine")


def test_a_checkpoint_without_its_template_is_one_clear_line(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "mine")
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"'mine' in .* has no chat_template\.jinja: fetch it again"):
        registry.read_manifest(directory)


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    known = Registry()
    with pytest.raises(ModelError, match=r"'torch' is missing: pip install 'pytest-pocket\[hf\]'"):
        known.build(known.resolve("sft-run6"))


@pytest.mark.parametrize(
    "text",
    [
        "[tool.pocket.models.mine]\ntarget = 'x'\n",
        "[tool.pocket.models.mine]\nbackend = 'hf'\nwings = 2\n",
        "[tool.pocket.models.mine]\nbackend = 3\n",
        "[tool.pocket]\nmodels = 3\n",
        "[tool.pocket.models]\nmine = 'hf'\n",
        "[tool\n",
        "tool = 3\n",
    ],
)
def test_a_bad_table_in_pyproject_is_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(ModelError, match=r"pyproject\.toml") as caught:
        Registry(registry.from_pyproject(tmp_path / "pyproject.toml"))
    assert "\n" not in str(caught.value)


def test_a_misspelt_key_in_pyproject_names_the_keys(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.pocket.models.mine]\nbackends = 'hf'\n")
    with pytest.raises(ModelError, match="unknown key 'backends': choose from backend, target, adapter"):
        registry.from_pyproject(tmp_path / "pyproject.toml")


def test_a_model_of_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ModelError, match="wants the backend 'warp'"):
        Registry([Model("mine", "warp", "x")]).resolve("mine")


def test_a_later_registration_replaces_an_earlier_one() -> None:
    assert Registry([Model("noop", "hf", "x")]).resolve("noop").backend == "hf"


@pytest.mark.parametrize(
    ("name", "slug"),
    [("sft-run6", "sft-run6"),
     ("hf:Qwen/Qwen3.5-0.8B", "hf_Qwen_Qwen3.5-0.8B"), ("openai:x@http://h:1", "openai_x_http_h_1"),
     ("[=@]", "model")],
)  # fmt: skip
def test_a_slug_can_be_selected(name: str, slug: str) -> None:
    assert Model(name, "hf").slug == slug
