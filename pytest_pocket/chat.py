"""The chat interface: everything that a backend and the episode loop know of each other.

A backend turns a :class:`ChatRequest` into a :class:`ChatReply`.  It never runs a tool, never sees a
reward, and may be called from many threads at once: an engine that can batch does so by itself.
All types here are frozen and picklable, because under pytest-xdist a request crosses a process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """One call that an assistant asks for: a tool's name and its arguments, by parameter name."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """One turn.  ``thinking`` and ``calls`` belong to assistants, ``name`` (the tool's) to tool results."""

    role: Role
    content: str
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()
    name: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The message in the OpenAI shape that chat templates take (``arguments`` as a mapping)."""
        data: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.thinking:
            data["reasoning_content"] = self.thinking
        if self.calls:
            data["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in self.calls
            ]
        if self.name:
            data["name"] = self.name
        return data


@dataclass(frozen=True)
class Sampling:
    """How one reply is drawn.  ``temperature`` 0 is greedy; ``max_tokens`` bounds the reply, thinking included.

    ``logprob`` asks for the reply's log-probability, which costs vLLM on a CPU a fifth of its speed.
    """

    temperature: float = 0.0
    seed: int = 0
    think: bool = False
    max_tokens: int = 512
    logprob: bool = False


@dataclass(frozen=True)
class ChatRequest:
    """What a backend is asked: the conversation so far, the tools' JSON schemas (OpenAI shape), the sampling.

    ``episode`` is ``"TASK:SEED"`` of the instance being attempted.  Engines may log it; only the scripted
    backends act on it.  ``seconds`` is how long the reply may take, for engines that can give up in time.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    sampling: Sampling
    episode: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class ChatReply:
    """What came back.

    ``calls`` is empty when the model ended its turn.  ``malformed`` says, in words meant for the model, why
    what it wrote is not a call; such a reply has no calls.  ``finish`` is ``"length"`` when ``max_tokens`` or
    the context window ended the reply, ``"time"`` when the request's seconds did while the model was writing.
    ``truncated`` means that the engine cut the *prompt*: the episode is invalid.  ``logprob`` is the sum of the
    log-probabilities (nats, temperature 1) of the sampled tokens, where it was asked for or costs nothing.
    ``evidence`` holds what the engine really saw (options, a hash of the rendered prompt), for the record.
    ``prompt_ids`` and ``completion_ids`` are the tokens themselves, from engines that give them: reinforcement
    learning trains on exactly these.
    """

    content: str
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()
    malformed: str = ""
    finish: Literal["stop", "length", "time"] = "stop"
    truncated: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprob: float | None = None
    evidence: Mapping[str, str | int | float] = field(default_factory=dict)
    prompt_ids: tuple[int, ...] = field(default=(), repr=False)
    completion_ids: tuple[int, ...] = field(default=(), repr=False)

    def message(self) -> Message:
        """The reply as the next message of the conversation."""
        return Message("assistant", self.content, thinking=self.thinking, calls=self.calls)


class EngineError(Exception):
    """The engine failed, not the model: the episode is invalid (``infra``), never scored 0."""


def first_line(error: BaseException) -> str:
    """What an error says, on one line; its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class Cancelled(Exception):
    """The session is ending: the request was abandoned, and nothing is to be recorded."""


class Backend(Protocol):
    """An engine that answers chat requests.  Thread-safe."""

    def chat(self, request: ChatRequest) -> ChatReply:
        """Answer one request.  Raises EngineError for the engine's faults, Cancelled after ``cancel``."""
        ...

    def cancel(self) -> None:
        """Make requests in flight, and later ones, raise Cancelled soon.  Callable from any thread."""
        ...

    def close(self) -> None:
        """Free the engine.  No request is in flight any more."""
        ...
