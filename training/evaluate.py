"""How a model in training does on dev: the same loop, sandbox and rewards as the suite's, a few instances."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pytest_pocket import sandbox, task_list
from pytest_pocket.backends.hf import HFBackend
from pytest_pocket.conditions import Condition
from pytest_pocket.episode import Episode, Workshop, play
from pytest_pocket.task import Split, instance_seed


def episodes(path: str, split: Split, runs: int, condition: Condition, in_flight: int = 32) -> list[Episode]:
    """The first ``runs`` instances of every task of a split, attempted by the checkpoint at ``path``."""
    workshop = Workshop(sandbox.select("auto"))
    backend = HFBackend(path)
    jobs = [
        (task, task.build(instance_seed(split, index)))
        for task in task_list.shipped().values()
        for index in range(runs)
    ]
    try:
        with ThreadPoolExecutor(in_flight) as threads:
            return list(threads.map(lambda job: play(job[0], job[1], backend, workshop, condition), jobs))
    finally:
        backend.close()


def on_dev(model: Any, tokenizer: Any, runs: int = 6) -> dict[str, float]:
    """Mean reward and pass@1 on dev, raw and full, of a model in memory."""
    import torch

    found = {}
    with tempfile.TemporaryDirectory(prefix="pocket-") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with torch.no_grad():
            for prompt in ("raw", "full"):
                done = episodes(folder, "dev", runs, Condition(prompt))
                found[f"dev_{prompt}_reward"] = sum(episode.reward for episode in done) / len(done)
                found[f"dev_{prompt}_pass"] = sum(episode.outcome == "passed" for episode in done) / len(done)
    return found
