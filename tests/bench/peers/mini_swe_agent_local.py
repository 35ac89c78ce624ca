"""mini-swe-agent: ``DefaultAgent`` in its local or, with MSWEA_ENVIRONMENT=bubblewrap, its bubblewrap environment.

Many at a time run on threads, as its own batch runner for SWE-bench does.  It has one tool, the shell, and ends by a
command that prints its answer: its third turn starts a third process.  A trajectory is saved after every step.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["MSWEA_SILENT_STARTUP"] = "1"

import toy
from minisweagent import __version__
from minisweagent.agents.default import DefaultAgent
from minisweagent.environments.extra.bubblewrap import BubblewrapEnvironment
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.test_models import DeterministicModel, make_output

BUBBLEWRAP = os.environ.get("MSWEA_ENVIRONMENT") == "bubblewrap"
SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; echo "


class Scripted(DeterministicModel):
    """The scripted model."""

    def query(self, messages: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
        prompt, *results = (message["content"] for message in messages if message["role"] == "user")
        command, answer = toy.step(toy.asked(prompt), results)
        wanted = command or SUBMIT + shlex.quote(answer)
        return make_output(wanted, [{"command": wanted}], cost=0.0)


def one(number: int, folder: Path) -> str:
    """One agent in one fresh folder."""
    workspace = Path(tempfile.mkdtemp(dir=folder))
    script = toy.script(number)
    for path, text in script.files.items():
        target = workspace / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    if script.setup:
        subprocess.run(["bash", "-c", script.setup], cwd=workspace, check=True)
    environment = (BubblewrapEnvironment if BUBBLEWRAP else LocalEnvironment)(cwd=str(workspace))
    agent = DefaultAgent(
        Scripted(outputs=[]),
        environment,
        system_template="You are a coding agent.",
        instance_template="{{task}}",
        output_path=folder / f"{number}.traj.json",
    )
    try:
        return str(agent.run(script.prompt)["submission"])
    finally:
        shutil.rmtree(workspace)


def play(numbers: Sequence[int], in_flight: int) -> list[str]:
    """Play on ``in_flight`` threads."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(in_flight) as pool:
        return list(pool.map(lambda number: one(number, Path(folder)), numbers))


if __name__ == "__main__":
    bubblewrap = "bubblewrap, a fresh one each command: a read-only system, the host's network and processes"
    toy.report(__version__, bubblewrap if BUBBLEWRAP else "none: a shell of the host in a folder", play)
