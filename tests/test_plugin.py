"""The plugin as a user meets it: options, collection, what a test shows, how a session ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import pytest
from toy_project import Project, processes, table, wait_for

from pytest_pocket import pool

TASKS = ("--pyargs", "pytest_pocket.tasks")


def test_without_a_model_tasks_skip_and_one_line_names_the_models(project: Project) -> None:
    result = project.run()
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(
        ["pocket: tasks skipped, no model: give --pocket-model=NAME, one or more of oracle, noop*half-right"]
    )
    assert not (project.path / "records").exists()


def test_the_oracle_passes_and_the_noop_fails_every_shipped_task(project: Project) -> None:
    result = project.run(
        *TASKS, "--pocket-model=oracle,noop", "--pocket-prompt=raw", "--tb=no", sandbox="auto"
    )
    result.assert_outcomes(passed=19, failed=19)
    rewards = {
        model: [r["reward"] for r in project.records() if r["model"] == model] for model in ("oracle", "noop")
    }
    assert rewards == {"oracle": [1.0] * 19, "noop": [0.0] * 19}
    assert result.ret == 1
    assert result.outlines[-1] == f"pocket: records in {project.path / 'records'}"
    result.stdout.fnmatch_lines(["pocket: 38 episodes, 16 in flight", "mean reward and pass@1*"])


def test_a_test_id_reads_well_and_is_selected_by_keyword(project: Project) -> None:
    options = ("--pocket-model=oracle,half-right", "--runs=2", "--collect-only", "-q")
    ids = [line for line in project.run(*options).outlines if "::" in line]
    assert ids[:3] == [
        "conftest.py::greet[oracle-raw-think_off-t0-r01]",
        "conftest.py::greet[oracle-raw-think_off-t0-r02]",
        "conftest.py::greet[oracle-full-think_off-t0-r01]",
    ]
    assert len(ids) == 8
    kept = [
        line for line in project.run(*options, "-k", "half-right and raw and r02").outlines if "::" in line
    ]
    assert kept == ["conftest.py::greet[half-right-raw-think_off-t0-r02]"]
    assert not (project.path / "records").exists()


def test_progress_is_told_while_one_slow_episode_holds_up_the_reports(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "PATIENCE", 0.4)
    result = project.run("--pocket-model=toy:late", "--runs=4", "--pocket-prompt=raw")
    waited = [line for line in result.outlines if "waiting for" in line]
    assert waited[-1] == "pocket: 3 of 4 played, waiting for greet[toy_late-raw-think_off-t0-r01]"
    assert 2 <= len(waited) <= 5
    result.assert_outcomes(failed=4)


def test_where_no_task_is_collected_a_line_says_where_they_are(project: Project) -> None:
    project.pytester.makepyfile(test_other="def test_other(): pass")
    result = project.run("test_other.py", "--pocket-model=oracle")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["pocket: no task among these tests: --pyargs pytest_pocket.tasks has*"])


def test_one_episode_is_told_as_one(project: Project) -> None:
    result = project.run("--pocket-model=oracle", "--pocket-prompt=raw")
    result.stdout.fnmatch_lines(["pocket: 1 episode, 16 in flight"])
    result = project.run("--pocket-model=oracle", "--collect-only")
    result.stdout.fnmatch_lines(["pocket: 2 episodes"])


def test_a_project_that_has_no_task_has_none_of_our_markers(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import pytest\n\n@pytest.mark.run\ndef test_it(): pass\n")
    # In a process of its own: pytest's marks remember the names that earlier sessions of a process had.
    result = pytester.runpytest_subprocess("--strict-markers", "-p", "no:randomly", timeout=60)
    result.stdout.fnmatch_lines(["*'run' not found in `markers` configuration option*"])
    assert "pocket" not in "\n".join(pytester.runpytest_inprocess("--markers").outlines)


def test_groups_models_and_conditions_are_markers(project: Project) -> None:
    options = ("--pocket-model=oracle,noop", "--runs=2", "--collect-only", "-q", "--strict-markers")
    assert sum("::" in line for line in project.run(*TASKS, *options, "-m", "read").outlines) == 4 * 2 * 2 * 2
    assert sum("::" in line for line in project.run(*options, "-m", "greeting").outlines) == 8
    if pytest.version_tuple < (8, 3):
        return  # -m did not yet look at a marker's arguments
    by_name = "model(name='noop') and condition(name='raw-think_off-t0') and backend"
    assert sum("::" in line for line in project.run(*options, "-m", by_name).outlines) == 2


@pytest.mark.parametrize(
    "arguments",
    [[], ["."], ["conftest.py"], ["conftest.py::greet"], ["conftest.py::greet[oracle-raw-think_off-t0-r01]"]],
    ids=" ".join,
)
def test_a_task_of_a_conftest_runs_however_it_is_named(project: Project, arguments: list[str]) -> None:
    result = project.run(*arguments, "--pocket-model=oracle", "--pocket-prompt=raw")
    result.assert_outcomes(passed=1)


def test_a_task_is_imported_once_even_where_every_file_is_a_test_file(project: Project) -> None:
    project.pytester.makeini("[pytest]\npython_files = *.py\n")
    project.pytester.makepyfile(
        test_last="def test_names():\n    import sys\n    assert not [name for name in sys.modules if name.startswith('tasks')]"
        "\n    assert sys.modules['pytest_pocket.tasks.read_value']"
    )
    result = project.start(
        "--pyargs", "pytest_pocket.tasks.read_value", "test_last.py", "--pocket-model=oracle", sandbox="auto"
    )
    result.assert_outcomes(passed=3)


def test_a_file_may_hold_ordinary_tests_beside_a_task(project: Project) -> None:
    path = project.path / "test_both.py"
    path.write_text((project.path / "conftest.py").read_text() + "\n\ndef test_plain():\n    pass\n")
    project.pytester.makeconftest("pytest_plugins = ['test_both']")
    result = project.start("--pocket-model=oracle", "--pocket-prompt=raw", "-v")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines_random(["test_both.py::greet*PASSED*", "test_both.py::test_plain PASSED*"])


def test_a_failure_shows_the_trajectory_and_the_check_but_no_traceback(project: Project) -> None:
    result = project.run("--pocket-model=half-right", "--runs=2", "--pocket-prompt=raw")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "early_stop: greeting: 0 (hello nobody)",
            "  greet run 2 (seed 2000000001) * reward 0 * stop: answer after 1 turn *5+3 tokens*",
            "    user | Greet the one in name.txt.",
            "    says | hello nobody",
            "FAILED conftest.py::greet[[]half-right-raw-think_off-t0-r02[]] - Failed: early_st*",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*plugin.py*")


def test_an_invalid_episode_is_an_error_and_fails_the_session(project: Project) -> None:
    result = project.run("--pocket-model=toy:broken,toy:cut", "--pocket-prompt=raw", "--junitxml=junit.xml")
    result.assert_outcomes(errors=2)
    assert result.ret == 1
    suite = ElementTree.parse(project.path / "junit.xml").getroot()[0]
    assert (suite.get("errors"), suite.get("failures")) == ("2", "0")
    assert {record["outcome"] for record in project.records()} == {"infra", "truncated"}
    result.stdout.fnmatch_lines(
        ["infra: EngineError: the engine is on fire", "*2 of 2 episodes (100.0%) are invalid*"]
    )


def test_junit_carries_the_numbers(project: Project) -> None:
    project.run("--pocket-model=half-right", "--runs=2", "--pocket-prompt=raw", "--junitxml=junit.xml")
    cases = list(ElementTree.parse(project.path / "junit.xml").getroot().iter("testcase"))
    first = {each.get("name"): each.get("value") for each in cases[0].iter("property")}
    assert first["model"] == "half-right"
    assert first["backend"] == "toy"
    assert first["outcome"] == "passed"
    assert float(first["reward"] or 0) == 1.0
    assert first["completion_tokens"] == "6"
    assert {
        "task",
        "group",
        "prompt",
        "think",
        "temperature",
        "best_of",
        "run",
        "sample",
        "seed",
    } <= first.keys()
    assert {"stop", "turns", "prompt_tokens", "seconds", "suite"} <= first.keys()
    assert first["condition"] == "raw-think_off-t0"
    names = [each.get("name") for each in cases[1].iter("property")]
    assert len(names) == len(set(names))


def test_what_a_model_writes_cannot_reach_the_terminal_or_break_the_xml(project: Project) -> None:
    result = project.start("--pocket-model=toy:hostile", "--junitxml=junit.xml", "-vv", "--color=no")
    result.assert_outcomes(failed=2)
    assert not set("\x1b\x00\x9b\x07\u202e").intersection("\n".join(result.outlines))
    root = ElementTree.parse(project.path / "junit.xml").getroot()
    assert "\\x1b[31mred\\x00\\ud800" in "".join(root.itertext())
    assert project.records()[0]["answer"].startswith("\x1b[31mred\x00\ufffd")


def test_last_failed_plays_only_what_failed(project: Project) -> None:
    options = ("--pocket-model=half-right", "--runs=4", "--pocket-prompt=raw")
    project.run(*options).assert_outcomes(passed=2, failed=2)
    again = project.run(*options, "--lf", "--pocket-records=again")
    again.assert_outcomes(failed=2)
    runs = [
        json.loads(line)["run"]
        for line in (project.path / "again" / "episodes.jsonl").read_text().splitlines()
    ]
    assert sorted(runs) == [2, 4]


def test_an_installed_task_has_one_id_however_it_is_asked_for(project: Project) -> None:
    options = ("--pocket-model=noop", "--pocket-prompt=raw")
    first = project.run("--pyargs", "pytest_pocket.tasks.read_value", *options, "--tb=no", "-v")
    first.stdout.fnmatch_lines(
        ["pytest_pocket/tasks/read_value.py::read_value[[]noop-raw-think_off-t0-r01[]] FAILED*"]
    )
    project.run(*TASKS, *options, "--lf", "--tb=no", "--pocket-records=again").assert_outcomes(
        failed=1, deselected=18
    )


def test_exitfirst_ends_fast_and_keeps_what_had_finished(project: Project) -> None:
    start = time.monotonic()
    result = project.run("--pocket-model=toy:late,toy:slow", "--pocket-prompt=raw", "-x", "--runs=4")
    assert time.monotonic() - start < 30
    result.assert_outcomes(failed=1)
    assert sorted((record["model"], record["run"]) for record in project.records()) == [
        ("toy:late", n) for n in (1, 2, 3, 4)
    ]


def test_a_session_without_pocket_tests_opens_nothing(project: Project) -> None:
    project.pytester.makepyfile("def test_mine(): pass")
    result = project.run("--pocket-model=toy:unloadable", "-k", "test_mine", sandbox="docker")
    result.assert_outcomes(passed=1, deselected=2)
    assert not (project.path / "records").exists()


def test_options_have_ini_twins_and_the_command_line_wins(project: Project) -> None:
    project.pytester.makeini(
        "[pytest]\npocket_model =\n    oracle\n    noop\npocket_runs = 3\npocket_prompt = raw\n"
    )
    assert sum("::" in line for line in project.run("--collect-only", "-q").outlines) == 6
    lines = project.run("--collect-only", "-q", "--runs=1", "--pocket-model=oracle").outlines
    assert sum("::" in line for line in lines) == 1


def test_a_model_may_be_repeated_and_listed(project: Project) -> None:
    options = (
        "--pocket-model=oracle,noop",
        "--pocket-model=half-right",
        "--pocket-model=oracle",
        "--pocket-prompt=raw",
    )
    assert sum("::" in line for line in project.run(*options, "--collect-only", "-q").outlines) == 3


USAGE = {
    "--pocket-model=gpt-9": "unknown model 'gpt-9': choose from oracle, noop*",
    "--pocket-model=oracle --pocket-prompt=rwa": "unknown prompt 'rwa': choose from raw, full, verbose",
    "--pocket-model=oracle --pocket-think=maybe": "unknown think value 'maybe': choose from off, on",
    "--pocket-model=oracle --pocket-temperature=warm": "temperature 'warm' *",
    "--pocket-model=oracle --pocket-temperature=nan": "temperature nan *",
    "--pocket-model=oracle --pocket-temperature=,": "--pocket-temperature ',' holds no value*",
    "--pocket-model=oracle --pocket-best-of=2": "best-of 2 at temperature 0 *",
    "--pocket-model=oracle --runs=0": "--pocket-runs 0: give a whole number from 1 to 10000",
    "--pocket-model=oracle --runs=many": "--pocket-runs 'many': give a whole number from 1 to 10000",
    "--pocket-model=oracle --pocket-samples=2": "--pocket-samples 2 at temperature 0 *",
    "--pocket-model=oracle --pocket-split=test": "--pocket-split 'test': choose from train, dev, eval",
    "--pocket-model=oracle --pocket-seed=-1": "--pocket-seed -1: *",
    "--pocket-model=oracle --pocket-executor=slurm": "--pocket-executor 'slurm': choose from local, ray",
    "--pocket-model=oracle --pocket-in-flight=0": "--pocket-in-flight 0: *",
    "--pocket-model=oracle --pocket-timeout=nan": "--pocket-timeout 'nan': *",
    "--pocket-model=oracle --pocket-fail-under=90": "--pocket-fail-under '90': give a number from 0 to 1",
    "--pocket-model=oracle --pocket-sandbox=chroot": "--pocket-sandbox 'chroot': choose from auto, bwrap, *",
    "--pocket-model=oracle --pocket-records=conftest.py/x": "cannot write records to *conftest.py/x*choose another*",
    "--pocket-model=toy:unloadable": "the weights of 'unloadable' are missing: fetch them",
    "--pocket-model=toy:thoughtless --pocket-think=on": "--pocket-think on: model 'toy:thoughtless' has no switch*",
    "--pocket-model=oracle --pocket-records=full": "*full already holds a run: *",
    # Before the engine is loaded, which may take minutes.
    "--pocket-model=toy:unloadable --pocket-records=full": "*full already holds a run: *",
    "--pocket-model=toy:unloadable --pocket-records=conftest.py/x": "cannot write records to *conftest.py/x*",
    f"--pocket-model=toy:unloadable --pocket-records={'x' * 300}": "cannot write records to *File name too long*",
    "--pocket-model=oracle:x": "unknown model 'oracle:x': choose from *",
    "--runs=0": "--pocket-runs 0: *",
    "--pocket-model=": "--pocket-model without a model: give --pocket-model=NAME*",
    "--pocket-model= --pocket-fail-under=0.9": "--pocket-model without a model: *",
    "--pocket-fail-under=0.9": "--pocket-fail-under without a model: *",
    "--pocket-must-pass=greet": "--pocket-must-pass without a model: *",
    "--pocket-summary=out.md": "--pocket-summary without a model: *",
}


@pytest.mark.parametrize("command", USAGE)
def test_a_wrong_option_is_one_line_and_exit_status_4(project: Project, command: str) -> None:
    (project.path / "full").mkdir()
    (project.path / "full" / "episodes.jsonl").write_text("{}\n")
    result = project.run(*command.split())
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    lines = [line for line in (*result.outlines, *result.errlines) if line.startswith("ERROR: ")]
    assert len(lines) == 1
    (result.stderr if lines[0] in result.errlines else result.stdout).fnmatch_lines(
        [f"ERROR: {USAGE[command]}"]
    )
    assert not (project.path / "records").exists()


def test_a_broken_manifest_is_a_usage_error(project: Project) -> None:
    (project.path / "checkpoint").mkdir()
    (project.path / "checkpoint" / "pocket.json").write_text("{")
    result = project.run("--pocket-model=checkpoint")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: broken manifest *checkpoint/pocket.json*"])


def test_a_broken_table_of_models_is_one_line_for_a_session_without_a_model_too(project: Project) -> None:
    (project.path / "pyproject.toml").write_text("[tool.pocket.models.mine]\nbackends = 'hf'\n")
    result = project.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    line = "ERROR: [[]tool.pocket.models.mine] in *: unknown key 'backends': choose from *"
    result.stderr.fnmatch_lines([line], consecutive=True)
    result.stdout.no_fnmatch_line("*tool.pocket.models*")


def test_a_hook_that_breaks_is_one_line_for_a_session_without_a_model_too(project: Project) -> None:
    project.pytester.makeconftest("def pytest_pocket_tasks():\n    return 3 / 0\n")
    result = project.run()
    assert result.ret == pytest.ExitCode.INTERRUPTED
    line = "the hook pytest_pocket_tasks broke: ZeroDivisionError: division by zero (conftest.py:2)"
    result.stdout.fnmatch_lines(["*ERROR collecting*", line, "*short test summary*"], consecutive=True)


@pytest.mark.parametrize(
    ("hook", "given", "line"),
    [
        ("models", "['mine']", "the hook pytest_pocket_models gave 'mine': give a list of Models"),
        (
            "models",
            "Model('a', 'toy')",
            "the hook pytest_pocket_models gave Model(name='a'*: give a list of Models",
        ),
        ("models", "'mine'", "the hook pytest_pocket_models gave 'mine': give a list of Models"),
        (
            "models",
            "[read_manifest(Path('gone'))]",
            "gone holds no pocket.json: give a checkpoint directory*",
        ),
        ("models", "[Path(3)]", "the hook pytest_pocket_models broke: TypeError: * (conftest.py:*)"),
        ("models", "3 / 0", "the hook pytest_pocket_models broke: ZeroDivisionError: * (conftest.py:*)"),
        (
            "backends",
            "[Scripted]",
            "the hook pytest_pocket_backends gave [[]<class *: give a dict of names and *",
        ),
        (
            "backends",
            "{'toy': 3}",
            "the hook pytest_pocket_backends gave {'toy': 3}: give a dict of names and *",
        ),
        ("tasks", "Greet()", "the hook pytest_pocket_tasks gave <*Greet object at *: give a list of Tasks"),
        ("tasks", "[Greet]", "the hook pytest_pocket_tasks gave <class *: give a list of Tasks"),
        ("tasks", "(3 / 0 for _ in [1])", "the hook pytest_pocket_tasks broke: ZeroDivisionError: *"),
        ("tasks", "[type('Bare', (Task,), {})()]", "task Bare has the name None: give letters, *"),
        (
            "tasks",
            "[type('A', (Greet,), {'name': 'say hi'})()]",
            "task A has the name 'say hi': give letters, *",
        ),
        (
            "tasks",
            "[type('A', (Greet,), {'group': '_b'})()]",
            "task A has the group '_b': give an identifier",
        ),
    ],
)
@pytest.mark.parametrize("model", ["--pocket-model=oracle", "--pocket-list"])
def test_a_slip_in_a_hook_is_a_usage_error(
    project: Project, model: str, hook: str, given: str, line: str
) -> None:
    text = (project.path / "conftest.py").read_text()
    imports = "from pathlib import Path\nfrom pytest_pocket.registry import read_manifest\n"
    project.pytester.makeconftest(f"{imports}{text}\n\ndef pytest_pocket_{hook}():\n    return {given}\n")
    result = project.run(model)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {line}"])


def test_warnings_as_errors_do_not_break_a_session_without_a_sandbox(project: Project) -> None:
    result = project.start("--pocket-model=oracle", "-W", "error")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["pocket: *, no sandbox", "pocket: --pocket-sandbox=none: *without any isolation"]
    )


def test_what_k_deselects_is_not_said_to_be_elsewhere(project: Project) -> None:
    result = project.run("--pocket-model=oracle", "-k", "nothing")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "pocket: no task among these tests" in result.outlines


def test_options_from_the_environment_are_recorded_with_the_command(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "--runs=2")
    project.run("--pocket-model=oracle")
    info = json.loads((project.path / "records" / "run.json").read_text())
    assert info["command"][:3] == ["env", "PYTEST_ADDOPTS=--runs=2", "pytest"]
    assert info["options"]["runs"] == 2


def test_without_a_sandbox_the_session_stops_and_says_what_to_do(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(project.path))
    result = project.run("--pocket-model=oracle", sandbox="auto")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: no sandbox works on this machine; on Linux `apt install bubblewrap`*"]
    )
    assert not (project.path / "records").exists()


def test_a_task_with_a_shipped_name_or_given_twice_is_a_usage_error(project: Project) -> None:
    text = (project.path / "conftest.py").read_text()
    project.pytester.makeconftest(text.replace('"greet"', '"read_value"'))
    assert project.run("--pocket-model=oracle").ret == pytest.ExitCode.USAGE_ERROR
    project.pytester.makeconftest(text.replace("[Greet()]", "[Greet(), Greet()]"))
    result = project.run("--pocket-model=oracle")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: task 'greet' is added twice: choose another name"])


def test_list_shows_models_tasks_and_conditions(project: Project) -> None:
    result = project.run("--pocket-list")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["  oracle *", "  half-right *toy*", "  read *read_value*", "  greeting greet", "*raw full verbose"]
    )


def test_fail_under_decides_by_the_mean_reward(project: Project) -> None:
    options = ("--pocket-model=half-right", "--runs=4")
    good = project.run(*options, "--pocket-fail-under=0.5")
    assert good.ret == 0
    good.assert_outcomes(passed=4, failed=4)
    good.stdout.fnmatch_lines(["pocket: mean reward 0.5000 is at least --pocket-fail-under 0.5"])
    bad = project.run(*options, "--pocket-fail-under=0.51", "--pocket-records=bad")
    assert bad.ret == 1
    bad.stdout.fnmatch_lines(["pocket: mean reward 0.5000 is below --pocket-fail-under 0.51"])


@pytest.mark.parametrize(
    ("models", "test"),
    [("oracle,toy:broken", "pass"), ("oracle", "assert False")],
    ids=["invalid", "other test"],
)
def test_fail_under_forgives_neither_invalid_episodes_nor_other_tests(
    project: Project, models: str, test: str
) -> None:
    project.pytester.makepyfile(f"def test_mine(): {test}")
    result = project.run(f"--pocket-model={models}", "--pocket-fail-under=0.1")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["pocket: mean reward 1.0000 is at least *", "pocket: the session fails: there are errors*"]
    )


def test_runs_is_left_to_a_conftest_that_has_it(project: Project) -> None:
    own = "\n\ndef pytest_addoption(parser):\n    parser.addoption('--runs', default='none')\n"
    project.pytester.makeconftest((project.path / "conftest.py").read_text() + own)
    result = project.run("--runs=7", "--pocket-runs=2", "--pocket-model=oracle", "--pocket-prompt=raw")
    result.assert_outcomes(passed=2)


@pytest.mark.skipif(pytest.version_tuple < (8, 2), reason="pytest reads files of options from 8.2 on")
def test_runs_may_stand_in_a_file_of_options(project: Project) -> None:
    (project.path / "options").write_text("--runs=2\n")
    project.run("--pocket-model=oracle", "@options").assert_outcomes(passed=4)


def test_paths_may_be_arguments_of_pytest_main(project: Project) -> None:
    code = "import pytest, pathlib; raise SystemExit(pytest.main([pathlib.Path('conftest.py'), '-q']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=project.path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 skipped" in done.stdout


def test_a_conftest_that_comes_later_may_have_runs_where_nobody_asked_for_ours(project: Project) -> None:
    (project.path / "sub").mkdir()
    late = "def pytest_addoption(parser):\n    parser.addoption('--runs')\n"
    (project.path / "sub" / "conftest.py").write_text(late)
    (project.path / "sub" / "test_other.py").write_text("def test_other(): pass\n")
    project.run().assert_outcomes(passed=1, skipped=1)


def test_samples_and_best_of_play_what_they_say(project: Project) -> None:
    options = ("--pocket-model=half-right", "--pocket-prompt=raw", "--pocket-temperature=0.5")
    result = project.run(*options, "--pocket-samples=2", "--pocket-best-of=1,3", "-v")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["*::greet[[]half-right-raw-think_off-t0.5-bo3-r01-s2[]] PASSED*"])
    records = project.records()
    assert len(records) == 2 * (1 + 3)
    assert sum(record["chosen"] for record in records) == 4
    result.stdout.fnmatch_lines(["*any of 3  *"])


def test_a_rerun_is_a_fresh_attempt(project: Project) -> None:
    pytest.importorskip("pytest_rerunfailures")
    result = project.start(
        "--pocket-model=toy:flaky", "--pocket-prompt=raw", "--reruns=1", plugins=["pytest_rerunfailures"]
    )
    assert [(record["outcome"], record["rerun"]) for record in project.records()][:2] == [
        ("infra", 0),
        ("early_stop", 1),
    ]
    result.stdout.fnmatch_lines(["*rerun*"])
    assert "infra" not in "\n".join(table(result))


def test_a_shuffled_order_and_a_timeout_change_no_number(project: Project) -> None:
    pytest.importorskip("pytest_timeout")
    pytest.importorskip("pytest_randomly")
    options = ("--pocket-model=half-right,oracle", "--runs=3")
    plain = project.start(*options)
    plugins = ["pytest_randomly", "pytest_timeout"]
    shuffled = project.start(
        *options, "--timeout=30", "-p", "randomly", "--pocket-records=other", plugins=plugins[1:]
    )
    shuffled.stdout.fnmatch_lines(["Using --randomly-seed=*"])
    assert table(plain) == table(shuffled)


def test_a_test_that_ends_before_its_episode_is_said_to_be_in_no_table(project: Project) -> None:
    pytest.importorskip("pytest_timeout")
    result = project.start(
        "--pocket-model=oracle,toy:sleeper",
        "--pocket-prompt=raw",
        "--timeout=1",
        "--pocket-fail-under=0",
        "--junitxml=out.xml",
        plugins=["pytest_timeout"],
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["pocket: 1 test failed before the episode ended: not in the table"])
    said = {
        each.get("value")
        for each in ElementTree.parse(project.path / "out.xml").iter("property")
        if each.get("name") in ("model", "outcome")
    }
    assert said == {"oracle", "passed", "toy:sleeper"}


def test_an_interrupt_ends_at_once_and_leaves_no_process_behind(project: Project) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--pocket-model=toy:sleeper",
        "--runs=6",
        "--pocket-records=records",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=project.path, text=True
    ) as run:
        wait_for(lambda: len(processes("sleep 9.753")) >= 6)
        start = time.monotonic()
        run.send_signal(signal.SIGINT)
        output, _ = run.communicate(timeout=20)
    assert time.monotonic() - start < 8, output
    assert run.returncode == pytest.ExitCode.INTERRUPTED
    assert project.records() == []
    wait_for(lambda: not processes("sleep 9.753"))


def test_an_unused_plugin_imports_nothing_and_skips_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import sys\n"
        "def test_modules():\n"
        "    ours = {name for name in sys.modules if name.startswith('pytest_pocket')}\n"
        "    allowed = {'', '.chat', '.sandbox', '.task', '.hookspecs', '.plugin'}\n"
        "    assert {name.removeprefix('pytest_pocket') for name in ours} <= allowed\n"
        "    assert not {'torch', 'numpy', 'scipy', 'rich', 'transformers'} & sys.modules.keys()\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        result = pytester.runpytest_subprocess("-p", "pytest_pocket.plugin", "--strict-markers", timeout=30)
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*pocket: *")
