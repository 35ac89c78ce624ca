"""A server that a session starts for itself: waited for until it is ready, and ended whatever happens.

The server runs under a keeper, this module as a program.  The keeper holds the reading end of a pipe whose
writing end is ours alone: when the session ends, or is killed, the pipe closes, and the keeper ends the
server's whole process group.  So a server never outlives the session that started it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import httpx

from pytest_pocket.chat import Cancelled
from pytest_pocket.registry import ModelError

GRACE = 10.0
"""Seconds that a server has to end by itself."""
LAST_LINES = 12


class Process:
    """A started server.  Raises ModelError with the end of its log when it does not come up."""

    def __init__(
        self,
        command: Sequence[str],
        ready: str,
        *,
        environment: Mapping[str, str] = {},
        seconds: float = 600.0,
    ) -> None:
        """``ready`` is the address that answers 200 once the server is; ``seconds`` how long that may take."""
        self.command = tuple(command)
        self._log: IO[bytes] = tempfile.NamedTemporaryFile(prefix="pocket-server-", suffix=".log")  # noqa: SIM115
        self._cancelled = threading.Event()
        self._keeper = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, *command],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        try:
            self._wait(ready, time.monotonic() + seconds, seconds)
        except BaseException:
            self.close()
            raise

    @property
    def running(self) -> bool:
        return self._keeper.poll() is None

    def log(self) -> str:
        """The end of what the server printed."""
        text = Path(self._log.name).read_text(errors="replace")
        return "\n".join(text.splitlines()[-LAST_LINES:])

    def ended(self, seconds: float = 2.0) -> bool:
        """Whether the server is gone, or goes within that time: it hangs up before it ends."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(seconds)
        return not self.running

    def last(self) -> str:
        """The last that it printed, on one line."""
        return " | ".join(self.log().splitlines()[-3:])

    def cancel(self) -> None:
        """Stop waiting for the server, from any thread."""
        self._cancelled.set()

    def close(self) -> None:
        """End the server and everything that it started."""
        if self._keeper.stdin:
            with contextlib.suppress(OSError):
                self._keeper.stdin.close()
        try:
            self._keeper.wait(GRACE + 5)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
        with contextlib.suppress(FileNotFoundError):
            self._log.close()

    def _wait(self, ready: str, deadline: float, seconds: float) -> None:
        shown = " ".join(self.command)
        while not self._cancelled.wait(0.2):
            if not self.running:
                raise ModelError(f"the server ended before it was ready ({shown}); its log:\n{self.log()}")
            if time.monotonic() > deadline:
                raise ModelError(
                    f"the server was not ready after {seconds:.0f} s ({shown}); its log:\n{self.log()}"
                )
            # A proxy of the environment is not asked for what is on this machine.
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(ready, timeout=5, trust_env=False).is_success:
                    return
        raise Cancelled


def free_port() -> int:
    """A port of the loopback interface on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _keep(command: Sequence[str]) -> int:
    """Run a command until it ends or our standard input does."""
    try:
        # A group, and not a session: Linux shares processors out by session ("autogroup"), and a session that sleeps
        # most of the time waits for one up to seconds where a server spins, as vLLM does.
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}")
        return 127

    def end() -> None:
        sys.stdin.buffer.read()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(GRACE)
            os.killpg(server.pid, signal.SIGKILL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the pipe alone decides: a Ctrl-C reaches the session first
    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    status = server.wait()
    # What it leaves behind in its group (workers of a server that crashed) goes with it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    return status


if __name__ == "__main__":
    sys.exit(_keep(sys.argv[1:]))
