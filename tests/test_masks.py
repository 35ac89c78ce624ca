"""Masks: what training learns is exactly what a model samples, by our template and by Qwen3.5's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import byte_tokenizer, qwen3_5_template

from pytest_pocket.training import fit, recipe
from pytest_pocket.training.data import Trace
from pytest_pocket.training.fit import TrainingError

CHARACTERS = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<>|")
TEXT = st.text(CHARACTERS, max_size=12).map(str.strip)
WORD = st.text("abcdefgh_", min_size=1, max_size=6)
CALL = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    WORD,
    st.dictionaries(WORD, TEXT, max_size=2),
)
THINKING = TEXT.filter(bool)
TOOL = st.builds(lambda text: {"role": "tool", "content": text}, TEXT)


@st.composite
def traces(draw: Any) -> Trace:
    """A question, then calls and their results, then an answer; some turns are not to be learned from."""
    messages = [{"role": "user", "content": draw(THINKING)}]
    for _ in range(draw(st.integers(0, 3))):
        calls = draw(st.lists(CALL, min_size=1, max_size=2))
        said = {"role": "assistant", "content": draw(TEXT), "reasoning_content": draw(THINKING)}
        messages += [{**said, "tool_calls": calls}, *(draw(TOOL) for _ in calls)]
    messages.append({"role": "assistant", "content": draw(TEXT), "reasoning_content": draw(THINKING)})
    spoken = sum(message["role"] == "assistant" for message in messages)
    weights = draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=spoken, max_size=spoken))
    return Trace("read_value", 1, tuple(messages), tuple(weights))


def ours(message: dict[str, Any], think: bool) -> str:
    """What an assistant writes by our template, spelled out a second time."""
    calls = "".join(
        f"<tool_call><function={call['function']['name']}>"
        + "".join(
            f"<parameter={key}>\n{value}\n</parameter>"
            for key, value in call["function"]["arguments"].items()
        )
        + "</function></tool_call>"
        for call in message.get("tool_calls", ())
    )
    thinking = f"{message['reasoning_content']}</think>" if think else ""
    return thinking + message["content"] + calls + "<|im_end|>"


def qwen(message: dict[str, Any], think: bool) -> str:
    """The same by Qwen3.5's."""
    calls = [
        f"<tool_call>\n<function={call['function']['name']}>\n"
        + "".join(
            f"<parameter={key}>\n{value}\n</parameter>\n"
            for key, value in call["function"]["arguments"].items()
        )
        + "</function>\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    thinking = f"{message['reasoning_content']}\n</think>\n\n" if think else ""
    return (
        thinking
        + message["content"]
        + ("\n\n" if message["content"] and calls else "")
        + "\n".join(calls)
        + "<|im_end|>"
    )


TEMPLATES = {"ours": (byte_tokenizer(), ours), "qwen3.5": (byte_tokenizer(qwen3_5_template()), qwen)}


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=150)
@given(trace=traces(), prompt=st.sampled_from(["raw", "full", "verbose"]), think=st.booleans())
def test_the_targets_are_the_assistants_tokens_and_no_other(
    name: str, trace: Trace, prompt: str, think: bool
) -> None:
    tokenizer, written = TEMPLATES[name]
    text = fit.render(tokenizer, trace, prompt, think, everything=False)
    learned = [token for token, wanted in zip(text.ids, text.targets, strict=True) if wanted]
    turns = [message for message in trace.messages if message["role"] == "assistant"]
    wanted = [written(turn, think) for turn, weight in zip(turns, trace.weights, strict=True) if weight]
    assert tokenizer.decode(learned) == "".join(wanted)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=50)
@given(trace=traces(), prompt=st.sampled_from(["raw", "full"]), think=st.floats(0, 1))
def test_the_check_before_a_run_finds_nothing_wrong(
    name: str, trace: Trace, prompt: str, think: float
) -> None:
    fit.prove_masks(TEMPLATES[name][0], [trace], _plan(prompt, think))


def _plan(prompt: str, think: float) -> recipe.Fit:
    return recipe.Fit({prompt: 1.0}, think, 0, 0, 0, 1000, 1000, 0, 1e-4, 1)


TRACE = Trace(
    "read_value", 1, ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}), (1.0,)
)


def test_generation_markers_around_more_than_is_sampled_are_refused() -> None:
    """Those of TRL's training template for Qwen3.5 hold the empty thinking of the prompt, and the newline after."""
    from trl.chat_template_utils import get_training_chat_template

    tokenizer = byte_tokenizer(qwen3_5_template())
    tokenizer.chat_template = get_training_chat_template(tokenizer)
    with pytest.raises(TrainingError, match="not around exactly what a model samples"):
        fit.prove_masks(tokenizer, [TRACE], _plan("raw", 0.0))


def test_a_template_that_rewrites_what_was_said_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[now]{% endif %}"
    )
    with pytest.raises(TrainingError, match="writes a turn otherwise once it is over"):
        fit.prove_masks(tokenizer, [TRACE], _plan("raw", 0.0))
