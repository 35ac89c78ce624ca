"""The system calls that a sandbox refuses: memory that no limit counts, namespaces, tracing, rarely audited corners.

Without it a process could hold memory files (``memfd_create``), segments (``shmget``), semaphores or queues of any
total size, use up what the host's user may have of asynchronous requests (``io_setup``) and file watches, or mount
file systems of any size in namespaces of its own.  ``clone3`` takes its flags where a filter cannot read them, so it
is told to be missing, and C libraries then use ``clone``.

Sockets are of three families.  A network namespace does not hold the others: over ``AF_VSOCK`` a process talks to
the hypervisor of a virtual machine, whatever its namespace.

Limits and scheduling of another process are refused too: the kernel would let a process set those of the agent,
which has the same user.

:func:`program` is for bubblewrap, :func:`profile` says the same to container engines.
"""

from __future__ import annotations

import errno
import json
import platform
import struct
from collections.abc import Iterable, Mapping

# Numbers: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h of Linux.
REFUSED = {
    "x86_64": {
        "shmget": 29,
        "semget": 64,
        "msgget": 68,
        "ptrace": 101,
        "syslog": 103,
        "mount": 165,
        "io_setup": 206,
        "mq_open": 240,
        "add_key": 248,
        "request_key": 249,
        "keyctl": 250,
        "inotify_init": 253,
        "unshare": 272,
        "inotify_init1": 294,
        "perf_event_open": 298,
        "fanotify_init": 300,
        "setns": 308,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "memfd_create": 319,
        "bpf": 321,
        "userfaultfd": 323,
        "io_uring_setup": 425,
        "memfd_secret": 447,
    },
    "aarch64": {
        "io_setup": 0,
        "inotify_init1": 26,
        "mount": 40,
        "unshare": 97,
        "syslog": 116,
        "ptrace": 117,
        "mq_open": 180,
        "msgget": 186,
        "semget": 190,
        "shmget": 194,
        "add_key": 217,
        "request_key": 218,
        "keyctl": 219,
        "perf_event_open": 241,
        "fanotify_init": 262,
        "setns": 268,
        "process_vm_readv": 270,
        "process_vm_writev": 271,
        "memfd_create": 279,
        "bpf": 280,
        "userfaultfd": 282,
        "io_uring_setup": 425,
        "memfd_secret": 447,
    },
}
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3 = 435
SOCKETS = {"x86_64": {"socket": 41, "socketpair": 53}, "aarch64": {"socket": 198, "socketpair": 199}}
"""Allowed for :data:`FAMILIES`."""
OWN = {
    "x86_64": {
        "sched_setparam": 142,
        "sched_setscheduler": 144,
        "sched_setaffinity": 203,
        "prlimit64": 302,
        "sched_setattr": 314,
    },
    "aarch64": {
        "sched_setparam": 118,
        "sched_setscheduler": 119,
        "sched_setaffinity": 122,
        "prlimit64": 261,
        "sched_setattr": 274,
    },
}
"""Allowed for process 0, which is the caller."""
FAMILIES = (1, 2, 10)
"""``AF_UNIX``, ``AF_INET`` and ``AF_INET6``."""
ENGINES_REFUSED = tuple(
    """
    acct clock_adjtime clock_settime settimeofday stime reboot quotactl quotactl_fd create_module init_module
    finit_module delete_module kexec_load kexec_file_load nfsservctl chroot pivot_root umount umount2 swapon swapoff
    sysfs ustat uselib open_by_handle_at fsopen fsconfig fsmount fspick open_tree move_mount mount_setattr
    lookup_dcookie kcmp pidfd_getfd process_madvise get_mempolicy set_mempolicy mbind move_pages migrate_pages ioperm
    iopl vm86 vm86old vhangup io_uring_enter io_uring_register
    """.split()
)
"""What the engines' own profiles refuse to a container without capabilities, and one of ours must go on refusing."""
NAMESPACES = 0x7E020000
"""The flags of ``clone`` that ask for a new namespace of any kind: ``CLONE_NEW*`` in include/uapi/linux/sched.h."""
AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# The x32 calls of x86_64 have numbers of their own from here on.
FOREIGN = 0x40000000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL_PROCESS, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
# Offsets in struct seccomp_data, the lower half of the first argument on these machines.
NUMBER, ARCHITECTURE, FIRST = 0, 4, 16


def program(machine: str = platform.machine()) -> bytes:
    """The filter as classic BPF (``struct sock_filter[]``); empty where the numbers are not known."""
    if machine not in REFUSED:
        return b""
    numbers = sorted(REFUSED[machine].values())
    # Jumps count the steps that they leave out.
    own = OWN[machine].values()
    socket, pair = SOCKETS[machine].values()
    refuse = len(numbers) + len(own) + 15
    steps = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, AUDIT_ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, refuse, 0, FOREIGN),
    ]
    steps += [(EQUAL, refuse - 1 - place, 0, number) for place, number in enumerate(numbers)]
    steps += [(EQUAL, len(own) + 11 - place, 0, number) for place, number in enumerate(own)]
    steps += [
        (EQUAL, 0, 1, CLONE3),
        (RETURN, 0, 0, ENOSYS),
        (EQUAL, 5, 0, socket),
        (EQUAL, 4, 0, pair),
        (EQUAL, 0, 2, CLONE[machine]),
        (LOAD, 0, 0, FIRST),
        (ANY_BIT, 8, 0, NAMESPACES),
        (RETURN, 0, 0, ALLOW),
        (LOAD, 0, 0, FIRST),
        (EQUAL, 4, 0, FAMILIES[0]),
        (EQUAL, 3, 0, FAMILIES[1]),
        (EQUAL, 2, 3, FAMILIES[2]),
        (LOAD, 0, 0, FIRST),
        (EQUAL, 0, 1, 0),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, EPERM),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def profile() -> str:
    """The same as a profile of Docker and Podman, in JSON; they know the numbers, and skip unknown names.

    Format: https://docs.docker.com/engine/security/seccomp/ and libseccomp's comparisons.  One rule for every flag and
    every value, because what the conditions of one rule ask must hold together.
    """

    def named(table: Mapping[str, Mapping[str, int]]) -> set[str]:
        return {name for numbers in table.values() for name in numbers}

    def refuse(names: Iterable[str], error: int = errno.EPERM, **first: int | str) -> dict[str, object]:
        conditions = {"args": [{"index": 0, **first}]} if first else {}
        return {"names": sorted(names), "action": "SCMP_ACT_ERRNO", "errnoRet": error, **conditions}

    flags = [1 << bit for bit in range(32) if NAMESPACES >> bit & 1]
    foreign = [family for family in range(max(FAMILIES)) if family not in FAMILIES]
    rules = [
        refuse(named(REFUSED).union(ENGINES_REFUSED)),
        refuse(["clone3"], errno.ENOSYS),
        *(refuse(["clone"], op="SCMP_CMP_MASKED_EQ", value=flag, valueTwo=flag) for flag in flags),
        *(refuse(named(SOCKETS), op="SCMP_CMP_EQ", value=family) for family in foreign),
        refuse(named(SOCKETS), op="SCMP_CMP_GT", value=max(FAMILIES)),
        refuse(named(OWN), op="SCMP_CMP_NE", value=0),
    ]
    return json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules})
