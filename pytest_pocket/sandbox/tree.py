"""A tree of files: written from a task's mapping, and read back without trusting anything in it.

Reading goes through directory file descriptors only: a symlink is never followed, a FIFO never waited for,
and what a hostile tree costs (depth, entries, bytes) is bounded.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from pytest_pocket.sandbox import FileState

MAX_ENTRIES = 10_000
MAX_DEPTH = 64
CUT = "[the rest of the workspace was not read: too many entries, too deep, or closed]"
"""The path under which a snapshot says that it is not complete."""
OTHER = FileState("other", b"")


def relative(path: str) -> PurePosixPath:
    """The path, if it stays inside the workspace.  Raises ValueError otherwise."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or not pure.parts or ".." in pure.parts or "\0" in path:
        raise ValueError(f"{path!r} is not a path inside the workspace: give a relative one without '..'")
    return pure


def write(root: str, files: Mapping[str, str]) -> None:
    """Write the files under an existing directory, readable by everybody; ``#!`` makes one executable."""
    for path, text in files.items():
        target = os.path.join(root, relative(path))
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        with open(target, "wb") as file:
            file.write(text.encode())
            os.fchmod(file.fileno(), 0o755 if text.startswith("#!") else 0o644)


def printable(name: str) -> str:
    """A file name without the surrogates that stand for bytes that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read(root: int, max_bytes: int) -> dict[str, FileState]:
    """Every file under an open directory.  What is beyond ``max_bytes`` in all (sparse files) is "other"."""
    if os.fstat(root).st_mode & 0o500 != 0o500:
        return {CUT: OTHER}
    found: dict[str, FileState] = {}
    left = max_bytes
    for seen, (path, state) in enumerate(_walk(root, "", MAX_DEPTH)):
        if state is None or seen >= MAX_ENTRIES:
            found[CUT] = OTHER
            if state is not None:
                break
        elif isinstance(state, FileState):
            found[path] = state
        else:
            content = _content(*state, left)
            found[path] = (
                OTHER if content is None else FileState("file", content, bool(state[2] & stat.S_IXUSR))
            )
            left -= len(content or b"")
    return found


def _walk(
    folder: int, prefix: str, depth: int
) -> Iterator[tuple[str, FileState | tuple[int, str, int] | None]]:
    """Paths with a state, (folder, name, mode) of a file still to be read, or None where it is too deep."""
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + printable(entry.name)
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                target = os.readlink(entry.name, dir_fd=folder)
                yield path, FileState("link", os.fsencode(target))
            elif stat.S_ISREG(mode):
                yield path, (folder, entry.name, mode)
            elif not stat.S_ISDIR(mode) or mode & 0o500 != 0o500:
                yield path, OTHER
            elif depth == 0:
                yield path, None
            else:
                yield from _walk_into(folder, entry.name, path, depth)


def _walk_into(
    folder: int, name: str, path: str, depth: int
) -> Iterator[tuple[str, FileState | tuple[int, str, int] | None]]:
    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        yield from _walk(inner, path + "/", depth - 1)
    finally:
        os.close(inner)


def _content(folder: int, name: str, mode: int, max_bytes: int) -> bytes | None:
    """The bytes of a file; None when its owner may not read it (root could) or it is over ``max_bytes``."""
    if not mode & stat.S_IRUSR:
        return None
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    with open(file, "rb") as stream:
        info = os.fstat(file)
        if not stat.S_ISREG(info.st_mode) or info.st_size > max_bytes:
            return None
        return stream.read(info.st_size)
