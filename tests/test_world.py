"""Several processes, a GPU each, or here the CPU: they hold the same weights, those that one would have made."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import make_qwen3
from transformers import AutoModelForCausalLM

from pytest_pocket.training import fit, recipe, world
from pytest_pocket.training.fit import Rendered

BATCHES = [
    [Rendered([5, 6, 7, 8], [0, 0, 1, 1])],
    [Rendered([9, 8, 7, 6, 5], [0, 1, 1, 1, 1])],
]
PROCESS = """
import sys
import torch
from transformers import AutoModelForCausalLM
from test_world import BATCHES, averaged
from pytest_pocket.training import world

assert world.size() == 2
assert world.gathered([f"{world.is_first()} {n}" for n in range(2)]) == [
    "True 0", "False 0", "True 1", "False 1"
]
assert world.total(1.5) == 3.0
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
(batch,) = world.share(BATCHES)
averaged(model, [batch])
torch.save(model.state_dict(), f"{sys.argv[2]}/{world.is_first()}.pt")
world.total(0.0)  # neither leaves the other alone
"""


def averaged(model: torch.nn.Module, batches: list[list[Rendered]]) -> None:
    """A step on the mean of the batches' losses, those of all processes."""
    optimizers = fit.optimizers_of(model, 0.0, 1e-2)
    for batch in batches:
        (fit.next_token_loss(model, *fit.tensors(batch)) / len(batches)).backward()
    fit.descend(model, optimizers)


def test_one_process_has_all() -> None:
    assert world.size() == 1
    assert world.is_first()
    assert list(world.share([1, 2, 3])) == [1, 2, 3]
    assert world.gathered([1, 2]) == [1, 2]
    assert world.total(2.0) == 2.0


@pytest.mark.timeout(300)
def test_two_processes_make_the_step_that_one_makes_with_both_batches(tmp_path: Path) -> None:
    path = make_qwen3(tmp_path / "model")
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(script, path, tmp_path),
        ],
        check=True,
        env=environment(tmp_path),
    )
    alone = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    averaged(alone, BATCHES)
    ends = [torch.load(tmp_path / f"{first}.pt") for first in (True, False)]
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(ends[0][name], value)
        assert torch.equal(ends[0][name], ends[1][name])


def environment(home: Path) -> dict[str, str]:
    """For processes that share the cores, and import this module."""
    here = str(Path(__file__).parent)
    return {**os.environ, "PYTHONPATH": here, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}


COUNT = 240
LENGTH = 16
CURVE = """
import json, sys
from pathlib import Path
from test_world import examples, fitted

curve = fitted(sys.argv[1], Path(sys.argv[2]), [[[each]] for each in examples()])
from pytest_pocket.training import world
assert world.size() == 2
if world.is_first():
    Path(sys.argv[2], "curve.json").write_text(json.dumps(curve))
"""


def examples() -> list[Rendered]:
    """Sequences in which each token is the one before it and one more: a model learns that soon."""
    starts = random.Random(0)
    return [
        Rendered([start + place for place in range(LENGTH)], [0] + [1] * (LENGTH - 1))
        for start in (starts.randrange(5, 80) for _ in range(COUNT))
    ]


def fitted(model: str, folder: Path, steps: list[list[list[Rendered]]]) -> list[dict[str, float]]:
    """The curve of the training loop of SFT on the CPU."""
    learner = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plan = recipe.Fit({"raw": 1.0}, 0.0, 0.0, 0, 0.0, COUNT * LENGTH, LENGTH, 0.005, 1e-3, 0)
    return fit.fit_model(learner, iter(steps), plan, fit.State(folder / f"{len(steps)}.state"))


@pytest.mark.timeout(300)
def test_accelerate_launch_with_two_processes_gives_the_loss_curve_of_one(tmp_path: Path) -> None:
    path = make_qwen3(tmp_path / "model")
    script = tmp_path / "process.py"
    script.write_text(CURVE)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    # Processes that find no GPU train on the CPU.
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [*launch, "--main_process_port", "0", script, path, tmp_path],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    both = json.loads((tmp_path / "curve.json").read_text())
    pairs = examples()
    alone = fitted(str(path), tmp_path, [[pairs[n : n + 2]] for n in range(0, COUNT, 2)])
    assert [point["tokens"] for point in both] == [point["tokens"] for point in alone]
    assert len(both) == 2
    assert both[-1]["loss"] < 0.8 * both[0]["loss"]
    for one, other in zip(both, alone, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
