"""The gates: what fails a session in CI, what does not, and what is said of a run that is too small to tell."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from toy_project import Project
from typer.testing import CliRunner

from pytest_pocket.cli import app

CHAMPION = """
from pytest_pocket.registry import Model
def pytest_pocket_models():
    return [Model("champion", "{backend}", "")]
"""


def champion(project: Project, backend: str, *args: str) -> pytest.RunResult:
    """All 19 tasks by a model that is as good as its backend."""
    project.pytester.makeconftest(CHAMPION.format(backend=backend))
    return project.run(
        "--pyargs", "pytest_pocket.tasks", "--pocket-model=champion", "--pocket-prompt=raw", *args
    )


@pytest.fixture
def baseline(project: Project) -> Path:
    assert champion(project, "oracle", "--pocket-records=baseline").ret == 0
    return project.path / "baseline"


def test_a_supported_drop_fails_and_says_how_large(project: Project, baseline: Path) -> None:
    result = champion(project, "noop", f"--pocket-baseline={baseline}", "--pocket-fail-worse=0.05")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "pocket: champion raw no-think t0: -1.000 against the baseline (19 pairs, p 0.000)"
            " is worse than --pocket-fail-worse 0.05"
        ]
    )


def test_failed_tests_alone_do_not_fail_what_is_no_worse(project: Project) -> None:
    first = champion(project, "noop", "--pocket-records=baseline")
    assert first.ret == pytest.ExitCode.TESTS_FAILED
    again = champion(project, "noop", "--pocket-baseline=baseline", "--pocket-fail-worse=0.05")
    assert again.ret == 0
    again.assert_outcomes(failed=19)


def test_a_baseline_without_a_gate_is_shown_and_decides_nothing(project: Project, baseline: Path) -> None:
    worse = champion(project, "noop", f"--pocket-baseline={baseline}")
    assert worse.ret == pytest.ExitCode.TESTS_FAILED  # as without the baseline: its tests failed
    worse.stdout.fnmatch_lines(["pocket: champion raw no-think t0: -1.000 against the baseline *"])
    same = champion(project, "oracle", f"--pocket-baseline={baseline}", "--pocket-records=same")
    assert same.ret == 0


def test_one_task_is_too_small_a_run_to_tell(project: Project) -> None:
    run = ("--pocket-model=half-right", "--runs=4")
    project.run(*run, "--pocket-records=baseline")
    result = project.run(*run, "--pocket-baseline=baseline", "--pocket-fail-worse=0.05")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["pocket: half-right raw *+0.000 *: too small a run to rule out a drop of 0.05*"]
    )


def test_tasks_that_must_pass_fail_a_session_whose_mean_is_good(project: Project) -> None:
    run = ("--pocket-model=half-right,oracle", "--runs=2", "--pocket-fail-under=0.5")
    assert project.run(*run).ret == 0
    result = project.run(*run, "--pocket-must-pass=greet", "--pocket-records=strict")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["pocket: --pocket-must-pass greet: 6 of 8 episodes passed"])
    oracle = project.run("--pocket-model=oracle", "--pocket-must-pass=greet", "--pocket-records=good")
    assert oracle.ret == 0


def test_a_task_that_must_pass_and_was_not_played_fails(project: Project) -> None:
    result = project.run("--pocket-model=oracle", "--pocket-must-pass=read_value")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["pocket: --pocket-must-pass read_value: no such task was played"])


def test_a_task_that_must_pass_and_is_unknown_is_a_usage_error_before_anything_runs(project: Project) -> None:
    result = project.run("--pocket-model=oracle", "--pocket-must-pass=gret")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: unknown task 'gret': choose from *read_value*greet*"])


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["serial", "xdist"])
def test_the_summary_holds_the_tables_and_the_findings(project: Project, workers: tuple[str, ...]) -> None:
    project.start(
        "--pocket-model=half-right",
        "--runs=2",
        "--pocket-fail-under=0.9",
        "--pocket-summary=summary.md",
        *workers,
        plugins=("xdist",) if workers else (),
    )
    text = (project.path / "summary.md").read_text()
    assert "- ❌ mean reward 0.5000 is below --pocket-fail-under 0.9\n" in text
    assert "| model |  | raw | full | full - raw | n | invalid |" in text
    assert "| greeting | greet |" in text


def test_a_summary_without_a_gate_leaves_the_exit_status_alone(project: Project) -> None:
    assert project.run("--pocket-model=oracle", "--pocket-summary=summary.md").ret == 0
    assert project.run("--pocket-model=toy:x", "--pocket-records=b", "--pocket-summary=s.md").ret == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--pocket-fail-worse=0.05",), "--pocket-fail-worse needs --pocket-baseline RUN: *"),
        (("--pocket-baseline=nowhere",), "nowhere holds no run.json: *"),
        (("--pocket-baseline=baseline", "--pocket-seed=3"), "*was run with --pocket-seed 0*"),
        (("--pocket-baseline=baseline", "--pocket-split=dev"), "*was run with --pocket-split eval*"),
        (
            ("--pocket-baseline=baseline", "--pocket-prompt=verbose"),
            "*holds oracle and no model and condition*",
        ),
        (
            ("--pocket-baseline=baseline", "--pocket-fail-worse=5%"),
            "--pocket-fail-worse '5%': give a number*",
        ),
        (("--pocket-summary=no/where.md",), "--pocket-summary no/where.md: its folder is missing*"),
        (("--pocket-summary=.",), "--pocket-summary .: this is a folder; give a file"),
    ],
)
def test_what_cannot_be_a_gate_is_a_usage_error(
    project: Project, options: tuple[str, ...], complaint: str
) -> None:
    project.run("--pocket-model=oracle", "--pocket-records=baseline")
    result = project.run("--pocket-model=oracle", *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {complaint}"])
    assert not (project.path / "records").exists()


def test_a_foreign_baseline_is_a_usage_error(project: Project) -> None:
    project.run("--pocket-model=oracle", "--pocket-records=baseline")
    info = json.loads((project.path / "baseline" / "run.json").read_text())
    del info["seed"]
    (project.path / "baseline" / "run.json").write_text(json.dumps(info))
    result = project.run("--pocket-model=oracle", "--pocket-baseline=baseline")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: baseline has no 'seed': it is not of this version"])


def test_shards_are_merged_and_judged_without_playing_again(
    project: Project,
) -> None:
    run = ("--pocket-model=half-right", "--runs=4")
    project.run(*run, "--pocket-records=baseline")
    for shard in ("1", "2"):
        project.run(*run, f"--pocket-shard={shard}/2", f"--pocket-records=shard-{shard}")
    merged = CliRunner().invoke(app, ["merge", "shard-1", "shard-2", "-o", "records"])
    assert merged.exit_code == 0, merged.output
    before = project.records()
    assert len(before) == 4 * 2
    judged = project.run(
        *run,
        "--pocket-resume",
        "--pocket-baseline=baseline",
        "--pocket-fail-worse=0.05",
        "--pocket-must-pass=greet",
        "--pocket-summary=summary.md",
        "-s",
    )
    assert project.records() == before
    judged.stdout.no_fnmatch_line("LOADED*")
    assert judged.ret == pytest.ExitCode.TESTS_FAILED
    judged.stdout.fnmatch_lines(["pocket: --pocket-must-pass greet: 4 of 8 episodes passed"])
    assert "4 of 8 episodes passed" in (project.path / "summary.md").read_text()


def test_the_workflow_in_the_docs_uses_options_that_there_are(pytester: pytest.Pytester) -> None:
    text = (Path(__file__).parents[1] / "docs" / "ci.md").read_text()
    workflow = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert set(workflow["jobs"]) == {"play", "judge"}
    used = set(re.findall(r"(?<![-\w])--[a-z-]+", text))
    known = set(re.findall(r"--[a-z-]+", pytester.runpytest_inprocess("--help").stdout.str()))
    assert {option for option in used if option.startswith("--pocket-")} <= known
