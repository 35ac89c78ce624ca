"""Reading what a model wrote: its thinking, its answer, and its tool calls.

Engines differ in what they parse for us, and a parser that drops a call scores the parser, not the model.
So there is one here, for the two spellings that small open models use, and it never guesses: what is not
exactly a call is ``malformed``, with a reason meant for the model to read.

* JSON (Hermes, Qwen3): ``<tool_call>{"name": "Read", "arguments": {"file_path": "a"}}</tool_call>``
* XML (Qwen3-Coder, Qwen3.5):
  ``<tool_call><function=Read><parameter=file_path>VALUE</parameter></function></tool_call>``,
  with any white space between the tags, and with or without the ``<tool_call>`` around it.

The newline rule, that of Qwen's and vLLM's own parsers: one newline right after ``<parameter=KEY>`` and one
right before ``</parameter>`` are layout, and each is removed where present.  A template that always writes
both (ours and Qwen's do) therefore gives back every value exactly, those with newlines at the ends included,
if it does not contain ``</parameter>``.  Newlines around the answer and around the thinking are layout too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_pocket.chat import ToolCall

_MARK = re.compile(r"<think>|</think>|<tool_call>|<function=")
_FUNCTION = re.compile(r"<function=([^<>\n]+)>")
_PARAMETER = re.compile(r"<parameter=([^<>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_SPACE = re.compile(r"\s*")
MAX_DEPTH = 32
"""Levels of lists and objects in a call's arguments: far deeper, Python can no longer print them."""


@dataclass(frozen=True)
class Parsed:
    """A reply, taken apart.  ``malformed`` is empty or says what is wrong; then there are no calls.

    The content of a malformed reply is everything after the thinking, verbatim, so that the model can see in
    the conversation what it wrote.
    """

    content: str
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()
    malformed: str = ""


class _Malformed(Exception):
    """What is wrong with a call, in words for the model."""


def parse(text: str, *, thinking_open: bool, schemas: Sequence[Mapping[str, Any]]) -> Parsed:
    """Take a reply apart.  Never raises, whatever the text.

    ``text`` is what the model produced, without its end-of-turn token.  ``thinking_open`` says that the
    prompt ended inside a ``<think>``.  ``schemas`` are the tools offered (OpenAI shape): they give the types
    to which the values of XML calls, all text, are converted; a value that does not convert stays text.
    """
    thinking, rest, closed = _split_thinking(text, thinking_open)
    if not closed:
        call = "<tool_call>" in thinking or "<function=" in thinking
        problem = "the thinking is never closed: write </think> before calling a tool" if call else ""
        return Parsed("", thinking=thinking.strip("\n"), malformed=problem)
    try:
        content, calls = _split_calls(rest, schemas)
    except _Malformed as problem:
        return Parsed(rest, thinking=thinking.strip("\n"), malformed=str(problem))
    return Parsed(content.strip("\n"), thinking=thinking.strip("\n"), calls=tuple(calls))


def leaves_thinking_open(prompt: str) -> bool:
    """Whether a prompt ends inside of the thinking, so that the reply begins there."""
    return prompt.rfind("<think>") > prompt.rfind("</think>")


def _split_thinking(text: str, inside: bool) -> tuple[str, str, bool]:
    """(thinking, the rest, whether the thinking was closed).

    A ``</think>`` that nothing opened closes a thinking that the prompt had opened unknown to us.  Marks
    behind the start of a call belong to its values, and ``<think>`` within an answer is part of that answer.
    """
    start = 0
    if not inside:
        mark = _MARK.search(text)
        if mark is None or mark.group() in ("<tool_call>", "<function="):
            return "", text, True
        if mark.group() == "<think>":
            if text[: mark.start()].strip():
                return "", text, True
            start = mark.end()
    elif opened := re.match(r"\s*<think>", text):
        start = opened.end()
    end = text.find("</think>", start)
    if end < 0:
        return text[start:], "", False
    return text[start:end], text[end + len("</think>") :], True


def _split_calls(text: str, schemas: Sequence[Mapping[str, Any]]) -> tuple[str, list[ToolCall]]:
    """The text outside of the calls, joined, and the calls."""
    outside: list[str] = []
    calls: list[ToolCall] = []
    position = 0
    while True:
        starts = [at for tag in ("<tool_call>", "<function=") if (at := text.find(tag, position)) >= 0]
        piece = text[position : min(starts)] if starts else text[position:]
        if not calls or piece.strip():
            outside.append(piece)
        if not starts:
            break
        call, position = _read_call(text, min(starts), schemas)
        if nesting(call.arguments) > MAX_DEPTH:
            raise _Malformed(f"the arguments of {call.name} are nested more than {MAX_DEPTH} levels deep")
        calls.append(call)
    if "</tool_call>" in "".join(outside):
        raise _Malformed("</tool_call> without a <tool_call> before it")
    return "".join(outside), calls


def _read_call(text: str, start: int, schemas: Sequence[Mapping[str, Any]]) -> tuple[ToolCall, int]:
    """The call that starts there, and where the text goes on."""
    if text.startswith("<function=", start):
        return _read_xml(text, start, schemas)
    inner = _skip_space(text, start + len("<tool_call>"))
    if text.startswith("{", inner):
        call, end = _read_json(text, inner)
    elif text.startswith("<function=", inner):
        call, end = _read_xml(text, inner, schemas)
    else:
        raise _Malformed("<tool_call> must be followed by a call: the name of a tool and its arguments")
    end = _skip_space(text, end)
    if not text.startswith("</tool_call>", end):
        raise _Malformed("the call is not closed: </tool_call> is missing after it")
    return call, end + len("</tool_call>")


def _read_json(text: str, start: int) -> tuple[ToolCall, int]:
    try:
        data, end = json.JSONDecoder().raw_decode(text, start)
        arguments = data.get("arguments", data.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "it cannot be decoded")
        raise _Malformed(f"the call is not valid JSON: {reason}") from None
    name = data.get("name")
    if not isinstance(name, str) or not name:
        raise _Malformed('the call has no "name" that is a string')
    if not isinstance(arguments, dict):
        raise _Malformed('the "arguments" of the call must be a JSON object')
    return ToolCall(name, arguments), end


def _read_xml(text: str, start: int, schemas: Sequence[Mapping[str, Any]]) -> tuple[ToolCall, int]:
    opening = _FUNCTION.match(text, start)
    if opening is None:
        raise _Malformed("<function= must be followed by the name of a tool and >")
    name = opening.group(1).strip()
    types = _types(name, schemas)
    arguments: dict[str, Any] = {}
    position = _skip_space(text, opening.end())
    while parameter := _PARAMETER.match(text, position):
        key = parameter.group(1).strip()
        if key in arguments:
            raise _Malformed(f"the parameter {key} of {name} is given twice")
        arguments[key] = _convert(parameter.group(2), types.get(key, frozenset()))
        position = _skip_space(text, parameter.end())
    if text.startswith("</function>", position):
        return ToolCall(name, arguments), position + len("</function>")
    if text.startswith("<parameter=", position):
        raise _Malformed(f"a parameter of {name} is not closed: </parameter> is missing after its value")
    raise _Malformed(f"the call of {name} is not closed: </function> is missing after its parameters")


def nesting(value: object) -> int:
    """The levels of nesting, counted without recursion."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return depth


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _types(name: str, schemas: Sequence[Mapping[str, Any]]) -> dict[str, frozenset[str]]:
    """The JSON types that each parameter of a tool may have; none where the schema does not say."""
    for schema in schemas:
        function = schema.get("function", schema)
        if function.get("name") == name:
            properties = function.get("parameters", {}).get("properties", {})
            return {key: _allowed(value) for key, value in properties.items()}
    return {}


def _allowed(schema: Mapping[str, Any]) -> frozenset[str]:
    options = schema.get("anyOf", schema.get("oneOf"))
    if options:
        return frozenset().union(*map(_allowed, options))
    declared = schema.get("type", ())
    return frozenset((declared,) if isinstance(declared, str) else declared)


def _convert(text: str, types: frozenset[str]) -> Any:
    """The value as one of the types; the text itself when it may be text, or is none of them."""
    if not types or "string" in types:
        return text
    literal = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text)
    try:
        value = json.loads(literal)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, float) and "integer" in types and "number" not in types and value.is_integer():
        return int(value)
    return value if _type_names(value) & types else text


def _type_names(value: Any) -> frozenset[str]:
    if value is None:
        return frozenset({"null"})
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int):
        return frozenset({"integer", "number"})
    if isinstance(value, float):
        return frozenset({"number"})
    if isinstance(value, str):
        return frozenset({"string"})
    return frozenset({"array" if isinstance(value, list) else "object"})
