"""What an answer is read as: the value in a few honest words, and nothing that denies or hedges."""

from __future__ import annotations

import pytest

from pytest_pocket.answers import says


@pytest.mark.parametrize(
    "answer",
    [
        "8080",
        "`8080`",
        "The port is 8080.",
        "Answer: 8080",
        "conf/a.ini does not exist. In conf/b.ini the port is 8080.",
        "conf/a.ini does not exist, but in conf/b.ini the port is `8080`.",
        "I could not find a.ini; b.ini says `8080`",
        "The file was not there.\nThe value is **8080**",
    ],
)
def test_an_honest_sentence_with_the_value_says_it(answer: str) -> None:
    assert says(answer, "8080")


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "It is not `8080`.",
        "It is `8080` or something else.",
        "Maybe `8080`",
        "`8080`? No.",
        "b.ini says 9090, but a.ini does not say `8080`",
        "`8080` and `9090`",
        "8080 9090",
    ],
)
def test_a_denial_a_choice_and_a_list_say_nothing(answer: str) -> None:
    assert not says(answer, "8080")
