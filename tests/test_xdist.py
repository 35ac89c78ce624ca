"""The plugin under pytest-xdist: the same numbers, one copy of each engine, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from toy_project import Project, processes, table, wait_for

XDIST = ("xdist.plugin",)


def _numbers(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    keys = ("model", "task", "prompt", "run", "seed", "reward", "outcome", "answer")
    return sorted(tuple(record[key] for key in keys) for record in records)


def test_serial_pooled_and_distributed_sessions_show_the_same(project: Project) -> None:
    options = ("--pocket-model=half-right,oracle,toy:broken", "--runs=4", "--tb=no")
    serial = project.start(*options, "--pocket-in-flight=1", "--pocket-records=serial")
    pooled = project.start(*options, "--pocket-records=pooled")
    distributed = project.start(*options, "-n", "2", plugins=XDIST)
    distributed.assert_outcomes(passed=4 + 8, failed=4, errors=8)
    assert table(serial) == table(pooled) == table(distributed)
    numbers = _numbers(project.records())
    assert len(numbers) == 24
    for name in ("serial", "pooled"):
        (project.path / name).rename(project.path / "records-now")
        (project.path / "records").rename(project.path / f"before-{name}")
        (project.path / "records-now").rename(project.path / "records")
        assert _numbers(project.records()) == numbers
    assert distributed.outlines[-1].startswith("pocket: records in ")


def test_an_engine_is_loaded_once_and_by_the_controller(project: Project) -> None:
    options = ("--pocket-model=half-right", "--runs=6", "--pocket-fail-under=0.5", "--junitxml=junit.xml")
    result = project.start(*options, "-n", "2", plugins=XDIST)
    result.assert_outcomes(passed=6, failed=6)
    assert result.outlines.count("LOADED half-right") == 1
    assert result.ret == 0
    result.stdout.fnmatch_lines(["pocket: mean reward 0.5000 is at least --pocket-fail-under 0.5"])
    assert 'name="reward" value="1.0"' in (project.path / "junit.xml").read_text()


def test_an_engine_that_cannot_be_loaded_is_a_usage_error_there_too(project: Project) -> None:
    result = project.start("--pocket-model=toy:unloadable", "--runs=8", "-n", "2", plugins=XDIST)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.errlines == ["ERROR: the weights of 'unloadable' are missing: fetch them", ""]
    assert "are missing: fetch them" not in result.stdout.str()
    assert not (project.path / "records").exists()


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--pocket-must-pass=greet,nosuch", "unknown task 'nosuch': choose from *"),
        (
            "--pocket-think=on",
            "--pocket-think on: model 'toy:even' has no switch for thinking in its chat template*",
        ),
    ],
)
def test_what_cannot_be_played_is_refused_before_anything_is(
    project: Project, option: str, line: str
) -> None:
    text = (project.path / "conftest.py").read_text()
    project.pytester.makeconftest(
        text.replace("class Scripted:", "class Scripted:\n    supports_think = False\n", 1)
    )
    result = project.start(
        "--pocket-model=toy:even", option, "-n", "2", "--pocket-records=a/b", plugins=XDIST
    )
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {line}"])
    assert not (project.path / "a").exists()


def test_a_task_of_a_folder_that_only_workers_read_may_have_to_pass(project: Project) -> None:
    for name in ("sub", "unit"):
        (project.path / name).mkdir()
    (project.path / "conftest.py").rename(project.path / "sub" / "conftest.py")
    (project.path / "unit" / "test_unit.py").write_text("def test_unit(): pass\n")
    options = ("--pocket-model=oracle", "--pocket-must-pass=greet", "-n", "2")
    assert project.start(*options, plugins=XDIST).ret == 0
    assert project.start(*options, "unit", "--pocket-records=b", plugins=XDIST).ret == 0
    told = project.start(
        *options,
        "-k",
        "answer_directly",
        "--pocket-records=c",
        "--pyargs",
        "pytest_pocket.tasks",
        ".",
        plugins=XDIST,
    )
    assert told.ret == pytest.ExitCode.TESTS_FAILED
    told.stdout.fnmatch_lines(["pocket: *greet*"])


def test_a_refused_session_takes_nothing_away_that_was_there(project: Project) -> None:
    folder = project.path / "mine"
    folder.mkdir()
    for name in ("run.json", "episodes.jsonl", "notes.txt"):
        (folder / name).touch()
    result = project.start("--pocket-model=toy:unloadable", "--pocket-records=mine", "-n", "2", plugins=XDIST)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert {path.name for path in folder.iterdir()} == {"run.json", "episodes.jsonl", "notes.txt"}


def test_what_another_plugin_adds_to_an_id_hides_no_cell(project: Project) -> None:
    twice = "def pytest_generate_tests(metafunc):\n    metafunc.fixturenames.append('turn')\n"
    twice += "    metafunc.parametrize('turn', [1, 2], ids=['x1', 'x2'])\n"
    text = (project.path / "conftest.py").read_text()
    project.pytester.makeconftest(text + "\n" + twice)
    result = project.start("--pocket-model=toy:unloadable", "-n", "2", plugins=XDIST)
    assert result.errlines == ["ERROR: the weights of 'unloadable' are missing: fetch them", ""]


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["serial", "xdist"])
def test_a_model_without_an_engine_is_an_error_and_the_others_finish(
    project: Project, workers: tuple[str, ...]
) -> None:
    result = project.start("--pocket-model=toy:unloadable,half-right", "--runs=4", *workers, plugins=XDIST)
    result.assert_outcomes(passed=4, failed=4, errors=8)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "pocket: the weights of 'unloadable' are missing: fetch them" in result.outlines
    assert {record["model"] for record in project.records()} == {"half-right"}


def test_a_model_without_an_engine_outweighs_a_good_mean(project: Project) -> None:
    result = project.start("--pocket-model=toy:unloadable,oracle", "--pocket-fail-under=0.5")
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_a_wrong_option_stops_the_controller_before_any_worker_starts(project: Project) -> None:
    result = project.start("--pocket-model=gpt-9", "-n", "2", plugins=XDIST)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: unknown model 'gpt-9'*"])
    assert not (project.path / "records").exists()


def test_without_a_model_the_controller_names_the_models(project: Project) -> None:
    result = project.start("-n", "1", plugins=XDIST)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(
        ["pocket: tasks skipped, no model: give --pocket-model=NAME, one or more of oracle*"]
    )


@pytest.mark.parametrize("model", ["toy:slow", "toy:sleeper"])
def test_an_interrupt_of_the_controller_ends_its_workers(project: Project, model: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "2",
        f"--pocket-model={model}",
        "--runs=6",
        "--pocket-records=records",
    ]
    with subprocess.Popen(
        [*command, "-p", "no:randomly", "-p", "no:hypothesispytest"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=project.path,
        text=True,
    ) as run:
        if model == "toy:sleeper":
            wait_for(lambda: len(processes("sleep 9.753")) >= 2)
        else:
            wait_for((project.path / "records" / "run.json").exists)
            time.sleep(2)
        start = time.monotonic()
        os.kill(run.pid, signal.SIGINT)
        output, _ = run.communicate(timeout=30)
    assert time.monotonic() - start < 8, output
    assert run.returncode == pytest.ExitCode.INTERRUPTED
    assert project.records() == []
    wait_for(lambda: not processes("sleep 9.753"), seconds=2)


def test_a_killed_controller_leaves_no_process_behind(project: Project) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "1",
        "--pocket-model=toy:sleeper",
        "--pocket-records=records",
    ]
    with subprocess.Popen(
        [*command, "-p", "no:randomly", "-p", "no:hypothesispytest"],
        stdout=subprocess.DEVNULL,
        cwd=project.path,
    ) as run:
        wait_for(lambda: bool(processes("sleep 9.753")))
        run.kill()
    wait_for(lambda: not processes("sleep 9.753"), seconds=3)
