"""The root directory of every sandbox of this process: all that is the same for all of them, made once.

Each mount that bubblewrap makes costs it a look at the whole table of mounts, so whatever can be a file, a
directory or a link in here is one.  Sandboxes have it mounted read-only; what changes from one to the next
(workspace, ``/tmp``, ``/proc``) is mounted over its empty directories.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64")
"""Links into ``/usr`` on merged systems, else directories to be mounted beside it."""
DEVICES = ("null", "zero", "urandom")
LINKS = {
    "dev/random": "urandom",
    "dev/fd": "/proc/self/fd",
    "dev/stdin": "/proc/self/fd/0",
    "dev/stdout": "/proc/self/fd/1",
    "dev/stderr": "/proc/self/fd/2",
    "dev/shm": "/tmp",
}
ACCOUNTS = {
    "etc/passwd": "root:x:0:0::/root:/bin/bash\npocket:x:1000:1000::/workspace:/bin/bash\n",
    "etc/group": "root:x:0:\npocket:x:1000:\n",
}
AGENT = "run/agent"
SCRIPTS = "run/pocket"
"""Where the calls of all sandboxes lie while they run: nobody inside can list it, or guess a name in it."""


@cache
def mounted() -> tuple[str, ...]:
    """The directories of this system that a sandbox sees: ``/usr``, and what of :data:`SYSTEM` lies beside it."""
    return "/usr", *(path for path in SYSTEM if os.path.isdir(path) and not os.path.islink(path))


def hidden() -> list[str]:
    """The directories of this package that a sandbox would see: the tasks hold what a model is to find out."""
    specs = filter(None, map(find_spec, ("pytest_pocket", "pytest_pocket.tasks")))
    places = {os.path.realpath(place) for spec in specs for place in spec.submodule_search_locations or ()}
    return sorted(path for path in places if any(path.startswith(f"{folder}/") for folder in mounted()))


@cache
def directory(pid: int) -> str:
    """The path of the root, for as long as this process (``pid``: a fork makes its own) lives.

    ``AGENT`` in it is a copy of bash that can be run and not read.  Raises OSError.
    """
    root = tempfile.mkdtemp(prefix="pocket-root-")
    atexit.register(_remove, root)
    # bwrap may run as nobody, and nothing in here is secret: the agent can be run, the scripts passed.
    os.chmod(root, 0o755)  # nosec B103
    for path in (*mounted(), "/proc", "/dev", "/etc", "/run", "/tmp", "/workspace", f"/{SCRIPTS}"):
        os.mkdir(root + path)
    for path in filter(os.path.islink, SYSTEM):
        os.symlink(os.readlink(path), root + path)
    for name in DEVICES:
        open(f"{root}/dev/{name}", "w").close()
    for name, target in LINKS.items():
        os.symlink(target, f"{root}/{name}")
    for name, text in ACCOUNTS.items():
        with open(f"{root}/{name}", "w") as file:
            file.write(text)
    with contextlib.suppress(FileNotFoundError):
        shutil.copyfile("/etc/ld.so.cache", f"{root}/etc/ld.so.cache")
    os.mkdir(f"{root}/etc/alternatives")
    for name, target in _alternatives():
        os.symlink(target, f"{root}/etc/alternatives/{name}")
    shutil.copyfile(shutil.which("bash") or "/bin/bash", f"{root}/{AGENT}")
    for folder, _, names in os.walk(root):
        os.chmod(folder, 0o755)  # nosec B103
        for path in (os.path.join(folder, name) for name in names):
            if not os.path.islink(path):
                os.chmod(path, 0o644)
    os.chmod(f"{root}/{AGENT}", 0o111)  # nosec B103
    os.chmod(f"{root}/{SCRIPTS}", 0o311)  # nosec B103
    return root


def _alternatives() -> Iterator[tuple[str, str]]:
    """Debian's links from a command's plain name to one of several programs; pages of manuals are left out."""
    with contextlib.suppress(FileNotFoundError), os.scandir("/etc/alternatives") as entries:
        for entry in entries:
            if entry.is_symlink() and not entry.name.endswith(".gz"):
                yield entry.name, os.readlink(entry.path)


def _remove(root: str) -> None:
    os.chmod(f"{root}/{SCRIPTS}", 0o700)
    shutil.rmtree(root, ignore_errors=True)
