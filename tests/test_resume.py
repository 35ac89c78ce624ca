"""Resuming a run: only what is missing or invalid is played, what changed is noticed, nothing finished is lost."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from toy_project import Project, table, wait_for

from pytest_pocket import records

RESUME = ("--pocket-model=half-right,oracle", "--pocket-resume")


def cells(project: Project) -> Counter[tuple[object, ...]]:
    keys = ("model", "prompt", "run", "sample")
    return Counter(tuple(record[key] for key in keys) for record in project.records())


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["serial", "xdist"])
def test_more_runs_keep_those_that_were_played(project: Project, workers: tuple[str, ...]) -> None:
    project.run("--pocket-model=half-right", "--runs=2")
    before = project.records()
    plugins = ("xdist",) if workers else ()
    resumed = project.start(*RESUME, "--runs=3", *workers, plugins=plugins)
    assert project.records()[: len(before)] == before
    assert set(cells(project).values()) == {1}
    assert len(project.records()) == 2 * 2 * 3
    fresh = project.run("--pocket-model=half-right,oracle", "--runs=3", "--pocket-records=fresh")
    assert table(resumed) == table(fresh)
    assert resumed.ret == fresh.ret == 1


def test_a_kept_failure_shows_its_trajectory(project: Project) -> None:
    first = project.run("--pocket-model=half-right", "--runs=2", "--pocket-prompt=raw")
    again = project.run("--pocket-model=half-right", "--runs=2", "--pocket-prompt=raw", "--pocket-resume")
    shown = [[line for line in result.outlines if " | " in line] for result in (first, again)]
    assert shown[0] == shown[1] != []


def test_a_whole_run_is_shown_again_without_loading_an_engine(project: Project) -> None:
    project.run("--pocket-model=half-right")
    again = project.run("--pocket-model=half-right", "--pocket-resume", "-s")
    again.stdout.no_fnmatch_line("LOADED*")
    assert len(project.records()) == 2


def test_invalid_episodes_are_played_again(project: Project) -> None:
    project.run("--pocket-model=toy:flaky", "--runs=2", "--pocket-in-flight=1")
    outcomes = [record["outcome"] for record in project.records()]
    assert outcomes.count("infra") == 2
    project.run("--pocket-model=toy:flaky", "--runs=2", "--pocket-resume", "--pocket-in-flight=1")
    assert len(project.records()) == 6


def test_best_of_is_kept_whole_or_played_whole(project: Project) -> None:
    options = (
        "--pocket-model=half-right",
        "--pocket-prompt=raw",
        "--pocket-temperature=1",
        "--pocket-best-of=3",
    )
    project.run(*options)
    path = project.path / "records" / "episodes.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    project.run(*options, "--pocket-resume")
    assert len(project.records()) == 3
    path.write_text("".join(lines[:2]))
    project.run(*options, "--pocket-resume")
    assert [record["candidate"] for record in project.records()] == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--pocket-seed=7",), "the seed was 0 and is 7"),
        (("--pocket-split=dev",), 'the split was "eval" and is "dev"'),
        (("--pocket-max-turns=3",), "the budget was"),
    ],
)
def test_what_would_make_other_numbers_is_refused(
    project: Project, change: tuple[str, ...], said: str
) -> None:
    project.run("--pocket-model=oracle")
    path = project.path / "records"
    before = {name: (path / name).read_bytes() for name in (records.RUN, records.EPISODES)}
    refused = project.start("--pocket-model=oracle", "--pocket-resume", *change)
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    assert said in refused.stderr.str()
    assert {name: (path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (("tools_sha256",), "the tool set was"),
        (("git", "commit"), "the commit was"),
        (("models", "oracle", "digest"), "the digest of model oracle was"),
        (("models", "oracle", "template_sha256"), "the template of model oracle was"),
        (("suite",), "the suite's version was"),
    ],
)
def test_a_changed_determinant_is_refused_and_force_notes_it(
    project: Project, key: tuple[str, ...], said: str
) -> None:
    project.run("--pocket-model=oracle")
    path = project.path / "records" / records.RUN
    info = json.loads(path.read_text())
    place = info
    for part in key[:-1]:
        place = place.setdefault(part, {})
    place[key[-1]] = "another"
    if key[0] == "git":
        subprocess.run(["git", "init", "-q"], check=True, cwd=project.path)
        words = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"]
        subprocess.run(["git", *words], check=True, cwd=project.path)
    path.write_text(json.dumps(info))
    refused = project.start("--pocket-model=oracle", "--pocket-resume")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    assert said in refused.stderr.str()
    assert project.run("--pocket-model=oracle", "--pocket-resume=force").ret == 0
    (noted,) = json.loads(path.read_text())["resumed"]
    assert said in noted["changed"][0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--pocket-resume",), "--pocket-resume needs --pocket-records DIR"),
        (("--pocket-resume=never", "--pocket-records=r"), "--pocket-resume 'never'"),
    ],
)
def test_a_wrong_use_is_one_line(project: Project, arguments: tuple[str, ...], said: str) -> None:
    result = project.pytester.runpytest("--pocket-model=oracle", *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert said in result.stderr.str()


def test_a_second_session_on_a_run_is_refused(tmp_path: Path) -> None:
    info = {"schema": 1}
    run = records.start(tmp_path / "run", info)
    for open_again in (records.start, records.resume):
        with pytest.raises(records.RecordsError, match="another session is writing"):
            open_again(run.directory, info)
    run.close()
    records.start(run.directory, info).close()


@pytest.mark.parametrize("workers", [(), ("-p", "xdist", "-n2")], ids=["serial", "xdist"])
def test_a_run_killed_at_50_moments_loses_nothing(project: Project, workers: tuple[str, ...]) -> None:
    moments = random.Random(5)
    command = [sys.executable, "-m", "pytest", "-p", "pytest_pocket.plugin", *workers, "-q"]
    command += ["--pocket-model=oracle", "--pocket-prompt=raw", "--runs=2000", "--pocket-sandbox=none"]
    command += ["--pocket-records=records", "--pocket-resume", "-W", "ignore"]
    directory = project.path / "records"
    episodes = directory / records.EPISODES
    held = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        for moment in range(50):
            with subprocess.Popen(command, cwd=project.path, stdout=subprocess.DEVNULL) as run:
                if not moment:  # on a busy machine no session might come to an episode in the time below
                    wait_for(lambda: episodes.is_file() and episodes.stat().st_size > 0, 60)
                time.sleep(moments.uniform(0.2, 2.0))
                run.kill()
            if not (directory / records.RUN).exists():
                continue
            # Workers of a killed controller end by themselves; then nobody holds the directory.
            found = records.finished(directory)
            assert len(found) >= held
            held = len(found)
        assert held > 0
        done = subprocess.run(command, cwd=project.path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    counts = cells(project)
    assert len(counts) == 2000
    assert set(counts.values()) == {1}
