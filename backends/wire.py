"""Conversations on the wire: our messages in the shape that servers take, and their answers as ours.

Engines parse calls themselves, and each drops or mangles some.  What an engine has read is taken as it is; where
it read nothing, our own parser looks at the text, so that a call which the engine dropped is still the
model's, and a malformed one is told from an answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pytest_pocket.chat import Message, ToolCall
from pytest_pocket.parsing import MAX_DEPTH, Parsed, nesting, parse


@dataclass(frozen=True)
class Said:
    """What a server says that the model said.  Each call is its name, and its arguments as JSON or as values."""

    content: str
    thinking: str = ""
    calls: tuple[tuple[str, str | Mapping[str, Any]], ...] = ()


def openai_messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """The conversation as OpenAI-compatible servers take it: calls numbered, arguments as JSON text."""
    made: list[dict[str, Any]] = []
    numbered = 0
    unanswered: list[str] = []
    for message in messages:
        data = message.to_dict()
        if message.calls:
            unanswered = []
            for call in data["tool_calls"]:
                numbered += 1
                call["id"] = f"call_{numbered:06d}"
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                unanswered.append(call["id"])
        elif message.role == "tool" and unanswered:
            data["tool_call_id"] = unanswered.pop(0)
        if message.thinking:
            data["reasoning"] = message.thinking  # vLLM's newer name; each server ignores the other
        made.append(data)
    return made


def ollama_messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """The conversation as Ollama's own interface takes it: arguments as values, a tool's name as ``tool_name``."""
    made = []
    for message in messages:
        data: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.thinking:
            data["thinking"] = message.thinking
        if message.calls:
            data["tool_calls"] = [
                {"function": {"name": call.name, "arguments": dict(call.arguments)}} for call in message.calls
            ]
        if message.name:
            data["tool_name"] = message.name
        made.append(data)
    return made


def read(said: Said, tools: Sequence[Mapping[str, Any]], *, thinking_open: bool = False) -> Parsed:
    """The reply.  ``thinking_open`` says that its text begins inside of the thinking."""
    if not said.calls:
        parsed = parse(said.content, thinking_open=thinking_open, schemas=tools)
        return replace(parsed, thinking=said.thinking.strip("\n") or parsed.thinking)
    thinking = said.thinking.strip("\n")
    calls = []
    for name, given in said.calls:
        try:
            arguments = json.loads(given or "{}") if isinstance(given, str) else given
        except (ValueError, RecursionError) as error:
            arguments, problem = None, f"the arguments of {name} are not JSON: {error}"
        else:
            problem = f"the arguments of {name} are no object"
        if not isinstance(arguments, Mapping):
            return Parsed(said.content, thinking, malformed=problem)
        if nesting(arguments) > MAX_DEPTH:
            problem = f"the arguments of {name} are nested more than {MAX_DEPTH} levels deep"
            return Parsed(said.content, thinking, malformed=problem)
        calls.append(ToolCall(name, dict(arguments)))
    return Parsed(said.content.strip("\n"), thinking, tuple(calls))
