"""The tripwire: it never trips over a prompt that was read whole, and trips when a message is gone."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from hypothesis import given
from hypothesis import strategies as st

from pytest_pocket.backends.reference import Reference
from pytest_pocket.backends.tripwire import LAYOUT, Tripwire
from pytest_pocket.chat import ChatRequest, Message, Sampling
from pytest_pocket.registry import shipped
from pytest_pocket.tools import SCHEMAS

texts = st.text(st.sampled_from("ab \n日7.<>"), max_size=40)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), texts), min_size=1, max_size=8)
REFERENCE = Reference(str(shipped() / "rlvr-v1"))


def request(said: list[tuple[str, str]]) -> ChatRequest:
    messages = tuple(Message(role, text) for role, text in said)  # type: ignore[arg-type]
    return ChatRequest(messages, SCHEMAS, Sampling())


@given(turns)
def test_a_prompt_that_was_read_whole_is_never_cut_with_or_without_a_tokenizer(
    said: list[tuple[str, str]],
) -> None:
    exact, bounds = Tripwire(REFERENCE), Tripwire(None)
    for length in range(1, len(said) + 1):
        asked = request(said[:length])
        ids = REFERENCE.ids(asked)
        for wire in (exact, bounds):
            evidence: dict[str, str | int | float] = {}
            assert not wire.cut(asked, len(ids), wire.own(asked), evidence, ids)
            assert evidence


@given(turns)
def test_with_a_tokenizer_a_single_missing_token_is_seen(said: list[tuple[str, str]]) -> None:
    asked = request(said)
    ids = REFERENCE.ids(asked)
    evidence: dict[str, str | int | float] = {}
    assert Tripwire(REFERENCE).cut(asked, len(ids) - 1, ids, evidence, ids[1:])
    assert evidence["prompt_is_reference"] == 0


def test_without_one_a_conversation_that_shrinks_is_seen() -> None:
    wire = Tripwire(None)
    said = [("user", "look"), ("assistant", "I look."), ("tool", "word " * 300)]
    whole = len(REFERENCE.ids(request(said)))
    assert not wire.cut(request(said), whole, None, {})
    more = [*said, ("assistant", "done"), ("user", "again")]
    assert wire.cut(request(more), whole - LAYOUT - 1, None, {})
    assert not wire.cut(request(more), whole + 4, None, {})


def test_thinking_that_a_template_drops_is_no_cut() -> None:
    wire = Tripwire(None)
    asked = request([("user", "look")])
    assert not wire.cut(asked, 900, None, {})
    thought = (*asked.messages, Message("assistant", "x", thinking="long " * 500), Message("user", "go on"))
    assert not wire.cut(ChatRequest(thought, SCHEMAS, Sampling()), 500, None, {})
