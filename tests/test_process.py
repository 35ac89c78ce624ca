"""Servers that a session starts: they come up, say why when they do not, and never outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("httpx")

from toy_project import processes, wait_for

from pytest_pocket.backends.process import Process, free_port
from pytest_pocket.chat import Cancelled
from pytest_pocket.registry import ModelError


def server(port: int, mark: str) -> list[str]:
    """A server that answers 200, with a child of its own; both have ``mark`` in their command lines."""
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)', '{mark}'])"
    serve = f"import runpy; sys.argv = ['http.server', '{port}']; runpy.run_module('http.server', run_name='__main__')"
    return [sys.executable, "-c", f"{child}; {serve}", mark]


def test_a_server_is_waited_for_and_ended_with_all_that_it_started() -> None:
    port, mark = free_port(), "pocket-mark-ended"
    process = Process(server(port, mark), f"http://127.0.0.1:{port}/", seconds=60)
    assert process.running
    assert len(processes(mark, within=True)) >= 2
    process.close()
    assert not process.running
    wait_for(lambda: not processes(mark, within=True))


def test_a_server_that_ends_too_early_shows_its_log() -> None:
    command = [sys.executable, "-c", "print('no such weights'); raise SystemExit(3)"]
    with pytest.raises(ModelError, match=r"ended before it was ready.*\n.*no such weights"):
        Process(command, f"http://127.0.0.1:{free_port()}/")


def test_a_program_that_is_not_there_is_said() -> None:
    with pytest.raises(ModelError, match="cannot start pocket-no-such-program"):
        Process(["pocket-no-such-program"], f"http://127.0.0.1:{free_port()}/")


def test_a_server_that_never_becomes_ready_is_given_up_and_ended() -> None:
    mark = "pocket-mark-silent"
    with pytest.raises(ModelError, match="not ready after 1 s"):
        Process(
            [sys.executable, "-c", "import time; time.sleep(300)", mark], "http://127.0.0.1:9/", seconds=1
        )
    wait_for(lambda: not processes(mark, within=True))


def test_waiting_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Process] = []
    begin = Process._wait

    def wait(self: Process, *arguments: object) -> None:
        started.append(self)
        threading.Timer(0.3, self.cancel).start()
        begin(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Process, "_wait", wait)
    with pytest.raises(Cancelled):
        Process([sys.executable, "-c", "import time; time.sleep(300)"], "http://127.0.0.1:9/", seconds=60)
    assert not started[0].running


def test_a_session_that_is_killed_leaves_no_server(tmp_path: Path) -> None:
    port, mark = free_port(), "pocket-mark-orphan"
    script = tmp_path / "session.py"
    script.write_text(
        "import sys, time\n"
        "from pytest_pocket.backends.process import Process\n"
        f"process = Process({server(port, mark)!r}, 'http://127.0.0.1:{port}/', seconds=60)\n"
        "print('ready', flush=True)\n"
        "time.sleep(300)\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as session:
        assert session.stdout
        assert session.stdout.readline() == "ready\n"
        assert processes(mark, within=True)
        os.kill(session.pid, signal.SIGKILL)
    wait_for(lambda: not processes(mark, within=True))
