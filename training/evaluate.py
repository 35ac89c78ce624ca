"""How a model in training does on dev: the same loop, sandbox and rewards as the suite's, a few instances."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pytest_pocket import sandbox, task_list
from pytest_pocket.backends.hf import HFBackend
from pytest_pocket.chat import Backend
from pytest_pocket.conditions import Condition
from pytest_pocket.episode import Episode, Workshop, play
from pytest_pocket.task import Split, instance_seed


def episodes(
    backend: Backend, split: Split, runs: int, condition: Condition, in_flight: int = 32
) -> list[Episode]:
    """The first ``runs`` instances of every task of a split, attempted by a model."""
    workshop = Workshop(sandbox.select("auto"))
    jobs = [
        (task, task.build(instance_seed(split, index)))
        for task in task_list.shipped().values()
        for index in range(runs)
    ]
    with ThreadPoolExecutor(in_flight) as threads:
        return list(threads.map(lambda job: play(job[0], job[1], backend, workshop, condition), jobs))


def on_dev(model: Any, tokenizer: Any, runs: int = 6) -> dict[str, float]:
    """Mean reward and pass@1 on dev, raw and full, of a model in memory."""
    found = {}
    backend = HFBackend.around(model, tokenizer)
    try:
        for prompt in ("raw", "full"):
            done = episodes(backend, "dev", runs, Condition(prompt))
            found[f"dev_{prompt}_reward"] = sum(episode.reward for episode in done) / len(done)
            found[f"dev_{prompt}_pass"] = sum(episode.outcome == "passed" for episode in done) / len(done)
    finally:
        backend.close()
    return found
