"""The default sandbox: one ``bwrap`` an episode, which stays open for all its calls.

Inside, process 1 is a bash loop, the agent: it reads a call's number, runs its script in a child, kills
every other process, and only then reports the status.  The scripts lie in a host directory that is mounted
read-only (:mod:`pytest_pocket.sandbox.root`); output leaves through a pipe; the final files are read through
a directory descriptor of the workspace.  Nothing on the host can be written from inside.

The agent runs from a copy of bash that nobody may read: the kernel then lets no process of the same user
trace it, touch its memory or open its pipes through ``/proc/1/fd``, so a status cannot be forged.

Not covered: attacks on the kernel, and the memory of some kernel objects (file locks, pipe buffers), for which a
container with a memory limit is the better provider.  Where it becomes scarce, the kernel ends sandboxes first.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import secrets
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.thread import BrokenThreadPool
from functools import cache

from pytest_pocket.sandbox import (
    ENVIRONMENT,
    CommandResult,
    FileState,
    Limits,
    SandboxError,
    SandboxUnavailable,
    identity,
    root,
    seccomp,
    tree,
)

# Any signal that bash handles would end it, or the wait for a call: from inside, all of them end the call.
# One line, so that bash counts a script's lines from 1 in its messages.
AGENT = (
    "exec 3>&2 2>/dev/null; umask 022; {limits} trap 'kill -9 -1' {{1..8}} {{10..16}} {{21..31}}; "
    "_path={path}; echo ready; "
    'while read -r _call _input; do IFS= read -r -d "" _script <"$_path"; '
    '(unset _path _call _input; eval "$_script") <"$_input" >&3 2>&1 3>&- & wait $!; _status=$?; '
    'while kill -9 -1; do :; done; echo "$_call $_status"; done'
)
PATH = "/usr/local/bin:/usr/bin:/bin"
INFO, SECCOMP = "--info-fd", "--seccomp"
START_SECONDS = 20.0
KILL_SECONDS = 5.0
WATCH_SECONDS = 0.1
TIMED_OUT = 124
OUT_OF_MEMORY = 137
INODE_BYTES = 1024
"""What the kernel reckons for a file of a tmpfs, apart from its content (``BOGO_INODE_SIZE`` in mm/shmem.c)."""
SOCKET_BYTES = 4 * 2**20
"""What the buffers of one socket may hold (the largest size of ``net.ipv4.tcp_wmem``): no limit counts it."""


@cache
def _arguments(pid: int) -> tuple[str, ...]:
    """The part of the command line that is the same for every sandbox of this process.  Raises OSError."""
    words = ["--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    words += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--as-pid-1"]
    words += ["--uid", "1000", "--gid", "1000", "--hostname", "pocket", "--cap-drop", "ALL", "--clearenv"]
    if not seccomp.program():
        words.append("--disable-userns")
    for name, value in {"PATH": PATH, "HOME": "/workspace", "SHELL": "/bin/bash", **ENVIRONMENT}.items():
        words += ["--setenv", name, value]
    words += ["--ro-bind", root.directory(pid), "/"]
    for path in root.mounted():
        words += ["--ro-bind", path, path]
    for path in root.hidden():
        words += ["--ro-bind", f"{root.directory(pid)}/workspace", path]
    # bwrap's own --dev would add terminals, a second file system and a third for shared memory.
    for name in root.DEVICES:
        words += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    words += ["--proc", "/proc"]
    return tuple(words)


def _program(name: str) -> str:
    """The path of a program; its bare name if there is none."""
    return _find(name, os.environ.get("PATH"))


@cache
def _find(name: str, path: str | None) -> str:
    return shutil.which(name, path=path) or name


@cache
def _spawner(pid: int) -> ThreadPoolExecutor:
    """The thread that starts every sandbox of this process, as nobody if the others are root's.

    ``--die-with-parent`` follows the *thread* that started bwrap, so this must be one that lives on.
    """
    return ThreadPoolExecutor(1, "pocket-sandbox", initializer=identity.drop_root)


@cache
def _counts_processes_by_namespace() -> bool:
    """Whether RLIMIT_NPROC counts the processes of one sandbox; before Linux 5.14, all those of the user."""
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    return release is not None and tuple(map(int, release.groups())) >= (5, 14)


_preparing = threading.Lock()
_prepared: set[int] = set()


def _prepare(pid: int) -> None:
    """Make what all sandboxes of this process share.  Raises OSError.

    Under a lock: of two threads that open the first ones at once, each would make its own.
    """
    if pid not in _prepared:
        with _preparing:
            _arguments(pid)
            _spawner(pid)
            _prepared.add(pid)


def _write(file: int, data: bytes) -> None:
    """Write all of the data at the beginning of a file.  Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done : done + 2**20], done)


def _memory_file(data: bytes) -> int:
    """An open file that holds the data and has no name.  Raises OSError."""
    file = os.memfd_create("pocket")
    _write(file, data)
    return file


class BubblewrapSandbox:
    """One open workspace.  See :class:`pytest_pocket.sandbox.Sandbox`."""

    def __init__(self, files: Mapping[str, str], limits: Limits) -> None:
        self.limits = limits
        self._calls = 0
        self._closed = self._freed = False
        self._busy = threading.RLock()
        self._gate = threading.Lock()
        # Unknown to every other sandbox, which sees the same directory of scripts.
        self._token = secrets.token_hex(16)
        with contextlib.ExitStack() as cleanup:
            self._start(files, cleanup)
            self._free = cleanup.pop_all()

    def _start(self, files: Mapping[str, str], cleanup: contextlib.ExitStack) -> None:
        info, info_writer = os.pipe()
        cleanup.callback(os.close, info)
        given = {INFO: info_writer}
        try:
            _prepare(os.getpid())
            self._script = self._new_file(self._token, cleanup)
            if program := seccomp.program():
                given[SECCOMP] = _memory_file(program)
            for path, text in files.items():
                given[f"/workspace/{tree.relative(path)}"] = _memory_file(text.encode())
            command = self._command(given, files)
            start = _spawner(os.getpid()).submit(
                subprocess.Popen,
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=tuple(given.values()),
                env={},
            )
            process: subprocess.Popen[bytes] = start.result()
        except (OSError, BrokenThreadPool) as error:
            raise SandboxError(f"cannot start bwrap: {error}") from error
        finally:
            for descriptor in given.values():
                os.close(descriptor)
        assert process.stdin
        assert process.stdout
        assert process.stderr
        self._agent_in, self._agent_out, self._output = process.stdin, process.stdout, process.stderr
        cleanup.callback(self._reap, process)
        os.set_blocking(self._agent_out.fileno(), False)
        os.set_blocking(self._output.fileno(), False)
        self._await_ready()
        pid = int(json.loads(os.read(info, 4096))["child-pid"])
        self._agent = os.pidfd_open(pid)
        cleanup.callback(os.close, self._agent)
        cleanup.callback(self._kill)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        self._workspace = os.open(f"/proc/{pid}/root/workspace", flags)
        cleanup.callback(os.close, self._workspace)
        self._tmp = os.open(f"/proc/{pid}/root/tmp", flags)
        cleanup.callback(os.close, self._tmp)
        self._proc = os.open(f"/proc/{pid}/root/proc", flags)
        cleanup.callback(os.close, self._proc)
        with contextlib.suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w") as file:
            file.write("1000")

    def _command(self, given: Mapping[str, int], files: Mapping[str, str]) -> list[str]:
        size = str(self.limits.workspace_bytes)
        words = [_program("bwrap"), *_arguments(os.getpid())]
        words += ["--size", size, "--tmpfs", "/workspace", "--size", size, "--tmpfs", "/tmp"]
        scripts = {
            f"/workspace/{tree.relative(path)}" for path, text in files.items() if text.startswith("#!")
        }
        for path, descriptor in given.items():
            if path in (INFO, SECCOMP):
                words += [path, str(descriptor)]
            else:
                words += ["--perms", "0755" if path in scripts else "0644", "--file", str(descriptor), path]
        words += ["--chdir", "/workspace"]
        agent = AGENT.format(limits=self._ulimits(), path=f"/{root.SCRIPTS}/{self._token}")
        return [*words, f"/{root.AGENT}", "--norc", "--noprofile", "-c", agent, "bash"]

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        said = b""
        while not said.endswith(b"ready\n"):
            if not self._readable(deadline):
                raise SandboxError(f"bwrap was not ready after {START_SECONDS:g} s")
            part = self._agent_out.read(64)
            if not part:
                message = (self._output.read(4096) or b"").decode(errors="replace").strip()
                raise SandboxError(f"bwrap did not start: {message or 'it said nothing'}")
            said += part

    def _readable(self, deadline: float) -> bool:
        """Wait until the agent has said something, or is gone; False at the deadline."""
        # Not select(), which takes no descriptor above 1023.
        poll = select.poll()
        poll.register(self._agent_out, select.POLLIN)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))

    def _ulimits(self) -> str:
        """The agent's first commands, inherited by all it starts.  A value over a hard limit does nothing."""
        limits = self.limits
        kib = {"v": limits.memory_bytes, "f": limits.workspace_bytes, "l": 0, "c": 0}
        values = {letter: size // 1024 for letter, size in kib.items()} | {"t": limits.cpu_seconds, "n": 256}
        if _counts_processes_by_namespace():
            values["u"] = limits.processes
        return " ".join(f"ulimit -{letter} {value};" for letter, value in values.items())

    def run(self, script: str, *, stdin: bytes = b"", seconds: float | None = None) -> CommandResult:
        """Run a bash script in the workspace root."""
        if "\0" in script:
            raise ValueError("a script cannot contain a NUL byte")
        with self._busy:
            self._check_open()
            self._calls += 1
            try:
                with contextlib.ExitStack() as cleanup:
                    self._agent_in.write(self._given(script.encode(), stdin, cleanup))
                    return self._await_end(self.limits.call_seconds if seconds is None else seconds)
            except BrokenPipeError:
                raise self._broken() from None

    def _given(self, script: bytes, stdin: bytes, cleanup: contextlib.ExitStack) -> bytes:
        """Lay out the script and what standard input there is; the line that tells the agent.  Raises SandboxError."""
        path = "/dev/null"
        try:
            _write(self._script, script)
            os.ftruncate(self._script, len(script))
            if stdin:
                name = f"{self._token}.{self._calls}"
                _write(self._new_file(name, cleanup), stdin)
                path = f"/{root.SCRIPTS}/{name}"
        except OSError as error:
            raise SandboxError(f"cannot hand over a call: {error}") from error
        return f"{self._calls} {path}\n".encode()

    @staticmethod
    def _new_file(name: str, cleanup: contextlib.ExitStack) -> int:
        """A file for the agent to read, open for writing, gone with ``cleanup``.  Raises OSError."""
        path = f"{root.directory(os.getpid())}/{root.SCRIPTS}/{name}"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        cleanup.callback(os.unlink, path)
        cleanup.callback(os.close, file)
        os.fchmod(file, 0o644)
        return file

    def _await_end(self, seconds: float) -> CommandResult:
        """Collect output until the agent reports the end, forced by time, memory or output where need be."""
        start = time.monotonic()
        forced: int | None = None
        timed_out = cut = False
        ended = b""
        chunks: list[bytes] = []
        room = self.limits.output_bytes
        pause = next_look = start + WATCH_SECONDS
        give_up = start + seconds + KILL_SECONDS
        poll = select.poll()
        poll.register(self._agent_out, select.POLLIN)
        poll.register(self._output, select.POLLIN)
        while not ended.endswith(b"\n"):
            now = time.monotonic()
            if now >= give_up:
                self._kill()
                raise SandboxError(
                    f"the sandbox did not end a call within {KILL_SECONDS:g} s of its deadline"
                )
            if forced is None and now >= start + seconds:
                forced, timed_out = TIMED_OUT, True
            if now >= next_look:
                if forced is None and self._memory() > self.limits.memory_bytes:
                    forced = OUT_OF_MEMORY
                next_look = now + WATCH_SECONDS
            if forced is not None and now >= pause:
                # Again and again, because a signal just before bash begins to wait would go unnoticed.
                self._signal(signal.SIGUSR1)
                pause = now + 0.05
            until = min(next_look, start + seconds if forced is None else pause)
            ready = dict(poll.poll(max(1, (until - now) * 1000)))
            if self._output.fileno() in ready:
                part = self._output.read(2**16) or b""
                chunks.append(part[:room])
                cut = cut or len(part) > room
                room -= len(chunks[-1])
                if cut and forced is None:
                    forced, give_up, pause = OUT_OF_MEMORY, now + KILL_SECONDS, now
            if self._agent_out.fileno() in ready:
                part = self._agent_out.read(64) or b""
                if not part:
                    raise self._broken()
                ended += part
        number, _, status = ended.decode(errors="replace").strip().partition(" ")
        if number != str(self._calls) or not status.isdigit():
            self._kill()
            raise SandboxError(f"the sandbox answered {ended!r} to call {self._calls}")
        while part := self._output.read(2**16):
            chunks.append(part[:room])
            cut = cut or len(part) > room
            room -= len(chunks[-1])
        return CommandResult(int(status) if forced is None else forced, b"".join(chunks), timed_out, cut)

    def _memory(self) -> int:
        """Bytes of memory of all processes inside, and of the kernel for them: RLIMIT_AS bounds each one only."""
        total = 0
        for name in os.listdir(self._proc):
            if name.isdigit():
                text = self._proc_text(f"{name}/status")
                total += sum(int(kib) for kib in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", text)) * 1024
        for folder in (self._workspace, self._tmp):
            info = os.fstatvfs(folder)
            total += (info.f_files - info.f_ffree) * INODE_BYTES
        sockets = re.search(r"sockets: used (\d+)", self._proc_text("1/net/sockstat"))
        return total + (int(sockets[1]) * SOCKET_BYTES if sockets else 0)

    def _proc_text(self, path: str) -> str:
        """A file of the sandbox's ``/proc``; empty when it is gone."""
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
            with open(file) as stream:
                return stream.read()
        return ""

    def snapshot(self) -> Mapping[str, FileState]:
        """Every file of the workspace.  Between calls only the agent is alive, so nothing moves."""
        with self._busy:
            self._check_open()
            try:
                return tree.read(self._workspace, self.limits.workspace_bytes)
            except OSError as error:
                raise SandboxError(f"cannot read the workspace: {error}") from error

    def close(self) -> None:
        """Kill what is inside and free everything."""
        self._closed = True
        with self._gate:
            # Once freed, the descriptor's number may be that of another sandbox's agent.
            if not self._freed:
                self._kill()
        with self._busy, self._gate:
            self._freed = True
            self._free.close()

    def _check_open(self) -> None:
        if self._closed:
            raise SandboxError("the sandbox is closed")

    def _broken(self) -> SandboxError:
        return SandboxError("the sandbox was closed" if self._closed else "the sandbox died during a call")

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._agent, number)

    def _kill(self) -> None:
        """Kill the agent; the kernel kills all others of its namespace before it lets the agent go."""
        self._signal(signal.SIGKILL)

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until bwrap and the agent are gone: only then does their end of the pipe close."""
        self._agent_in.close()
        deadline = time.monotonic() + KILL_SECONDS
        alive = True
        while alive and self._readable(deadline):
            alive = bool(self._agent_out.read(4096))
        if alive:
            process.kill()
        process.wait()
        self._agent_out.close()
        self._output.close()


class BubblewrapProvider:
    """Sandboxes made with bubblewrap, on Linux, without privileges."""

    name = "bwrap"
    caveat = ""

    def probe(self) -> None:
        """Open a sandbox and look for what the tasks use.  Raises SandboxUnavailable."""
        if shutil.which("bwrap") is None:
            raise SandboxUnavailable(
                "bwrap is not installed: `apt install bubblewrap`, or use --pocket-sandbox=docker"
            )
        if not identity.is_known():
            raise SandboxUnavailable(f"on {platform.machine()} bwrap is not started by root: be another user")
        try:
            sandbox = self.open({"probe": "ok\n"})
        except SandboxError as error:
            raise SandboxUnavailable(f"bwrap does not work here: {error}. {_advice(str(error))}") from error
        try:
            found = sandbox.run(
                'cat probe; for c in git python3 grep; do "$c" --version >/dev/null 2>&1 || echo "$c"; done'
            )
        except SandboxError as error:
            raise SandboxUnavailable(f"bwrap does not work here: {error}") from error
        finally:
            sandbox.close()
        if found.output != b"ok\n":
            missing = " ".join(found.output.decode(errors="replace").split()[1:])
            raise SandboxUnavailable(
                f"not usable inside the sandbox: {missing}; `apt install {missing}` puts it in /usr"
            )

    def open(self, files: Mapping[str, str], limits: Limits = Limits()) -> BubblewrapSandbox:
        """A fresh workspace."""
        return BubblewrapSandbox(files, limits)


def _advice(message: str) -> str:
    """What to do about a failure of bwrap to start."""
    if re.search(r"uid map|namespace|Operation not permitted|RTM_NEWADDR|Permission denied", message):
        return (
            "Unprivileged user namespaces seem to be forbidden: on Ubuntu 24.04 "
            "`sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0`, elsewhere "
            "`sudo sysctl kernel.unprivileged_userns_clone=1`, in a container run it with "
            "--security-opt seccomp=unconfined; or use --pocket-sandbox=docker"
        )
    return "Use --pocket-sandbox=docker instead"
