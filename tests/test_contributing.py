"""What CONTRIBUTING shows works as it stands there: a task, a model, a backend of a user's own conftest.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
TASK, MODEL, BACKEND = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_each_is_under_40_lines() -> None:
    assert max(block.count("\n") for block in (TASK, MODEL, BACKEND)) < 40


def test_a_task_that_the_oracle_passes_and_the_no_op_does_not(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(TASK)
    result = pytester.runpytest_subprocess(".", "--pocket-model=oracle,noop", "-v")
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines_random(
        ["*conftest.py::greet[[]oracle-raw-*PASSED*", "*conftest.py::greet[[]noop-full-*FAILED*"]
    )


def test_a_model_of_ones_own_beside_a_task_of_ones_own(pytester: pytest.Pytester) -> None:
    """The model is a checkpoint that is there: the one that ships."""
    from pytest_pocket.registry import shipped

    pytester.makeconftest(TASK + MODEL.replace("path/to/checkpoint", str(shipped() / "sft-run6")))
    result = pytester.runpytest_subprocess(".", "--pocket-model=mine", "--pocket-fail-under=0")
    assert result.ret == 0  # the gate: how well it does at a task that it never saw is no matter here
    result.stdout.fnmatch_lines(["mine *reward*"])


def test_a_backend_of_ones_own(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(BACKEND)
    result = pytester.runpytest_subprocess(
        *(
            "--pyargs",
            "pytest_pocket.tasks",
            "--pocket-model=polly",
            "-k",
            "answer_directly or read_value",
            "-v",
        )
    )
    result.assert_outcomes(failed=4)
    result.stdout.fnmatch_lines(["*read_value[[]polly-raw-*FAILED*"])
