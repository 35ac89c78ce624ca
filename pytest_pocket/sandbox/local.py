"""No sandbox at all: a temporary directory and a shell, as the user who runs pytest.

For machines where nothing else works, and for models that one trusts.  A command can read, write and send
whatever that user can, and a process that leaves its process group survives its call.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import IO

from pytest_pocket.sandbox import (
    ENVIRONMENT,
    CommandResult,
    FileState,
    Limits,
    SandboxError,
    SandboxUnavailable,
    tree,
)

TIMED_OUT = 124
TOO_MUCH_OUTPUT = 137
LOOK_SECONDS = 0.02
GONE = (ProcessLookupError, PermissionError) if sys.platform == "darwin" else (ProcessLookupError,)
"""What a process group without living members is said to be: macOS may not signal zombies."""


class LocalSandbox:
    """One open workspace.  See :class:`pytest_pocket.sandbox.Sandbox`."""

    def __init__(self, files: Mapping[str, str], limits: Limits) -> None:
        self.limits = limits
        self._closed = threading.Event()
        self._busy = threading.RLock()
        self._folder = tempfile.mkdtemp(prefix="pocket-local-")
        self._workspace = os.path.join(self._folder, "workspace")
        os.mkdir(self._workspace)
        try:
            tree.write(self._workspace, files)
        except BaseException:
            self.close()
            raise

    def run(self, script: str, *, stdin: bytes = b"", seconds: float | None = None) -> CommandResult:
        """Run a bash script in the workspace root."""
        if "\0" in script:
            raise ValueError("a script cannot contain a NUL byte")
        with self._busy:
            if self._closed.is_set():
                raise SandboxError("the sandbox is closed")
            with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output:
                given.write(stdin)
                given.seek(0)
                process = subprocess.Popen(
                    ["bash", "-c", script, "bash"],
                    cwd=self._workspace,
                    env={
                        "PATH": os.environ.get("PATH", os.defpath),
                        "HOME": self._workspace,
                        **ENVIRONMENT,
                    },
                    stdin=given,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
                try:
                    forced = self._await_end(
                        process, output, self.limits.call_seconds if seconds is None else seconds
                    )
                finally:
                    with contextlib.suppress(*GONE):
                        os.killpg(process.pid, signal.SIGKILL)
                    status = process.wait()
                return self._result(output, status if forced is None else forced, forced == TIMED_OUT)

    def _await_end(self, process: subprocess.Popen[bytes], output: IO[bytes], seconds: float) -> int | None:
        """Wait for the shell; the status of a call that had to be ended, else None."""
        deadline = time.monotonic() + seconds
        while True:
            if _has_ended(process):
                return None
            if self._closed.is_set():
                raise SandboxError("the sandbox was closed")
            if time.monotonic() >= deadline:
                return TIMED_OUT
            if os.fstat(output.fileno()).st_size > self.limits.output_bytes:
                return TOO_MUCH_OUTPUT
            time.sleep(LOOK_SECONDS)

    def _result(self, output: IO[bytes], status: int, timed_out: bool) -> CommandResult:
        output.seek(0)
        text = output.read(self.limits.output_bytes + 1)
        cut = len(text) > self.limits.output_bytes
        # As a shell shows a death by signal.
        return CommandResult(
            128 - status if status < 0 else status, text[: self.limits.output_bytes], timed_out, cut
        )

    def snapshot(self) -> Mapping[str, FileState]:
        """Every file of the workspace."""
        with self._busy:
            if self._closed.is_set():
                raise SandboxError("the sandbox is closed")
            folder = os.open(self._workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                return tree.read(folder, self.limits.workspace_bytes)
            except OSError as error:
                raise SandboxError(f"cannot read the workspace: {error}") from error
            finally:
                os.close(folder)

    def close(self) -> None:
        """End a call that runs, and remove the directory."""
        self._closed.set()
        with self._busy:
            shutil.rmtree(self._folder, ignore_errors=True)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a shell has ended."""
    if hasattr(os, "waitid"):
        # Not reaped yet: until it is, its process group's number cannot belong to anybody else.
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    # macOS, before Python 3.13: it is reaped here, and its number is free for as long as it takes to end its group.
    return process.poll() is not None


class LocalProvider:
    """Workspaces without isolation."""

    name = "none"
    caveat = "--pocket-sandbox=none: models run commands with all your rights, without any isolation"

    def probe(self) -> None:
        """Raises SandboxUnavailable without bash."""
        if shutil.which("bash") is None:
            raise SandboxUnavailable("bash is not installed, and the tools need it")

    def open(self, files: Mapping[str, str], limits: Limits = Limits()) -> LocalSandbox:
        """A fresh temporary directory."""
        return LocalSandbox(files, limits)
