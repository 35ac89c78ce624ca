"""The provider without isolation: same results as a sandbox, and nothing left behind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pytest_pocket.sandbox import FileState, Limits, SandboxError, select
from pytest_pocket.sandbox.local import LocalProvider, LocalSandbox

LIMITS = Limits(output_bytes=2**16, call_seconds=3.0)


@pytest.fixture(params=["here", "macos"])
def sandbox(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalSandbox]:
    if request.param == "macos":
        monkeypatch.delattr(os, "waitid", raising=False)
    with closing(
        LocalProvider().open({"a.txt": "alpha\n", "d/x.sh": "#!/bin/bash\necho ran\n"}, LIMITS)
    ) as opened:
        yield opened


def test_it_says_what_it_is() -> None:
    assert "without any isolation" in select("none").caveat


def test_a_script_runs_in_the_workspace(sandbox: LocalSandbox) -> None:
    result = sandbox.run("cat; cat a.txt; ./d/x.sh; echo err >&2; exit 7", stdin=b"in\n")
    assert (result.status, result.output) == (7, b"in\nalpha\nran\nerr\n")
    assert sandbox.run("kill -9 $$").status == 137


def test_the_environment_is_clean(sandbox: LocalSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKET_SECRET", "s3cret")
    assert b"s3cret" not in sandbox.run("env").output


def test_a_hung_command_times_out(sandbox: LocalSandbox) -> None:
    start = time.monotonic()
    result = sandbox.run("echo a; sleep 30 & sleep 30", seconds=0.2)
    assert (result.status, result.output, result.timed_out) == (124, b"a\n", True)
    assert time.monotonic() - start < 20
    assert sandbox.run("echo alive").output == b"alive\n"


def test_endless_output_is_cut(sandbox: LocalSandbox) -> None:
    result = sandbox.run("yes")
    assert (result.cut, len(result.output)) == (True, LIMITS.output_bytes)


def test_a_process_left_in_the_background_is_killed(sandbox: LocalSandbox) -> None:
    pid = int(sandbox.run("sleep 60 & echo $!").output)
    status = Path(f"/proc/{pid}/status")
    give_up = time.monotonic() + 20
    while status.exists() and "\nState:\tZ" not in status.read_text():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_symlinks_are_not_followed(sandbox: LocalSandbox) -> None:
    sandbox.run("ln -s /etc/passwd p; mkfifo f")
    states = sandbox.snapshot()
    assert states["p"] == FileState("link", b"/etc/passwd")
    assert states["f"].kind == "other"
    assert states["d/x.sh"].executable


def test_close_from_another_thread_cancels_and_removes_the_directory(sandbox: LocalSandbox) -> None:
    threading.Timer(0.2, sandbox.close).start()
    with pytest.raises(SandboxError, match="closed"):
        sandbox.run("sleep 60", seconds=60)
    sandbox.close()
    assert not os.path.exists(sandbox._folder)
    with pytest.raises(SandboxError, match="closed"):
        sandbox.snapshot()
