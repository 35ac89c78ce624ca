"""dpo: from pairs of episodes of one instance, the better made likelier than the worse.

Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) with a share of the likelihood of the better
episode (RPO, Pang et al. 2024, arXiv:2404.19733), over whole episodes: the tokens that count are those that the model
sampled, in all turns, and what tools said between them is context.  Why not TRL's trainer: it takes everything after
the prompt for the completion, tool results too, and renders and tokenises anew what was sampled.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_pocket import export, records
from pytest_pocket.registry import file_hash
from pytest_pocket.training import checkpoint, data, fit, recipe, stage, world
from pytest_pocket.training.evaluate import on_dev
from pytest_pocket.training.fit import NotWritten, Rendered, TrainingError
from pytest_pocket.training.journal import Journal
from pytest_pocket.training.recipe import Preference
from pytest_pocket.training.rlvr import sequences


@dataclass(frozen=True)
class Pair:
    """Two episodes of an instance under one condition, the texts of each: several where prompts do not only grow."""

    prompt: str
    better: list[Rendered]
    worse: list[Rendered]


def pairs(directories: Sequence[Path], tokenizer: Any, plan: Preference) -> tuple[list[Pair], Counter[str]]:
    """The pairs of some runs, and what was left out, by reason.  Raises ExportError, RecordsError, TrainingError."""
    found = [record for directory in directories for record in records.load(directory)[1]]
    left_out: Counter[str] = Counter()
    made = []
    with records.of_this_version():
        for better, worse in export.pairs(found, left_out, plan.similar):
            try:
                made.append(Pair(better["prompt"], texts(better, tokenizer), texts(worse, tokenizer)))
            except NotWritten:
                left_out["of another tokenizer, and not as this template writes"] += 1
    if not made:
        raise TrainingError(
            f"no pairs in {', '.join(map(str, directories))} ({export.listed(left_out) or 'no episodes'}): "
            "play several --pocket-samples at a --pocket-temperature, with a model that sometimes passes"
        )
    return made, left_out


def texts(record: Mapping[str, Any], tokenizer: Any) -> list[Rendered]:
    """An episode as it was sampled, if the engine gave the ids of this very tokenizer, else rendered by it.

    Raises TrainingError where the same ids would be learned from otherwise by the two ways.
    """
    messages = records.messages(record)
    spoken = [message.to_dict() for message in export.to_last_word(messages)]
    start = next(number for number, message in enumerate(spoken) if message["role"] == "assistant")
    turns = records.token_ids(record)
    if not turns or turns[0][0] != fit.prompt_ids(tokenizer, spoken[:start], record["think"]):
        return [Rendered(*fit.sampled(tokenizer, spoken, record["think"]), record["prompt"])]
    found = sequences(turns, record["prompt"])
    try:
        ids, targets = fit.sampled(tokenizer, spoken, record["think"])
    except NotWritten:
        return found  # what was sampled is nothing that the template would write
    length = len(found[0].ids)
    if ids[:length] == found[0].ids and targets[:length] != found[0].targets:
        raise TrainingError(
            f"the record of {record['task']}, seed {record['seed']}, says that other tokens were sampled than the chat "
            "template gives to the assistant: play the run again with this tokenizer"
        )
    return found


def batches(found: Sequence[Pair], plan: Preference) -> Iterator[list[Pair]]:
    """The pairs of each step.  Those of a step are under one condition: what their texts begin with is shared."""
    choice = random.Random(plan.seed)
    for _ in range(plan.epochs):
        order = sorted(choice.sample(found, len(found)), key=lambda pair: pair.prompt)
        made: list[list[Pair]] = []
        for pair in order:
            if not made or len(made[-1]) == plan.pairs or made[-1][0].prompt != pair.prompt:
                made.append([])
            made[-1].append(pair)
        yield from choice.sample(made, len(made))


def parts(batch: Sequence[Pair], tokens: int) -> Iterator[list[Pair]]:
    """Parts of a step of at most ``tokens`` padded tokens (or of one pair), of like lengths."""

    def longest(pair: Pair) -> int:
        return max(len(text.ids) for text in (*pair.better, *pair.worse))

    return fit.within(sorted(batch, key=longest), lambda pair: 2 * longest(pair), tokens)


def logprobs(model: Any, episodes: Sequence[Sequence[Rendered]]) -> tuple[Any, Any]:
    """The log-probability of each episode's targets together, in nats, and their number: shape [episodes]."""
    import torch

    texts = [text for episode in episodes for text in episode]
    ids, labels = (tensor.to(model.device) for tensor in fit.tensors(texts))
    logits, targets = fit.target_logits(model, ids, labels)
    each = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    counts = torch.tensor([sum(sum(text.targets) for text in episode) for episode in episodes])
    owners = torch.arange(len(episodes)).repeat_interleave(counts).to(each.device)
    sums = torch.zeros(len(episodes), device=each.device).index_add(0, owners, each)
    return sums, counts.to(each.device)


def preference_losses(policy: Any, reference: Any, counts: Any, plan: Preference) -> tuple[Any, Any]:
    """Of each pair the loss, and the margin in nats by which the better one gained on the worse.

    Log-probabilities and counts of the better texts, then of the worse ones: shape [2 x pairs].
    """
    from torch.nn.functional import logsigmoid

    better, worse = (policy - reference).chunk(2)
    margin = better - worse
    likelihood = (policy / counts).chunk(2)[0]
    return -logsigmoid(plan.beta * margin) - plan.sft * likelihood, margin


def learn(
    model: Any,
    found: Sequence[Pair],
    plan: Preference,
    state: fit.State,
    evaluate: fit.Evaluate | None = None,
    evaluations: int = 0,
    journal: Journal | None = None,
) -> list[dict[str, float]]:
    """Learn from the pairs; resumes from ``state`` if it is there.  Returns the curve.

    Raises TrainingError at a loss that is not a number; the last saved state is then intact.
    """
    import torch

    steps = list(batches(found, plan))
    optimizers = fit.optimizers_of(model, plan.muon_lr, plan.adam_lr)
    reference = copy.deepcopy(model).eval()
    journal = journal or Journal()
    saved = state.load(model, optimizers)
    done = saved.get("step", 0)
    model.eval()
    last_save = time.monotonic()
    with journal.open(saved):
        while done < len(steps):
            told = {"loss": 0.0, "margin": 0.0, "preferred": 0.0}
            for part in parts(list(world.share(steps[done])), plan.batch_tokens):
                episodes = [pair.better for pair in part] + [pair.worse for pair in part]
                with torch.no_grad():
                    known, _ = logprobs(reference, episodes)
                policy, counts = logprobs(model, episodes)
                losses, margin = preference_losses(policy, known, counts, plan)
                fit.check_finite(losses.sum().item())
                # Of all processes' pairs each counts the same.
                (losses.sum() * world.size() / len(steps[done])).backward()
                told["loss"] += losses.sum().item()
                told["margin"] += margin.sum().item()
                told["preferred"] += (margin > 0).float().sum().item()
            fit.descend(model, optimizers, fit.schedule(done / len(steps)))
            point = {key: world.total(value) / len(steps[done]) for key, value in told.items()}
            done += 1
            journal.done(done / len(steps))
            if evaluate and fit.due((done - 1) / len(steps), done / len(steps), evaluations):
                point |= evaluate()
            journal.note(done, {"step": done, **point})
            if done == len(steps) or time.monotonic() - last_save > fit.SAVE_SECONDS:
                state.save(model, optimizers, step=done, spent=journal.seconds, curve=journal.curve)
                last_save = time.monotonic()
    return journal.curve


def main(argv: Sequence[str] | None = None) -> None:
    """Train a model on preferences."""
    parser = stage.arguments("dpo", __doc__, parent="sft-run6")
    parser.add_argument(
        "--run",
        type=Path,
        action="append",
        required=True,
        help="a run directory of training episodes; repeatable",
    )
    options = parser.parse_args(argv)

    chosen = recipe.load(options.recipe, options.changes)
    plan = chosen.dpo
    stage.begin(options, plan.seed)
    parent, model, words = checkpoint.load(options.parent, chosen.weights)
    found, left_out = pairs(options.run, words, plan)
    print(json.dumps({"pairs": len(found), **left_out}), file=sys.stderr, flush=True)
    known = {**checkpoint.recipe_facts(chosen, plan), "sampling": data.sampling(options.run)}
    data_sha256 = [file_hash(directory / records.EPISODES) for directory in options.run]
    state = stage.state(options, known["recipe_sha256"], parent.digest, *data_sha256)
    curve = learn(
        model,
        found,
        plan,
        state,
        lambda: on_dev(model, words),
        options.evaluations,
        stage.journal(options),
    )
    checkpoint.save(
        options.out / options.name,
        model,
        words,
        name=options.name,
        stage="dpo",
        parent=parent,
        description=f"preferences between episodes of one training instance, beta {plan.beta}",
        facts={
            **known,
            "pairs": len(found),
            "left_out": dict(left_out),
            "data_sha256": data_sha256,
            "minutes": round(curve[-1]["minutes"], 1) if curve else 0.0,
        },
        curve=curve,
    )


if __name__ == "__main__":
    stage.run(main)
