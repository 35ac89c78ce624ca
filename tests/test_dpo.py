"""DPO: the better episode of a pair becomes likelier than the worse; a killed run goes on."""

from __future__ import annotations

import functools
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from suite_run import play_one_task
from tiny_models import byte_tokenizer, make_qwen3
from transformers import AutoModelForCausalLM, AutoTokenizer

from pytest_pocket import records
from pytest_pocket.registry import shipped
from pytest_pocket.training import dpo, fit, recipe
from pytest_pocket.training.dpo import Pair
from pytest_pocket.training.fit import Rendered, State, TrainingError

PLAN = replace(recipe.load("smoke").dpo, pairs=2, epochs=2)
GOOD, BAD = Rendered([5, 6, 7, 8], [0, 0, 1, 1], "raw"), Rendered([5, 6, 9, 4, 3], [0, 0, 1, 0, 1], "raw")
PAIR = Pair("raw", [GOOD], [BAD])


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_qwen3(tmp_path / "model"), dtype=torch.float32)


@functools.cache
def words() -> Any:
    return AutoTokenizer.from_pretrained(shipped() / "sft-run6")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Episodes of training instances by the shipped model, hot enough that some of an instance pass and some fail."""
    directory = tmp_path_factory.mktemp("play") / "run"
    command = [
        *(sys.executable, "-m", "pytest", "--pyargs", "pytest_pocket.tasks", "-q", "-p", "no:cacheprovider"),
        *(
            "--pocket-model=sft-run6",
            "--pocket-split=train",
            "--pocket-temperature=1.5",
            "--pocket-samples=4",
        ),
        *("--runs=3", "--pocket-prompt=raw,full", "--pocket-fail-under=0", f"--pocket-records={directory}"),
        *("--pocket-max-turns=4", "-m", "read"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=directory.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def trained(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest_pocket",
        "train",
        "dpo",
        "--recipe=smoke",
        "--name=dpo",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=directory)


def test_pairs_hold_what_was_sampled_and_the_better_episode_first(run: Path) -> None:
    found, left_out = dpo.pairs([run], words(), PLAN)
    _, played = records.load(run)
    rewards = {}
    for record in played:
        said = tuple(token for _, completion in records.token_ids(record) for token in completion)
        rewards[record["task"], record["seed"], record["prompt"], said] = record["reward"]
    assert found
    assert left_out["no worse than the best"] > 0
    for pair in found:
        better, worse = (
            tuple(
                token
                for text in texts
                for token, wanted in zip(text.ids, text.targets, strict=True)
                if wanted
            )
            for texts in (pair.better, pair.worse)
        )
        assert pair.better[0].opening() == pair.worse[0].opening()
        places = [key for key in rewards if key[3] == better]
        assert any(rewards[place] > rewards.get((*place[:3], worse), math.inf) for place in places)


def test_near_identical_pairs_are_left_out_by_the_recipe(run: Path) -> None:
    all_of_them, _ = dpo.pairs([run], words(), replace(PLAN, similar=1.0))
    few, left_out = dpo.pairs([run], words(), replace(PLAN, similar=0.5))
    assert len(few) + left_out["near-identical"] == len(all_of_them)
    assert left_out["near-identical"] > 0


def test_from_a_run_to_a_checkpoint_that_is_a_model(run: Path, tmp_path: Path) -> None:
    done = trained(tmp_path, f"--run={run}")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / ".pocket/checkpoints/dpo/pocket.json").read_text())
    assert manifest["stage"] == "dpo"
    assert manifest["parent"] == "sft-run6"
    assert manifest["sampling"] == [
        {"model": "sft-run6", "prompt": prompt, "think": False, "temperature": 1.5, "best_of": 1}
        for prompt in ("full", "raw")
    ]
    assert manifest["pairs"] == len(dpo.pairs([run], words(), recipe.load("smoke").dpo)[0])
    result = play_one_task(tmp_path, ".pocket/checkpoints/dpo")
    assert result.returncode in (0, 1), result.stdout
    assert "dpo" in result.stdout


def test_episodes_without_token_ids_are_rendered(suite_run: Path) -> None:
    found, _ = dpo.pairs([suite_run], words(), PLAN)  # the oracle's, each better than the no-op's
    assert len(found) == 38
    for pair in found:
        assert pair.better[0].opening() == pair.worse[0].opening()
        said = [
            token for token, wanted in zip(pair.worse[0].ids, pair.worse[0].targets, strict=True) if wanted
        ]
        assert words().decode(said).endswith("<|im_end|>")


def test_token_ids_of_another_tokenizer_are_not_taken(run: Path) -> None:
    record = next(record for record in records.load(run)[1] if len(record["replies"]) > 1)
    (text,) = dpo.texts(record, byte_tokenizer())
    spoken = [message for message in record["messages"] if message["role"] == "assistant"]
    learned = [token for token, wanted in zip(text.ids, text.targets, strict=True) if wanted]
    assert max(text.ids) < len(byte_tokenizer())
    assert byte_tokenizer().decode(learned).count("<|im_end|>") == len(spoken)


def test_a_record_that_claims_other_tokens_than_the_assistants_is_refused(run: Path) -> None:
    """A tool's answer taken for sampled: the ids of prompt and completion are cut elsewhere."""
    record = next(
        record for record in records.load(run)[1] if len(record["replies"]) > 1 and record["passed"]
    )
    (text,) = dpo.texts(record, words())
    first, second, *others = record["replies"]
    shifted = {
        **second,
        "prompt_ids": second["prompt_ids"][:-3],
        "completion_ids": second["prompt_ids"][-3:] + second["completion_ids"],
    }
    with pytest.raises(TrainingError, match="other tokens were sampled than the chat template gives"):
        dpo.texts({**record, "replies": [first, shifted, *others]}, words())
    assert sum(text.targets) == sum(len(reply["completion_ids"]) for reply in record["replies"])


def test_pairs_that_another_tokenizer_cannot_write_are_left_out_and_counted(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Malformed calls of hot episodes, which the template of a model with other tokens would spell otherwise."""
    every, _ = dpo.pairs([run], words(), PLAN)
    rendered = fit.sampled

    def refused(tokenizer: Any, turns: Any, think: bool) -> Any:
        if any("tool_calls" in turn for turn in turns[2:]):
            raise fit.NotWritten("another way")
        return rendered(tokenizer, turns, think)

    monkeypatch.setattr(fit, "sampled", refused)
    made, left_out = dpo.pairs([run], byte_tokenizer(), PLAN)
    counted = left_out["of another tokenizer, and not as this template writes"]
    assert counted > 0
    assert len(made) + counted == len(every)


def test_a_run_without_pairs_says_what_it_lacks(suite_run: Path, tmp_path: Path) -> None:
    info, found = records.load(suite_run)
    alone = tmp_path / "alone"
    records.write(alone, info, [each for each in found if each["model"] == "oracle"])
    done = trained(tmp_path, f"--run={alone}")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"pocket train: no pairs in {alone}")


def test_a_foreign_parent_is_one_line(run: Path, tmp_path: Path) -> None:
    done = trained(tmp_path, f"--run={run}", "--from=nobody")
    assert done.returncode == 2
    assert "'nobody'" in done.stderr
    assert "Traceback" not in done.stderr


@given(
    st.lists(st.sampled_from(["raw", "full", "verbose"]), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(1, 3),
)
def test_every_pair_is_seen_once_an_epoch_and_no_step_mixes_conditions(
    prompts: list[str], pairs: int, epochs: int
) -> None:
    found = [
        Pair(prompt, [Rendered([n], [1], prompt)], [Rendered([n], [1], prompt)])
        for n, prompt in enumerate(prompts)
    ]
    steps = list(dpo.batches(found, replace(PLAN, pairs=pairs, epochs=epochs)))
    assert sorted(pair.better[0].ids[0] for step in steps for pair in step) == sorted(
        [*range(len(found))] * epochs
    )
    assert all(len(step) <= pairs and len({pair.prompt for pair in step}) == 1 for step in steps)


def test_logprobs_sum_over_exactly_the_sampled_tokens(model: Any) -> None:
    episodes = [[GOOD], [BAD, GOOD]]
    sums, counts = dpo.logprobs(model, episodes)
    assert counts.tolist() == [2, 4]
    for texts, found in zip(episodes, sums, strict=True):
        expected = 0.0
        for text in texts:
            logits = model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
            expected += sum(
                logits[n - 1, text.ids[n]].item() for n in range(len(text.ids)) if text.targets[n]
            )
        assert found.item() == pytest.approx(expected, abs=1e-4)


@given(st.lists(st.integers(3, 60), min_size=1, max_size=20), st.integers(1, 400))
def test_a_step_is_learned_from_in_parts_that_hold_each_pair_once(lengths: list[int], tokens: int) -> None:
    def text(length: int) -> Rendered:
        return Rendered([0] * length, [0, *[1] * (length - 1)], "raw")

    pairs = [Pair("raw", [text(length)], [text(3)]) for length in lengths]
    made = list(dpo.parts(pairs, tokens))
    assert sorted(map(id, itertools.chain(*made))) == sorted(map(id, pairs))
    for part in made:
        assert len(part) == 1 or 2 * len(part) * max(len(pair.better[0].ids) for pair in part) <= tokens


def test_the_parts_of_a_step_do_not_change_what_is_learned(tmp_path: Path) -> None:
    path = make_qwen3(tmp_path / "model")
    ends = []
    for tokens in (10, 10_000):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        longer = Pair("raw", [Rendered([*GOOD.ids, 3], [*GOOD.targets, 1], "raw")], [BAD])
        plan = replace(PLAN, batch_tokens=tokens)
        curve = dpo.learn(model, [PAIR, longer], plan, State(tmp_path / f"{tokens}.state"))
        ends.append([(point["loss"], point["margin"]) for point in curve])
    assert ends[0][0] == pytest.approx(ends[1][0], abs=1e-5)
    assert ends[0][-1] == pytest.approx(ends[1][-1], rel=1e-2)


def logps(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_the_loss_is_that_of_the_paper() -> None:
    plan = replace(PLAN, beta=0.1, sft=0.0)
    loss, margin = dpo.preference_losses(logps(-1.0, -4.0), logps(-2.0, -3.0), logps(2, 2), plan)
    assert margin.tolist() == [2.0]
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.2)))
    with_sft, _ = dpo.preference_losses(
        logps(-1.0, -4.0), logps(-2.0, -3.0), logps(2, 2), replace(plan, sft=0.5)
    )
    assert with_sft.item() - loss.item() == pytest.approx(0.5 * 1.0 / 2)


@settings(max_examples=50)
@given(st.lists(st.floats(-50, 0), min_size=4, max_size=4), st.floats(0.01, 0.5))
def test_at_the_parent_the_loss_is_ln_2_whatever_the_texts(values: list[float], beta: float) -> None:
    loss, _ = dpo.preference_losses(
        logps(*values), logps(*values), logps(1, 1, 1, 1), replace(PLAN, beta=beta, sft=0.0)
    )
    assert loss.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-5)


def test_the_better_becomes_likelier_than_the_worse(model: Any, tmp_path: Path) -> None:
    before = dpo.logprobs(model, [[GOOD], [BAD]])[0].diff().item()
    curve = dpo.learn(model, [PAIR] * 4, replace(PLAN, epochs=4), State(tmp_path / "x.state"))
    after = dpo.logprobs(model, [[GOOD], [BAD]])[0].diff().item()
    assert after < before
    assert curve[0]["loss"] > curve[-1]["loss"]
    assert curve[-1]["preferred"] == 1.0


def weights(model: Any) -> Sequence[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_a_killed_run_goes_on_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [PAIR] * 8
    monkeypatch.setattr(dpo.fit, "SAVE_SECONDS", 0.0)
    directory = make_qwen3(tmp_path / "model")

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    whole = fresh()
    dpo.learn(whole, found, PLAN, State(tmp_path / "whole.state"))
    halted = fresh()
    taken = iter(range(3))

    def killed() -> dict[str, float]:
        if next(taken, None) is None:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        dpo.learn(halted, found, PLAN, State(tmp_path / "halted.state"), killed, evaluations=8)
    resumed = fresh()
    curve = dpo.learn(resumed, found, PLAN, State(tmp_path / "halted.state"))
    assert [point["step"] for point in curve] == list(range(1, 9))
    assert all(map(torch.allclose, weights(whole), weights(resumed)))


def test_a_state_of_another_run_is_refused(model: Any, tmp_path: Path) -> None:
    dpo.learn(model, [PAIR], PLAN, State(tmp_path / "x.state", "beta 0.1"))
    with pytest.raises(TrainingError, match="another recipe, parent or data: remove it"):
        dpo.learn(model, [PAIR], PLAN, State(tmp_path / "x.state", "beta 0.5"))


def test_a_loss_that_is_not_a_number_stops_before_harm(model: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    before = weights(model)
    with pytest.raises(TrainingError, match="lower the learning rates"):
        dpo.learn(model, [PAIR], PLAN, State(tmp_path / "x.state"))
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, weights(model), strict=True))
