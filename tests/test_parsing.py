"""Reading replies: what the template writes comes back exactly, and nothing makes the parser raise."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TEMPLATE

from pytest_pocket.chat import Message, ToolCall
from pytest_pocket.parsing import Parsed, parse

TYPES = {
    "text": "string",
    "count": "integer",
    "ratio": "number",
    "flag": "boolean",
    "items": "array",
    "table": "object",
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "Use",
        "description": "A tool with a parameter of every type.",
        "parameters": {
            "type": "object",
            "properties": {
                **{key: {"type": kind} for key, kind in TYPES.items()},
                "either": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                "loose": {},
            },
            "required": ["text"],
        },
    },
}
TOOLS: list[Any] = [TOOL]

text = st.text(st.characters(exclude_categories=["Cs"])) | st.text('<>/\n =tx{}"', max_size=30)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
values = {
    "string": text,
    "integer": st.integers(),
    "number": st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
    "boolean": st.booleans(),
    "array": st.lists(json_values, max_size=3),
    "object": st.dictionaries(text, json_values, max_size=3),
}
arguments = st.fixed_dictionaries({}, optional={key: values[kind] for key, kind in TYPES.items()})
calls = st.builds(
    ToolCall,
    st.sampled_from(["Use", "Other_tool-2"]),
    arguments.filter(lambda given: "</parameter>" not in json.dumps(given, ensure_ascii=False)),
)
# In an answer these would be the parts of a reply themselves.
plain = text.filter(lambda value: not any(tag in value for tag in ("think>", "tool_call>", "<function=")))


def as_text(call: ToolCall) -> ToolCall:
    """The call of a tool that offers no types: everything but text arrives as JSON."""
    spelled = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in call.arguments.items()
    }
    return ToolCall(call.name, spelled)


def render(messages: list[Message], *, think: bool, prompt: bool = False, marks: bool = False) -> Any:
    """The text that the tiny family's template makes, and with ``marks`` the spans that the model writes."""
    from transformers.utils.chat_template_utils import render_jinja_template

    made: Any = render_jinja_template(
        conversations=[[message.to_dict() for message in messages]],
        tools=TOOLS,
        chat_template=TEMPLATE.read_text(),
        add_generation_prompt=prompt,
        enable_thinking=think,
        return_assistant_tokens_mask=marks,
    )
    rendered, spans = made
    return [rendered[0][start:end] for start, end in spans[0]] if marks else rendered[0]


@given(st.text() | text, st.booleans())
def test_no_text_makes_it_raise(reply: str, thinking_open: bool) -> None:
    parsed = parse(reply, thinking_open=thinking_open, schemas=TOOLS)
    assert not (parsed.calls and parsed.malformed)


PIECES = st.sampled_from(
    [
        *(
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            "<function=",
            "<function=Use>",
            "</function>",
        ),
        *("<parameter=", "<parameter=count>", "</parameter>", '{"name": "Use", "arguments": {', "}}"),
        *("\n", "7", "x"),
    ]
)


@given(st.lists(PIECES, max_size=14).map("".join), st.booleans())
def test_no_jumble_of_tags_makes_it_raise(reply: str, thinking_open: bool) -> None:
    parsed = parse(reply, thinking_open=thinking_open, schemas=TOOLS)
    assert not (parsed.calls and parsed.malformed)


@pytest.mark.parametrize("nest", ["[", '{"a":'])
def test_deep_nesting_is_malformed_and_does_not_raise(nest: str) -> None:
    reply = '<tool_call>{"name": "Use", "arguments": ' + nest * 100_000
    assert parse(reply, thinking_open=False, schemas=TOOLS).malformed


def test_arguments_too_deep_to_print_are_malformed() -> None:
    deep = '{"a": ' * 33 + "1" + "}" * 33
    reply = f'<tool_call>{{"name": "Use", "arguments": {deep}}}</tool_call>'
    assert "nested" in parse(reply, thinking_open=False, schemas=TOOLS).malformed
    shallow = f'<tool_call>{{"name": "Use", "arguments": {deep[6:-1]}}}</tool_call>'
    assert parse(shallow, thinking_open=False, schemas=TOOLS).calls


@given(plain, plain, st.lists(calls, max_size=3), st.booleans())
def test_what_the_template_writes_is_read_back(
    thought: str, answer: str, made: list[ToolCall], think: bool
) -> None:
    message = Message("assistant", answer, thinking=thought if think else "", calls=tuple(made))
    (reply,) = render([Message("user", "Go."), message], think=think, marks=True)
    parsed = parse(reply.removesuffix("<|im_end|>"), thinking_open=think, schemas=TOOLS)
    assert parsed.malformed == ""
    assert parsed.content == answer.strip("\n")
    assert parsed.thinking == message.thinking.strip("\n")
    assert parsed.calls == tuple(call if call.name == "Use" else as_text(call) for call in made)


@given(st.lists(calls, min_size=1, max_size=3), st.sampled_from(["", "\n", "\n\n  "]))
def test_json_calls_are_read_back(made: list[ToolCall], space: str) -> None:
    spelled = [json.dumps({"name": call.name, "arguments": dict(call.arguments)}) for call in made]
    reply = "".join(f"<tool_call>{space}{one}{space}</tool_call>{space}" for one in spelled)
    assert parse(reply, thinking_open=False, schemas=TOOLS) == Parsed("", calls=tuple(made))


turns = st.lists(
    st.tuples(st.lists(calls, max_size=2), plain, plain).map(
        lambda turn: [
            Message("assistant", turn[1], calls=tuple(turn[0])),
            *(Message("tool", turn[2], name=call.name) for call in turn[0]),
            *(() if turn[0] else (Message("user", turn[2]),)),
        ]
    ),
    max_size=3,
).map(lambda groups: [message for group in groups for message in group])


@given(turns, st.booleans(), st.booleans(), text)
def test_every_prompt_is_a_prefix_of_what_follows(
    history: list[Message], think: bool, system: bool, thought: str
) -> None:
    opening = [Message("system", "Be brief.")] if system else []
    if think:
        history = [
            Message(turn.role, turn.content, thinking=thought, calls=turn.calls, name=turn.name)
            if turn.role == "assistant"
            else turn
            for turn in history
        ]
    conversation = [*opening, Message("user", "Go."), *history]
    whole = render(conversation, think=think)
    for length in range(len(opening) + 1, len(conversation) + 1):
        assert whole.startswith(render(conversation[:length], think=think))
        if conversation[length:] and conversation[length].role == "assistant":
            prompt = render(conversation[:length], think=think, prompt=True)
            assert whole.startswith(prompt)
            spoken = render(conversation[: length + 1], think=think).removeprefix(prompt).removesuffix("\n")
            assert render(conversation[: length + 1], think=think, marks=True)[-1] == spoken


def test_the_template_shows_tools_as_signatures() -> None:
    system = render([Message("user", "Go.")], think=False).split("<|im_end|>")[0]
    assert system == (
        "<|im_start|>system\n<tools>Use(text, count?, ratio?, flag?, items?, table?, either?, loose?)</tools>"
    )


def xml(*parameters: tuple[str, str], name: str = "Use") -> str:
    inside = "".join(f"<parameter={key}>{value}</parameter>" for key, value in parameters)
    return f"<tool_call><function={name}>{inside}</function></tool_call>"


@pytest.mark.parametrize(
    ("key", "spelled", "value"),
    [
        ("text", "7", "7"),
        ("count", "7", 7),
        ("count", "\n 7 \n", 7),
        ("count", "7.0", 7),
        ("count", "7.5", "7.5"),
        ("count", "true", "true"),
        ("count", "seven", "seven"),
        ("count", "9" * 5000, "9" * 5000),
        ("ratio", "7", 7),
        ("ratio", "0.5", 0.5),
        ("flag", "true", True),
        ("flag", "True", True),
        ("flag", "1", "1"),
        ("items", "[1, 2]", [1, 2]),
        ("items", "{}", "{}"),
        ("table", '{"a": null}', {"a": None}),
        ("either", "None", None),
        ("either", "3", 3),
        ("loose", "3", "3"),
        ("unknown", "3", "3"),
    ],
)
def test_xml_values_get_the_type_that_the_schema_says(key: str, spelled: str, value: object) -> None:
    (call,) = parse(xml((key, spelled)), thinking_open=False, schemas=TOOLS).calls
    assert call.arguments == {key: value}
    assert type(call.arguments[key]) is type(value)


@pytest.mark.parametrize(
    ("spelled", "value"),
    [("a", "a"), ("\na\n", "a"), ("\n\na\n\n", "\na\n"), ("\n", ""), ("\n\n", ""), ("a\nb", "a\nb")],
)
def test_one_newline_on_each_side_of_a_value_is_layout(spelled: str, value: str) -> None:
    (call,) = parse(xml(("text", spelled)), thinking_open=False, schemas=TOOLS).calls
    assert call.arguments == {"text": value}


def test_qwens_own_spelling_is_read() -> None:
    reply = (
        "<think>\nLook first.\n</think>\n\nI look.\n\n<tool_call>\n<function=Use>\n<parameter=text>\na\nb\n"
        "</parameter>\n<parameter=count>\n3\n</parameter>\n</function>\n</tool_call>\n"
    )
    assert parse(reply, thinking_open=False, schemas=TOOLS) == Parsed(
        "I look.", thinking="Look first.", calls=(ToolCall("Use", {"text": "a\nb", "count": 3}),)
    )


def test_a_call_without_the_tool_call_tag_is_read() -> None:
    reply = "<function=Use><parameter=text>a</parameter></function>"
    assert parse(reply, thinking_open=False, schemas=TOOLS).calls == (ToolCall("Use", {"text": "a"}),)


def test_text_around_calls_is_kept() -> None:
    parsed = parse("before" + xml(("text", "a")) + "after", thinking_open=False, schemas=TOOLS)
    assert (parsed.content, len(parsed.calls)) == ("beforeafter", 1)


@pytest.mark.parametrize(
    ("reply", "thinking_open", "thinking", "content"),
    [
        ("<think>a</think>b", False, "a", "b"),
        ("a</think>b", True, "a", "b"),
        ("a</think>b", False, "a", "b"),
        ("<think>a</think>b", True, "a", "b"),
        ("<think>a", False, "a", ""),
        ("a", True, "a", ""),
        ("the tag <think> opens it", False, "", "the tag <think> opens it"),
    ],
)
def test_thinking_is_kept_apart(reply: str, thinking_open: bool, thinking: str, content: str) -> None:
    assert parse(reply, thinking_open=thinking_open, schemas=TOOLS) == Parsed(content, thinking=thinking)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("<tool_call>", "must be followed by a call"),
        ("<tool_call>hello</tool_call>", "must be followed by a call"),
        ('<tool_call>{"name": "Use", "arguments": {}}', "</tool_call> is missing"),
        ('<tool_call>{"name": "Use", "arguments": {"text": "a}}</tool_call>', "not valid JSON"),
        ('<tool_call>{"arguments": {}}</tool_call>', '"name"'),
        ('<tool_call>{"name": "Use", "arguments": [1]}</tool_call>', "must be a JSON object"),
        ("<tool_call><function=Use>", "</function> is missing"),
        ("<tool_call><function=Use", "name of a tool"),
        ("<tool_call><function=Use><parameter=text>a</function></tool_call>", "</parameter> is missing"),
        ("<tool_call><function=Use></function>", "</tool_call> is missing"),
        ("<function=Use></function></tool_call>", "</tool_call> without"),
        (xml(("text", "a"), ("text", "b")), "given twice"),
        (xml(("text", "a")) + "<tool_call>", "must be followed by a call"),
    ],
)
def test_a_broken_call_is_malformed_and_keeps_what_was_written(reply: str, reason: str) -> None:
    parsed = parse(reply, thinking_open=False, schemas=TOOLS)
    assert reason in parsed.malformed
    assert parsed.calls == ()
    assert parsed.content == reply


def test_a_call_inside_a_thinking_that_never_ends_is_malformed() -> None:
    parsed = parse("I call " + xml(("text", "a")), thinking_open=True, schemas=TOOLS)
    assert "</think>" in parsed.malformed
    assert parsed.calls == ()
