"""Conditions: what may be asked, and how it is named."""

from __future__ import annotations

import pytest

from pytest_pocket.conditions import SYSTEM_PROMPTS, Condition, ConditionError, grid


def test_the_headline_conditions_in_the_order_given() -> None:
    conditions = grid(["raw", "full"], ["off"], ["0"], ["1"])
    assert conditions == [Condition("raw"), Condition("full")]
    assert [condition.slug for condition in conditions] == ["raw-think_off-t0", "full-think_off-t0"]


def test_values_multiply_and_repeats_count_once() -> None:
    assert len(grid(["raw", "full", "raw"], ["off", "on"], ["0.5", "0.70", "0.7"], ["1", "4"])) == 16


def test_a_slug_names_every_part() -> None:
    assert Condition("verbose", True, 0.7, 4).slug == "verbose-think_on-t0.7-bo4"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((["loud"], ["off"], ["0"], ["1"]), "unknown prompt 'loud': choose from raw, full, verbose"),
        ((["raw"], ["maybe"], ["0"], ["1"]), "unknown think value 'maybe': choose from off, on"),
        ((["raw"], ["off"], ["warm"], ["1"]), "temperature 'warm' is no number"),
        ((["raw"], ["off"], ["nan"], ["1"]), "nan is not in"),
        ((["raw"], ["off"], ["-1"], ["1"]), "-1 is not in"),
        ((["raw"], ["off"], ["0.5"], ["0"]), "best-of 0 is not at least 1"),
        ((["raw"], ["off"], ["0.5"], ["1.5"]), "best-of '1.5' is no whole number"),
        ((["raw"], ["off"], ["0"], ["4"]), "set --pocket-temperature above 0"),
    ],
)
def test_a_bad_value_is_one_clear_line(values: tuple[list[str], ...], said: str) -> None:
    with pytest.raises(ConditionError) as caught:
        grid(*values)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_raw_has_no_system_message_and_the_others_have_theirs() -> None:
    assert [message.role for message in Condition("raw").messages("do it")] == ["user"]
    for prompt in ("full", "verbose"):
        system, user = Condition(prompt).messages("do it")
        assert (system.role, system.content) == ("system", SYSTEM_PROMPTS[prompt])
        assert (user.role, user.content) == ("user", "do it")
