"""Comparisons: what pairs with what, what is refused, and when models share a rank."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_pocket import comparison

TASKS = [f"task{number}" for number in range(19)]


def rows(model: str, rewards: float | dict[str, float], **changes: Any) -> list[dict[str, Any]]:
    """Two instances of each of 19 tasks, all with that reward, or with one by task."""
    return [
        {
            "model": model,
            "prompt": "raw",
            "think": "off",
            "temperature": 0.0,
            "best_of": 1,
            "task": task,
            "seed": seed,
            "sample": 0,
            "outcome": "wrong",
            "reward": rewards if isinstance(rewards, float) else rewards[task],
            **changes,
        }
        for task in TASKS
        for seed in (10, 11)
    ]


def test_only_what_differs_in_one_thing_is_compared() -> None:
    cells = [
        (model, prompt, think)
        for model in ("a", "b")
        for prompt, think in (("raw", "off"), ("full", "off"), ("raw", "on"))
    ]
    every = [row for model, prompt, think in cells for row in rows(model, 0.5, prompt=prompt, think=think)]
    found = comparison.pairings(every)
    assert sorted((pair.what, pair.first, pair.second) for pair in found) == [
        ("model", "a", "b"),
        ("model", "a", "b"),
        ("model", "a", "b"),
        ("prompt", "raw", "full"),
        ("prompt", "raw", "full"),
        ("think", "off", "on"),
        ("think", "off", "on"),
    ]
    assert not any(pair.separated for pair in found)


def test_a_supported_difference_is_separated_after_correction() -> None:
    (pair,) = comparison.pairings([*rows("a", 0.25), *rows("b", 0.75)])
    assert pair.separated
    assert pair.result.difference.value == pytest.approx(0.5)
    assert pair.result.pairs == 38


def test_pairs_with_an_invalid_side_are_dropped_and_bounded() -> None:
    first, second = rows("a", 0.5), rows("b", 0.5)
    for row in second[:4]:
        row["outcome"], row["reward"] = "infra", 0.0
    (pair,) = comparison.pairings([*first, *second])
    assert pair.dropped == 4
    assert pair.result.pairs == 34
    assert pair.result.difference.value == 0
    # Two of 19 tasks at 0 or 1 against 0.5.
    assert pair.bounds == pytest.approx((-1 / 19, 1 / 19))


def test_runs_without_a_common_instance_are_refused() -> None:
    other = [{**row, "seed": row["seed"] + 100} for row in rows("b", 0.5)]
    with pytest.raises(comparison.ComparisonError, match="same split, seed and tasks"):
        comparison.pairings([*rows("a", 0.5), *other])


def test_a_run_is_told_apart_only_where_another_holds_the_same() -> None:
    same = comparison.together({"old": rows("a", 0.2), "new": [*rows("a", 0.9), *rows("b", 0.9)]})
    found = {(pair.what, pair.first, pair.second) for pair in comparison.pairings(same)}
    assert found == {("run_directory", "old", "new"), ("model", "a", "b")}
    assert {row["run_directory"] for row in same if row["model"] == "b"} == {""}


def test_models_that_cannot_be_told_apart_share_a_rank() -> None:
    noisy = {task: 0.9 if index % 2 else 0.7 for index, task in enumerate(TASKS)}
    other = {task: 0.7 if index % 2 else 0.9 for index, task in enumerate(TASKS)}
    lines = {"a": rows("a", noisy), "b": rows("b", other), "c": rows("c", 0.1)}
    assert comparison.ranks(lines) == {"a": 1, "b": 1, "c": 3}


def test_too_many_invalid_episodes_make_no_ranking() -> None:
    broken = rows("b", 0.9)
    broken[0]["outcome"] = "infra"
    assert comparison.ranks({"a": rows("a", 0.1), "b": broken}) == {"a": None, "b": None}
