"""The published schemas: what sessions write is valid, what is wrong is not."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from toy_project import Project

from pytest_pocket import records, schemas
from pytest_pocket.conditions import SYSTEM_PROMPTS
from pytest_pocket.episode import Ending
from pytest_pocket.options import Options

RUN, EPISODE = (Draft202012Validator(schemas.load(name)) for name in schemas.NAMES)
ROOT = Path(__file__).parents[1]
COMMITTED = sorted(path.parent for path in (ROOT / "reports").glob("*/run.json"))


def check(run: Path) -> int:
    """Raises ValidationError; the number of records."""
    info, found = records.load(run)
    RUN.validate(info)
    for each in found:
        EPISODE.validate(each)
        for text in json_texts(each):
            assert isinstance(json.loads(text), dict)
    return len(found)


def json_texts(record: Mapping[str, Any]) -> Iterator[str]:
    for message in record["messages"]:
        for call in message["tool_calls"]:
            yield call["function"]["arguments"]
    for reply in record["replies"]:
        yield reply["evidence"]


@pytest.mark.parametrize("name", schemas.NAMES)
def test_the_schemas_are_schemas(name: str) -> None:
    Draft202012Validator.check_schema(schemas.load(name))


def test_what_a_session_of_all_tasks_writes_is_valid(suite_run: Path) -> None:
    assert check(suite_run) == 19 * 2 * 2


@pytest.mark.parametrize(
    "options",
    [
        ("--pocket-model=toy:broken,toy:cut,toy:hostile",),
        (
            "--pocket-model=half-right",
            "--pocket-temperature=0.5,1",
            "--pocket-best-of=2",
            "--pocket-samples=2",
        ),
        ("--pocket-model=oracle", "--pocket-shard=1/1", "--pocket-must-pass=greet", "--pocket-resume"),
    ],
)
def test_what_odd_sessions_write_is_valid(project: Project, options: tuple[str, ...]) -> None:
    project.run(*options)
    assert check(project.path / "records") > 0


def test_a_resumed_run_is_valid(project: Project) -> None:
    project.run("--pocket-model=oracle")
    project.run("--pocket-model=oracle,noop", "--pocket-resume=force", "--pocket-max-turns=3")
    assert records.load(project.path / "records")[0]["resumed"][0]["changed"]
    assert check(project.path / "records") == 4


def test_the_schemas_name_what_there_is() -> None:
    options = schemas.load("run")["$defs"]["options"]["properties"]
    assert {field.name for field in fields(Options)} == options.keys()
    properties = schemas.load("episode")["properties"]
    assert properties["prompt"]["enum"] == list(SYSTEM_PROMPTS)
    assert properties["outcome"]["enum"] == list(get_args(Ending))
    assert (
        properties["schema"]["const"]
        == schemas.load("run")["properties"]["schema"]["const"]
        == records.SCHEMA
    )


def objects(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every object within."""
    if isinstance(value, dict):
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield from objects(item, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


FREE = {("models",), ("versions",), ("models", "oracle", "options"), ("models", "noop", "options")}
"""Objects of ``run.json`` whose keys are not ours."""


@settings(max_examples=200)
@given(data=st.data())
def test_a_record_with_a_key_too_many_or_too_few_is_refused(suite_run: Path, data: st.DataObject) -> None:
    info, found = records.load(suite_run)
    validator, value = data.draw(
        st.one_of(st.tuples(st.just(EPISODE), st.sampled_from(found)), st.tuples(st.just(RUN), st.just(info)))
    )
    value = copy.deepcopy(value)
    places = [path for path in objects(value) if validator is EPISODE or path not in FREE]
    place = at(value, data.draw(st.sampled_from(places)))
    optional = {"memory_bytes", "gpus", "in_flight", *schemas.load("run")["$defs"]["options"]["properties"]}
    required = sorted(place.keys() - optional)
    if required and data.draw(st.booleans()):
        del place[data.draw(st.sampled_from(required))]
    else:
        place["surplus"] = 1
    with pytest.raises(ValidationError):
        validator.validate(value)


@pytest.mark.parametrize(
    "change",
    [
        {"reward": None}, {"reward": 2}, {"reward": 0.5}, {"passed": False}, {"passed": None}, {"factors": None},
        {"checks": []}, {"outcome": "wrong"}, {"outcome": "infra"}, {"outcome": "nice"}, {"schema": 2},
        {"temperature": -1}, {"temperature": "0"}, {"think": 0}, {"run": 0}, {"seed": -1}, {"seed": 3_000_000_000},
        {"prompt": "short"}, {"split": "test"}, {"messages": []}, {"replies": []}, {"files": {}}, {"started": "today"},
        {"seconds": -0.1}, {"candidate": -1}, {"unseen": ["a", "a"]}, {"answer": None}, {"model": ""},
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused(suite_run: Path, change: dict[str, Any]) -> None:
    passed = next(each for each in records.load(suite_run)[1] if each["outcome"] == "passed")
    EPISODE.validate(passed)
    with pytest.raises(ValidationError):
        EPISODE.validate({**passed, **change})


@pytest.mark.parametrize("run", COMMITTED, ids=lambda run: run.name)
def test_a_committed_run_is_valid(run: Path) -> None:
    assert check(run) > 0
