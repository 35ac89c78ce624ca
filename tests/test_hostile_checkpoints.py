"""Checkpoints that nobody vouches for: refused in one line, with real files, before anything in them runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_pocket import registry
from pytest_pocket.registry import ModelError, Registry

pytest.importorskip("transformers")

from pytest_pocket.backends import hf
from pytest_pocket.backends.deadline import TooSlow, deadline
from pytest_pocket.backends.hf import HFBackend

RAN = "pocket-code-of-a-checkpoint-ran"


class Evil:
    """What a pickle runs when it is opened."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return eval, (f"__import__('os').environ.__setitem__({RAN!r}, '1')",)


def test_what_the_pickles_do_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RAN, "0")
    pickle.loads(pickle.dumps(Evil()))
    assert os.environ[RAN] == "1"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a checkpoint that ships."""
    monkeypatch.delenv(RAN, raising=False)
    return Path(shutil.copytree(registry.shipped() / "base", tmp_path / "shelf" / "base"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def bin_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps({"model.embed_tokens.weight": Evil()}))


def pickled_safetensors(base: Path) -> None:
    (base / "model.safetensors").write_bytes(pickle.dumps(Evil()))


def safetensors_with_a_long_header(base: Path) -> None:
    (base / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")


def safetensors_that_nest(base: Path) -> None:
    header = b"[" * 100_000
    (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def remote_code(base: Path) -> None:
    (base / "evil.py").write_text(
        f"import os\nos.environ[{RAN!r}] = '1'\nclass Model: pass\nclass Config: pass\n"
    )
    change(
        base / "config.json",
        model_type="evil",
        architectures=["Evil"],
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        trust_remote_code=True,
    )


def remote_code_of_a_tokenizer(base: Path) -> None:
    (base / "evil.py").write_text(f"import os\nos.environ[{RAN!r}] = '1'\nclass Words: pass\n")
    change(
        base / "tokenizer_config.json",
        tokenizer_class="Words",
        auto_map={"AutoTokenizer": ["evil.Words", None]},
    )
    (base / "tokenizer.json").unlink()


def huge_tokenizer(base: Path) -> None:
    os.truncate(base / "tokenizer.json", 2**36)


def huge_configuration(base: Path) -> None:
    os.truncate(base / "config.json", 2**36)


def huge_template(base: Path) -> None:
    (base / "chat_template.jinja").write_text("x" * 2**21)


def nested_configuration(base: Path) -> None:
    (base / "config.json").write_text('{"a":' * 100_000)


def nested_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").write_text('{"a":' * 100_000)


def endless_layers(base: Path) -> None:
    change(base / "config.json", num_hidden_layers=10**8, layer_types=None)


def endless_layers_of_a_part(base: Path) -> None:
    change(base / "config.json", text_config={"num_hidden_layers": 10**8})


def endless_width(base: Path) -> None:
    change(base / "config.json", hidden_size=10**15)


def a_wide_model(base: Path) -> None:
    change(base / "config.json", vocab_size=10**10)


LOADED = {
    bin_weights: r"has no \*\.safetensors, and other weights are not read",
    pickled_safetensors: "header|no safetensors file",
    safetensors_with_a_long_header: "header has 4611686018427387904 bytes",
    safetensors_that_nest: "is no safetensors file: RecursionError",
    remote_code: "cannot load",
    remote_code_of_a_tokenizer: "cannot load the tokenizer",
    huge_tokenizer: r"tokenizer\.json has 68719476736 bytes",
    huge_configuration: r"config\.json has 68719476736 bytes",
    huge_template: r"chat_template\.jinja has 2097152 bytes",
    nested_configuration: r"config\.json is broken: \w+; save or fetch it again",
    nested_tokenizer: "cannot load the tokenizer",
    endless_layers: "num_hidden_layers 100000000, and its weights hold 35 tensors",
    endless_layers_of_a_part: "num_hidden_layers 100000000",
    endless_width: r"hidden_size 1e\+15",
    a_wide_model: "cannot load model",
}


@pytest.mark.parametrize("spoil", LOADED, ids=lambda spoil: spoil.__name__)
def test_a_hostile_folder_is_refused_in_one_line_and_runs_nothing(
    spoil: Callable[[Path], None], base: Path
) -> None:
    spoil(base)
    start = time.monotonic()
    with pytest.raises(ModelError, match=LOADED[spoil]) as refusal:
        HFBackend(str(base))
    assert "\n" not in str(refusal.value)
    assert RAN not in os.environ
    assert time.monotonic() - start < 60


def test_pickles_beside_the_weights_are_not_opened(base: Path) -> None:
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt", "scheduler.pkl"):
        (base / name).write_bytes(pickle.dumps(Evil()))
    (base / "adapter.py").write_text(f"import os\nos.environ[{RAN!r}] = '1'\n")
    HFBackend(str(base)).close()
    assert RAN not in os.environ


def test_a_pickled_adapter_is_refused(base: Path) -> None:
    adapter = base.parent / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "../base"})
    )
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        HFBackend(str(adapter))
    assert RAN not in os.environ


def test_training_runs_no_code_of_a_checkpoint_either(base: Path) -> None:
    from pytest_pocket.training import checkpoint
    from pytest_pocket.training.recipe import load

    weights = load("smoke").weights
    remote_code(base)
    with pytest.raises(ModelError) as refusal:
        checkpoint.load(f"hf:{base}", weights)
    assert "\n" not in str(refusal.value)
    assert RAN not in os.environ


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter_of": "/etc"}, "neither a hub name nor a path like"),
        ({"adapter_of": "~/models"}, "neither a hub name nor a path like"),
        ({"adapter_of": "a/b/c"}, "neither a hub name nor a path like"),
        ({"adapter_of": "a/../../etc"}, "neither a hub name nor a path like"),
        ({"adapter_of": "file:///etc"}, "neither a hub name nor a path like"),
        ({"adapter_of": "../../../../../../../etc"}, "is far away: /etc"),
        ({"adapter_of": "./../../x"}, "is far away"),
        ({"files": {"../base/config.json": "0"}}, "not a file beside it"),
        ({"files": {"/etc/passwd": "0"}}, "not a file beside it"),
        ({"files": {"a\0b": "0"}}, "not a file beside it"),
    ],
)
def test_a_manifest_names_nothing_outside(base: Path, changes: dict[str, Any], said: str) -> None:
    change(base / registry.MANIFEST, **changes)
    with pytest.raises(ModelError, match=said) as refusal:
        Registry().resolve(str(base))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "chat_template.jinja", "more.json", "folder"]
)
def test_a_link_out_of_a_checkpoint_is_refused(base: Path, name: str) -> None:
    outside = base.parent.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("{}")
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(outside if name == "folder" else outside / "file")
    with pytest.raises(ModelError, match="leads out of its folder"):
        Registry().resolve(str(base))


def test_links_within_the_hubs_cache_are_followed(base: Path) -> None:
    blobs, commit = base.parent / "m" / "blobs", base.parent / "m" / "snapshots" / "0abc"
    blobs.mkdir(parents=True)
    commit.mkdir(parents=True)
    for path in base.iterdir():
        shutil.copy(path, blobs / path.name)
        (commit / path.name).symlink_to(f"../../blobs/{path.name}")
    assert Registry().resolve(str(commit)).name == "base"


def test_a_manifest_that_nests_or_is_huge_is_refused(base: Path) -> None:
    path = base / registry.MANIFEST
    path.write_text("[" * 100_000)
    with pytest.raises(ModelError, match="broken manifest"):
        Registry().resolve(str(base))
    os.truncate(path, 2**36)
    with pytest.raises(ModelError, match="68719476736 bytes"):
        Registry().resolve(str(base))


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "a loop without end": LOOP,
    "a range over all limits": "{% for a in range(10 ** 12) %}{% endfor %}",
    "the classes of Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the globals of a function": "{{ raise_exception.__globals__['os'].environ }}",
    "the globals by a filter": "{{ (messages|attr('append'))|attr('__self__')|attr('__class__') }}{{ cycler.__init__.__globals__.os.system('true') }}",
    "a change of the messages": "{{ messages.clear() }}",
    "a file of the host": "{% include '/etc/passwd' %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_is_refused_in_one_line(
    base: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "TEMPLATE_SECONDS", 1.0)
    (base / "chat_template.jinja").write_text(TEMPLATES[name])
    start = time.monotonic()
    with pytest.raises(ModelError, match="the chat template of") as refusal:
        HFBackend(str(base))
    assert "\n" not in str(refusal.value)
    assert time.monotonic() - start < 30


def test_a_deadline_ends_its_own_block_and_nothing_else() -> None:
    def for_ever() -> None:
        with deadline(0.05):
            while True:
                pass

    with pytest.raises(TooSlow, match=r"longer than 0\.05 s"):
        for_ever()
    with deadline(60):
        pass
    for _ in range(200):
        try:
            with deadline(0.0005):
                for _ in range(3000):
                    pass
        except TooSlow:
            pass
        # What was raised late would be raised here.
        sum(range(1000))
    time.sleep(0.01)
    assert not [
        each for each in threading.enumerate() if isinstance(each, threading.Timer) and not each.daemon
    ]
