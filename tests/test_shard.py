"""Shards: parts of a run that are played apart and together make the whole."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_project import Project

from pytest_pocket import task_list
from pytest_pocket.shard import Shard, parse


@given(st.text(min_size=1), st.integers(1, 10_000), st.integers(1, 50))
def test_every_instance_is_in_exactly_one_shard(task: str, run: int, count: int) -> None:
    assert sum(Shard(index, count).holds(task, run) for index in range(1, count + 1)) == 1


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_shards_of_the_suite_are_about_equal(count: int) -> None:
    instances = [(task, run) for task in task_list.shipped() for run in range(1, 11)]
    sizes = [
        sum(Shard(index, count).holds(*instance) for instance in instances) for index in range(1, count + 1)
    ]
    assert max(sizes) <= 1.25 * len(instances) / count


def test_where_an_instance_belongs_never_changes() -> None:
    # Jobs of a CI may run different versions of Python and of this package.
    assert [Shard(index, 4).holds("read_value", 1) for index in (1, 2, 3, 4)] == [False, True, False, False]


@pytest.mark.parametrize(
    "value", ["", "2", "0/4", "5/4", "1/0", "-1/4", "1/4/5", "a/b", "1.0/2", "1/99999", "１/2"]
)
def test_a_wrong_shard_is_one_line_that_says_what_to_give(value: str, project: Project) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{value!r}: give I/N, such as 2/4")):
        parse(value)
    if value:
        result = project.run("--pocket-model=oracle", f"--pocket-shard={value}")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert f"--pocket-shard {value!r}: give I/N" in result.stderr.str()
        assert not (project.path / "records").exists()


def test_others_are_deselected_and_pairs_stay_together(project: Project) -> None:
    options = ("--pocket-model=oracle,half-right", "--runs=4", "--tb=no")
    result = project.run(*options, "--pocket-shard=1/2")
    result.assert_outcomes(passed=8, deselected=8)
    runs: dict[int, set[tuple[str, str]]] = {}
    for record in project.records():
        runs.setdefault(record["run"], set()).add((record["model"], record["prompt"]))
    assert len(runs) == 2
    assert all(len(found) == 4 for found in runs.values())
    assert "shard 1/2" in result.stdout.str()


def test_the_ini_twin_works(project: Project) -> None:
    project.pytester.makeini("[pytest]\npocket_shard = 2/2\n")
    project.run("--pocket-model=oracle", "--runs=4").assert_outcomes(passed=4, deselected=4)
