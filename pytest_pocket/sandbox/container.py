"""The second provider: one Docker or Podman container an episode, for machines where bubblewrap cannot run.

Slower to start than bubblewrap, but it works on macOS and Windows, and its memory limit covers the whole
sandbox.  Calls go through ``exec``; the final files through a tar stream, which is read, never extracted.

Process 1 is the container's root, with no capability but to kill; calls have another user, and so cannot trace it,
limit it, or make it the first to go when memory ends.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import secrets
import select
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from pytest_pocket.sandbox import (
    ENVIRONMENT,
    CommandResult,
    FileState,
    Limits,
    SandboxError,
    SandboxUnavailable,
    seccomp,
    tree,
)

USER = "1000:1000"
"""Whose the calls are."""
DEFAULT_IMAGE = "python:3.11"
"""Needs bash, git, python3 and tar.  The environment variable POCKET_SANDBOX_IMAGE names another."""
OWNED_BY_ROOT = {
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "safe.directory",
    "GIT_CONFIG_VALUE_0": "*",
}
"""Lets git work in a folder that is not the caller's own."""
EMPTY = ("/sys", "/sys/fs/cgroup", "/dev/pts", "/dev/mqueue")
"""What would tell about the machine, and where terminals and queues are made."""
START_SECONDS = 120.0
PROCESSES = 16_384
"""Of the user in all containers together; those of one are held by its own limit."""
KILL_SECONDS = 10.0
TIMED_OUT = 124
TOO_MUCH_OUTPUT = 137
# Docker's runc gives a tmpfs the mode of the folder below it, whatever was asked for.
# Process 1 needs no process to end a fork bomb that leaves no room for another `exec`.
INIT = (
    "chmod 1777 /workspace /tmp; trap 'kill -9 -1 2>/dev/null' USR1; while :; do sleep 1000 & wait $!; done"
)
FILL = "until [ -w /workspace ] && [ -w /tmp ]; do sleep 0.01; done; tar -xf - --no-same-owner"
"""What puts files into the workspace, once process 1 has begun."""
# Spares process 1, and the shell that does this.
KILL_OTHERS = "kill -9 -1 2>/dev/null; :"
# Files take memory even when nothing is in them.  More than a snapshot shows are no use to anybody.
CLEAR = f"""n=0
for folder in /workspace /tmp; do set -- $(stat -f -c '%c %d' $folder); n=$((n + $1 - $2)); done
[ $n -ge {2 * tree.MAX_ENTRIES} ] || exit 0
exec 2>/dev/null
chmod -R u+rwx /workspace /tmp
find /workspace /tmp -mindepth 1 -delete
:"""
SPARE = 32 * 2**20
"""Bytes of memory more for a container that has none left to end a call with."""
# When memory ends, calls go before process 1.
CALL = 'echo 1000 2>/dev/null >/proc/self/oom_score_adj; exec bash -c "$0" bash'


def image() -> str:
    """The image that containers are made from."""
    return os.environ.get("POCKET_SANDBOX_IMAGE") or DEFAULT_IMAGE


INODE_BYTES = 1024
"""About what a file without content takes of memory, with its name."""


def start_command(engine: str, name: str, limits: Limits, profile: str) -> list[str]:
    """The command line that starts a container which waits for calls; ``profile`` is its seccomp profile's file."""
    size = f"{limits.workspace_bytes},mode=1777"
    if engine == "docker":
        # Files without content take memory as well, and stay.  Podman knows no such option.
        size += f",nr_inodes={limits.memory_bytes // 4 // INODE_BYTES}"
    words = [engine, "run", "--detach", "--rm", "--name", name, "--network", "none", "--read-only"]
    words += ["--user", "0:0", "--cap-drop", "ALL", "--cap-add", "KILL"]
    words += ["--security-opt", "no-new-privileges", "--security-opt", f"seccomp={profile}"]
    # Without /dev/shm, and without what Podman makes writable beside our two: they would not count.
    words += ["--ipc", "none", *(["--read-only-tmpfs=false"] if engine == "podman" else [])]
    for folder in EMPTY:
        words += ["--tmpfs", f"{folder}:ro,size=4096,mode=0555"]
    words += [
        "--pids-limit",
        str(limits.processes),
        "--ulimit",
        f"cpu={limits.cpu_seconds}",
        "--ulimit",
        "core=0",
        "--ulimit",
        "nofile=1024:1024",
    ]
    if sys.platform == "linux":
        # Unasked, Podman's root would raise it, which not every machine's root may.
        hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        most = PROCESSES if hard == resource.RLIM_INFINITY else min(PROCESSES, hard)
        words += ["--ulimit", f"nproc={most}:{most}"]
    words += _memory(limits.memory_bytes)
    words += ["--tmpfs", f"/workspace:rw,exec,nosuid,nodev,size={size}"]
    words += ["--tmpfs", f"/tmp:rw,exec,nosuid,nodev,size={size}"]
    words += ["--workdir", "/workspace", "--entrypoint", "bash"]
    for key, value in {"HOME": "/workspace", **ENVIRONMENT, **OWNED_BY_ROOT}.items():
        words += ["--env", f"{key}={value}"]
    return [*words, image(), "-c", INIT]


def _memory(size: int) -> list[str]:
    return ["--memory", str(size), "--memory-swap", str(size)]


def packed(files: Mapping[str, str]) -> bytes:
    """The files as a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, text in files.items():
            data = text.encode()
            member = tarfile.TarInfo(str(tree.relative(path)))
            member.size, member.mtime = len(data), int(time.time())
            member.mode = 0o755 if text.startswith("#!") else 0o644
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def unpacked(archive: bytes, max_bytes: int) -> dict[str, FileState]:
    """The files of a tar archive that nobody vouches for.  Raises SandboxError when it is broken.

    Nothing is written anywhere: names are only keys, links are only text.
    """
    found: dict[str, FileState] = {}
    left = max_bytes
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as members:
            for seen, member in enumerate(members):
                path = tree.printable(member.name).removeprefix("./").rstrip("/")
                if seen > tree.MAX_ENTRIES or path.count("/") > tree.MAX_DEPTH:
                    found[tree.CUT] = tree.OTHER
                    break
                if member.isdir() or path in ("", "."):
                    continue
                found[path] = _state(members, member, found, left)
                left -= len(found[path].content) if member.isreg() else 0
    except (tarfile.TarError, ValueError, OverflowError, EOFError, OSError) as error:
        raise SandboxError(f"cannot read the workspace's archive: {error}") from error
    return found


def _state(
    archive: tarfile.TarFile, member: tarfile.TarInfo, found: Mapping[str, FileState], max_bytes: int
) -> FileState:
    if member.issym():
        return FileState("link", os.fsencode(member.linkname))
    if member.islnk():
        # A second name of a file that came before.
        return found.get(tree.printable(member.linkname).removeprefix("./"), tree.OTHER)
    if not member.isreg() or member.size > max_bytes or not member.mode & 0o400:
        return tree.OTHER
    content = archive.extractfile(member)
    return tree.OTHER if content is None else FileState("file", content.read(), bool(member.mode & 0o100))


class ContainerSandbox:
    """One open workspace.  See :class:`pytest_pocket.sandbox.Sandbox`."""

    def __init__(self, engine: str, files: Mapping[str, str], limits: Limits) -> None:
        self.limits = limits
        self._engine = engine
        self._name = f"pocket-{secrets.token_hex(8)}"
        self._closed = threading.Event()
        self._busy = threading.RLock()
        archive = packed(files)
        # The engine runs in a folder of its own, because Podman's monitor leaves files where it was started.
        self._folder = tempfile.TemporaryDirectory(prefix="pocket-", ignore_cleanup_errors=True)
        try:
            profile = Path(self._folder.name, "seccomp.json")
            profile.write_text(seccomp.profile())
            self._control(start_command(engine, self._name, limits, str(profile)), START_SECONDS)
            if (made := self.run(FILL, stdin=archive, seconds=START_SECONDS)).status:
                raise SandboxError(
                    f"cannot fill the workspace: {made.output.decode(errors='replace').strip()}"
                )
        except BaseException:
            self.close()
            raise

    def _exec(self, *options: str) -> list[str]:
        return [self._engine, "exec", "--user", USER, *options, self._name]

    def _control(self, command: list[str], seconds: float) -> None:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=seconds,
                cwd=self._folder.name,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SandboxError(f"{self._engine} does not answer: {error}") from error
        if done.returncode:
            raise SandboxError(f"{command[0]} {command[1]}: {done.stderr.decode(errors='replace').strip()}")

    def run(self, script: str, *, stdin: bytes = b"", seconds: float | None = None) -> CommandResult:
        """Run a bash script in the workspace root."""
        if "\0" in script:
            raise ValueError("a script cannot contain a NUL byte")
        with self._busy:
            return self._call(
                script,
                stdin,
                self.limits.call_seconds if seconds is None else seconds,
                self.limits.output_bytes,
            )

    def _call(self, script: str, stdin: bytes, seconds: float, output_bytes: int) -> CommandResult:
        """One ``exec``, and afterwards the end of whatever it left."""
        if self._closed.is_set():
            raise SandboxError("the sandbox is closed")
        process = subprocess.Popen(
            [*self._exec("--interactive"), "bash", "-c", CALL, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            cwd=self._folder.name,
        )
        feeder = threading.Thread(target=_feed, args=(process, stdin), daemon=True)
        feeder.start()
        try:
            output, timed_out = self._collect(process, seconds, output_bytes + 1)
        finally:
            killed = process.poll() is None
            if killed:
                process.kill()
            process.wait()
            feeder.join()
            if process.stdout:
                process.stdout.close()
        if self._closed.is_set():
            raise SandboxError("the sandbox was closed")
        # "exec" keeps its own channel: killing the client leaves the command, and what it started, alive.
        self._kill_others()
        cut = len(output) > output_bytes
        status = TIMED_OUT if timed_out else TOO_MUCH_OUTPUT if cut else process.returncode
        return CommandResult(status, output[:output_bytes], timed_out, cut)

    def _kill_others(self) -> None:
        with contextlib.suppress(SandboxError):
            return self._inside(KILL_OTHERS)
        # No room for another process, or no memory: then process 1 itself would be the next to go.
        more = [self._engine, "update", *_memory(self.limits.memory_bytes + SPARE), self._name]
        with contextlib.suppress(SandboxError):
            self._control(more, KILL_SECONDS)
        for attempt in range(4):
            if self._closed.is_set():
                raise SandboxError("the sandbox is closed")
            self._control([self._engine, "kill", "--signal", "USR1", self._name], KILL_SECONDS)
            try:
                return self._inside(f"{KILL_OTHERS}; {CLEAR}", START_SECONDS)
            except SandboxError:
                if attempt == 3:
                    raise
        return None

    def _inside(self, script: str, seconds: float = KILL_SECONDS) -> None:
        self._control([*self._exec(), "bash", "-c", script], seconds)

    def _collect(
        self, process: subprocess.Popen[bytes], seconds: float, max_bytes: int
    ) -> tuple[bytes, bool]:
        """Output until its end, the deadline, or too much of it."""
        assert process.stdout
        deadline = time.monotonic() + seconds
        output = bytearray()
        while len(output) < max_bytes:
            left = deadline - time.monotonic()
            if left <= 0:
                return bytes(output), True
            if self._closed.is_set():
                break
            if select.select([process.stdout], [], [], min(left, 0.2))[0]:
                part = process.stdout.read(2**16)
                if not part:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(max(0.0, deadline - time.monotonic()))
                        break
                    return bytes(output), True
                output += part
        return bytes(output), False

    def snapshot(self) -> Mapping[str, FileState]:
        """Every file of the workspace, as ``tar`` inside sees it: nothing else is alive by then."""
        with self._busy:
            room = 2 * self.limits.workspace_bytes + tree.MAX_ENTRIES * 4096
            made = self._call("exec tar -cf - . 2>/dev/null", b"", START_SECONDS, room)
            # Ended by a signal: what is there leaves no memory for tar.
            if made.cut or made.timed_out or made.status > 128:
                return {tree.CUT: tree.OTHER}
            return unpacked(made.output, self.limits.workspace_bytes)

    def close(self) -> None:
        """Remove the container."""
        self._closed.set()
        with self._busy:
            if os.path.exists(self._folder.name):
                # Podman would first ask it to stop, and wait; Docker does not, and knows no such option.
                at_once = ["--time", "0"] if self._engine == "podman" else []
                with contextlib.suppress(SandboxError):
                    self._control([self._engine, "rm", "--force", *at_once, self._name], START_SECONDS)
                self._folder.cleanup()


def _feed(process: subprocess.Popen[bytes], data: bytes) -> None:
    """Write standard input from a thread: a command that does not read must not block its own output."""
    assert process.stdin
    with contextlib.suppress(OSError), process.stdin:
        view = memoryview(data)
        while view:
            view = view[process.stdin.write(view) or 0 :]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class ContainerProvider:
    """Sandboxes made with the command line of ``docker`` or ``podman``."""

    caveat = ""

    def __init__(self, name: str) -> None:
        self.name = name

    def probe(self) -> None:
        """Start a container and look for what the tasks use.  Raises SandboxUnavailable."""
        if shutil.which(self.name) is None:
            raise SandboxUnavailable(f"{self.name} is not installed: install it, or choose another sandbox")
        try:
            sandbox = self.open({"probe": "ok\n"})
        except SandboxError as error:
            raise SandboxUnavailable(
                f"{self.name} does not work here: {_one_line(error)}. Is its service running, and the "
                f"image {image()} there (`{self.name} pull {image()}`, or POCKET_SANDBOX_IMAGE)?"
            ) from error
        try:
            found = sandbox.run(
                "cat probe; for c in git python3 grep; do $c --version >/dev/null || echo $c; done"
            )
        except SandboxError as error:
            raise SandboxUnavailable(f"{self.name} does not work here: {_one_line(error)}") from error
        finally:
            sandbox.close()
        if found.output != b"ok\n":
            said = found.output.decode(errors="replace").strip()
            raise SandboxUnavailable(f"image {image()} needs bash, git, python3, grep and tar, but: {said}")

    def open(self, files: Mapping[str, str], limits: Limits = Limits()) -> ContainerSandbox:
        """A fresh container."""
        return ContainerSandbox(self.name, files, limits)
