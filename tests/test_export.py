"""Exports: what trainers and tables take, of training instances only."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from pytest_pocket import export, records, report, tools
from pytest_pocket.cli import app
from pytest_pocket.training import data


def pocket(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.output


def exported(run: Path, kind: str, output: Path) -> list[dict[str, Any]]:
    status, text = pocket("export", run, "--as", kind, "-o", output)
    assert status == 0, text
    return [json.loads(line) for line in output.read_text().splitlines()]


def of(run: Path, task: str) -> list[dict[str, Any]]:
    """The records of one task: oracle and no-op, raw and full."""
    return [each for each in records.load(run)[1] if each["task"] == task]


def changed(run: Path, copy: Path, **changes: Any) -> Path:
    """A copy of a run whose records have other values."""
    info, found = records.load(run)
    records.write(copy, info, [{**each, **changes} for each in found])
    return copy


def test_sft_is_the_conversations_that_passed_with_their_tools(suite_run: Path, tmp_path: Path) -> None:
    rows = exported(suite_run, "sft", tmp_path / "sft.jsonl")
    passed = [each for each in records.load(suite_run)[1] if each["passed"]]
    assert len(rows) == len(passed) == 38
    assert [row["messages"][-1]["content"] for row in rows] == [each["answer"] for each in passed]
    for row in rows:
        assert row.keys() == {"messages", "tools"}
        assert row["tools"] == json.loads(json.dumps(tools.SCHEMAS))
        for message in row["messages"]:
            for call in message.get("tool_calls", ()):
                assert isinstance(call["function"]["arguments"], dict)


def test_dpo_prefers_the_higher_reward_on_one_prompt(suite_run: Path, tmp_path: Path) -> None:
    rows = exported(suite_run, "dpo", tmp_path / "dpo.jsonl")
    by_start: dict[str, dict[str, Any]] = {}
    for each in records.load(suite_run)[1]:
        start = [message for message in each["messages"] if message["role"] in ("system", "user")]
        key = json.dumps([message["content"] for message in start])
        by_start.setdefault(key, {})[each["answer"], len(each["messages"])] = each["reward"]
    assert len(rows) == 38
    for row in rows:
        assert row.keys() == {"prompt", "chosen", "rejected", "tools"}
        assert [message["role"] for message in row["prompt"]] in (["user"], ["system", "user"])
        rewards = by_start[json.dumps([message["content"] for message in row["prompt"]])]
        chosen, rejected = (
            rewards[row[side][-1]["content"], len(row["prompt"]) + len(row[side])]
            for side in ("chosen", "rejected")
        )
        assert chosen > rejected
        assert {message["role"] for message in row["chosen"]} <= {"assistant", "tool"}
        assert row["chosen"][-1]["role"] == row["rejected"][-1]["role"] == "assistant"


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_data_card_says_who_played_and_what_was_left_out(
    suite_run: Path, tmp_path: Path, kind: str
) -> None:
    rows = exported(suite_run, kind, tmp_path / "mine.jsonl")
    card = json.loads((tmp_path / "mine.card.json").read_text())
    assert card["rows"] == len(rows)
    assert sum(card["left_out"].values()) + len(rows) == len(records.load(suite_run)[1]) - 38 * (
        kind == "dpo"
    )
    assert card["sha256"] == hashlib.sha256((tmp_path / "mine.jsonl").read_bytes()).hexdigest()
    assert {(each["model"], each["prompt"], each["temperature"]) for each in card["sampling"]} == {
        (model, prompt, 0.0) for model in ("noop", "oracle") for prompt in ("raw", "full")
    }


def test_a_data_card_that_is_there_is_not_replaced(suite_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.card.json").write_text("precious")
    status, text = pocket("export", suite_run, "--as", "sft", "-o", tmp_path / "mine.jsonl")
    assert (status, text.count("\n")) == (2, 1)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_a_trajectory_that_a_limit_ended_is_rejected_up_to_its_last_reply(suite_run: Path) -> None:
    passed = next(
        each for each in records.load(suite_run)[1] if each["passed"] and each["task"] == "read_value"
    )
    call = [*passed["messages"][:-1]]
    worse = {**passed, "model": "other", "messages": call, "replies": passed["replies"][:-1]}
    worse |= {"outcome": "limit", "stop": "turns", "reward": 0.0, "passed": False, "answer": ""}
    assert call[-1]["role"] == "tool"
    made = export.export([passed, worse], "dpo")
    assert json.loads(made.data)["rejected"][-1]["role"] == "assistant"


def test_near_identical_pairs_are_left_out_and_counted(suite_run: Path) -> None:
    passed = next(
        each for each in records.load(suite_run)[1] if each["passed"] and each["task"] == "read_value"
    )
    messages = [
        *passed["messages"][:-1],
        {**passed["messages"][-1], "content": f" {passed['answer'].upper()} "},
    ]
    worse = {**passed, "messages": messages, "outcome": "wrong", "reward": 0.0, "passed": False}
    with pytest.raises(export.ExportError, match="nothing to export as dpo: 1 near-identical"):
        export.export([passed, worse], "dpo")


def test_equal_conversations_count_once(suite_run: Path) -> None:
    found = of(suite_run, "read_value")
    made = export.export([*found, *found], "sft")
    assert (made.rows, made.left_out) == (2, {"the same as another": 2, "not passed": 4})


def test_invalid_episodes_are_left_out_and_counted(suite_run: Path) -> None:
    found = of(suite_run, "read_value")
    invalid = {**found[0], "outcome": "infra", **records.scored(None)}
    assert export.export([*found, invalid], "sft").left_out == {"invalid": 1, "not passed": 2}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"split": "eval", "seed": 2_000_000_001}, "episodes of the eval split"),
        ({"split": "dev", "seed": 1_000_000_001}, "episodes of the dev split"),
        ({"split": "train", "seed": 2_000_000_001}, "episodes of the eval split"),
        ({"task": "greet"}, "task 'greet' does not ship"),
    ],
)
def test_what_models_are_tested_on_is_not_exported_to_train(
    suite_run: Path, tmp_path: Path, kind: str, change: dict[str, Any], said: str
) -> None:
    run = changed(suite_run, tmp_path / "run", **change)
    status, text = pocket("export", run, "--as", kind, "-o", tmp_path / "out")
    assert status == 2
    assert said in text
    assert text.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_instance_that_equals_a_held_out_one_is_left_out(
    suite_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No seed is known to give one: so one is declared held out.
    found = of(suite_run, "read_value")
    instance = export.task_list.find("read_value").build(found[0]["seed"])
    monkeypatch.setattr(data, "guarded", lambda names: {data.fingerprint(instance)})
    with pytest.raises(export.ExportError, match="4 equal to a held-out instance"):
        export.export(found, "sft")


def test_jsonl_and_parquet_hold_the_rows_of_the_tables(suite_run: Path, tmp_path: Path) -> None:
    rows = report.rows(records.load(suite_run)[1])
    assert exported(suite_run, "jsonl", tmp_path / "rows.jsonl") == rows
    status, text = pocket("export", suite_run, "--as", "parquet", "-o", tmp_path / "rows.parquet", "--json")
    assert status == 0
    assert json.loads(text) == {"output": str(tmp_path / "rows.parquet"), "rows": 76, "left_out": {}}
    assert parquet.read_table(tmp_path / "rows.parquet").to_pylist() == rows


def test_without_pyarrow_one_line_says_what_to_install(
    suite_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    status, text = pocket("export", suite_run, "--as", "parquet", "-o", tmp_path / "out")
    assert (status, text) == (2, "pocket: parquet needs pyarrow: pip install 'pytest-pocket[export]'\n")
    assert not (tmp_path / "out").exists()


def test_an_existing_file_is_refused_and_left_alone(suite_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    status, text = pocket("export", suite_run, "--as", "jsonl", "-o", tmp_path / "mine")
    assert (status, text) == (2, f"pocket: {tmp_path / 'mine'} exists: give another --output\n")
    with pytest.raises(export.ExportError, match="exists: give another --output"):
        export.write(tmp_path / "mine", b"")
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    ("kind", "output", "said"),
    [("csv", "out", "--as 'csv': choose from sft, dpo, jsonl, parquet"), ("jsonl", "no/out", "cannot write")],
)
def test_a_wrong_use_is_one_line(suite_run: Path, tmp_path: Path, kind: str, output: str, said: str) -> None:
    status, text = pocket("export", suite_run, "--as", kind, "-o", tmp_path / output)
    assert status == 2
    assert said in text
    assert text.count("\n") == 1
