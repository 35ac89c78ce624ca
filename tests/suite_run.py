"""Real sessions over the shipped tasks, for the tests of what reads records."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def play_one_task(folder: Path, model: str) -> subprocess.CompletedProcess[str]:
    """Play ``answer_directly`` with a model, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--pyargs",
        "pytest_pocket.tasks",
        "-q",
        "-k",
        "answer_directly",
    ]
    return subprocess.run(
        [*command, f"--pocket-model={model}"], capture_output=True, text=True, timeout=120, cwd=folder
    )


def play_suite(folder: Path, *options: str) -> Path:
    """Play oracle and no-op on the shipped tasks, in a process of its own; the run directory."""
    command = [sys.executable, "-m", "pytest", "--pyargs", "pytest_pocket.tasks", "-q", "--tb=no"]
    command += ["--pocket-model=oracle,noop", "--pocket-records=run", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "run"
