"""rlvr: reinforcement learning with verifiable rewards, on the tasks themselves.

Groups of attempts at training instances are played in the suite's own loop and sandbox, all in flight together, and
scored by the tasks' rewards.  An attempt that did better than its group is made likelier, token by token: GRPO
(Shao et al. 2024, arXiv:2402.03300), its advantage not divided by the group's deviation (Liu et al. 2025,
arXiv:2503.20783), its loss a mean over tokens with a wider upper clip (Yu et al. 2025, arXiv:2503.14476).  Exactly the
sampled tokens are learned from: the ids come from the engine, nothing is tokenised again.
"""

from __future__ import annotations

import copy
import functools
import itertools
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from pytest_pocket import sandbox, task_list
from pytest_pocket.backends.hf import HFBackend
from pytest_pocket.chat import Backend
from pytest_pocket.conditions import Condition
from pytest_pocket.episode import Budget, Episode, Workshop, play
from pytest_pocket.task import Instance, instance_seed
from pytest_pocket.training import checkpoint, data, fit, recipe, stage, world
from pytest_pocket.training.evaluate import on_dev
from pytest_pocket.training.fit import Rendered, TrainingError
from pytest_pocket.training.journal import Journal
from pytest_pocket.training.recipe import RL

IN_FLIGHT = 64
DRIFT = 0.1
"""Nats a token by which the engine and the trainer may differ; in bfloat16 they do by some hundredths."""
OPEN = 64
"""How many instances whose groups had variance are remembered."""
FIRST = 500_000_000
"""Where the training instances of this stage begin: the traces of the others hold earlier ones."""


@dataclass(frozen=True)
class Sample:
    """Texts to learn from, and how much better the episode was than the others of its group."""

    text: Rendered
    advantage: float


class Tally:
    """Where there is something to learn: groups of each task with variance and in all, and instances that had it last.

    ``saved`` is what ``state`` gave.
    """

    def __init__(self, saved: Mapping[str, Any] = {}) -> None:
        counts = saved.get("counts", {})
        self.counts = {name: list(counts.get(name, (0, 0))) for name in task_list.shipped()}
        self.open: list[tuple[str, int]] = [(task, seed) for task, seed in saved.get("open", ())]

    def state(self) -> dict[str, Any]:
        """What a run that goes on needs."""
        return {"counts": self.counts, "open": self.open}

    def add(self, groups: Sequence[Sequence[Episode]]) -> None:
        """Count the groups of a step; an instance is open from one group with variance to one without."""
        for group in groups:
            instance = group[0].instance
            mixed = len({episode.reward for episode in group if not episode.invalid}) > 1
            self.counts[instance.task][0] += mixed
            self.counts[instance.task][1] += 1
            key = (instance.task, instance.seed)
            self.open = [other for other in self.open if other != key] + [key] * mixed
        self.open = self.open[-OPEN:]

    def weights(self, focus: float) -> list[float]:
        """For each task the chance to be drawn: a share ``focus`` of all by variance, the rest evenly."""
        rates = [(mixed + 1) / (groups + 2) for mixed, groups in self.counts.values()]
        return [(1 - focus) / len(rates) + focus * rate / sum(rates) for rate in rates]


def draws(
    plan: RL, step: int, tally: Tally | None = None, kinds: float = 1.0
) -> list[tuple[Instance, Condition]]:
    """What the groups of a step attempt.  ``kinds`` is the share of each list of kinds that traces show."""
    choice = random.Random(f"{plan.seed}:{step}")
    tasks = list(task_list.shipped().values())
    tally = tally or Tally()
    weights = tally.weights(plan.focus)
    again = choice.sample(tally.open, len(tally.open))
    prompts, shares = zip(*plan.prompts.items(), strict=True)
    groups = []
    for _ in range(plan.instances):
        if again and choice.random() < plan.revisit:
            name, seed = again.pop()
            instance = task_list.find(name).build(seed)
        else:
            task = choice.choices(tasks, weights)[0]
            left_out = choice.random() < plan.left_out
            instance = drawn(task.name, choice, kinds if left_out else 0.0)
        condition = Condition(
            choice.choices(prompts, shares)[0], choice.random() < plan.think, plan.temperature
        )
        groups.append((instance, condition))
    return groups


def rollouts(
    plan: RL,
    step: int,
    backend: Backend,
    workshop: Workshop,
    tally: Tally | None = None,
    kinds: float = 1.0,
) -> list[list[Episode]]:
    """The groups of a step: attempts at what ``draws`` draws, a list for each."""
    groups = draws(plan, step, tally, kinds)
    budget = Budget(turns=plan.turns, tokens=plan.tokens, reply_tokens=plan.reply_tokens)

    def attempt(number: int) -> Episode:
        instance, condition = groups[number // plan.group]
        task = task_list.find(instance.task)
        sample = step * plan.group + number % plan.group
        return play(
            task, instance, backend, workshop, condition, budget=budget, seed=plan.seed, sample=sample
        )

    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        done = world.gathered(list(threads.map(attempt, world.share(range(len(groups) * plan.group)))))
    return [done[start : start + plan.group] for start in range(0, len(done), plan.group)]


def drawn(task: str, choice: random.Random, reach: float = 0.0) -> Instance:
    """A training instance that no trace was made of and that equals none that models are tested on.

    One of at least that ``reach``, if there is one among some hundred.
    """
    for attempt in itertools.count():
        instance = task_list.find(task).build(instance_seed("train", FIRST + choice.randrange(FIRST)))
        far = instance.reach >= reach or attempt >= data.SPACING
        if far and data.fingerprint(instance) not in _guarded(task):
            return instance
    raise AssertionError("unreachable")


@functools.cache
def _guarded(task: str) -> frozenset[str]:
    return data.guarded([task])


def sequences(turns: Iterable[tuple[list[int], list[int]]], condition: str) -> list[Rendered]:
    """The sampled tokens of an episode as targets, after what the engine was given: one text if prompts only grow.

    A turn is the ids of a prompt and of what was sampled after it.
    """
    found: list[Rendered] = []
    for prompt, said in turns:
        if not said:
            continue
        held = found[-1].ids if found else []
        if found and prompt[: len(held)] == held:
            given = prompt[len(held) :]
            targets = [*found.pop().targets, *[0] * len(given), *[1] * len(said)]
        else:
            targets = [0] * len(prompt) + [1] * len(said)
        found.append(Rendered([*prompt, *said], targets, condition))
    return found


def samples(groups: Sequence[Sequence[Episode]], plan: RL) -> tuple[list[Sample], Counter[str]]:
    """What a step learns from, and counts of what it does not: groups without variance, invalid and cut episodes."""
    found: list[Sample] = []
    counts: Counter[str] = Counter()
    for group in groups:
        valid = [episode for episode in group if not episode.invalid]
        counts["invalid"] += len(group) - len(valid)
        if plan.overlong == "mask":
            whole = [episode for episode in valid if episode.stop not in ("tokens", "turns", "seconds")]
            counts["overlong"] += len(valid) - len(whole)
            valid = whole
        rewards = [episode.reward for episode in valid]
        if len(set(rewards)) < 2:
            counts["without variance"] += 1
            continue
        counts["learned"] += 1
        mean = statistics.fmean(rewards)
        for episode in valid:
            texts = sequences(turns_of(episode), episode.condition.prompt)
            found += [Sample(text, episode.reward - mean) for text in texts]
    return found, counts


def alike(batch: Iterable[Sample]) -> list[list[Sample]]:
    """The samples text by text: the attempts of a group are often the same, token by token."""
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Sample]] = {}
    for sample in batch:
        found.setdefault((tuple(sample.text.ids), tuple(sample.text.targets)), []).append(sample)
    return list(found.values())


def packed(batch: Sequence[Sample], tokens: int) -> Iterator[list[Sample]]:
    """Parts of at most ``tokens`` padded tokens (or of one text), of like conditions and lengths.

    A text counts once, and all samples of it are together.
    """
    ordered = sorted(alike(batch), key=lambda same: (same[0].text.prompt, len(same[0].text.ids)))
    for part in fit.within(ordered, lambda same: len(same[0].text.ids), tokens):
        yield [sample for same in part for sample in same]


def logprobs(model: Any, part: Sequence[Sample], temperature: float) -> tuple[Any, Any]:
    """The log-probabilities of the targets and the entropies there, in nats, each of shape [targets].

    Of the policy that sampled: at the temperature of the rollouts.  Samples of one text stand together; it is
    computed once.
    """
    import torch

    texts = [(same[0].text, len(same)) for same in alike(part)]
    ids, labels = (tensor.to(model.device) for tensor in fit.tensors([text for text, _ in texts]))
    logits, targets = fit.target_logits(model, ids, labels)
    every = (logits / temperature).log_softmax(-1)
    found = every.gather(-1, targets[:, None]).squeeze(-1), -(every.exp() * every).sum(-1)
    lengths = [sum(text.targets) for text, _ in texts]
    logprob, entropy = (
        torch.cat([each.repeat(times) for each, (_, times) in zip(values.split(lengths), texts, strict=True)])
        for values in found
    )
    return logprob, entropy


def prove_rollouts(model: Any, groups: Sequence[Sequence[Episode]], count: int = 8) -> float:
    """Check that what will be learned is what was sampled: the engine's log-probabilities are those computed here.

    Of the first episodes, as the mean difference in nats a token, which is returned.  Raises TrainingError.
    """
    import torch

    told = computed = tokens = 0.0
    for episode in [episode for group in groups for episode in group if not episode.invalid][:count]:
        texts = [Sample(text, 0.0) for text in sequences(turns_of(episode), episode.condition.prompt)]
        with torch.no_grad():
            every = [logprobs(model, [text], 1.0)[0] for text in texts]
        computed += sum(float(each.sum()) for each in every)
        tokens += sum(map(len, every))
        told += sum(reply.logprob or 0.0 for reply in episode.replies)
    drift = abs(told - computed) / max(1.0, tokens)
    if drift > DRIFT:
        raise TrainingError(
            f"the engine's log-probabilities differ from the trainer's by {drift:.3f} nats a token: "
            "the tokens or the weights are not those that were sampled; train in float32, or report this"
        )
    return drift


def turns_of(episode: Episode) -> list[tuple[list[int], list[int]]]:
    """The ids of each prompt of an episode and of what was sampled after it."""
    return [(list(reply.prompt_ids), list(reply.completion_ids)) for reply in episode.replies]


def policy_loss(new: Any, old: Any, advantages: Any, plan: RL) -> tuple[Any, Any]:
    """The clipped surrogate, negated, and whether the clip cut it, each of shape [targets]."""
    import torch

    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - plan.clip_low, 1 + plan.clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    return -surrogate, (ratio * advantages) > surrogate


def rate(plan: RL, step: int, done: float) -> float:
    """The factor on the learning rates when a share ``done`` of a step's updates is over."""
    return fit.schedule((step + done) / plan.steps)


def update(
    model: Any,
    reference: Any,
    optimizers: Sequence[Any],
    found: Sequence[Sample],
    plan: RL,
    seed: str,
    factor: Callable[[float], float] = lambda done: 1.0,
) -> dict[str, float]:
    """Learn from a step's samples, at ``factor`` times the learning rates when a share ``done`` of it is over.

    Raises TrainingError at a loss that is not a number, before it does harm.
    """
    import torch

    order = random.Random(seed).sample(found, len(found))
    sums: dict[str, float] = dict.fromkeys(("tokens", "entropy", "kl", "cut"), 0.0)
    parts = []
    for start in range(plan.updates):
        for part in world.share(packed(order[start :: plan.updates], plan.batch_tokens)):
            # Before the first update the policy is the one that sampled: in one pass its parts are computed below.
            with torch.no_grad():
                old = logprobs(model, part, plan.temperature)[0] if start or plan.epochs > 1 else None
                known = logprobs(reference, part, plan.temperature)[0] if plan.kl else None
            parts.append((start, part, old, known))
    starts = [*range(plan.updates)] * plan.epochs
    for number, start in enumerate(starts):
        mine = [each for each in parts if each[0] == start]
        count = sum(sum(sample.text.targets) for sample in order[start :: plan.updates])
        for _, part, old, known in mine:
            new, entropy = logprobs(model, part, plan.temperature)
            sums["tokens"] += len(new)
            sums["entropy"] += float(entropy.detach().sum())
            lengths = torch.tensor([sum(sample.text.targets) for sample in part])
            advantages = (
                torch.tensor([sample.advantage for sample in part]).repeat_interleave(lengths).to(new.device)
            )
            losses, cut = policy_loss(new, new.detach() if old is None else old, advantages, plan)
            if known is not None:
                # k3 of Schulman, http://joschu.net/blog/kl-approx.html: unbiased, never negative.
                divergence = (known - new).exp() - (known - new) - 1
                losses = losses + plan.kl * divergence
                sums["kl"] += float(divergence.detach().sum())
            # The mean over the tokens of all processes, whose gradients are averaged.
            loss = losses.sum() * world.size() / count
            fit.check_finite(loss.item())
            loss.backward()
            sums["cut"] += int(cut.sum())
        if count:
            fit.descend(model, optimizers, factor(number / len(starts)))
    sums = {key: world.total(value) for key, value in sums.items()}
    tokens = max(1, sums["tokens"])
    return {"entropy": sums["entropy"] / tokens, "kl": sums["kl"] / tokens, "clipped": sums["cut"] / tokens}


def learn(
    model: Any,
    tokenizer: Any,
    plan: RL,
    state: fit.State,
    evaluate: fit.Evaluate | None = None,
    evaluations: int = 0,
    journal: Journal | None = None,
    kinds: float = 1.0,
) -> list[dict[str, float]]:
    """Play and learn for the recipe's steps; resumes from ``state`` if it is there.  Returns the curve."""
    optimizers = fit.optimizers_of(model, plan.muon_lr, plan.adam_lr)
    reference = copy.deepcopy(model).eval() if plan.kl else None
    journal = journal or Journal()
    saved = state.load(model, optimizers)
    step = saved.get("step", 0)
    tally = Tally(saved.get("tally", {}))
    resumed = step
    model.eval()
    workshop = Workshop(sandbox.select("auto"))
    backend = HFBackend.around(model, tokenizer)
    try:
        with journal.open(saved):
            while step < plan.steps:
                groups = rollouts(plan, step, backend, workshop, tally, kinds)
                backend.weights_changed()  # they are about to, and the update can use the memory
                if step == resumed:
                    prove_rollouts(model, groups)
                tally.add(groups)
                found, counts = samples(groups, plan)
                learned = {}
                if found:
                    learned = update(
                        model,
                        reference,
                        optimizers,
                        found,
                        plan,
                        f"{plan.seed}:{step}",
                        functools.partial(rate, plan, step),
                    )
                step += 1
                journal.done(step / plan.steps)
                point = {"step": step, **told(groups), **counts, **learned}
                if evaluate and fit.due((step - 1) / plan.steps, step / plan.steps, evaluations):
                    point |= evaluate()
                journal.note(step, point)
                state.save(
                    model,
                    optimizers,
                    step=step,
                    spent=journal.seconds,
                    curve=journal.curve,
                    tally=tally.state(),
                )
    finally:
        backend.close()
    return journal.curve


def told(groups: Sequence[Sequence[Episode]]) -> dict[str, float]:
    """What the rollouts of a step were like: reward, length, and the shares of the ledger."""
    episodes = [episode for group in groups for episode in group]
    endings = Counter(episode.outcome for episode in episodes)
    return {
        "reward": statistics.fmean(episode.reward for episode in episodes),
        "tokens": sum(episode.completion_tokens for episode in episodes),
        "tokens_an_episode": statistics.fmean(episode.completion_tokens for episode in episodes),
        **{f"share_{ending}": count / len(episodes) for ending, count in sorted(endings.items())},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Train a model by reinforcement learning on the tasks."""
    parser = stage.arguments("rlvr", __doc__, parent="sft-run6")
    options = parser.parse_args(argv)

    chosen = recipe.load(options.recipe, options.changes)
    plan = chosen.rlvr
    stage.begin(options, plan.seed)
    parent, model, words = checkpoint.load(options.parent, chosen.weights)
    known = checkpoint.recipe_facts(chosen, plan)
    state = stage.state(options, known["recipe_sha256"], parent.digest)
    curve = learn(
        model,
        words,
        plan,
        state,
        lambda: on_dev(model, words),
        options.evaluations,
        stage.journal(options),
        chosen.data.kinds,
    )
    checkpoint.save(
        options.out / options.name,
        model,
        words,
        name=options.name,
        stage="rlvr",
        parent=parent,
        description="reinforcement learning with verifiable rewards on the training split of the tasks",
        facts={
            **known,
            "sampling": [
                {"model": options.name, **asdict(Condition(prompt, think, plan.temperature))}
                for prompt in plan.prompts
                for think, share in ((False, 1 - plan.think), (True, plan.think))
                if share
            ],
            "tokens": int(sum(point["tokens"] for point in curve)),
            "minutes": round(curve[-1]["minutes"], 1) if curve else 0.0,
        },
        curve=curve,
    )


if __name__ == "__main__":
    stage.run(main)
