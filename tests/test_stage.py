"""How a stage of training ends: in one line when it fails, where it was when it was killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from pytest_pocket import sandbox, task_list
from pytest_pocket.backends.scripted import OracleBackend
from pytest_pocket.episode import Workshop, play
from pytest_pocket.registry import read_manifest
from pytest_pocket.task import instance_seed
from pytest_pocket.training import data, fit, sft, stage

LIMITED = """
import resource, signal, sys
from pytest_pocket.training import sft, stage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
stage.run(sft.main, sys.argv[2:])
"""


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    task = task_list.find("create_file")
    workshop = Workshop(sandbox.select("auto"))
    episodes = [
        play(task, task.build(instance_seed("train", n)), OracleBackend(), workshop) for n in range(4)
    ]
    found = [data.trace(episode, False) for episode in episodes]
    path = tmp_path / "traces.jsonl"
    data.write(path, iter([(found, Counter())]))
    return path


def line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line in which a stage of SFT ends."""
    with pytest.raises(SystemExit) as ended:
        stage.run(sft.main, ["--recipe", "smoke", "--name", "mine", *arguments])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("pocket train: ")
    return last


def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, traces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    here = ["--traces", str(traces), *out]
    assert "unknown key 'epochs'" in line(capsys, *here, "--set", "sft.epochs=3")
    assert "unknown model 'sft-run99'" in line(capsys, *here, "--from", "sft-run99")
    row = json.loads(traces.read_text().splitlines()[0])
    traces.write_text(json.dumps({**row, "seed": instance_seed("eval", 3)}) + "\n")
    assert "holds the eval seed 2000000003: training refuses it" in line(capsys, *here)
    assert "pocket train data" in line(capsys, "--traces", str(tmp_path / "none.jsonl"), *out)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_no_half_of_a_checkpoint(tmp_path: Path, traces: Path) -> None:
    """A file that may grow no further stands for it."""
    command = ["--recipe", "smoke", "--set", "sft.tokens=1", "--from", "base", "--traces", str(traces)]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "4000000", *command, "--name", "mine", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("pocket train: ")
    assert last.endswith("is the disk full? What was saved before is whole")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "mine").exists()
    assert not (tmp_path / "mine.state").exists()


def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    model = torch.nn.Linear(100, 100)
    state = fit.State(tmp_path / "mine.state")
    state.save(model, [], step=1)
    (tmp_path / "mine.partial").symlink_to("/dev/full")  # a device that is always full
    with pytest.raises(fit.TrainingError, match="is the disk full"):
        state.save(model, [], step=2)
    assert torch.load(state.path, weights_only=True)["step"] == 1


def test_too_little_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        stage.run(lambda _: torch.empty(10**15))
    (last,) = capsys.readouterr().err.splitlines()
    assert last.startswith("pocket train: out of memory: lower batch_tokens in the recipe")


def test_rlvr_killed_in_the_middle_goes_on_by_the_same_command(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "pytest_pocket.training.rlvr", "--recipe", "smoke", "--from", "sft-run6"),
        *("--set", "rlvr.steps=3", "--name", "mine", "--out", str(tmp_path)),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr
        for told in first.stderr:
            if told.startswith('{"step": 2'):
                first.send_signal(signal.SIGKILL)
                break
    assert first.returncode == -signal.SIGKILL
    assert (tmp_path / "mine.state").is_file()
    assert not (tmp_path / "mine").exists()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    steps = [json.loads(told)["step"] for told in again.stderr.splitlines() if told.startswith('{"step"')]
    assert steps in ([2, 3], [3])  # the state of step 2 may not have been saved
    curve = json.loads((tmp_path / "mine" / "curve.json").read_text())
    assert [point["step"] for point in curve] == [1, 2, 3]
    assert (tmp_path / "mine" / "curve.png").is_file()
    assert read_manifest(tmp_path / "mine").stage == "rlvr"
