"""Rescoring: saved final states give the rewards that they gave, and a wrong one is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from pytest_pocket import records, rescore, sandbox, schemas
from pytest_pocket.cli import app
from pytest_pocket.episode import Workshop
from pytest_pocket.task import SUITE_VERSION


@pytest.fixture(scope="module")
def workshop() -> Workshop:
    return Workshop(sandbox.select("auto"))


def pocket(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.output


def of(run: Path, task: str, model: str = "oracle") -> dict[str, Any]:
    """One record of a run."""
    return next(each for each in records.load(run)[1] if (each["task"], each["model"]) == (task, model))


def edited(run: Path, name: Path, **changes: Any) -> Path:
    """A copy of a run in which the first record has other values."""
    info, (first, *rest) = records.load(run)
    records.write(name, info, [{**first, **changes}, *rest])
    return name


def test_rewards_of_all_19_tasks_are_what_they_were(suite_run: Path, workshop: Workshop) -> None:
    found = records.load(suite_run)[1]
    results = list(rescore.rescore(found, workshop))
    assert len({result.old["task"] for result in results}) == 19
    assert {result.old["reward"] for result in results} == {0.0, 1.0}
    assert rescore.counts(results) == {"changed": 0, "unchanged": 76, "not_rescorable": 0, "invalid": 0}
    assert [result.new for result in results] == found


def test_a_wrong_reward_is_found_and_mended_in_a_new_run(suite_run: Path, tmp_path: Path) -> None:
    right = records.load(suite_run)[1][0]
    wrong = {
        "reward": 0.25,
        "passed": False,
        "outcome": "wrong",
        "factors": {**right["factors"], "outcome": 0.25},
    }
    run = edited(suite_run, tmp_path / "run", **wrong)
    before = (run / records.EPISODES).read_bytes()
    status, text = pocket("rescore", run, "-o", tmp_path / "new")
    assert status == 0
    assert f"{right['task']} run 1 sample 1 · {right['model']} {right['prompt']}" in text
    assert f": wrong 0.250 -> {right['outcome']} {right['reward']:.3f}" in text
    assert text.endswith("1 changed, 75 unchanged, 0 not rescorable, 0 invalid\n")
    assert (run / records.EPISODES).read_bytes() == before
    info, found = records.load(tmp_path / "new")
    assert found == records.load(suite_run)[1]
    assert info["rescored"][0]["run"] == "run"
    assert info["rescored"][0]["changed"] == 1
    Draft202012Validator(schemas.load("run")).validate(info)
    said = json.loads(pocket("rescore", run, "--json")[1])
    assert said["changes"][0]["old"]["reward"] == 0.25
    assert said["changes"][0]["new"] == {key: right[key] for key in ("outcome", "reward", "factors")}


def test_a_damaged_file_costs_its_reward(suite_run: Path, workshop: Workshop) -> None:
    record = of(suite_run, "read_value")
    other = {**record["files"][0], "path": "left_behind.txt"}
    (result,) = rescore.rescore([{**record, "files": [*record["files"], other]}], workshop)
    assert (result.fate, result.new["reward"], result.new["factors"]["intact"]) == ("changed", 0.5, 0.5)
    assert result.new["outcome"] == "wrong"


def test_hidden_tests_are_run_again(suite_run: Path, workshop: Workshop) -> None:
    record = of(suite_run, "implement_function")
    broken = [{**file, "content": file["content"].replace("return", "pass  #")} for file in record["files"]]
    (result,) = rescore.rescore([{**record, "files": broken}], workshop)
    assert result.fate == "changed"
    assert result.new["reward"] < 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"suite": "0"}, f"it is of suite 0, not {SUITE_VERSION}"),
        ({"task": "no_such_task"}, "its task does not ship"),
        ({"seed": 12345}, "its seed gives another problem now"),
    ],
)
def test_what_cannot_be_rescored_is_kept_and_said(
    suite_run: Path, workshop: Workshop, change: dict[str, Any], reason: str
) -> None:
    record = {**of(suite_run, "edit_value"), **change, "reward": 0.125}
    (result,) = rescore.rescore([record], workshop)
    assert (result.fate, result.reason, result.new) == ("not_rescorable", reason, record)
    assert f"not rescorable: {reason}\n0 changed, 0 unchanged, 1 not rescorable" in rescore.render([result])


def test_a_cut_file_cannot_be_rescored(suite_run: Path, workshop: Workshop) -> None:
    record = of(suite_run, "append_line")
    record["files"][0]["cut_from_bytes"] = 100_000
    (result,) = rescore.rescore([record], workshop)
    assert result.reason == f"of {record['files'][0]['path']} only the beginning was kept"


def test_another_git_is_not_taken_for_damage(suite_run: Path, workshop: Workshop) -> None:
    record = of(suite_run, "git_history")
    config = next(file for file in record["files"] if file["path"] == ".git/config")
    config["content"] += "[another]\n\tgit = true\n"
    (result,) = rescore.rescore([record], workshop)
    assert result.reason == "its setup makes other files on this machine"


def test_invalid_episodes_stay_as_they_are(suite_run: Path, workshop: Workshop) -> None:
    invalid = {**of(suite_run, "read_value"), "outcome": "infra", **records.scored(None)}
    (result,) = rescore.rescore([invalid], workshop)
    assert (result.fate, result.new) == ("invalid", invalid)


def test_what_a_run_says_is_harmless_to_a_terminal(suite_run: Path, workshop: Workshop) -> None:
    record = {**of(suite_run, "read_value"), "suite": "\x1b[31m\n", "model": "\x1b]0;title\x07"}
    text = rescore.render(list(rescore.rescore([record], workshop)))
    assert "\x1b" not in text
    assert text.count("\n") == 1


def test_an_existing_output_is_refused_and_left_alone(suite_run: Path, tmp_path: Path) -> None:
    status, text = pocket("rescore", suite_run, "-o", tmp_path)
    assert (status, text) == (2, f"pocket: {tmp_path} exists: give another --output\n")
    assert list(tmp_path.iterdir()) == []
