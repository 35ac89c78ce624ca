"""Fixtures of all tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from engine_fixtures import llama_server_binary, ollama_double, vllm_command
from suite_run import play_suite
from toy_project import Project

__all__ = ["llama_server_binary", "ollama_double", "project", "suite_run", "vllm_command"]

# Tests are not timed: the first example of a property may import torch, and machines are busy.
hypothesis.settings.register_profile("usual", deadline=None)
# HYPOTHESIS_PROFILE=nightly looks for what makes a parser raise for hours rather than seconds.
hypothesis.settings.register_profile(
    "nightly",
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", 100_000)),
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "usual"))

# A shell's background job ignores interrupts, and so would all that the tests start from it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


TOGETHER = {
    # Servers of engines, and a cluster of Ray, would be started in every worker, and leave no processor to the others.
    "engines": (
        "test_engines.py",
        "test_engine_faults.py",
        "test_faults.py",
        "test_real_ollama.py",
        "test_ollama_double.py",
    ),
    "ray": ("test_ray.py",),
    # One worker plays the run for all of them.
    "preferences": ("test_dpo.py",),
}
"""Files whose tests one worker runs; those of others go wherever there is room."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Instead of ``--dist loadgroup``, whose marks xdist 3.8 does not see with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    groups = {file: group for group, files in TOGETHER.items() for file in files}
    if gone := [file for file in groups if not Path(__file__).with_name(file).exists()]:
        raise pytest.UsageError(f"TOGETHER in tests/conftest.py names files that are not there: {gone}")

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return groups.get(nodeid.partition("::")[0].rpartition("/")[2], nodeid)

    return Grouped(config, log)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "real_ollama: needs a real Ollama at OLLAMA_HOST; see test_real_ollama.py"
    )


@pytest.fixture
def project(pytester: pytest.Pytester) -> Project:
    """A user's project, with a task, models and backends of its own."""
    return Project(pytester)


@pytest.fixture(scope="session")
def suite_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of a real session: oracle and no-op on one training instance of all 19 tasks, in the sandbox."""
    return play_suite(tmp_path_factory.mktemp("suite"), "--pocket-split=train")
