"""The container provider: its command line, hostile archives, and real containers where there are any."""

from __future__ import annotations

import io
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import containers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_pocket import task_list
from pytest_pocket.backends.scripted import OracleBackend
from pytest_pocket.episode import Workshop, play
from pytest_pocket.sandbox import FileState, Limits, SandboxError, SandboxUnavailable, tree
from pytest_pocket.sandbox.container import (
    ContainerProvider,
    ContainerSandbox,
    image,
    packed,
    start_command,
    unpacked,
)
from pytest_pocket.task import Task, instance_seed

ROOM = 2**20
NAMES = st.text(
    st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=20
).filter(lambda name: name not in (".", ".."))
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def archive(*members: tarfile.TarInfo, content: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, target
    return info


def test_a_container_has_no_network_no_privileges_and_limits() -> None:
    command = " ".join(
        start_command(
            "docker", "pocket-x", Limits(workspace_bytes=1000, memory_bytes=2000, processes=7), "p.json"
        )
    )
    for option in (
        "docker run --detach --rm --name pocket-x",
        "--network none",
        "--read-only",
        "--user 0:0 --cap-drop ALL --cap-add KILL",
        "--security-opt no-new-privileges --security-opt seccomp=p.json",
        "--ipc none",
        "--pids-limit 7",
        "--memory 2000 --memory-swap 2000",
        "--tmpfs /workspace:rw,exec,nosuid,nodev,size=1000",
        "--tmpfs /tmp:rw,exec,nosuid,nodev,size=1000",
    ):
        assert option in command
    assert "--volume" not in command
    assert " -v " not in command


def test_the_image_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POCKET_SANDBOX_IMAGE", raising=False)
    assert "python:3.11" in start_command("docker", "x", Limits(), "p")
    monkeypatch.setenv("POCKET_SANDBOX_IMAGE", "mine:1")
    assert "mine:1" in start_command("docker", "x", Limits(), "p")


def test_a_docker_workspace_holds_so_many_files_whatever_is_in_them() -> None:
    limits = Limits(memory_bytes=64 * 2**20)
    docker = [word for word in start_command("docker", "x", limits, "p") if word.endswith(",nr_inodes=16384")]
    assert [word.split(":")[0] for word in docker] == ["/workspace", "/tmp"]
    assert "nr_inodes" not in " ".join(start_command("podman", "x", limits, "p"))


@given(st.dictionaries(NAMES, TEXT, max_size=8))
def test_packed_files_are_unpacked_as_they_were(files: dict[str, str]) -> None:
    assert unpacked(packed(files), ROOM) == {
        name: FileState("file", text.encode(), text.startswith("#!")) for name, text in files.items()
    }


@settings(max_examples=300)
@given(st.binary(max_size=2000), st.integers(0, 10_000), st.integers(0, 255))
def test_an_archive_of_nonsense_is_read_or_refused_but_never_crashes(
    noise: bytes, place: int, byte: int
) -> None:
    whole = bytearray(packed({"a": "text" * 200, "d/b": "x"}))
    whole[place % len(whole)] = byte
    for data in (noise, bytes(whole), bytes(whole[: place % len(whole)]), bytes(whole) + noise):
        try:
            states = unpacked(data, ROOM)
        except SandboxError:
            continue
        assert all(state.kind in ("file", "link", "other") for state in states.values())


def test_links_devices_and_pipes_are_named_and_never_opened() -> None:
    data = archive(
        member("./link", tarfile.SYMTYPE, target="/etc/passwd"),
        member("./hard", tarfile.LNKTYPE, target="/etc/passwd"),
        member("./fifo", tarfile.FIFOTYPE),
        member("./device", tarfile.CHRTYPE),
        member("./folder", tarfile.DIRTYPE),
    )
    assert unpacked(data, ROOM) == {
        "link": FileState("link", b"/etc/passwd"),
        "hard": tree.OTHER,
        "fifo": tree.OTHER,
        "device": tree.OTHER,
    }


def test_a_hard_link_is_the_file_that_it_names() -> None:
    data = archive(member("./a", size=2), member("./b", tarfile.LNKTYPE, target="./a"), content=b"hi")
    assert unpacked(data, ROOM)["b"] == FileState("file", b"hi")


def test_contents_beyond_the_limit_are_not_read() -> None:
    data = archive(member("a", size=600), member("b", size=600), content=b"x" * 600)
    assert {path: state.kind for path, state in unpacked(data, 1000).items()} == {"a": "file", "b": "other"}


def test_too_many_entries_are_cut_and_it_says_so() -> None:
    data = archive(*(member(f"f{number}") for number in range(tree.MAX_ENTRIES + 50)))
    states = unpacked(data, ROOM)
    assert tree.CUT in states
    assert len(states) <= tree.MAX_ENTRIES + 2


def test_an_engine_that_is_not_installed_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SandboxUnavailable, match="docker is not installed"):
        ContainerProvider("docker").probe()


@pytest.fixture(scope="module", params=containers.ENGINES)
def provider(request: pytest.FixtureRequest) -> ContainerProvider:
    """A provider whose containers start, where its engine is there."""
    if not containers.there(request.param):
        pytest.skip(f"no {request.param} here, or without the image {image()}")
    engine = ContainerProvider(request.param)
    engine.probe()
    return engine


@pytest.fixture
def sandbox(provider: ContainerProvider) -> Iterator[ContainerSandbox]:
    limits = Limits(workspace_bytes=4 * 2**20, output_bytes=2**18, processes=32, call_seconds=10.0)
    with closing(provider.open({"a.txt": "alpha\n", "x.sh": "#!/bin/bash\necho ran\n"}, limits)) as opened:
        yield opened


def test_a_real_container_runs_scripts_and_shows_its_files(sandbox: ContainerSandbox) -> None:
    result = sandbox.run("cat; cat a.txt; ./x.sh; pwd; exit 7", stdin=b"in\n")
    assert (result.status, result.output) == (7, b"in\nalpha\nran\n/workspace\n")
    sandbox.run("ln -s /etc/passwd link; mkfifo fifo; echo b >>a.txt")
    assert sandbox.snapshot() == {
        "a.txt": FileState("file", b"alpha\nb\n"),
        "x.sh": FileState("file", b"#!/bin/bash\necho ran\n", executable=True),
        "link": FileState("link", b"/etc/passwd"),
        "fifo": tree.OTHER,
    }


def test_oracles_solve_all_tasks_in_real_containers(provider: ContainerProvider) -> None:
    workshop = Workshop(provider)

    def outcome(task: Task) -> str:
        episode = play(task, task.build(instance_seed("eval", 0)), OracleBackend(), workshop)
        return f"{episode.outcome} {episode.detail}".strip()

    tasks = task_list.shipped()
    with ThreadPoolExecutor(4) as threads:
        outcomes = dict(zip(tasks, threads.map(outcome, tasks.values()), strict=True))
    assert outcomes == dict.fromkeys(tasks, "passed")


def test_a_real_container_is_closed(sandbox: ContainerSandbox) -> None:
    assert b"unreachable" in sandbox.run("exec 3<>/dev/tcp/1.1.1.1/53").output
    assert sandbox.run("touch /usr/x || touch /x").status != 0
    assert sandbox.run("head -c 9M /dev/zero >big").status != 0


def test_a_real_container_kills_what_a_call_leaves(sandbox: ContainerSandbox) -> None:
    result = sandbox.run(
        "(setsid bash -c 'while :; do echo x >>alive; sleep 0.05; done' &) ; sleep 60", seconds=1.0
    )
    assert result.timed_out
    before = sandbox.snapshot()["alive"]
    time.sleep(0.3)
    assert before.content
    assert sandbox.snapshot()["alive"] == before


def test_a_real_container_survives_endless_output_and_a_fork_bomb(sandbox: ContainerSandbox) -> None:
    assert sandbox.run("yes").cut
    sandbox.run("bomb() { bomb | bomb & }; bomb; sleep 1", seconds=3)
    assert sandbox.run("echo alive").output == b"alive\n"


def test_a_real_container_is_gone_once_it_is_closed(
    provider: ContainerProvider, sandbox: ContainerSandbox
) -> None:
    assert sandbox._name in running(provider)
    sandbox.close()
    assert sandbox._name not in running(provider)


def running(provider: ContainerProvider) -> str:
    command = [provider.name, "ps", "--all", "--format", "{{.Names}}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_closing_a_real_container_cancels_its_call(sandbox: ContainerSandbox) -> None:
    threading.Timer(0.5, sandbox.close).start()
    with pytest.raises(SandboxError, match="closed"):
        sandbox.run("sleep 60", seconds=60)
