"""Episodes on a Ray cluster: the same records, nothing lost with a machine, nothing counted twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from suite_run import play_suite
from toy_project import Project, wait_for

from pytest_pocket import options
from pytest_pocket.attempt import Cell
from pytest_pocket.conditions import Condition
from pytest_pocket.options import OptionError
from pytest_pocket.registry import Model, Registry

PLACE_AND_TIME = ("started", "seconds")
PATIENCE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Where the processors are busy, a slow answer is no dead machine; no answer at all soon is.
    "RAY_health_check_timeout_ms": "120000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_worker_register_timeout_seconds": "240",
    "RAY_gcs_server_request_timeout_seconds": "240",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "240",
}
CONFTEST = """
from helper import Steady, greeting
from pytest_pocket import *


class Greet(Task):
    name = "greet"
    group = "greeting"

    def make(self, draw):
        word = f"ada{draw.number(0, 9999)}"
        return Problem("Greet the one in name.txt.", {"name.txt": word}, {"word": word})

    def solve(self, instance):
        yield ToolCall("Bash", {"command": "cat name.txt"})
        return greeting(instance.expect["word"])

    def reward(self, instance, final):
        return score(final, Check("greeting", float(final.answer == greeting(instance.expect["word"]))))


def pytest_pocket_tasks():
    return [Greet()]


def pytest_pocket_backends():
    return {"steady": Steady}
"""
HELPER = """
import os
import signal
import time
from pathlib import Path

from pytest_pocket import *

BEGUN = str(Path(__file__).with_name("begun.txt"))


def greeting(word):
    return f"hello {word}"


class Steady:
    '''Greets whoever has an even seed, after as many seconds as its target says, and writes down what it begins.'''

    def __init__(self, model):
        self.target = model.target

    def chat(self, request):
        if request.messages[-1].role == "tool":
            return ChatReply(greeting(request.messages[-1].content.strip()), completion_tokens=3)
        if self.target == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        with open(BEGUN, "a") as file:
            file.write(f"{request.episode} {os.getppid()}\\n")  # a worker's parent is its machine's raylet
        time.sleep(float(self.target))
        if int(request.episode.split(":")[1]) % 2:
            return ChatReply("hello stranger", completion_tokens=2)
        return ChatReply("", calls=(ToolCall("Bash", {"command": "cat name.txt"}),), completion_tokens=3)

    def cancel(self):
        pass

    def close(self):
        pass
"""


class Machines:
    """A local cluster of Ray: see ray_machines.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address: str = self.add()["address"]

    def add(self) -> dict[str, Any]:
        """One more machine: its number, its raylet's process, and the cluster's address."""
        return self._ask("add")

    def kill(self, machine: dict[str, Any]) -> None:
        """End all processes of a machine, as a power cut would."""
        self._ask(f"kill {machine['number']}")

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            print(command, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("told "):
                answer: dict[str, Any] = json.loads(line.removeprefix("told "))
                return answer
        raise AssertionError(f"the cluster has ended: {self._process.wait()}")


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    pytest.importorskip("ray")
    command = [sys.executable, str(Path(__file__).with_name("ray_machines.py"))]
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **PATIENCE}
        ) as process,
    ):
        for name, value in PATIENCE.items():
            patch.setenv(name, value)
        found = Machines(process)
        patch.setenv("RAY_ADDRESS", found.address)
        yield found


def _start(folder: Path, *args: str) -> subprocess.Popen[str]:
    """A session over the greetings, in a process of its own."""
    if not (folder / "conftest.py").exists():
        (folder / "conftest.py").write_text(CONFTEST)
        (folder / "helper.py").write_text(HELPER)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
    ]
    return subprocess.Popen(
        [*command, "--pocket-sandbox=none", "--pocket-prompt=raw", *args],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _lines(run: Path) -> list[dict[str, Any]]:
    """The records of a run in the order of their cells, less when and how long."""
    found = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    for each in found:
        for name in PLACE_AND_TIME:
            del each[name]
        # Git's index holds the times and inodes of files.
        each["files"] = [file for file in each["files"] if file["path"] != ".git/index"]
    return sorted(found, key=lambda each: (each["task"], each["model"], each["prompt"], each["run"]))


def test_records_are_those_of_a_local_run(machines: Machines, suite_run: Path, tmp_path: Path) -> None:
    run = play_suite(tmp_path, "--pocket-split=train", "--pocket-executor=ray")
    assert len(_lines(run)) == 19 * 2 * 2
    assert _lines(run) == _lines(suite_run)
    assert json.loads((run / "run.json").read_text())["options"]["executor"] == "ray"


def test_a_machine_lost_in_mid_run_costs_nothing_and_nothing_counts_twice(
    machines: Machines, tmp_path: Path
) -> None:
    asked = ("--pocket-model=steady:1,oracle", "--pocket-in-flight=6", "--runs=8")
    local = _start(tmp_path, *asked, "--pocket-records=local")
    assert local.communicate(timeout=300)[0]
    (tmp_path / "begun.txt").unlink()
    doomed = machines.add()
    there = _start(tmp_path, *asked, "--pocket-executor=ray", "--pocket-records=there")
    file, begun = tmp_path / "there" / "episodes.jsonl", tmp_path / "begun.txt"
    raylet = f" {doomed['raylet']}\n"
    wait_for(lambda: begun.exists() and raylet in begun.read_text(), seconds=300)
    machines.kill(doomed)
    # Results are recorded as they come back, long before the last one.
    wait_for(lambda: file.read_text() != "", seconds=300)
    assert there.poll() is None
    output = there.communicate(timeout=300)[0]
    assert "raylet" not in output
    assert _lines(tmp_path / "there") == _lines(tmp_path / "local"), output
    # What the machine was playing was begun again, and is recorded once.
    episodes = Counter(line.split()[0] for line in begun.read_text().splitlines())
    assert len(episodes) == 8
    assert episodes.total() > 8, output


def test_an_attempt_that_ends_every_worker_is_invalid_and_the_others_finish(
    machines: Machines, tmp_path: Path
) -> None:
    session = _start(
        tmp_path, "--pocket-model=steady:deadly,oracle", "--pocket-executor=ray", "--pocket-records=r"
    )
    output = session.communicate(timeout=300)[0]
    assert session.returncode == 1, output
    oracle, deadly = _lines(tmp_path / "r")
    assert (oracle["outcome"], deadly["outcome"]) == ("passed", "infra")
    assert deadly["detail"].startswith("WorkerCrashedError: "), deadly["detail"]


def test_an_interrupt_ends_what_the_workers_play(machines: Machines, tmp_path: Path) -> None:
    session = _start(
        tmp_path, "--pocket-model=steady:600", "--runs=4", "--pocket-executor=ray", "--pocket-records=r"
    )
    begun = tmp_path / "begun.txt"
    wait_for(begun.exists, seconds=300)
    session.send_signal(signal.SIGINT)
    output = session.communicate(timeout=300)[0]
    assert session.returncode == 2, output
    assert (tmp_path / "r" / "episodes.jsonl").read_text() == ""
    # The machines are free for the next session.
    after = _start(tmp_path, "--pocket-model=oracle", "--pocket-executor=ray", "--pocket-records=r2")
    output = after.communicate(timeout=300)[0]
    assert after.returncode == 0, output


def test_without_ray_it_is_one_line_that_says_how_to_install_it(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = project.run("--pocket-model=oracle", "--pocket-executor=ray")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.errlines == [
        "ERROR: --pocket-executor ray: the package is missing: pip install 'pytest-pocket[ray]'",
        "",
    ]
    assert not (project.path / "records").exists()


def test_xdist_workers_and_ray_are_not_combined(project: Project) -> None:
    pytest.importorskip("ray")
    result = project.start("--pocket-model=oracle", "--pocket-executor=ray", "-n2", plugins=("xdist.plugin",))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --pocket-executor ray plays in Ray's workers: run it without -n"])


def _packed(model: Model, **backends: Any) -> bytes:
    from pytest_pocket.cluster import packed

    asked = options.read(lambda name: model.name if name == "model" else "")
    return packed(asked, "none", [model], Registry([model], backends), ["read_value"], Path(__file__).parent)


def test_what_cannot_travel_is_refused_in_one_line() -> None:
    pytest.importorskip("ray")
    lock = threading.Lock()
    with pytest.raises(
        OptionError, match=r"cannot travel: .*lock.*; install it on every machine, as a package"
    ):
        _packed(Model("locked", "mine"), mine=lambda model: lock)


@pytest.mark.parametrize(("backend", "variable"), [("vllm", "VLLM_BASE_URL"), ("ollama", "OLLAMA_HOST")])
def test_a_server_is_not_started_in_every_worker(
    backend: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(OptionError, match=f"start one that all machines reach, and set {variable} to it"):
        _packed(Model("served", backend, "m"))
    monkeypatch.setenv(variable, "http://10.0.0.7:8000")
    assert b"http://10.0.0.7:8000" in _packed(Model("served", backend, "m"))


def test_a_machine_with_other_code_is_unfit() -> None:
    pytest.importorskip("ray")
    from pytest_pocket import cluster

    kit = _packed(Model("oracle", "oracle"))
    with pytest.raises(
        cluster.Unfit, match="has another pytest-pocket: install the same one on every machine"
    ):
        cluster.play("0" * 64, kit, Cell("read_value", "oracle", Condition(), 1))


def test_a_machine_without_the_weights_says_which_and_where(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from pytest_pocket import cluster

    kit = _packed(Model("mine", "hf", str(tmp_path / "missing")))
    with pytest.raises(cluster.ModelError, match=rf"missing'.* \(on {os.uname().nodename}\)$"):
        cluster.ready(cluster.code_digest(), kit, "mine")
