"""The sandbox interface: a fresh, closed workspace in which one episode's tool calls run.

Models write the commands, so every call is treated as hostile.  What a provider promises: no network, no
view of the host's home, environment or processes, a read-only system, a size-limited workspace, limits on
memory, processes, CPU seconds and output, nothing alive once a call has returned, everything gone at
``close``.  The final state is read from outside, after everything inside is dead, so nothing inside can
forge it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Limits:
    """What one sandbox may use.  Bytes, seconds, counts."""

    workspace_bytes: int = 64 * 2**20
    output_bytes: int = 4 * 2**20
    memory_bytes: int = 1024 * 2**20
    processes: int = 64
    cpu_seconds: int = 20
    call_seconds: float = 10.0


@dataclass(frozen=True)
class CommandResult:
    """One command's end: exit status, stdout and stderr as one (cut to ``output_bytes``), how it ended."""

    status: int
    output: bytes
    timed_out: bool = False
    cut: bool = False


@dataclass(frozen=True)
class FileState:
    """A file as the snapshot saw it.  ``content`` is the target of a ``"link"``, empty for ``"other"``."""

    kind: str  # "file", "link" or "other"
    content: bytes
    executable: bool = False


class SandboxError(Exception):
    """The sandbox failed, not the model: the episode is invalid (``infra``)."""


class SandboxUnavailable(Exception):
    """This machine cannot run the provider; the message says why and what to do."""


class Sandbox(Protocol):
    """One open workspace.  Used by one thread at a time."""

    def run(self, script: str, *, stdin: bytes = b"", seconds: float | None = None) -> CommandResult:
        """Run a bash script in the workspace root, with ``stdin`` as its standard input.

        When it returns, no process that it started is alive.  ``seconds`` defaults to
        ``Limits.call_seconds``.
        Raises SandboxError when the sandbox itself is broken.
        """
        ...

    def snapshot(self) -> Mapping[str, FileState]:
        """Every file of the workspace by relative path, read from outside, never following links."""
        ...

    def close(self) -> None:
        """Kill what is inside, free everything.  Idempotent, and callable from another thread to cancel."""
        ...


class SandboxProvider(Protocol):
    """Makes sandboxes.  ``name`` is what ``--pocket-sandbox`` selects, ``caveat`` what a user must be told of it."""

    name: str
    caveat: str

    def probe(self) -> None:
        """Raise SandboxUnavailable, with what to do, if sandboxes cannot be had on this machine."""
        ...

    def open(self, files: Mapping[str, str], limits: Limits = Limits()) -> Sandbox:
        """A fresh workspace holding ``files`` (relative path to text); ``#!`` makes one executable."""
        ...


ENVIRONMENT = {
    "LC_CTYPE": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
    "GIT_CONFIG_NOSYSTEM": "1",
}
"""What every provider sets: the same commands leave the same files everywhere."""
PROVIDERS = ("bwrap", "docker", "podman", "none")
"""What ``--pocket-sandbox`` can name, beside ``auto``: the first of these, ``none`` excepted, that works."""


def select(name: str) -> SandboxProvider:
    """The provider of that name, probed.  Raises ValueError for an unknown name, SandboxUnavailable."""
    if name == "auto":
        return _first_available()
    if name not in PROVIDERS:
        raise ValueError(f"unknown sandbox {name!r}: choose one of auto, {', '.join(PROVIDERS)}")
    provider = _provider(name)
    provider.probe()
    return provider


def _provider(name: str) -> SandboxProvider:
    # Imported late: the providers' modules import this one.
    from pytest_pocket.sandbox.bubblewrap import BubblewrapProvider
    from pytest_pocket.sandbox.container import ContainerProvider
    from pytest_pocket.sandbox.local import LocalProvider

    if name == "bwrap":
        return BubblewrapProvider()
    return LocalProvider() if name == "none" else ContainerProvider(name)


def _first_available() -> SandboxProvider:
    reasons = []
    for name in PROVIDERS[:-1]:
        try:
            return select(name)
        except SandboxUnavailable as reason:
            reasons.append(f"{name}: {reason}")
    raise SandboxUnavailable(
        "no sandbox works on this machine; on Linux `apt install bubblewrap`, elsewhere install Docker "
        "or Podman. Tried " + "; ".join(reasons)
    )
