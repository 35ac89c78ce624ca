"""The training loop that pretraining and SFT share: token budgets, Muon and AdamW, checkpoints, a curve.

Why a loop of our own: measured on a prototype, Muon on the matrices with batches of about a thousand tokens
reached in 4 CPU-minutes what AdamW with stock batches did not reach at all, and a run must survive a kill.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pytest_pocket.conditions import SYSTEM_PROMPTS
from pytest_pocket.tools import SCHEMAS
from pytest_pocket.training import world
from pytest_pocket.training.data import Trace
from pytest_pocket.training.journal import Journal
from pytest_pocket.training.recipe import Fit
from pytest_pocket.words import NOUNS

IGNORED = -100
MARKER = re.compile(r"{%-?\s*generation\s*-?%}")
PLAIN_WORD = re.compile(r"(?<![^\s(])[A-Za-z]+(?=[.,:;!?)]*(?:\s|$))")
WARMUP = 0.02
DECAY = 0.3
SAVE_SECONDS = 120.0
T = TypeVar("T")
Evaluate = Callable[[], Mapping[str, float]]


class TrainingError(RuntimeError):
    """A run that cannot go on, said in one line; the last checkpoint is intact."""


class NotWritten(TrainingError):
    """A conversation that holds what the chat template would write otherwise."""


@dataclass(frozen=True)
class Rendered:
    """One text to learn from: a trace under a condition, plain source, or copies.

    ``prompt`` names the condition of a trace: texts of one prompt begin alike.
    """

    ids: list[int]
    targets: list[int]
    prompt: str = ""

    def opening(self) -> list[int]:
        """The tokens before the first target."""
        return self.ids[: self.targets.index(1)]


def render(tokenizer: Any, trace: Trace, prompt: str, think: bool, *, everything: bool) -> Rendered:
    """A trace under a condition, by the chat template that the suite uses.

    Targets are exactly the assistant's tokens (its thinking, calls and end token) of the turns with a weight;
    ``everything`` makes all tokens targets, as pretraining wants.  A template's generation markers say which they
    are, which is quick; without them, ``sampled`` does.  Raises TrainingError.
    """
    turns = _turns(trace, prompt, think)
    if not MARKER.search(tokenizer.chat_template):
        ids, mask = sampled(tokenizer, turns, think)
    else:
        encoded = tokenizer.apply_chat_template(
            turns,
            tools=list(SCHEMAS),
            enable_thinking=think,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    if everything:
        return Rendered(ids, [1] * len(ids), prompt)
    return Rendered(ids, _weigh(mask, trace.weights), prompt)


def sampled(tokenizer: Any, turns: Sequence[Mapping[str, Any]], think: bool) -> tuple[list[int], list[int]]:
    """The ids of a conversation, and a mask of those that a model samples when it plays the assistant.

    Found as an engine would: a turn's tokens are those after the prompt that asks for it, to the end token.
    Raises TrainingError where the prompt is not what the conversation begins with.
    """

    ids = _ids(tokenizer, turns, think, prompt=False)
    mask = [0] * len(ids)
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        asked = prompt_ids(tokenizer, turns[:number], think)
        try:
            if ids[: len(asked)] != asked:
                raise ValueError
            end = ids.index(tokenizer.eos_token_id, len(asked)) + 1
        except ValueError:
            raise NotWritten(
                "the chat template writes a turn otherwise once it is over "
                f"(turn {number + 1}, thinking {'on' if think else 'off'}): what is sampled could not be trained on; "
                "use a template that keeps what it wrote"
            ) from None
        mask[len(asked) : end] = [1] * (end - len(asked))
    return ids, mask


def prompt_ids(tokenizer: Any, turns: Sequence[Mapping[str, Any]], think: bool) -> list[int]:
    """What an engine is given to ask for the next turn."""
    return _ids(tokenizer, turns, think, prompt=True)


def _ids(tokenizer: Any, turns: Sequence[Mapping[str, Any]], think: bool, *, prompt: bool) -> list[int]:
    return list(
        tokenizer.apply_chat_template(
            turns,
            tools=list(SCHEMAS),
            enable_thinking=think,
            add_generation_prompt=prompt,
            sanitize_control_tokens=True,
            return_dict=False,
        )
    )


def prove_masks(tokenizer: Any, traces: Sequence[Trace], fit: Fit, count: int = 8) -> None:
    """Check, before a run, that what some traces teach is exactly what a model samples.  Raises TrainingError."""
    for trace, prompt in itertools.product(traces[:count], fit.prompts):
        for think in {fit.think > 0, fit.think == 1}:
            rendered = render(tokenizer, trace, prompt, think, everything=False)
            turns = _turns(trace, prompt, think)
            ids, mask = sampled(tokenizer, turns, think)
            if (rendered.ids, rendered.targets) != (ids, _weigh(mask, trace.weights)):
                raise TrainingError(
                    "the chat template's generation markers are not around exactly what a model samples: "
                    f"mend them, or remove them (a trace of {trace.task}, prompt {prompt})"
                )


def _turns(trace: Trace, prompt: str, think: bool) -> list[dict[str, Any]]:
    """The messages of a trace under a condition."""
    system = SYSTEM_PROMPTS[prompt]
    turns: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    return turns + [
        {key: value for key, value in message.items() if think or key != "reasoning_content"}
        for message in trace.messages
    ]


def _weigh(mask: list[int], weights: Sequence[float]) -> list[int]:
    """The mask without the spans (runs of 1s, one an assistant turn) whose weight is 0."""
    out, span, before = [], -1, 0
    for flag in mask:
        span += flag == 1 and before == 0
        out.append(int(flag == 1 and weights[span] > 0))
        before = flag
    if span + 1 != len(weights):
        raise TrainingError(f"{span + 1} assistant spans in the mask for {len(weights)} assistant turns")
    return out


def stream(tokenizer: Any, traces: Sequence[Trace], plain: Sequence[str], fit: Fit) -> Iterator[Rendered]:
    """Traces in random order under the recipe's conditions, without end, with plain source among them."""
    choice = random.Random(fit.seed)
    prompts, shares = zip(*fit.prompts.items(), strict=True)
    words = _vocabulary(tokenizer) if fit.noise else []
    while True:
        for trace in choice.sample(traces, len(traces)):
            prompt = choice.choices(prompts, shares)[0]
            trace = reworded(trace, fit.noise, words, choice)
            yield render(
                tokenizer, trace, prompt, choice.random() < fit.think, everything=fit.targets == "all"
            )
            if plain and choice.random() < fit.text_share:
                ids = tokenizer(choice.choice(plain), add_special_tokens=False)["input_ids"][:512]
                yield Rendered(ids, [1] * len(ids))


def reworded(trace: Trace, share: float, words: Sequence[str], choice: random.Random) -> Trace:
    """The trace with a share of the request's words lost or replaced by any other: what a model leans on then is all
    of a request, not one turn of phrase.

    Words that come back later (names, paths, values) stay, and so does everything that is not a plain word.
    """
    if not share:
        return trace
    first, *rest = trace.messages
    later = json.dumps(rest)

    def changed(match: re.Match[str]) -> str:
        word = match[0]
        if word in later or choice.random() >= share:
            return word
        return choice.choice(words) if choice.random() < 0.5 else ""

    content = PLAIN_WORD.sub(changed, first["content"])
    return replace(trace, messages=({**first, "content": content}, *rest))


def _vocabulary(tokenizer: Any) -> list[str]:
    return sorted(token for token in tokenizer.get_vocab() if token.isascii() and token.isalnum())


def copies(tokenizer: Any, seed: int, whole: int = 0) -> Iterator[Rendered]:
    """Random words and numbers, then all or a part of them again, without end: only repetitions are learned.

    Copying is the first skill of an agent, and in traces too rare to emerge early.  Eight words repeated whole,
    three times over, as the first ``whole`` tokens are, taught it within 200,000 tokens; a repeated part took a
    million, and traces alone more than three.  Half of the words are any of the vocabulary, for a token that is
    never a target comes to be one that is never said.
    """
    choice = random.Random(seed)
    vocabulary = _vocabulary(tokenizer)
    joints = list("/._-: `\n")

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def piece() -> str:
        return choice.choice(NOUNS if choice.random() < 0.5 else vocabulary)

    while True:
        parts = [piece() + choice.choice([*joints, "", ""]) for _ in range(24)]
        if whole > 0 or choice.random() < 0.5:
            first = encode("".join(parts[: 8 if whole > 0 else choice.randint(4, 10)]) + "\n")
            whole -= 4 * len(first)
            yield Rendered(4 * first, [0] * (len(first) + 1) + [1] * (3 * len(first) - 1))
            continue
        filler = [piece() + " " for _ in range(choice.randint(0, 40))]
        place = choice.randint(0, len(filler))
        text = [*filler[:place], *parts, "\n", *filler[place:], "\n"]
        start = choice.randint(0, 12)
        again = parts[start : start + choice.randint(4, 12)]
        first, second = encode("".join(text)), encode("".join(again))
        yield Rendered(first + second, [0] * (len(first) + 1) + [1] * (len(second) - 1))


def batches(examples: Iterator[Rendered], tokens: int, window: int = 64) -> Iterator[list[Rendered]]:
    """Batches of at most ``tokens`` tokens, made of examples of like length and, if they can be, like opening.

    Padding counts, and a common opening counts once: ``next_token_loss`` computes it once.
    """
    order = random.Random(tokens)
    while True:
        pool = sorted(
            (next(examples) for _ in range(window)), key=lambda example: (example.prompt, len(example.ids))
        )
        made: list[list[Rendered]] = [[]]
        for example in pool:
            if made[-1]:
                alike = os.path.commonprefix([made[-1][0].opening(), example.opening()])  # noqa: RUF071 - of lists
                shared = len(alike)
                width = max(len(example.ids), len(made[-1][-1].ids)) - shared
                if shared + width * (len(made[-1]) + 1) > tokens:
                    made.append([])
            made[-1].append(example)
        order.shuffle(made)
        yield from made


def steps(
    tokenizer: Any, traces: Sequence[Trace], plain: Sequence[str], fit: Fit
) -> Iterator[tuple[list[Rendered], ...]]:
    """The batches of each step: copies alone for ``copies_alone`` tokens, then traces with a share of copies."""
    copied = batches(copies(tokenizer, fit.seed, fit.copies_alone // 2), fit.batch_tokens)
    seen = 0
    while seen < fit.copies_alone:
        batch = next(copied)
        seen += sum(len(example.ids) for example in batch)
        yield (batch,)
    choice = random.Random(fit.seed)
    for batch in batches(stream(tokenizer, traces, plain, fit), fit.batch_tokens):
        yield (batch, next(copied)) if choice.random() < fit.copies else (batch,)


def optimizers_of(model: Any, muon_lr: float, adam_lr: float) -> list[Any]:
    """Muon for the matrices of the layers, AdamW for the rest, and for all where ``muon_lr`` is 0."""
    import torch

    from pytest_pocket.training.muon import Muon

    matrices = [
        p
        for name, p in model.named_parameters()
        if muon_lr and p.requires_grad and p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    made: list[Any] = [torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)]
    if matrices:
        made.insert(0, Muon(matrices, muon_lr))
    for group in (group for optimizer in made for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return made


def descend(model: Any, optimizers: Sequence[Any], factor: float = 1.0) -> None:
    """An optimizer step on the gradients there are, clipped to norm 1, at ``factor`` times the learning rates."""
    import torch

    world.average_gradients(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        optimizer.zero_grad()


def due(before: float, after: float, evaluations: int) -> bool:
    """Whether one of so many evaluations, evenly spread, falls between two shares of a run."""
    return int(after * evaluations) > int(before * evaluations)


def check_finite(*losses: float) -> None:
    """Raises TrainingError at a loss that is not a number, before it does harm."""
    if not all(map(math.isfinite, losses)):
        raise TrainingError(
            f"the loss is {', '.join(map(str, losses))}: lower the learning rates; the last saved state is whole"
        )


def schedule(done: float) -> float:
    """The factor on the learning rate when a share ``done`` of the tokens is seen: up, level, down."""
    return min(1.0, (done + 1e-3) / WARMUP, max(0.02, (1.0 - done) / DECAY))


def within(items: Iterable[T], width: Callable[[T], int], tokens: int) -> Iterator[list[T]]:
    """Parts, in order, of at most ``tokens`` padded tokens, or of one item; an item is ``width`` tokens wide."""
    part: list[T] = []
    for item in items:
        if part and (len(part) + 1) * width(item) > tokens:
            yield part
            part = []
        part.append(item)
    if part:
        yield part


def tensors(batch: list[Rendered]) -> tuple[Any, Any]:
    """Token ids and labels, each of shape [rows, width], padded on the right: causal attention needs no mask."""
    import torch

    width = max(len(example.ids) for example in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for row, example in enumerate(batch):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        targets = torch.tensor(example.targets, dtype=torch.bool)
        labels[row, :length][targets] = ids[row, :length][targets]
    return ids, labels


def next_token_loss(model: Any, ids: Any, labels: Any) -> Any:
    """The mean cross-entropy of the targets, from shapes [rows, width], padded on the right."""
    import torch

    return torch.nn.functional.cross_entropy(*target_logits(model, ids, labels))


def target_logits(model: Any, ids: Any, labels: Any) -> tuple[Any, Any]:
    """The logits of the targets in float32, of shape [targets, vocabulary], and the targets, row by row.

    What all rows begin with (system prompt and tools: half of a trace) is computed once, and only the targets'
    hidden states reach the output layer.
    """
    decoder = model.get_decoder()
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    alike = (ids == ids[:1]).all(0) & (labels == IGNORED).all(0)
    # One less: the first target is predicted from the token before it, which must be among the rows' own.
    shared = int(alike.cumprod(0).sum()) - 1
    cache = None
    # A state of linear attention cannot be handed on with its gradient, and a recomputed layer keeps no cache.
    if len(ids) > 1 and shared > 0 and kinds == {"full_attention"} and not model.is_activation_checkpointing:
        cache = decoder(input_ids=ids[:1, :shared], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(ids))
        ids, labels = ids[:, shared:], labels[:, shared:]
    hidden = decoder(input_ids=ids, past_key_values=cache, use_cache=cache is not None).last_hidden_state
    wanted = labels[:, 1:] != IGNORED
    logits = model.get_output_embeddings()(hidden[:, :-1][wanted])
    return logits.float(), labels[:, 1:][wanted]


@dataclass(frozen=True)
class State:
    """Where a run keeps what it needs to go on after a kill, and of which run it is: recipe, parent, data."""

    path: Path
    run: str = ""

    def save(self, model: Any, optimizers: Sequence[Any], **progress: Any) -> None:
        """Keep it; the file before it stays whole until this one is.  Raises TrainingError."""
        import torch

        if not world.is_first():
            return
        partial = self.path.with_suffix(".partial")
        values = [optimizer.state_dict() for optimizer in optimizers]
        learned = {name: value for name, value in model.named_parameters() if value.requires_grad}
        try:
            torch.save({"run": self.run, "model": learned, "optimizers": values, **progress}, partial)
        except (OSError, RuntimeError) as error:
            # Of a full disk torch says only that a position in the file is unexpected.
            raise TrainingError(
                f"{partial} cannot be written ({str(error).splitlines()[0]}): is the disk full? "
                "What was saved before is whole"
            ) from error
        os.replace(partial, self.path)

    def load(self, model: Any, optimizers: Sequence[Any]) -> dict[str, Any]:
        """Put a run back where it was, and return its progress; empty when there is nothing to go on with.

        Raises TrainingError when the state is of another run.
        """
        import torch

        if not self.path.is_file():
            return {}
        saved: dict[str, Any] = torch.load(self.path, map_location=model.device, weights_only=True)
        if saved.get("run") != self.run:
            raise TrainingError(
                f"{self.path} is of a run with another recipe, parent or data: remove it, or give another --name"
            )
        model.load_state_dict(saved["model"], strict=False)
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        return saved


def fit_model(
    model: Any,
    batches_of_steps: Iterator[Sequence[list[Rendered]]],
    fit: Fit,
    state: State,
    evaluate: Evaluate | None = None,
    evaluations: int = 0,
    journal: Journal | None = None,
) -> list[dict[str, float]]:
    """Train until the recipe's tokens are seen; resumes from ``state`` if it is there.  Returns the curve.

    A step is one or more batches whose gradients add up; the loss reported is that of the first, the mean over
    the processes that train together.

    Raises TrainingError at a loss that is not a number; the last saved state is then intact.
    """
    model.train()
    optimizers = optimizers_of(model, fit.muon_lr, fit.adam_lr)
    journal = journal or Journal()
    saved = state.load(model, optimizers)
    seen, steps = saved.get("seen", 0), saved.get("steps", 0)
    mine = world.share(batches_of_steps)
    for _ in range(steps):
        next(mine)
    last_save = time.monotonic()
    recent: list[float] = []

    def save() -> None:
        state.save(model, optimizers, seen=seen, steps=steps, spent=journal.seconds, curve=journal.curve)

    with journal.open(saved):
        while seen < fit.tokens:
            losses = []
            before, tokens = seen, 0
            for batch in next(mine):
                ids, labels = (tensor.to(model.device) for tensor in tensors(batch))
                loss = next_token_loss(model, ids, labels)
                loss.backward()
                losses.append(loss.item())
                tokens += sum(len(example.ids) for example in batch)
            check_finite(*losses)
            descend(model, optimizers, schedule(before / fit.tokens))
            shares = world.gathered([(tokens, losses[0])])
            seen += sum(count for count, _ in shares)
            steps += 1
            recent.append(sum(loss for _, loss in shares) / len(shares))
            journal.done(seen / fit.tokens)
            now = evaluate is not None and due(before / fit.tokens, seen / fit.tokens, evaluations)
            if steps % 100 == 0 or seen >= fit.tokens or now:
                point = {"tokens": seen, "loss": sum(recent) / len(recent)}
                recent.clear()
                if now and evaluate:
                    model.eval()
                    point |= evaluate()
                    model.train()
                journal.note(steps, point)
            if time.monotonic() - last_save > SAVE_SECONDS:
                save()
                last_save = time.monotonic()
    save()
    model.eval()
    return journal.curve
