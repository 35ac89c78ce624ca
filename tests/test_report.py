"""The table: what it says, what it refuses to say, and that no name can break it."""

from __future__ import annotations

import random
import re
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_pocket import report


def row(**changes: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "backend": "hf",
        "task": "read_value",
        "group": "read",
        "prompt": "raw",
        "think": "off",
        "temperature": 0.0,
        "best_of": 1,
        "run": 1,
        "sample": 0,
        "seed": changes.get("run", 1),
        "reward": 1.0,
        "outcome": "passed",
        "stop": "answer",
        "turns": 3,
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "seconds": 0.5,
        **changes,
    }


def failed(reward: float = 0.0, **changes: Any) -> dict[str, Any]:
    return row(reward=reward, outcome="wrong", **changes)


def test_reward_pass_rate_and_gap_by_prompt() -> None:
    rows = [
        row(task="a"), failed(0.5, task="b"), failed(0.0, task="c"),
        row(task="a", prompt="full"), row(task="b", prompt="full"), failed(0.5, task="c", prompt="full"),
    ]  # fmt: skip
    lines = report.render(rows, 100).splitlines()
    reward, passed = (next(line for line in lines if f"  {name}  " in line) for name in ("reward", "pass@1"))
    # Task means 1, 0.5, 0: sd 0.5, t(0.975, 2) = 4.303, cut to [0, 1].
    assert re.findall(r"[+-]?\d\.\d{3}", reward) == ["0.500", "0.500", "0.833", "0.717", "+0.333", "0.717"]
    assert re.findall(r"[+-]?\d\.\d{3}", passed)[::2] == ["0.333", "0.667", "+0.333"]


def test_invalid_episodes_are_counted_and_in_no_mean() -> None:
    rows = [row(task="a"), row(task="b"), row(task="c", outcome="infra", reward=0.0)]
    text = report.render(rows, 100)
    assert "1.000" in text
    assert "0.667" not in text
    assert "1 of 3 episodes (33.3%) are invalid and in no mean; the models are not ranked." in text


def test_few_invalid_episodes_do_not_forbid_a_ranking() -> None:
    rows = [row(task=f"t{number}") for number in range(99)] + [row(outcome="truncated")]
    text = report.render(rows, 100)
    assert "1 of 100 episodes (1.0%) are invalid" in text
    assert "not ranked" not in text


def test_all_invalid_shows_no_number() -> None:
    text = report.render([row(outcome="infra", reward=0.0)], 100)
    assert re.search(r"reward +-", text)


def test_a_pair_with_an_invalid_side_is_not_in_the_gap() -> None:
    rows = [
        row(task="a"), failed(task="b"),
        row(task="a", prompt="full", outcome="infra"), row(task="b", prompt="full"),
    ]  # fmt: skip
    assert "+1.000" in report.render(rows, 100)


def test_models_keep_their_order_and_conditions_are_sorted() -> None:
    rows = [
        row(model="zeta", temperature=0.7, think="on"),
        row(model="alpha"),
        row(model="zeta", temperature=0.0),
    ]
    text = report.render(rows, 100)
    table = text.split("how the episodes ended")[0]
    assert re.findall(r"^(zeta|alpha|think t0\.7|no-think t0)\b", table, re.MULTILINE) == [
        "zeta", "no-think t0", "zeta", "think t0.7", "alpha", "no-think t0",
    ]  # fmt: skip


def test_the_order_of_rows_does_not_change_the_numbers() -> None:
    rows = [failed(n / 40, task=f"t{n % 5}", run=n, prompt=p) for n in range(40) for p in ("raw", "full")]
    shuffled = rows[2:]
    random.Random(1).shuffle(shuffled)
    assert report.render(rows, 100) == report.render([*rows[:2], *shuffled], 100)


def test_the_ledger_counts_outcomes_by_prompt() -> None:
    rows = [
        row(),
        row(outcome="looping"),
        row(outcome="looping", prompt="full"),
        row(outcome="limit", prompt="full"),
    ]
    ledger = report.render(rows, 100).split("how the episodes ended")[1].splitlines()
    assert ledger[1].split() == ["model", "prompt", "passed", "wrong", "looping", "limit"]
    assert ledger[3].split()[-5:] == ["raw", "1", "0", "1", "0"]
    assert ledger[4].split()[-5:] == ["full", "0", "0", "1", "1"]


def test_one_task_gets_no_interval() -> None:
    text = report.render([row(), failed(run=2)], 100)
    assert "0.500" in text
    assert "0.500 ±" not in text


def test_tasks_by_group_then_seen_and_unseen_kinds() -> None:
    rows = [
        row(task="z", group="read", unseen=""), failed(task="b", group="stop", unseen="layout"),
        failed(0.5, task="mine", group="custom", unseen=""),
    ]  # fmt: skip
    words = [line.split() for line in report.tasks(rows, 100).splitlines()]
    assert [line[:2] for line in words[-5:]] == [
        ["read", "z"], ["stop", "b"], ["custom", "mine"], ["all", "seen"], ["all", "unseen"],
    ]  # fmt: skip
    assert words[-2][3] == "0.750"
    assert words[-1][3] == "0.000"


def test_a_task_has_its_pass_rate_and_wilson_interval() -> None:
    rows = [row(run=n) if n < 3 else failed(0.5, run=n) for n in range(4)]
    # 3 of 4, by Wilson's formula: centre (3 + z^2/2) / (4 + z^2), z = 1.96.
    assert report.tasks(rows, 100).splitlines()[-1].endswith("0.75 (0.30 to 0.95)")
    assert report.tasks_markdown(rows).splitlines()[-1] == "| read | read\\_value | 0.75 (0.30 to 0.95) |"


def test_samples_of_one_instance_get_no_wilson_interval() -> None:
    rows = [row(sample=0), failed(sample=1)]
    assert report.tasks(rows, 100).splitlines()[-1].endswith(" 0.50")


def test_samples_give_pass_at_k_and_pass_hat_k_with_their_gap() -> None:
    rows = [
        make(task=task, sample=sample, prompt=prompt)
        for task in "abc"
        for prompt in ("raw", "full")
        for sample, make in enumerate([row, row if prompt == "full" else failed])
    ]
    lines = report.render(rows, 100).splitlines()
    shown = {
        name: re.findall(r"[+-]?\d\.\d{3}", line)[::2]
        for line in lines
        for name in ("pass@1", "pass@2", "pass^2")
        if f"  {name}  " in line
    }
    assert shown == {
        "pass@1": ["0.500", "1.000", "+0.500"],
        "pass@2": ["1.000", "1.000", "+0.000"],
        "pass^2": ["0.000", "1.000", "+1.000"],
    }


def test_an_instance_that_lost_a_sample_is_not_in_pass_at_k() -> None:
    rows = [row(sample=0), row(sample=1), failed(sample=0, run=2), row(sample=1, run=2, outcome="infra")]
    assert re.search(r"pass\^2 +1\.000", report.render(rows, 100))


def test_the_smallest_difference_stands_under_every_table() -> None:
    def found(rows: list[dict[str, Any]]) -> list[str]:
        return re.findall(r"Smallest (.+?) in\s+reward", report.render(rows, 200))

    one = [make(task=task, prompt="raw") for task, make in zip("abcd", [row, row, failed, row], strict=True)]
    other = [{**each, "model": "other", "reward": 0.5 * (n % 2)} for n, each in enumerate(one)]
    full = [failed(task=task, prompt="full") for task in "abcd"]
    assert found(one) == ["difference from a fixed value"]
    assert found(one + other) == ["difference between two lines"]
    assert found(one + full) == ["full - raw difference"]
    assert found(one + full + other) == ["full - raw difference", "difference between two lines"]


def test_no_rows_is_a_line() -> None:
    assert report.render([], 80) == report.tasks([], 80) == report.markdown([]) == "no episodes\n"


def test_no_colour_codes_even_when_colour_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    assert "\x1b" not in report.render([row()], 80)


def test_ascii_only_is_ascii() -> None:
    text = report.render(
        [row(model="modèle", task="a"), failed(model="modèle", task="b")], 80, ascii_only=True
    )
    assert text.isascii()
    assert "mod?le" in text


def test_the_usual_table_fits_80_columns() -> None:
    rows = [
        failed(0.1 * n % 1, model="rlvr-v1", task=f"t{n}", prompt=p, run=r)
        for n in range(19) for p in ("raw", "full") for r in (1, 2, 3)
    ]  # fmt: skip
    assert max(map(len, report.render(rows, 80).splitlines())) <= 80


def hostile() -> st.SearchStrategy[str]:
    bits = [
        "[red]",
        "[/]",
        "\x1b[31m",
        "\n",
        "\r",
        "|",
        "<script>",
        "\u202e",
        "\ud800",
        "\0",
        "名前",
        "e\u0301",
        "\u2028",
    ]
    return st.lists(st.sampled_from(bits) | st.text(max_size=4), min_size=1, max_size=6).map("".join)


@settings(max_examples=40)
@given(model=hostile(), task=hostile(), prompt=hostile(), group=hostile())
def test_no_name_can_style_or_break_a_line(model: str, task: str, prompt: str, group: str) -> None:
    names = {"model": model, "task": task, "prompt": prompt, "group": group}
    plain = {"model": "m", "task": "t", "prompt": "p", "group": "g"}
    for render in (
        lambda rows: report.render(rows, 80), lambda rows: report.tasks(rows, 80), report.markdown,
    ):  # fmt: skip
        text, expected = render([row(**names)]), render([row(**plain)])
        assert text.count("\n") == expected.count("\n")
        assert not [char for char in text if unicodedata.category(char)[0] == "C" and char != "\n"]
        text.encode()


def test_markdown_escapes_names() -> None:
    text = report.markdown([row(model="a|b<img>*c*")])
    assert r"a\|b&lt;img&gt;\*c\*<br>" in text


def test_rows_of_records_are_the_chosen_with_the_cost_of_all_candidates() -> None:
    record = row(
        think=True, best_of=2, temperature=0.7, unseen=["layout"], candidate=0, chosen=False,
        replies=[{"prompt_tokens": 10, "completion_tokens": 5}],
    )  # fmt: skip
    (found,) = report.rows([record, {**record, "candidate": 1, "chosen": True}])
    assert (found["prompt_tokens"], found["completion_tokens"], found["seconds"]) == (20, 10, 1.0)
    assert (found["think"], found["unseen"], found["turns"]) == ("on", "layout", 1)
    assert found["candidates_passed"] == 2
    assert "think t0.7 best of 2" in report.render([found], 80)


def test_a_rerun_spends_more_and_passes_anew() -> None:
    record = row(candidate=0, chosen=True, replies=[{"prompt_tokens": 10, "completion_tokens": 5}], unseen=[])
    (found,) = report.rows([record, {**record, "outcome": "wrong"}])
    assert (found["completion_tokens"], found["candidates_passed"]) == (10, 0)


def test_beside_the_best_of_n_stands_whether_any_passed_and_what_was_spent() -> None:
    drawn = {"temperature": 0.7, "best_of": 4, "completion_tokens": 80}
    rows = [
        row(task="a", **drawn, candidates_passed=4), failed(task="b", **drawn, candidates_passed=1),
        failed(task="c", **drawn, candidates_passed=0), row(task="a", temperature=0.7, candidates_passed=1),
    ]  # fmt: skip
    text = report.render(rows, 120)
    assert [line.split()[-2:] for line in text.splitlines() if "tiny  " in line][:2] == [
        ["20", "0"],
        ["80", "0"],
    ]
    (line,) = (line for line in text.splitlines() if "any of 4  " in line)
    assert re.findall(r"\d\.\d{3}", line)[0] == "0.667"
    assert "any of N: whether one of the N candidates passed" in text
    assert "any of" not in report.render(rows[3:], 120)
