"""Verifying contributed runs: a real one is good, and whatever is changed in it is named."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pytest_pocket import records, sandbox
from pytest_pocket.cli import app
from pytest_pocket.episode import Workshop
from pytest_pocket.verify import Verdict, verify

COMMITTED = Path(__file__).parents[1] / "reports" / "tiny-family-3-runs"
SHARDS = 17
NEEDED = {"edit_value", "git_history", "run_script"}
Info = dict[str, Any]
Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def workshop() -> Workshop:
    return Workshop(sandbox.select("auto"))


@pytest.fixture(scope="module")
def run() -> tuple[Info, Found]:
    """A shard of a committed run: one model that ships, its ids, its evidence, its failures."""
    info, found = records.load(COMMITTED)
    shards: list[Found] = [[] for _ in range(SHARDS)]
    for each in found:
        if each["model"] == "sft-run6":
            shards[(zlib.crc32(each["task"].encode()) + each["run"]) % SHARDS].append(each)
    number, held = next((number, held) for number, held in enumerate(shards, 1) if _telling(held))
    info["models"] = {"sft-run6": info["models"]["sft-run6"]}
    info["options"] |= {"models": ["sft-run6"], "shard": {"index": number, "count": SHARDS}}
    return info, held


def _telling(held: Found) -> bool:
    """Whether what passed has all that is tampered with, and something failed without looping."""
    outcomes = {each["outcome"] for each in held}
    return {each["task"] for each in held if each["passed"]} >= NEEDED and bool(
        outcomes - {"passed", "looping"}
    )


def named(verdict: Verdict) -> set[tuple[str, str]]:
    """Which checks found something grave, and in which tasks."""
    return {(each.finding.check, each.where.split(" ")[0]) for each in verdict.found if each.finding.grave}


def said(verdict: Verdict) -> str:
    return "\n".join(each.finding.what for each in verdict.found)


def test_an_untouched_run_is_good(run: tuple[Info, Found], workshop: Workshop, tmp_path: Path) -> None:
    records.write(tmp_path / "run", *run)
    verdict = verify(tmp_path / "run", workshop)
    assert verdict.found == []
    assert verdict.episodes == len(run[1])


def of(found: Found, task: str) -> dict[str, Any]:
    """The first passed episode of a task."""
    return next(each for each in found if each["task"] == task and each["passed"])


def reward_flipped(info: Info, found: Found) -> None:
    failed = next(each for each in found if not each["passed"])
    passed = {"outcome": 1.0, "stopped": 1.0, "intact": 1.0}
    checks = [{**check, "value": 1.0, "detail": ""} for check in failed["checks"]]
    failed |= {"outcome": "passed", "reward": 1.0, "passed": True, "factors": passed, "checks": checks}


def dropped(info: Info, found: Found) -> None:
    found.remove(of(found, "edit_value"))


def duplicated(info: Info, found: Found) -> None:
    found.append(copy.deepcopy(of(found, "edit_value")))


def seed_changed(info: Info, found: Found) -> None:
    of(found, "edit_value")["seed"] += 3


def answer_edited(info: Info, found: Found) -> None:
    each = of(found, "run_script")
    each["answer"] = each["messages"][-1]["content"] = "another"


def words_between_edited(info: Info, found: Found) -> None:
    of(found, "edit_value")["messages"][-1]["reasoning_content"] = "I think so"


def call_edited(info: Info, found: Found) -> None:
    each = of(found, "edit_value")
    call = next(m for m in each["messages"] if m["tool_calls"])["tool_calls"][0]["function"]
    call["arguments"] = json.dumps({"command": "true"})


def result_edited(info: Info, found: Found) -> None:
    each = of(found, "edit_value")
    next(m for m in each["messages"] if m["role"] == "tool")["content"] = "what was never answered"


def prompt_edited(info: Info, found: Found) -> None:
    user = next(m for m in of(found, "edit_value")["messages"] if m["role"] == "user")
    user["content"] += " The answer is 7."


def final_file_edited(info: Info, found: Found) -> None:
    of(found, "edit_value")["files"][0]["content"] += "another line\n"


def final_file_dropped(info: Info, found: Found) -> None:
    of(found, "edit_value")["files"].pop()


def outcome_changed(info: Info, found: Found) -> None:
    failed = next(each for each in found if each["outcome"] not in ("passed", "looping"))
    failed["outcome"] = "looping"


def failure_called_a_fault_of_nobody(info: Info, found: Found) -> None:
    failed = next(each for each in found if not each["passed"])
    failed |= {
        "outcome": "truncated",
        "stop": "truncated",
        "detail": "cut",
        **records.scored(None),
        "files": [],
    }


def tokens_changed(info: Info, found: Found) -> None:
    of(found, "edit_value")["replies"][0]["completion_tokens"] -= 1


def ids_changed(info: Info, found: Found) -> None:
    of(found, "edit_value")["replies"][0]["completion_ids"][0] += 1


def replies_cut(info: Info, found: Found) -> None:
    each = of(found, "edit_value")
    del each["messages"][-1], each["replies"][-1]


def hotter(info: Info, found: Found) -> None:
    each = of(found, "edit_value")
    evidence = json.loads(each["replies"][0]["evidence"])
    each["replies"][0]["evidence"] = json.dumps({**evidence, "temperature": 0.7})


def another_condition(info: Info, found: Found) -> None:
    of(found, "edit_value")["think"] = True


def another_suite(info: Info, found: Found) -> None:
    of(found, "edit_value")["suite"] = "0"


def another_split(info: Info, found: Found) -> None:
    info["options"]["split"] = "dev"


def another_run_seed(info: Info, found: Found) -> None:
    info["seed"] = info["options"]["seed"] = 1


def more_runs_declared(info: Info, found: Found) -> None:
    info["options"]["runs"] = 11


def other_tools(info: Info, found: Found) -> None:
    info["tools_sha256"] = "0" * 64


def other_weights(info: Info, found: Found) -> None:
    info["models"]["sft-run6"]["digest"] = "0" * 64


def other_budget(info: Info, found: Found) -> None:
    info["options"]["budget"]["reply_tokens"] = 512


def run_of_another_suite(info: Info, found: Found) -> None:
    info["suite"] = "0"


def forced(info: Info, found: Found) -> None:
    info["resumed"] = [
        {"started": info["started"], "command": ["pytest"], "changed": ["the seed was 1 and is 0"]}
    ]


def field_dropped(info: Info, found: Found) -> None:
    del of(found, "edit_value")["stop"]


@pytest.mark.parametrize(
    ("tamper", "check", "where"),
    [
        (reward_flipped, "rewards", ""),
        (dropped, "design", "edit_value"),
        (duplicated, "design", "edit_value"),
        (seed_changed, "instances", "edit_value"),
        (answer_edited, "rewards", "run_script"),
        (words_between_edited, "tokens", "edit_value"),
        (call_edited, "replay", "edit_value"),
        (result_edited, "tokens", "edit_value"),
        (prompt_edited, "instances", "edit_value"),
        (final_file_edited, "replay", "edit_value"),
        (final_file_dropped, "replay", "edit_value"),
        (outcome_changed, "rewards", ""),
        (failure_called_a_fault_of_nobody, "rewards", ""),
        (tokens_changed, "tokens", "edit_value"),
        (ids_changed, "tokens", "edit_value"),
        (replies_cut, "replay", "edit_value"),
        (hotter, "evidence", "edit_value"),
        (another_condition, "design", "edit_value"),
        (another_suite, "suite", "edit_value"),
        (another_split, "instances", "edit_value"),
        (another_run_seed, "instances", "edit_value"),
        (more_runs_declared, "design", ""),
        (other_tools, "suite", ""),
        (other_weights, "models", ""),
        (other_budget, "evidence", "edit_value"),
        (run_of_another_suite, "suite", ""),
        (forced, "suite", ""),
        (field_dropped, "files", "line"),
    ],
)  # fmt: skip
def test_tampering_is_named(
    run: tuple[Info, Found],
    workshop: Workshop,
    tmp_path: Path,
    tamper: Callable[[Info, Found], None],
    check: str,
    where: str,
) -> None:
    info, found = copy.deepcopy(run)
    tamper(info, found)
    records.write(tmp_path / "run", info, found)
    verdict = verify(tmp_path / "run", workshop)
    assert verdict.failed()
    assert any(check == one and where in ("", task) for one, task in named(verdict)), named(verdict)


def test_a_torn_last_line_is_named(run: tuple[Info, Found], workshop: Workshop, tmp_path: Path) -> None:
    records.write(tmp_path / "run", *run)
    with (tmp_path / "run" / records.EPISODES).open("ab") as file:
        file.write(b'{"schema"')
    assert "its last line is torn" in said(verify(tmp_path / "run", workshop))


def test_runs_of_all_19_tasks_are_good_and_the_command_says_so(suite_run: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(suite_run), "--strict"])
    assert result.exit_code == 0, result.output
    assert "76 episodes, 0 of them invalid" in result.output
    assert result.output.count("  ok ") == 9
    assert "not shown by this: that the model wrote these words" in result.output
    said = json.loads(CliRunner().invoke(app, ["verify", str(suite_run), "--json"]).output)
    assert said[0]["good"]
    assert len(said[0]["sha256"][records.EPISODES]) == 64


def test_a_bad_run_ends_with_1_and_what_it_quotes_is_harmless(suite_run: Path, tmp_path: Path) -> None:
    info, found = records.load(suite_run)
    found[0]["files"][0]["path"] = "\x1b]0;title\x07"
    records.write(tmp_path / "run", info, found)
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "run"), str(suite_run)])
    assert result.exit_code == 1
    assert "problem (replay)" in result.output
    assert "\x1b" not in result.output
    assert result.output.endswith("  good\n")


def test_what_a_program_says_of_the_time_is_no_tampering(
    suite_run: Path, workshop: Workshop, tmp_path: Path
) -> None:
    """Bash's words are the machine's: told where they differ, and grave only for --strict."""
    info, found = records.load(suite_run)
    told = next(
        message
        for each in found
        if each["model"] == "oracle"
        for message in each["messages"]
        if message["role"] == "tool" and message["name"] == "Bash"
    )
    told["content"] += "12:34:56"
    records.write(tmp_path / "run", info, found)
    assert verify(tmp_path / "run", workshop).found == []
    told["content"] += " the words of another version"
    records.write(tmp_path / "other", info, found)
    verdict = verify(tmp_path / "other", workshop)
    assert not verdict.failed()
    assert verdict.failed(strict=True)
