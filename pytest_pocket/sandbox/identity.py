"""Who bubblewrap runs as: for root, nobody.

The kernel does not limit the processes of root, and root could not write to the sandbox's own file systems.
Credentials belong to a thread.  libc's calls change them for all threads of a process, so the kernel is asked
directly, for the one thread that starts sandboxes; a program in between (``setpriv``, ``chroot``) would cost
every sandbox as much as a call in it.
"""

from __future__ import annotations

import ctypes
import os
import platform

NOBODY = 65534
# setgroups, setresgid, setresuid: arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h.
CALLS = {"x86_64": (116, 119, 117), "aarch64": (159, 149, 147)}


def is_known() -> bool:
    """Whether this machine's numbers are known, or nothing is to be done because we are not root."""
    return os.geteuid() != 0 or platform.machine() in CALLS


def drop_root() -> None:
    """Make the calling thread, if it is root's, nobody's for good.  Raises OSError."""
    if os.geteuid() != 0:
        return
    setgroups, setresgid, setresuid = CALLS[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)
    for call in (
        (setgroups, 0, 0, 0),
        (setresgid, NOBODY, NOBODY, NOBODY),
        (setresuid, NOBODY, NOBODY, NOBODY),
    ):
        if libc.syscall(*map(ctypes.c_long, call)):
            number = ctypes.get_errno()
            raise OSError(number, f"cannot become the user nobody ({NOBODY}): {os.strerror(number)}")
