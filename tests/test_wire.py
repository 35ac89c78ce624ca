"""Conversations on the wire: what a server is told can be read back."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pytest_pocket.backends.wire import Said, ollama_messages, openai_messages, read
from pytest_pocket.chat import Message, ToolCall
from pytest_pocket.tools import SCHEMAS

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
calls = st.builds(ToolCall, st.sampled_from(["Read", "Bash"]), st.dictionaries(st.text(max_size=5), values))
conversations = st.lists(st.lists(calls, max_size=3), max_size=4)


def spoken(turns: list[list[ToolCall]]) -> list[Message]:
    messages = [Message("user", "go")]
    for made in turns:
        messages.append(Message("assistant", "", calls=tuple(made)))
        messages += [Message("tool", call.name, name=call.name) for call in made]
    return messages


@given(conversations)
def test_each_result_names_the_call_it_answers(turns: list[list[ToolCall]]) -> None:
    sent = openai_messages(spoken(turns))
    asked: list[Any] = []
    for message in sent:
        asked += [(call["id"], call["function"]["name"]) for call in message.get("tool_calls", ())]
        if message["role"] == "tool":
            assert (message["tool_call_id"], message["content"]) == asked.pop(0)
    assert not asked


@given(conversations)
def test_arguments_arrive_as_they_were(turns: list[list[ToolCall]]) -> None:
    wanted = [(call.name, call.arguments) for made in turns for call in made]
    sent = [call for message in openai_messages(spoken(turns)) for call in message.get("tool_calls", ())]
    assert [(each["function"]["name"], json.loads(each["function"]["arguments"])) for each in sent] == wanted
    native = [call for message in ollama_messages(spoken(turns)) for call in message.get("tool_calls", ())]
    assert [(each["function"]["name"], each["function"]["arguments"]) for each in native] == wanted


@given(st.lists(calls, min_size=1, max_size=3), st.booleans())
def test_calls_that_an_engine_has_read_come_back(made: list[ToolCall], as_text: bool) -> None:
    given = tuple((call.name, json.dumps(call.arguments) if as_text else call.arguments) for call in made)
    parsed = read(Said("\n", " hm\n", given), SCHEMAS)
    assert (parsed.calls, parsed.content, parsed.thinking, parsed.malformed) == (tuple(made), "", " hm", "")


@given(st.text(), st.text())
def test_broken_arguments_are_told_and_never_raise(text: str, name: str) -> None:
    parsed = read(Said("", calls=((name, text),)), SCHEMAS)
    assert bool(parsed.malformed) != bool(parsed.calls)


def test_arguments_that_are_nested_too_deep_are_malformed() -> None:
    for text in ('{"a":' * 50 + "1" + "}" * 50, "[" * 100_000):
        assert read(Said("", calls=(("Read", text),)), SCHEMAS).malformed
