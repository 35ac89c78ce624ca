"""The training pipeline: what is learned from, what is refused, what survives."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_pocket import records, sandbox, task_list
from pytest_pocket.conditions import SYSTEM_PROMPTS
from pytest_pocket.episode import Workshop, play
from pytest_pocket.registry import MANIFEST, ModelError, Registry, read_manifest, sha256_json, shipped
from pytest_pocket.task import instance_seed
from pytest_pocket.training import checkpoint, data, fit, recipe, tokenizer
from pytest_pocket.training.recipe import Fit, RecipeError

SMALL = Fit({"raw": 0.5, "full": 0.5}, 0.3, 0.2, 2000, 0.5, 30_000, 1024, 0.02, 3e-3, 1)
NAMES = ["read_value", "create_file", "answer_directly", "recover_missing"]


@pytest.fixture(scope="module")
def traces() -> list[data.Trace]:
    """Traces of a few tasks, half of them with a mistake at the start."""
    workshop, teacher = Workshop(sandbox.select("auto")), data.Teacher(0.5, 0)
    tasks = [task_list.find(name) for name in NAMES]
    episodes = [
        play(task, task.build(instance_seed("train", i)), teacher, workshop)
        for task in tasks
        for i in range(6)
    ]
    assert {episode.outcome for episode in episodes} == {"passed"}
    return [
        data.trace(episode, teacher.mistake(f"{episode.instance.task}:{episode.instance.seed}") is not None)
        for episode in episodes
    ]


@pytest.fixture(scope="module")
def words(traces: list[data.Trace]) -> Any:
    return tokenizer.build(traces, 600)


def tiny(words: Any) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=32,
            intermediate_size=64,
            tie_word_embeddings=True,
            max_position_embeddings=2048,
        )
    )


def said(message: dict[str, Any], think: bool) -> str:
    """What the assistant must produce, by the template's rules, written here a second time."""
    text = f"{message.get('reasoning_content', '')}</think>" if think else ""
    text += message["content"]
    for call in message.get("tool_calls", ()):
        arguments = call["function"]["arguments"].items()
        inner = "".join(f"<parameter={key}>\n{value}\n</parameter>" for key, value in arguments)
        text += f"<tool_call><function={call['function']['name']}>{inner}</function></tool_call>"
    return text + "<|im_end|>"


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("prompt", SYSTEM_PROMPTS)
def test_sft_learns_exactly_the_assistants_tokens(
    prompt: str, think: bool, traces: list[data.Trace], words: Any
) -> None:
    for trace in traces:
        rendered = fit.render(words, trace, prompt, think, everything=False)
        learned = words.decode(
            [i for i, target in zip(rendered.ids, rendered.targets, strict=True) if target]
        )
        turns = [message for message in trace.messages if message["role"] == "assistant"]
        wanted = [said(turn, think) for turn, weight in zip(turns, trace.weights, strict=True) if weight]
        assert learned == "".join(wanted)


def test_mistakes_are_context_and_not_learned(traces: list[data.Trace]) -> None:
    stumbled = [trace for trace in traces if 0.0 in trace.weights]
    assert stumbled
    assert all(trace.weights[0] == 0.0 and set(trace.weights[1:]) == {1.0} for trace in stumbled)
    assert all(
        "Error" in str(trace.messages[2]) or "No such file" in str(trace.messages[2]) for trace in stumbled
    )


def test_training_sees_the_token_ids_that_the_backend_sends(
    traces: list[data.Trace], words: Any, tmp_path: Path
) -> None:
    from pytest_pocket.backends.hf import HFBackend
    from pytest_pocket.chat import ChatRequest, Message, Sampling
    from pytest_pocket.tools import SCHEMAS

    model = tiny(words)
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    backend = HFBackend(str(tmp_path))
    try:
        for trace in traces[:6]:
            rendered = fit.render(words, trace, "raw", False, everything=True).ids
            request = ChatRequest(
                (Message("user", trace.messages[0]["content"]),), SCHEMAS, Sampling(max_tokens=1)
            )
            sent = list(backend.chat(request).prompt_ids)
            assert rendered[: len(sent)] == sent
    finally:
        backend.close()


@pytest.mark.parametrize("split", ["dev", "eval"])
def test_data_with_a_held_out_seed_is_refused(split: Any, tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    row = {"task": "read_value", "seed": instance_seed(split, 5), "messages": [], "weights": []}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(data.DataError, match=f"holds the {split} seed"):
        data.read(path)


def test_an_instance_that_equals_a_held_out_one_is_recognised() -> None:
    task = task_list.find("create_file")
    guarded = data.guarded(["create_file"])
    assert data.fingerprint(task.build(instance_seed("eval", 7))) in guarded
    assert data.fingerprint(task.build(instance_seed("train", 7))) not in guarded


def test_no_trace_is_made_of_an_instance_that_equals_a_held_out_one(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_list.find("read_value")
    plan = recipe.Data(episodes_per_task=4, kinds=1.1, stumble=0.0, seed=0)
    first, *others = [task.build(instance_seed("train", index)) for index in range(5)]
    monkeypatch.setattr(data, "guarded", lambda names: frozenset({data.fingerprint(first)}))
    kept, counts = data._play(("read_value", 0, 4, plan))
    assert counts == {"equal to a held-out instance": 1, "passed": 4}
    assert [trace.seed for trace in kept] == [instance.seed for instance in others]


def test_traces_leave_out_the_kinds_that_the_recipe_says() -> None:
    plan = recipe.Data(episodes_per_task=6, kinds=0.5, stumble=0.0, seed=0)
    found, counts = data._play(("run_script", 0, 6, plan))
    built = [task_list.find(trace.task).build(trace.seed) for trace in found]
    assert len(built) == 6
    assert all(each.reach < 0.5 for each in built)
    assert counts["of kinds that traces leave out"] > 0


def test_traces_of_a_run_are_its_passed_episodes_played_again(suite_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    counts = data.write(path, data.from_runs([suite_run]))
    assert counts["not passed"] == 38  # the no-op's
    assert counts["passed"] == 38  # the oracle's, raw and full
    assert counts["duplicate"] == 19  # which differ by the system prompt alone
    traces = data.read(path)
    assert len(traces) == 19
    for trace in traces:
        assert trace.messages[0]["role"] == "user"
        assert set(trace.weights) == {1.0}


def test_an_episode_that_does_not_pass_again_is_dropped(suite_run: Path, tmp_path: Path) -> None:
    info, found = records.load(suite_run)
    (forged,) = (
        each
        for each in found
        if each["task"] == "run_script" and each["prompt"] == "raw" and not each["passed"]
    )
    records.write(tmp_path / "run", info, [{**forged, "passed": True, "reward": 1.0}])
    with pytest.raises(data.DataError, match="'early_stop': 1"):
        data.write(tmp_path / "traces.jsonl", data.from_runs([tmp_path / "run"]))
    assert not list(tmp_path.glob("traces*"))


def test_traces_load_as_a_hugging_face_dataset(traces: list[data.Trace], tmp_path: Path) -> None:
    from datasets import load_dataset

    path = tmp_path / "traces.jsonl"
    data.write(path, iter([(traces, Counter())]))
    assert data.read(path) == traces
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == len(traces)
    arguments = [
        json.loads(call["function"]["arguments"])
        for row in rows
        for message in row["messages"]
        for call in message.get("tool_calls") or ()
    ]
    assert arguments == [
        call["function"]["arguments"]
        for trace in traces
        for message in trace.messages
        for call in message.get("tool_calls", ())
    ]


def test_missing_traces_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="pocket train data"):
        data.read(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seed = 2", "seed = 2\nlearning_rate = 1"), "unknown key 'learning_rate'"),
        (("[sft]", "[sfd]"), "unknown tables: sfd"),
        (("raw = 0.5", "rough = 0.5"), "unknown prompt 'rough'"),
        (("[sft]", "[sft"), "is not TOML"),
        (("[data]", '[weights]\ndtype = "int3"\n\n[data]'), "dtype 'int3': choose from float32, bfloat16"),
        (('"score"', '"drop"'), "overlong 'drop': choose from score, mask"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    text = (Path(str(recipe.__file__)).parent / "recipes" / "smoke.toml").read_text()
    path = tmp_path / "wrong.toml"
    path.write_text(text.replace(*change))
    with pytest.raises(RecipeError, match=message):
        recipe.load(str(path))
    with pytest.raises(RecipeError, match=r"choose from qwen3\.5-0\.8b-16gb, smoke, tiny"):
        recipe.load("huge")


def test_copies_learn_only_what_stands_before(words: Any) -> None:
    for example in islice(fit.copies(words, 3, whole=2000), 100):
        text = words.decode(example.ids)
        learned = words.decode([i for i, target in zip(example.ids, example.targets, strict=True) if target])
        assert learned
        once = text[: len(text) // 4]
        assert learned in text[: -len(learned)] or once * 4 == text


@given(st.floats(0, 1))
def test_the_learning_rate_stays_between_0_and_its_base(done: float) -> None:
    assert 0 < fit.schedule(done) <= 1


@settings(max_examples=30)
@given(st.lists(st.integers(1, 900), min_size=64, max_size=64), st.integers(900, 4000))
def test_batches_keep_to_their_tokens_and_lose_nothing(lengths: list[int], tokens: int) -> None:
    examples = [fit.Rendered([number] * length, [1] * length) for number, length in enumerate(lengths)]
    made: list[list[fit.Rendered]] = []
    for batch in fit.batches(iter(examples), tokens):
        made.append(batch)
        if sum(map(len, made)) == len(examples):
            break
    assert all(len(batch) * max(len(each.ids) for each in batch) <= tokens for batch in made)
    assert sorted(each.ids[0] for batch in made for each in batch) == list(range(64))


def test_an_opening_that_the_rows_share_counts_once() -> None:
    opening = [0] * 100
    examples = [fit.Rendered(opening + [number] * 50, [0] * 100 + [1] * 50, "raw") for number in range(1, 65)]
    made = next(fit.batches(iter(examples), 400))
    assert len(made) == 6


@pytest.mark.parametrize("learned", ["the assistant's tokens", "everything"])
def test_the_loss_and_its_gradient_are_those_of_each_row_by_itself(
    learned: str, traces: list[data.Trace], words: Any
) -> None:
    import torch

    everything = learned == "everything"
    rows = [fit.render(words, trace, "full", False, everything=everything) for trace in traces[:4]]
    model = tiny(words).train()

    def gradients(loss: Any) -> list[Any]:
        model.zero_grad()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    together = fit.next_token_loss(model, *fit.tensors(rows))
    targets = sum(sum(row.targets[1:]) for row in rows)
    alone = sum(
        fit.next_token_loss(model, *fit.tensors([row])) * (sum(row.targets[1:]) / targets) for row in rows
    )
    torch.testing.assert_close(together, alone)
    for one, other in zip(gradients(together), gradients(alone), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_a_resumed_run_ends_like_an_uninterrupted_one(
    traces: list[data.Trace], words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def stream() -> Any:
        return fit.steps(words, traces, ["x = 1\n"], SMALL)

    whole = tiny(words)
    fit.fit_model(whole, stream(), SMALL, fit.State(tmp_path / "whole.state"))

    class Killed(Exception):
        pass

    def interrupted() -> Any:
        yield from islice(stream(), 12)
        raise Killed

    monkeypatch.setattr(fit, "SAVE_SECONDS", 0.0)
    with pytest.raises(Killed):
        fit.fit_model(tiny(words), interrupted(), SMALL, fit.State(tmp_path / "halves.state"))
    resumed = tiny(words)
    curve = fit.fit_model(resumed, stream(), SMALL, fit.State(tmp_path / "halves.state"))
    assert curve[-1]["tokens"] >= SMALL.tokens
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_training_lowers_the_loss(traces: list[data.Trace], words: Any, tmp_path: Path) -> None:
    steps = fit.steps(words, traces, (), SMALL)
    longer = Fit(**{**SMALL.__dict__, "tokens": 60_000})
    curve = fit.fit_model(
        tiny(words), steps, longer, fit.State(tmp_path / "run.state"), lambda: {"dev": 0.5}, 4
    )
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.5
    assert [point["dev"] for point in curve if "dev" in point] == [0.5] * 4


def test_a_loss_that_is_not_a_number_stops_the_run(
    traces: list[data.Trace], words: Any, tmp_path: Path
) -> None:
    model = tiny(words)
    model.model.embed_tokens.weight.data.fill_(float("nan"))
    steps = fit.steps(words, traces, (), SMALL)
    with pytest.raises(fit.TrainingError, match="the loss is nan: lower the learning rates"):
        fit.fit_model(model, steps, SMALL, fit.State(tmp_path / "run.state"))
    assert not (tmp_path / "run.state").exists()


def test_a_value_of_a_recipe_can_be_changed_for_one_run() -> None:
    changed = recipe.load("smoke", ["dpo.beta=0.3", "sft.prompts={ raw = 1.0 }", "sft.targets = 'all'"])
    assert (changed.dpo.beta, changed.sft.prompts, changed.sft.targets) == (0.3, {"raw": 1.0}, "all")
    assert changed.name == "smoke dpo.beta=0.3 sft.prompts={ raw = 1.0 } sft.targets = 'all'"
    assert recipe.load("smoke").dpo.beta != 0.3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("dpo.beta", "write TABLE.KEY=VALUE"),
        ("dpo.beta=", "write TABLE.KEY=VALUE"),
        ("dpo.beta=much", "write TABLE.KEY=VALUE"),
        ("dpo.gamma=1", "unknown key 'gamma'"),
        ("warp.speed=9", "unknown tables: warp"),
        ("beta=0.1", "unknown"),
        ("sft.targets='none'", "choose from assistant, all"),
    ],
)
def test_a_change_that_cannot_be_made_is_one_clear_line(change: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        recipe.load("smoke", [change])
    assert "\n" not in str(caught.value)


@pytest.fixture
def saved(words: Any, tmp_path: Path) -> Path:
    directory = tmp_path / "mine"
    curve = [{"tokens": 100, "loss": 2.0, "minutes": 0.1}, {"tokens": 200, "loss": 1.0, "dev_raw_pass": 0.5}]
    checkpoint.save(
        directory, tiny(words), words, name="mine", stage="sft", parent=Registry().resolve("base"),
        description="", facts={}, curve=curve,
    )  # fmt: skip
    return directory


def test_a_checkpoint_is_a_model_of_the_suite(saved: Path) -> None:
    model = read_manifest(saved)
    assert (model.name, model.backend, model.parent, model.stage) == ("mine", "hf", "base", "sft")
    assert sorted(saved.parent.iterdir()) == [saved]
    assert len(json.loads((saved / "curve.json").read_text())) == 2
    assert (saved / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("key", ["suite", "tools_sha256", "template_sha256"])
def test_a_checkpoint_made_for_another_suite_is_refused(key: str, saved: Path) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    (saved / MANIFEST).write_text(json.dumps({**manifest, key: "other"}))
    with pytest.raises(ModelError, match=r"made for another suite: .* other"):
        read_manifest(saved)


@pytest.mark.parametrize("name", sorted(path.name for path in shipped().iterdir()))
def test_the_manifest_of_a_shipped_checkpoint_says_how_it_was_made(name: str) -> None:
    manifest = json.loads((shipped() / name / MANIFEST).read_text())
    assert manifest["recipe_sha256"] == sha256_json(list(manifest["values"].values()))
    assert manifest["seed"] == manifest["values"]["stage"]["seed"]
    # All that a checkpoint of today has, which the oldest ones were given later ("completed").
    for fact in ("suite", "tools_sha256", "tools", "template_sha256", "parser_sha256", "commit", "minutes"):
        assert manifest[fact]
    learned_from_a_model = manifest["stage"] in ("dpo", "rlvr")
    assert bool(manifest["parent"]) == (manifest["stage"] != "base")
    if manifest["parent"]:
        assert manifest["parent_sha256"] == read_manifest(shipped() / manifest["parent"]).digest
    assert bool(manifest["sampling"]) == learned_from_a_model
    assert ("data_sha256" in manifest) == (manifest["stage"] != "rlvr")
    assert (shipped() / name / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_traces_of_a_model_s_own_episodes_say_how_it_was_sampled(suite_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    data.main(["--recipe", "smoke", "--run", str(suite_run), "--out", str(path)])
    assert [(each["model"], each["prompt"], each["temperature"]) for each in data.sampling_of([path])] == [
        (model, prompt, 0.0) for model in ("noop", "oracle") for prompt in ("full", "raw")
    ]


def test_the_shipped_tokenizer_keeps_words_whole_wherever_they_stand() -> None:
    from transformers import AutoTokenizer

    shipped_words = AutoTokenizer.from_pretrained(str(shipped() / "base"), local_files_only=True)
    for text in ("anchor", " anchor", "`anchor`", "src/anchor.py", "merge_anchor"):
        assert "anchor" in shipped_words.tokenize(text)


@given(text=st.text(max_size=60))
@settings(max_examples=100)
def test_the_tokenizer_gives_back_every_text(text: str, words: Any) -> None:
    encodable = text.encode("utf-8", "ignore").decode()
    assert words.decode(words(encodable, add_special_tokens=False)["input_ids"]) == encodable
