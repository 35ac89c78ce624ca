"""Replays: a recorded episode played again by the very loop, with the recorded replies in the model's place.

The same instance in a fresh sandbox, the same calls by the same tools: what comes out must be what was recorded,
or the record is not of that episode.  Nothing of the record is trusted but the replies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pytest_pocket import records
from pytest_pocket.chat import ChatReply, ChatRequest, EngineError
from pytest_pocket.episode import Budget, Episode, Workshop, play, prepared
from pytest_pocket.parsing import leaves_thinking_open, parse
from pytest_pocket.sandbox import FileState
from pytest_pocket.task import NOT_DAMAGE, Task

ASKED = ("temperature", "seed", "think", "max_tokens")
"""What the evidence of a reply repeats of its request."""
EXACT = ("Read", "Write", "Edit", "Glob")
"""Tools whose results are of our own making; Bash and Grep show the machine's programs, whose words differ."""
TIMES = re.compile(
    r"\d{4}-\d\d-\d\d|\d{1,2}:\d\d(:\d\d(\.\d+)?)?|\b\d+\.\d+ ?s(econds)?\b|\b(Mon|Tue|Wed|Thu|Fri|Sat|Sun)\b"
    r"|\b(Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)\s+\d{1,2}\b|\b0x[0-9a-f]+\b|/tmp/\S+"
)
"""What a program says of the time, of addresses and of temporary names: never twice the same."""


class Reference(Protocol):
    """The tokenizer and template of the checkpoint that was run; ``backends.reference`` has it."""

    def ids(self, request: ChatRequest, *, neutral: bool = False) -> list[int]:
        """The prompt's token ids."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        ...


@dataclass(frozen=True)
class Finding:
    """Something that is not as it must be, or (``grave`` False) that could not be shown: by which check, and what."""

    check: str
    what: str
    grave: bool = True


class Script:
    """A backend that says the recorded replies in their order, and holds each against what it was asked."""

    def __init__(
        self, record: Mapping[str, Any], episode: Episode, has_evidence: bool, reference: Reference | None
    ) -> None:
        self._record, self._replies = record, episode.replies
        self._spoken = episode.messages
        self._turns = [at for at, message in enumerate(episode.messages) if message.role == "assistant"]
        self._has_evidence, self._reference = has_evidence, reference
        self._ids = iter(records.token_ids(record))
        self.said = 0
        self.beyond = False
        self.found: list[Finding] = []

    def chat(self, request: ChatRequest) -> ChatReply:
        """The next recorded reply.  Raises EngineError when there is none."""
        if self.said == len(self._replies):
            self.beyond = True
            raise EngineError("no more replies are recorded")
        reply = self._replies[self.said]
        self.said += 1
        self.found += self._asked(request, reply)
        self.found += self._counted(request, reply)
        return reply

    def cancel(self) -> None:
        """Nothing is in flight."""

    def close(self) -> None:
        """Nothing to free."""

    def _asked(self, request: ChatRequest, reply: ChatReply) -> Iterator[Finding]:
        """Whether the evidence says that the engine was asked what the condition and the seed say."""
        if not self._has_evidence:
            return
        for key in ASKED:
            if key == "seed" and "sampled_at_once" in reply.evidence:
                continue  # the candidates' seeds follow that of the first one
            right, told = getattr(request.sampling, key), reply.evidence.get(key)
            if told != right:
                said = "nothing" if told is None else f"{told}"
                yield Finding(
                    "evidence", f"reply {self.said}: {key} is {right:g}, and its evidence says {said}"
                )

    def _counted(self, request: ChatRequest, reply: ChatReply) -> Iterator[Finding]:
        """Whether the tokens are as many as is said, and, where the checkpoint is at hand, spell these words."""
        where = f"reply {self.said}"
        if reply.completion_tokens > request.sampling.max_tokens:
            yield Finding(
                "tokens",
                f"{where} has {reply.completion_tokens} tokens where {request.sampling.max_tokens} were allowed",
            )
        told = self._record["replies"][self.said - 1]
        if not told["completion_ids"]:
            if (reply.content or reply.calls) and not reply.completion_tokens and not reply.malformed:
                yield Finding("tokens", f"{where} says something in 0 tokens")
            return
        prompt, written = next(self._ids)
        for name, count, ids in (
            ("prompt", reply.prompt_tokens, prompt),
            ("completion", reply.completion_tokens, written),
        ):
            if count != len(ids):
                yield Finding(
                    "tokens", f"{where} has {count} {name} tokens by its count, {len(ids)} by its ids"
                )
        if self._reference is not None:
            yield from self._spelled(request, reply, prompt, written)

    def _spelled(
        self, request: ChatRequest, reply: ChatReply, prompt: list[int], written: list[int]
    ) -> Iterator[Finding]:
        assert self._reference is not None
        # Of the conversation as it is recorded: where a program says other words on this machine, it is still that one.
        recorded = replace(request, messages=self._spoken[: self._turns[self.said - 1]])
        right = self._reference.ids(recorded, neutral=True)
        if right != prompt:
            yield Finding("tokens", f"reply {self.said}: its prompt's ids spell another conversation")
        opened = leaves_thinking_open(self._reference.decode(right))
        text = self._reference.decode(written[:-1] if reply.finish == "stop" else written)
        read = parse(text, thinking_open=opened, schemas=request.tools)
        if (read.content, read.thinking, read.calls) != (reply.content, reply.thinking, reply.calls):
            yield Finding("tokens", f"reply {self.said}: its tokens spell other words")


def replay(
    task: Task,
    record: Mapping[str, Any],
    workshop: Workshop,
    *,
    budget: Budget,
    seed: int,
    has_evidence: bool = False,
    reference: Reference | None = None,
) -> Iterator[Finding]:
    """Play a recorded, valid episode again, and tell what differs.

    ``budget`` and ``seed`` are the run's.  Raises RecordsError for a foreign record, Cancelled.
    """
    instance = task.build(record["seed"])
    old = records.restore(record, instance)
    script = Script(record, old, has_evidence, reference)
    # Only the clock ends an episode between two replies: here, their number does.
    by_clock = old.stop == "seconds" and (not old.replies or old.replies[-1].finish == "stop")
    if by_clock and old.seconds < budget.seconds:
        yield Finding("replay", f"stopped by the clock after {old.seconds:g} s of {budget.seconds:g}")
    new = play(
        task,
        instance,
        script,
        workshop,
        old.condition,
        budget=replace(budget, seconds=float("inf"), turns=len(old.replies) if by_clock else budget.turns),
        seed=seed,
        sample=record["sample"] * record["best_of"] + record["candidate"],
    )
    if by_clock and new.stop == "turns":
        new = replace(new, stop="seconds")
    yield from script.found
    if script.beyond:
        yield Finding("replay", f"after its {script.said} replies the loop would have asked for another")
        return
    if new.outcome == "infra":
        yield Finding("replay", f"could not be played again: {new.detail}", grave=False)
        return
    if script.said < len(old.replies):
        yield Finding(
            "replay", f"{len(old.replies)} replies are recorded, and the loop ends with the {script.said}th"
        )
    yield from _conversation(record, new)
    yield from _ending(record, new)
    yield from _state(record, old.after, new.after, _made(record, task, workshop, old, new))


def _plain(episode: Episode, record: Mapping[str, Any]) -> dict[str, Any]:
    """The new episode as its record would say it: texts as JSON keeps them."""
    said: dict[str, Any] = json.loads(
        records.to_line({"messages": list(map(records.spoken, episode.messages))})
    )
    return {**said, "outcome": episode.outcome, "stop": episode.stop, "answer": episode.answer}


def _conversation(record: Mapping[str, Any], new: Episode) -> Iterator[Finding]:
    old, right = record["messages"], _plain(new, record)["messages"]
    for number, (told, is_) in enumerate(zip(old, right, strict=False), 1):
        if told == is_:
            continue
        if told["role"] == is_["role"] == "tool" and told["name"] == is_["name"]:
            same = TIMES.sub("", told["content"]) == TIMES.sub("", is_["content"])
            if not same:
                yield Finding(
                    "replay",
                    f"message {number}: {told['name']} answers {_short(is_['content'])}, "
                    f"and {_short(told['content'])} is recorded",
                    grave=told["name"] in EXACT,
                )
            continue
        opening = told["role"] in ("system", "user") and number <= 2
        what = (
            "is not the suite's prompt for this seed and condition"
            if opening
            else "is not what the loop says"
        )
        yield Finding(
            "instances" if opening else "replay", f"message {number} {what}: {_short(told['content'])}"
        )
    if len(old) != len(right):
        yield Finding("replay", f"{len(old)} messages are recorded, and the loop gives {len(right)}")


def _ending(record: Mapping[str, Any], new: Episode) -> Iterator[Finding]:
    right = {**_plain(new, record), **records.scored(new.score)}
    for key in ("outcome", "stop", "answer", "reward", "passed", "factors"):
        if record[key] != right[key] and not (key == "answer" and _same_text(record[key], right[key])):
            yield Finding("rewards", f"{key} is {_short(record[key])}, and must be {_short(right[key])}")
    told, are = ([(each["name"], each["value"]) for each in side["checks"]] for side in (record, right))
    if told != are:
        yield Finding("rewards", f"checks are {_short(told)}, and must be {_short(are)}")


def _same_text(told: str, right: str) -> bool:
    """Whether two texts are the same once a record has been made of both."""
    return records.to_line({"": told}) == records.to_line({"": right})


def _made(
    record: Mapping[str, Any], task: Task, workshop: Workshop, old: Episode, new: Episode
) -> frozenset[str]:
    """The files that the setup makes; looked for only where states differ."""
    if old.after == new.after or not new.instance.setup:
        return frozenset()
    sandbox = prepared(new.instance, workshop)
    try:
        return frozenset(sandbox.snapshot().keys() - new.instance.files.keys())
    finally:
        workshop.close(sandbox)


def _state(
    record: Mapping[str, Any],
    old: Mapping[str, FileState],
    new: Mapping[str, FileState],
    made: frozenset[str],
) -> Iterator[Finding]:
    cut = {file["path"]: file["cut_from_bytes"] for file in record["files"] if file["cut_from_bytes"]}
    for path in sorted((old.keys() | new.keys()) - NOT_DAMAGE):
        told, is_ = old.get(path), new.get(path)
        if told is not None and is_ is not None and path in cut and cut[path] == len(is_.content):
            is_ = replace(is_, content=is_.content[: len(told.content)])
        if told == is_:
            continue
        if told is None or is_ is None:
            what = (
                "is recorded, and not left by these calls"
                if told
                else "is left by these calls, and not recorded"
            )
        else:
            what = "is left otherwise by these calls"
        # Git's own files differ by its version and by the time of a commit; what they mean for the reward is checked.
        by_machine = path in made or path.startswith(".git/")
        yield Finding("replay", f"the final file {_short(path)} {what}", grave=not by_machine)


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
