"""The bubblewrap sandbox, attacked: every limit is proven by something that tries to break it."""

from __future__ import annotations

import errno
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from pytest_pocket.sandbox import FileState, Limits, SandboxError, SandboxUnavailable, seccomp, select, tree
from pytest_pocket.sandbox.bubblewrap import BubblewrapProvider, BubblewrapSandbox

PROVIDER = BubblewrapProvider()
try:
    PROVIDER.probe()
except SandboxUnavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)

SMALL = Limits(
    workspace_bytes=4 * 2**20,
    output_bytes=2**18,
    memory_bytes=256 * 2**20,
    processes=24,
    cpu_seconds=2,
    call_seconds=3.0,
)


@pytest.fixture
def sandbox() -> Iterator[BubblewrapSandbox]:
    with closing(PROVIDER.open({"a.txt": "alpha\n", "d/run.sh": "#!/bin/bash\necho ran\n"}, SMALL)) as opened:
        yield opened


def said(sandbox: BubblewrapSandbox, script: str) -> str:
    return sandbox.run(script).output.decode().strip()


def inside(sandbox: BubblewrapSandbox) -> list[str]:
    """The processes of the sandbox, as the host sees them."""
    return [name for name in os.listdir(sandbox._proc) if name.isdigit()]


def comes_true(condition: Callable[[], bool]) -> bool:
    """Whether the condition holds within 5 s."""
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def running(mark: str) -> list[int]:
    """Host processes whose command line contains the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_a_workspace_holds_its_files_and_scripts_are_executable(sandbox: BubblewrapSandbox) -> None:
    assert said(sandbox, "cat a.txt; ./d/run.sh; pwd") == "alpha\nran\n/workspace"
    assert sandbox.snapshot() == {
        "a.txt": FileState("file", b"alpha\n"),
        "d/run.sh": FileState("file", b"#!/bin/bash\necho ran\n", executable=True),
    }


def test_status_output_and_standard_input_come_through(sandbox: BubblewrapSandbox) -> None:
    result = sandbox.run("cat; echo err >&2; echo again >/dev/stderr; exit 7", stdin=b"\xff\x00in\n")
    assert (result.status, result.output) == (7, b"\xff\x00in\nerr\nagain\n")
    assert sandbox.run("cat").output == b""
    assert sandbox.run("nosuch").output == b"bash: line 1: nosuch: command not found\n"


def test_files_persist_over_calls_but_variables_do_not(sandbox: BubblewrapSandbox) -> None:
    sandbox.run("x=1; cd d; echo new >b.txt")
    assert said(sandbox, 'echo "[$x]" "$(cat d/b.txt)"; pwd') == "[] new\n/workspace"


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", ""])
def test_a_file_outside_the_workspace_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="inside the workspace"):
        PROVIDER.open({path: ""})


def test_the_network_is_out_of_reach(sandbox: BubblewrapSandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        assert sandbox.run(f"exec 3<>/dev/tcp/127.0.0.1/{port}").status != 0
    code = "import socket; socket.create_connection(('1.1.1.1', 53), 1)"
    assert "Network is unreachable" in said(sandbox, f'python3 -c "{code}"')


def test_an_abstract_socket_of_the_host_is_out_of_reach(sandbox: BubblewrapSandbox) -> None:
    name = f"pocket-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{name}")
        server.listen()
        code = f"import socket; socket.socket(socket.AF_UNIX).connect(chr(0) + {name!r})"
        assert "ConnectionRefusedError" in said(sandbox, f'python3 -c "{code}"')


def test_nothing_outside_the_workspace_can_be_written(sandbox: BubblewrapSandbox) -> None:
    places = "/ /usr /usr/bin /etc /run /run/pocket /dev /proc /bin /lib"
    script = f'for p in {places}; do (echo x >"$p/pocket-was-here") 2>/dev/null && echo "$p"; done; :'
    assert said(sandbox, script) == ""


def test_the_scripts_of_other_sandboxes_cannot_be_found(sandbox: BubblewrapSandbox) -> None:
    with closing(PROVIDER.open({})) as other:
        other.run("echo s3cret")
        script = (
            "chmod 777 /run/pocket; ls -a /run/pocket; cat /run/pocket/*; find / -name '*' -path '*pocket/*'"
        )
        shown = said(sandbox, f"({script}) 2>/dev/null; cat /proc/self/mountinfo; env; set")
        # Its own script shows in $BASH_EXECUTION_STRING and the like; the token of the other must not.
        assert other._token not in shown
        assert "s3cret" not in shown
        assert sandbox.run(f"cat /run/pocket/{other._token}").status == 0, "a name that is known can be read"


def test_the_home_and_the_environment_of_the_host_are_invisible(
    sandbox: BubblewrapSandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("POCKET_SECRET", "s3cret")
    (tmp_path / "secret").write_text("s3cret")
    with closing(PROVIDER.open({})) as fresh:
        assert "s3cret" not in said(fresh, "env; cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n'")
        script = f"ls {Path.home()} {tmp_path} /home /root /var /etc/shadow /sys /mnt /boot 2>/dev/null"
        assert said(fresh, script) == ""
        system = {"bin", "dev", "etc", "lib", "lib32", "lib64", "proc", "run", "sbin", "usr"}
        assert set(said(fresh, "ls /").split()) <= system | {"tmp", "workspace"}


def test_processes_of_the_host_are_invisible(sandbox: BubblewrapSandbox) -> None:
    assert len(said(sandbox, "ls -d /proc/[0-9]*; :").split()) == 2
    assert sandbox.run(f"kill -9 {os.getpid()}").status != 0


def test_no_privileges_are_left(sandbox: BubblewrapSandbox) -> None:
    status = said(sandbox, "cat /proc/self/status")
    assert set(re.findall(r"Cap(?:Prm|Eff|Bnd|Amb):\s+(\w+)", status)) == {"0" * 16}
    assert re.search(r"NoNewPrivs:\s+1", status)
    assert (
        said(sandbox, "id -u; ls -l /proc/self/fd | grep -vc -e pipe -e /dev/null -e '/fd$' -e total")
        == "1000\n0"
    )


def test_a_fork_bomb_ends_with_its_call(sandbox: BubblewrapSandbox) -> None:
    start = time.monotonic()
    sandbox.run("bomb() { bomb | bomb & }; bomb; sleep 1")
    assert time.monotonic() - start < 8
    assert said(sandbox, "echo alive") == "alive"
    assert inside(sandbox) == ["1"]


def test_memory_that_no_limit_counts_is_refused(sandbox: BubblewrapSandbox) -> None:
    assert "PermissionError" in said(sandbox, "python3 -c 'import os; os.memfd_create(\"x\")'")
    code = "import ctypes; print(ctypes.CDLL(None).shmget(0, 2**20, 0o1600))"
    assert said(sandbox, f"python3 -c '{code}'") == "-1"
    assert sandbox.run("unshare -Urm mount -t tmpfs none /tmp").status != 0
    assert sandbox.run("python3 -c 'import os; os.unshare(os.CLONE_NEWUSER)'").status != 0


def test_no_account_of_the_host_is_known(sandbox: BubblewrapSandbox) -> None:
    assert set(said(sandbox, "cut -d: -f1 /etc/passwd").split()) <= {"root", "pocket"}


@pytest.mark.parametrize(
    "flag", [0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000]
)
def test_no_process_gets_a_namespace_of_its_own(sandbox: BubblewrapSandbox, flag: int) -> None:
    clone = seccomp.CLONE[platform.machine()]
    call = f"libc.syscall({clone}, {flag | signal.SIGCHLD}, 0, 0, 0, 0), ctypes.get_errno()"
    code = f"import ctypes; libc = ctypes.CDLL(None, use_errno=True); print({call})"
    assert said(sandbox, f"python3 -c '{code}'") == f"-1 {errno.EPERM}"


def test_the_call_whose_flags_no_filter_reads_is_missing(sandbox: BubblewrapSandbox) -> None:
    call = f"libc.syscall({seccomp.CLONE3}, 0, 0), ctypes.get_errno()"
    code = f"import ctypes; libc = ctypes.CDLL(None, use_errno=True); print({call})"
    assert said(sandbox, f"python3 -c '{code}'") == f"-1 {errno.ENOSYS}"
    thread = "import threading; t = threading.Thread(target=print, args=[7]); t.start(); t.join()"
    assert said(sandbox, f"python3 -c '{thread}'") == "7"


def test_the_number_of_processes_is_limited(sandbox: BubblewrapSandbox) -> None:
    code = (
        "import os,time\nn=0\ntry:\n  while n<500:\n    if not os.fork(): time.sleep(9)\n    n+=1\n"
        "except OSError: print(n)"
    )
    assert int(said(sandbox, f"python3 -c '{code}'")) < SMALL.processes


def test_one_process_cannot_take_more_memory_than_the_limit(sandbox: BubblewrapSandbox) -> None:
    assert "MemoryError" in said(sandbox, 'python3 -c "bytearray(2**30)"')
    assert said(sandbox, "echo alive") == "alive"


def test_many_processes_cannot_take_more_memory_than_the_limit_together(sandbox: BubblewrapSandbox) -> None:
    code = "import time; x = bytearray(b'x') * (90 * 2**20); time.sleep(60)"
    start = time.monotonic()
    result = sandbox.run(f'for i in 1 2 3 4 5; do python3 -c "{code}" & done; wait; echo survived')
    assert (result.status, b"survived" in result.output) == (137, False)
    assert time.monotonic() - start < 30
    assert said(sandbox, "echo alive") == "alive"


@pytest.mark.parametrize("place", ["/workspace", "/tmp"])
def test_the_disk_cannot_be_filled(sandbox: BubblewrapSandbox, place: str) -> None:
    result = sandbox.run(
        f"for i in 1 2 3; do head -c 3M /dev/zero >{place}/$i || echo full; done; rm {place}/*; echo ok"
    )
    assert b"full" in result.output
    assert result.output.endswith(b"ok\n")


def test_other_writable_places_are_small(sandbox: BubblewrapSandbox) -> None:
    assert "No space" in said(sandbox, "for i in 1 2 3 4 5 6 7 8; do head -c 4M /dev/zero >/dev/shm/$i; done")


def test_endless_output_is_cut_and_ends_the_call(sandbox: BubblewrapSandbox) -> None:
    result = sandbox.run("yes & yes >&2")
    assert result.cut
    assert len(result.output) == SMALL.output_bytes
    assert not result.timed_out
    assert said(sandbox, "echo alive") == "alive"


def test_cpu_time_is_limited(sandbox: BubblewrapSandbox) -> None:
    limits = Limits(cpu_seconds=1, call_seconds=20)
    with closing(PROVIDER.open({}, limits)) as fresh:
        result = fresh.run("while :; do :; done")
        assert result.status in (128 + signal.SIGKILL, 128 + signal.SIGXCPU)
        assert not result.timed_out


def test_a_hung_command_times_out_and_the_sandbox_stays_usable(sandbox: BubblewrapSandbox) -> None:
    start = time.monotonic()
    result = sandbox.run("trap '' TERM INT USR1 HUP; echo before; while :; do sleep 100; done", seconds=0.3)
    assert result.timed_out
    assert result.output == b"before\n"
    assert time.monotonic() - start < 20
    assert said(sandbox, "cat a.txt") == "alpha"


def test_a_timeout_that_comes_at_any_moment_ends_the_call() -> None:
    with closing(PROVIDER.open({})) as fresh:
        for step in range(40):
            result = fresh.run("sleep 0.003; sleep 9" if step % 2 else "sleep 0.003", seconds=step * 0.0004)
            assert result.status in (0, 124)
        assert said(fresh, "echo alive") == "alive"


def test_a_daemon_is_dead_after_its_call(sandbox: BubblewrapSandbox) -> None:
    daemon = "while :; do date +%N >>alive; sleep 0.01; done"
    sandbox.run(
        f"(setsid nohup bash -c '{daemon}' >/dev/null 2>&1 &); sleep 0.1; trap '' HUP TERM; (sleep 50 &)"
    )
    assert inside(sandbox) == ["1"]
    before = sandbox.snapshot()["alive"]
    time.sleep(0.1)
    assert before.content
    assert sandbox.snapshot()["alive"] == before


def test_a_command_that_closes_its_output_is_still_waited_for(sandbox: BubblewrapSandbox) -> None:
    assert sandbox.run("exec >&- 2>&- <&-; sleep 0.2; touch late; exit 3").status == 3
    assert "late" in sandbox.snapshot()


@pytest.mark.parametrize(
    "name", ["TERM", "KILL", "STOP", "USR1", "SEGV", "CHLD", "PIPE", "TSTP", "RTMIN", "ALRM"]
)
def test_signals_to_process_1_do_no_harm(sandbox: BubblewrapSandbox, name: str) -> None:
    sandbox.run(f"for i in 1 2 3; do kill -{name} 1; done; sleep 0.05")
    assert said(sandbox, "echo alive") == "alive"


def test_a_status_cannot_be_forged(sandbox: BubblewrapSandbox) -> None:
    forge = 'for n in 1 2 3 4 5; do for f in /proc/1/fd/* /proc/1/fd/{1,3}; do echo "$n 0" >$f; done; done'
    assert sandbox.run(f"{{ {forge}; }} 2>/dev/null; exit 9").status == 9
    assert "Permission denied" in said(sandbox, "cat /proc/1/mem /proc/1/environ; ls /proc/1/fd /proc/1/root")
    code = (
        "import ctypes,os; c=ctypes.CDLL(None,use_errno=True); print(c.ptrace(16,1,0,0), ctypes.get_errno())"
    )
    assert said(sandbox, f'python3 -c "{code}"') == "-1 1"


def test_symlinks_are_seen_and_never_followed(sandbox: BubblewrapSandbox, tmp_path: Path) -> None:
    sandbox.run("ln -s /etc/passwd p; ln -s /proc/self/root r; ln -s .. up; ln -s loop loop")
    states = sandbox.snapshot()
    assert states["p"] == FileState("link", b"/etc/passwd")
    assert {name: states[name].kind for name in ("r", "up", "loop")} == dict.fromkeys(
        ("r", "up", "loop"), "link"
    )
    assert not [path for path in states if path.startswith(("r/", "up/", "loop/"))]


def test_a_hostile_tree_does_not_stop_the_snapshot(sandbox: BubblewrapSandbox) -> None:
    sandbox.run(
        "mkfifo pipe; truncate -s 4M s1; truncate -s 4M s2; touch $'new\\nline' $'not-\\xff';"
        "echo x >hidden; chmod 0 hidden;"
        "mkdir closed; touch closed/f; chmod 0 closed;"
        "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"sock\")';"
        "ln a.txt hard"
    )
    states = sandbox.snapshot()
    assert {name: states[name].kind for name in ("pipe", "sock", "hidden", "closed")} == dict.fromkeys(
        ("pipe", "sock", "hidden", "closed"), "other"
    )
    assert [states["s1"].kind, states["s2"].kind].count("file") <= 1
    assert {"new\nline", "not-\\xff"} <= states.keys()
    assert states["hard"] == states["a.txt"]


def test_a_snapshot_of_too_much_is_cut_and_says_so(sandbox: BubblewrapSandbox) -> None:
    sandbox.run("mkdir many; cd many; seq 12000 | xargs touch", seconds=8)
    states = sandbox.snapshot()
    assert tree.CUT in states
    assert len(states) <= tree.MAX_ENTRIES + 1
    sandbox.run("rm -rf many; for i in {1..80}; do mkdir d; cd d; done; touch deep")
    assert tree.CUT in sandbox.snapshot()


def test_the_snapshot_can_be_taken_again_and_follows_changes(sandbox: BubblewrapSandbox) -> None:
    before = sandbox.snapshot()
    sandbox.run("echo b >>a.txt; rm -r d")
    assert sandbox.snapshot() == {"a.txt": FileState("file", b"alpha\nb\n")}
    assert before["a.txt"].content == b"alpha\n"


def test_a_closed_sandbox_says_so_and_closes_again(sandbox: BubblewrapSandbox) -> None:
    sandbox.close()
    sandbox.close()
    for use in (lambda: sandbox.run("true"), sandbox.snapshot):
        with pytest.raises(SandboxError, match="closed"):
            use()


def test_a_nul_in_a_script_is_refused(sandbox: BubblewrapSandbox) -> None:
    with pytest.raises(ValueError, match="NUL"):
        sandbox.run("echo a\0b")


def test_close_from_another_thread_cancels_a_call_at_once(sandbox: BubblewrapSandbox) -> None:
    threading.Timer(0.2, sandbox.close).start()
    start = time.monotonic()
    with pytest.raises(SandboxError, match="closed"):
        sandbox.run("sleep 60 & sleep 60", seconds=60)
    assert time.monotonic() - start < 20


def test_many_threads_have_their_own_sandboxes() -> None:
    def use(number: int) -> str:
        with closing(PROVIDER.open({"n": f"{number}\n"})) as own:
            own.run("cat n n >m")
            return said(own, "cat m; ls; sleep 0.05")

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(use, range(48)))
    assert results == [f"{number}\n{number}\nm\nn" for number in range(48)]


FIRST_AT_ONCE = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from pytest_pocket.sandbox.bubblewrap import BubblewrapProvider

together = Barrier(8)


def one(number):
    together.wait()
    sandbox = BubblewrapProvider().open({"f": str(number)})
    try:
        return sandbox.run("cat f").output.decode()
    finally:
        sandbox.close()


with ThreadPoolExecutor(8) as pool:
    print(*pool.map(one, range(8)))
"""


def test_the_first_sandboxes_of_a_process_may_be_opened_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_AT_ONCE], capture_output=True, text=True)
    assert done.stdout == "0 1 2 3 4 5 6 7\n", done.stderr


def test_a_sandbox_outlives_the_thread_that_opened_it() -> None:
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(PROVIDER.open, {"a": "b\n"}).result()
    with closing(opened):
        time.sleep(0.1)
        assert said(opened, "cat a") == "b"


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        PROVIDER.open({}).close()
        descriptors = len(os.listdir("/proc/self/fd"))
        threads = threading.active_count()
        mark = str(93_000_000 + os.getpid())
        for index in range(10):
            opened = PROVIDER.open({"a": "b"})
            if index % 2:
                threading.Timer(0.05, opened.close).start()
                with pytest.raises(SandboxError):
                    opened.run(f"sleep {mark} & sleep {mark}")
            else:
                opened.run(f"(setsid sleep {mark} &) ; sleep 0.01")
            opened.close()
            assert running(mark) == []
        time.sleep(0.1)
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert threading.active_count() == threads
        assert os.listdir(folder) == []


def test_everything_inside_dies_with_the_host_process() -> None:
    mark = str(94_000_000 + os.getpid())
    code = (
        "from pytest_pocket.sandbox.bubblewrap import BubblewrapProvider\n"
        f"s = BubblewrapProvider().open({{}}); print('open', flush=True); s.run('sleep {mark}', seconds=60)"
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        environment = {**os.environ, "TMPDIR": folder}
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as host:
            assert host.stdout
            assert host.stdout.readline() == b"open\n"
            assert comes_true(lambda: bool(running(mark)))
            host.kill()
            host.wait()
            assert comes_true(lambda: not running(mark))


def test_git_and_python_are_usable_inside(sandbox: BubblewrapSandbox) -> None:
    script = (
        "git init -q . && git add . &&"
        " git -c user.name=A -c user.email=a@b commit -qm one && git log --format=%s;"
        "python3 -c 'import getpass; print(getpass.getuser())'"
    )
    assert said(sandbox, script) == "one\npocket"


def test_a_missing_bwrap_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SandboxUnavailable, match="apt install bubblewrap"):
        PROVIDER.probe()
    with pytest.raises(SandboxUnavailable, match=r"bubblewrap.*Docker or Podman"):
        select("auto")


def test_forbidden_namespaces_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not in tmp_path: under root the provider runs bwrap as nobody, who may not look in there.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        fake = Path(folder, "bwrap")
        fake.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2; exit 1\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        with pytest.raises(
            SandboxUnavailable, match=r"uid map: Permission denied.*apparmor_restrict_unprivileged_userns=0"
        ):
            PROVIDER.probe()


def test_an_unknown_sandbox_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'vm'.*auto, bwrap, docker, podman, none"):
        select("vm")


def test_an_episode_is_cheap() -> None:
    def spent() -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    PROVIDER.open({}).close()
    start, episodes = spent(), 20
    for _ in range(episodes):
        with closing(PROVIDER.open({"a": "b\n"})) as opened:
            opened.run("cat a >c")
            opened.run("cat c")
            opened.snapshot()
    # Loosely: a busy machine makes every process slower. What it costs when idle is in the benchmarks.
    assert (spent() - start) / episodes < 0.05
