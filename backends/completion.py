"""Completions: what an OpenAI-compatible server says, whole or in a stream, in one shape.

They are read as the JSON that they are.  The ``openai`` package's objects for every part of a stream were a fifth of
the client's processor time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Choice:
    """One of the replies that were asked for: all of it, or what a stream has brought so far.

    ``calls`` are names and arguments by position; ``logprob`` is the sum over the tokens, in nats.
    """

    content: str = ""
    thinking: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)
    finish: str = ""
    ids: list[int] = field(default_factory=list)
    logprob: float | None = None

    @property
    def characters(self) -> int:
        """How much text there is."""
        return (
            len(self.content)
            + len(self.thinking)
            + sum(len(part) for call in self.calls.values() for part in call)
        )

    def add(self, choice: Any, said: Any) -> None:
        """Take in a message, or a part of one.  ``choice`` is what holds it."""
        self.content += said.get("content") or ""
        self.thinking += _text(said, "reasoning_content") or _text(said, "reasoning")
        for position, call in enumerate(said.get("tool_calls") or ()):
            place = call.get("index")
            known = self.calls.setdefault(position if place is None else place, ["", ""])
            function = call.get("function") or {}
            known[0] += function.get("name") or ""
            known[1] += function.get("arguments") or ""
        self.finish = choice.get("finish_reason") or self.finish
        self.ids += choice.get("token_ids") or ()
        tokens = (choice.get("logprobs") or {}).get("content")
        if tokens:
            self.logprob = (self.logprob or 0.0) + sum(token["logprob"] for token in tokens)


@dataclass
class Answer:
    """What has come of a request.  ``late`` says that time ended it while it was being written."""

    choices: list[Choice]
    prompt_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    late: bool = False

    @property
    def begun(self) -> bool:
        """Whether every choice has something."""
        return all(choice.content or choice.thinking or choice.calls or choice.ids for choice in self.choices)

    @property
    def sampled(self) -> int:
        """How many tokens the server has told, of all choices together."""
        return sum(len(choice.ids) for choice in self.choices)

    def add(self, chunk: Any) -> None:
        """Take in a part of a stream."""
        self._note(chunk)
        for part in chunk.get("choices") or ():
            delta = part.get("delta")
            if delta is not None and part["index"] < len(self.choices):
                self.choices[part["index"]].add(part, delta)

    def fill(self, completion: Any) -> Answer:
        """Take in a whole completion."""
        self._note(completion)
        found = [each for each in completion.get("choices") or () if each.get("message") is not None]
        self.choices = [Choice() for _ in found]
        for choice, each in zip(self.choices, found, strict=True):
            choice.add(each, each["message"])
        return self

    def _note(self, told: Any) -> None:
        self.prompt_ids = self.prompt_ids or tuple(told.get("prompt_token_ids") or ())
        if usage := told.get("usage"):
            self.prompt_tokens = usage["prompt_tokens"]
            self.completion_tokens = usage["completion_tokens"]


def _text(said: Any, key: str) -> str:
    value = said.get(key)
    return value if isinstance(value, str) else ""
