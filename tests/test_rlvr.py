"""RLVR: exactly the sampled tokens are learned, groups without variance teach nothing, a killed run goes on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_qwen3
from transformers import AutoModelForCausalLM, AutoTokenizer

from pytest_pocket import sandbox
from pytest_pocket.backends.hf import HFBackend
from pytest_pocket.backends.scripted import OracleBackend
from pytest_pocket.chat import ChatReply, Message
from pytest_pocket.conditions import Condition
from pytest_pocket.episode import Episode, Workshop
from pytest_pocket.registry import read_manifest
from pytest_pocket.task import Check, Instance, Score, instance_seed, split_of
from pytest_pocket.training import recipe, rlvr
from pytest_pocket.training.fit import Rendered, TrainingError

PLAN = replace(recipe.load("smoke").rlvr, reply_tokens=12, tokens=24, turns=2)


def attempted(reward: float, *turns: tuple[Sequence[int], Sequence[int]], **changes: Any) -> Episode:
    """An episode of which only the token ids and the reward matter: (prompt, completion) of each reply."""
    replies = tuple(
        ChatReply("", prompt_ids=tuple(prompt), completion_ids=tuple(said), completion_tokens=len(said))
        for prompt, said in turns
    )
    score = Score((Check("value", reward),), reward, 1.0, 1.0)
    episode = Episode(
        Instance("read_value", 7, "Do it.", {}, {}), Condition(), (Message("user", "Do it."),), replies,
        "passed" if reward == 1 else "wrong", "answer", score, "", {}, 0.1,
    )  # fmt: skip
    return replace(episode, **changes)


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_qwen3(tmp_path / "model"), dtype=torch.float32)


def test_an_episode_is_one_text_whose_targets_are_what_was_sampled() -> None:
    episode = attempted(1.0, ([1, 2], [3, 4]), ([1, 2, 3, 4, 9], [5]), ([1, 2, 3, 4, 9, 5, 8], [6, 7]))
    (text,) = rlvr.sequences(rlvr.turns_of(episode), "raw")
    assert text.ids == [1, 2, 3, 4, 9, 5, 8, 6, 7]
    assert text.targets == [0, 0, 1, 1, 0, 1, 0, 1, 1]


@given(st.lists(st.tuples(st.lists(st.integers(1, 9), min_size=1), st.lists(st.integers(1, 9))), min_size=1))
def test_every_sampled_token_is_a_target_once_and_nothing_else_is(
    turns: list[tuple[list[int], list[int]]],
) -> None:
    texts = rlvr.sequences(turns, "raw")
    learned = [
        token for text in texts for token, wanted in zip(text.ids, text.targets, strict=True) if wanted
    ]
    assert learned == [token for _, said in turns for token in said]


def test_a_rollout_of_a_real_engine_is_learned_as_it_was_sampled(tmp_path: Path) -> None:
    backend = HFBackend(str(make_qwen3(tmp_path / "model")))
    try:
        groups = rlvr.rollouts(PLAN, 0, backend, Workshop(sandbox.select("auto")))
    finally:
        backend.close()
    assert [len(group) for group in groups] == [PLAN.group] * PLAN.instances
    for group in groups:
        assert len({episode.instance.seed for episode in group}) == 1
        assert {split_of(episode.instance.seed) for episode in group} == {"train"}
        for episode in group:
            texts = rlvr.sequences(rlvr.turns_of(episode), "raw")
            assert len(texts) == 1  # prompts only grow
            assert sum(texts[0].targets) == episode.completion_tokens
    assert len({repr(episode.messages) for episode in groups[0]}) > 1  # samples of one instance differ


def test_groups_without_variance_and_invalid_episodes_teach_nothing() -> None:
    turn = ([1], [2])
    groups = [
        [attempted(1.0, turn), attempted(1.0, turn)],
        [attempted(1.0, turn), attempted(0.0, turn), attempted(0.0, turn, outcome="infra", score=None)],
    ]
    found, counts = rlvr.samples(groups, PLAN)
    assert [sample.advantage for sample in found] == [0.5, -0.5]
    assert counts == {"without variance": 1, "invalid": 1, "learned": 1}


@pytest.mark.parametrize(("overlong", "kept"), [("score", 3), ("mask", 2)])
def test_episodes_that_hit_a_limit_are_scored_or_left_out(overlong: str, kept: int) -> None:
    turn = ([1], [2])
    group = [attempted(1.0, turn), attempted(0.5, turn), attempted(0.0, turn, stop="tokens", outcome="limit")]
    found, counts = rlvr.samples([group], replace(PLAN, overlong=overlong))
    assert len(found) == kept
    assert counts["overlong"] == 3 - kept


@given(st.lists(st.integers(1, 40), min_size=1), st.integers(1, 100))
def test_parts_keep_to_their_tokens_and_lose_nothing(lengths: list[int], tokens: int) -> None:
    batch = [rlvr.Sample(Rendered([1] * length, [1] * length), 0.0) for length in lengths]
    parts = list(rlvr.packed(batch, tokens))
    assert sorted(len(sample.text.ids) for part in parts for sample in part) == sorted(lengths)
    widths = [{len(sample.text.ids) for sample in part} for part in parts]
    assert all(len(each) == 1 or len(each) * max(each) <= tokens for each in widths)
    assert sum(map(len, widths)) == len(set(lengths)), "a text is in two parts"


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logprobs_are_those_of_the_sampled_tokens_at_their_temperature(
    model: Any, temperature: float
) -> None:
    texts = [Rendered([5, 6, 7, 8, 9], [0, 0, 1, 0, 1]), Rendered([5, 6, 4], [0, 0, 1])]
    found, entropy = rlvr.logprobs(model, [rlvr.Sample(text, 0.0) for text in texts], temperature)
    expected = []
    for text in texts:
        logits = (model(torch.tensor([text.ids])).logits[0] / temperature).log_softmax(-1)
        expected += [logits[n - 1, text.ids[n]] for n in range(len(text.ids)) if text.targets[n]]
    assert torch.allclose(found, torch.stack(expected), atol=1e-5)
    assert (entropy > 0).all()


@pytest.mark.parametrize("batch_tokens", [1000, 1])
def test_attempts_that_are_alike_teach_as_if_each_were_computed_by_itself(
    model: Any, batch_tokens: int
) -> None:
    texts = [Rendered([5, 6, 7, 8], [0, 0, 1, 1]), Rendered([5, 6, 9, 4, 3], [0, 0, 1, 0, 1])]
    found = [
        rlvr.Sample(texts[number % 2], advantage) for number, advantage in enumerate([1, -0.5, -0.2, 0.7])
    ]
    loss = sum(-sample.advantage * rlvr.logprobs(model, [sample], 1.0)[0].sum() for sample in found)
    (loss / 8).backward()  # type: ignore[union-attr]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    expected = [each.grad.clone() for each in model.parameters()]
    model.zero_grad()
    rlvr.update(model, None, [], found, replace(PLAN, kl=0, updates=1, batch_tokens=batch_tokens), "s")
    for each, wanted in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(each.grad, wanted, atol=1e-5)


@settings(max_examples=50)
@given(st.floats(-0.1, 0.1), st.floats(-1, 1))
def test_inside_the_clip_the_gradient_is_that_of_the_policy_gradient(shift: float, advantage: float) -> None:
    new = torch.tensor([-1.0 + shift], requires_grad=True)
    loss, cut = rlvr.policy_loss(new, torch.tensor([-1.0]), torch.tensor([advantage]), PLAN)
    loss.sum().backward()
    ratio = torch.tensor(shift).exp()
    assert new.grad is not None
    assert torch.allclose(new.grad, -advantage * ratio, atol=1e-5)
    assert not cut.any()


@pytest.mark.parametrize(("shift", "advantage"), [(0.5, 1.0), (-0.5, -1.0)])
def test_beyond_the_clip_nothing_more_is_learned(shift: float, advantage: float) -> None:
    new = torch.tensor([-1.0 + shift], requires_grad=True)
    loss, cut = rlvr.policy_loss(new, torch.tensor([-1.0]), torch.tensor([advantage]), PLAN)
    loss.sum().backward()
    assert new.grad is not None
    assert new.grad.item() == 0
    assert cut.all()


def chances(model: Any, *texts: Rendered) -> list[float]:
    with torch.no_grad():
        return [float(rlvr.logprobs(model, [rlvr.Sample(text, 0.0)], 1.0)[0].sum()) for text in texts]


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_what_did_better_becomes_likelier_and_what_did_worse_less(model: Any, kl: float) -> None:
    good, bad = Rendered([5, 6, 7, 8], [0, 0, 1, 1]), Rendered([5, 6, 9, 4], [0, 0, 1, 1])
    before = chances(model, good, bad)
    plan = replace(PLAN, kl=kl, updates=1)
    optimizers = rlvr.fit.optimizers_of(model, plan.muon_lr, plan.adam_lr)
    reference = AutoModelForCausalLM.from_config(model.config) if kl else None
    if reference:
        reference.load_state_dict(model.state_dict())
    facts = rlvr.update(
        model, reference, optimizers, [rlvr.Sample(good, 0.5), rlvr.Sample(bad, -0.5)], plan, "s"
    )
    after = chances(model, good, bad)
    assert after[0] > before[0]
    assert after[1] < before[1]
    assert facts["entropy"] > 0
    assert facts["kl"] == pytest.approx(0.0, abs=1e-6)  # the first step starts at the reference


def test_what_is_learned_is_what_was_sampled_or_the_run_stops(tmp_path: Path) -> None:
    """Played for real; then with one id exchanged, as tokenising anew might."""
    path = make_qwen3(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    backend = HFBackend.around(model, AutoTokenizer.from_pretrained(path))
    groups = rlvr.rollouts(replace(PLAN, instances=2, group=2), 0, backend, Workshop(sandbox.select("auto")))
    backend.close()
    assert rlvr.prove_rollouts(model, groups) < 1e-3

    def exchanged(reply: ChatReply) -> ChatReply:
        return replace(reply, completion_ids=tuple((token + 1) % 200 for token in reply.completion_ids))

    drifted = [
        [replace(each, replies=tuple(map(exchanged, each.replies))) for each in group] for group in groups
    ]
    model.get_output_embeddings().weight.data.mul_(30)  # random weights give all tokens about the same chance
    with pytest.raises(TrainingError, match=r"differ from the trainer's by .* nats a token"):
        rlvr.prove_rollouts(model, drifted)


def test_a_loss_that_is_not_a_number_changes_no_weight(model: Any) -> None:
    text = Rendered([5, 6, 7, 8], [0, 0, 1, 1])
    before = chances(model, text)
    optimizers = rlvr.fit.optimizers_of(model, 0.1, 0.1)
    with pytest.raises(TrainingError, match="lower the learning rates"):
        rlvr.update(model, None, optimizers, [rlvr.Sample(text, float("nan"))], PLAN, "s")
    assert chances(model, text) == before


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    """Killed after its first step, which a stop in the second stands for."""
    path = make_qwen3(tmp_path / "model")
    plan = replace(PLAN, steps=2)
    ends = []
    for name, stops in (("whole", ()), ("resumed", (1,))):
        state = rlvr.fit.State(tmp_path / f"{name}.state")
        for steps in (*stops, 2):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            words = AutoTokenizer.from_pretrained(path)
            curve = rlvr.learn(model, words, replace(plan, steps=steps), state)
        assert [point["step"] for point in curve] == [1, 2]
        ends.append([{k: v for k, v in point.items() if k != "minutes"} for point in curve])
    assert ends[0] == ends[1]


def test_a_trained_policy_is_a_model_of_the_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rlvr.main(["--recipe", "smoke", "--from", "sft-run6", "--name", "rlvr-smoke", "--out", str(tmp_path)])
    model = read_manifest(tmp_path / "rlvr-smoke")
    assert (model.stage, model.parent) == ("rlvr", "sft-run6")
    manifest = json.loads((tmp_path / "rlvr-smoke" / "pocket.json").read_text())
    assert manifest["sampling"] == [
        {"model": "rlvr-smoke", "prompt": prompt, "think": False, "temperature": 1.0, "best_of": 1}
        for prompt in ("raw", "full")
    ]
    assert manifest["values"]["stage"]["clip_high"] == 0.28
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith('{"step"')]
    assert [line["step"] for line in lines] == [1, 2]
    shares = [sum(value for key, value in line.items() if key.startswith("share_")) for line in lines]
    assert shares == pytest.approx([1.0, 1.0], abs=1e-3)


def test_tasks_whose_groups_had_variance_are_drawn_more_often() -> None:
    tally = rlvr.Tally()
    assert tally.weights(0.7) == pytest.approx([1 / 19] * 19)
    mixed = [attempted(1.0, ([1], [2])), attempted(0.0, ([1], [2]))]
    tally.add([mixed] * 8)
    weights = dict(zip(tally.counts, tally.weights(0.5), strict=True))
    assert sum(weights.values()) == pytest.approx(1.0)
    assert weights["read_value"] == max(weights.values()) > 1 / 19
    assert min(weights.values()) > 0.5 / 19  # no task is left
    assert tally.weights(0.0) == pytest.approx([1 / 19] * 19)
    assert rlvr.Tally(tally.state()).weights(0.5) == tally.weights(0.5)


def test_an_instance_is_played_again_until_its_group_has_no_variance() -> None:
    def group(seed: int, *rewards: float) -> list[Episode]:
        instance = Instance("read_value", seed, "Do it.", {}, {})
        return [attempted(reward, ([1], [2]), instance=instance) for reward in rewards]

    tally = rlvr.Tally()
    tally.add([group(1, 0.0, 1.0), group(2, 1.0, 1.0), group(3, 1.0, 0.0)])
    assert tally.open == [("read_value", 1), ("read_value", 3)]
    tally.add([group(3, 0.0, 1.0), group(1, 1.0, 1.0)])
    assert tally.open == rlvr.Tally(tally.state()).open == [("read_value", 3)]
    backend = OracleBackend()
    plan = replace(PLAN, instances=2, group=2, revisit=1.0)
    seed = instance_seed("train", 5)
    tally.add([group(3, 1.0, 1.0), group(seed, 0.0, 1.0)])
    groups = rlvr.rollouts(plan, 0, backend, Workshop(sandbox.select("auto")), tally)
    seeds = [{episode.instance.seed for episode in each} for each in groups]
    assert seeds[0] == {seed}
    assert seeds[1].isdisjoint({seed})  # the open ones first, then new ones


def test_instances_are_drawn_apart_from_those_of_the_traces() -> None:
    seeds = {rlvr.drawn("read_value", random.Random(n)).seed for n in range(20)}
    assert len(seeds) == 20
    assert min(seeds) >= rlvr.FIRST
    assert {split_of(seed) for seed in seeds} == {"train"}


def test_a_share_of_the_instances_shows_what_the_traces_left_out() -> None:
    far = [rlvr.drawn("read_value", random.Random(n), reach=0.8) for n in range(10)]
    assert min(each.reach for each in far) >= 0.8
    assert rlvr.drawn("read_value", random.Random(0), reach=1.0).reach < 1  # where there is none, any
    plan = replace(PLAN, instances=8, group=1, left_out=1.0)
    groups = rlvr.rollouts(plan, 0, OracleBackend(), Workshop(sandbox.select("auto")), kinds=0.6)
    assert min(group[0].instance.reach for group in groups) >= 0.6


def test_two_updates_of_a_step_start_from_the_policy_that_sampled(model: Any) -> None:
    texts = [Rendered([5, 6, 7, 8], [0, 0, 1, 1]), Rendered([5, 6, 9, 4], [0, 0, 1, 1])]
    found = [rlvr.Sample(text, 0.5) for text in texts]
    expected = sum(float(rlvr.logprobs(model, [sample], 1.0)[1].detach().sum()) for sample in found) / 4
    optimizers = rlvr.fit.optimizers_of(model, 0.0, 1e-6)
    facts = rlvr.update(model, None, optimizers, found, replace(PLAN, updates=2), "s")
    assert facts["entropy"] == pytest.approx(expected, rel=1e-3)
    assert facts["clipped"] == 0


def test_a_second_pass_over_a_step_is_clipped_against_the_policy_that_sampled(model: Any) -> None:
    texts = [Rendered([5, 6, 7, 8], [0, 0, 1, 1]), Rendered([5, 6, 9, 4], [0, 0, 1, 1])]
    found = [rlvr.Sample(text, advantage) for text, advantage in zip(texts, (0.5, -0.5), strict=True)]
    plan = replace(PLAN, updates=1, epochs=20)
    rates: list[float] = []
    optimizers = rlvr.fit.optimizers_of(model, 0.0, 1e-2)
    facts = rlvr.update(model, None, optimizers, found, plan, "s", lambda done: rates.append(done) or 1.0)  # type: ignore[func-returns-value]
    assert rates == [number / 20 for number in range(20)]
    assert facts["clipped"] > 0.2
