"""The 19 tasks as scripts for toy.py: ``python tests/bench/peers/suite.py FILE``.

What each task's oracle does is written as shell commands, for that is what every framework has.  Every script is played by
our own loop, in bubblewrap, and must pass the task's checks; what its commands print there and in a bare folder of the host
alike is what they must show everywhere.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import toy

from pytest_pocket import records, task_list
from pytest_pocket.attempt import Cell
from pytest_pocket.backends.scripted import OracleBackend
from pytest_pocket.chat import ChatReply, ChatRequest, ToolCall
from pytest_pocket.conditions import Condition
from pytest_pocket.episode import Episode, Workshop, play
from pytest_pocket.registry import Model
from pytest_pocket.sandbox.bubblewrap import BubblewrapProvider
from pytest_pocket.task import Check, Final, Instance, Score, Task, instance_seed, score

MODEL = Model("scripted", "scripted")
LOOK = "md5sum $(find . -type f | sort)"
"""What a command that changes files is followed by, so that it shows what it did."""


class Scripted:
    """Plays a script through our loop."""

    def __init__(self, script: toy.Script) -> None:
        self.script = script

    def chat(self, request: ChatRequest) -> ChatReply:
        results = [message.content for message in request.messages if message.role == "tool"]
        command, answer = toy.step(self.script, results)
        calls = (ToolCall("Bash", {"command": command}),) if command else ()
        return ChatReply(answer, calls=calls, completion_tokens=toy.TOKENS)

    def cancel(self) -> None: ...

    def close(self) -> None: ...


class Toy(Task):
    """The toy, as one of our tasks."""

    name = "toy"
    group = "read"

    def reward(self, instance: Instance, final: Final) -> Score:
        return score(final, Check("value", float(final.answer == instance.expect["value"])))


def attempt(script: toy.Script, workshop: Workshop) -> Episode:
    """The script's episode, scored as the suite scores it.  It must pass."""
    if script.origin:
        name, seed = script.origin
        task = task_list.find(name)
        instance = task.build(seed)
    else:
        task = Toy()
        instance = Instance(task.name, 0, script.prompt, script.files, {"value": script.answer})
    episode = play(task, instance, Scripted(script), workshop, Condition("full"))
    assert episode.outcome == "passed", (script, episode.outcome, episode.detail, episode.answer)
    return episode


def record(episode: Episode) -> dict[str, Any]:
    """The episode as a session records it."""
    task = episode.instance.task
    group = Toy.group if task == Toy.name else task_list.find(task).group
    cell = Cell(task, MODEL.name, episode.condition, 1)
    return records.record(cell=cell, model=MODEL, episode=episode, split="train", group=group)


def shell(call: ToolCall, files: Mapping[str, str]) -> str:
    """A call of one of our tools as a shell command."""
    given = call.arguments
    match call.name:
        case "Bash":
            return str(given["command"])
        case "Read":
            return f"cat {shlex.quote(given['file_path'])}"
        case "Glob":
            folder, _, name = given["pattern"].rpartition("**/")
            return f"find {shlex.quote(folder or '.')} -type f -name {shlex.quote(name)}"
        case "Write":
            path, text = given["file_path"], given["content"]
        case "Edit":
            path = given["file_path"]
            text = files[path].replace(given["old_string"], given["new_string"], 1)
        case other:
            raise ValueError(f"no shell command for {other}")
    quoted = shlex.quote(path)
    return f"mkdir -p $(dirname {quoted}); printf %s {shlex.quote(text)} >{quoted}; cat {quoted}"


def printed(script: toy.Script) -> list[str]:
    """What the commands print in a bare folder."""
    with tempfile.TemporaryDirectory() as folder:
        for path, text in script.files.items():
            Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, path).write_text(text)
        return [
            subprocess.run(
                ["bash", "-c", command],
                cwd=folder,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            ).stdout
            for command in (script.setup or ":", *script.commands)
        ][1:]


def scripted(name: str, workshop: Workshop) -> toy.Script:
    """The first training instance of a task."""
    task, seed = task_list.find(name), instance_seed("train", 0)
    instance = task.build(seed)
    solved = play(task, instance, OracleBackend(), workshop, Condition("full"))
    commands = [shell(call, instance.files) for reply in solved.replies for call in reply.calls]
    if task.group == "write":
        commands = [f"{command}; {LOOK}" for command in commands]
    plain = toy.Script(
        instance.prompt,
        dict(instance.files),
        commands,
        [()] * len(commands),
        solved.answer,
        instance.setup,
        (name, seed),
    )
    ours = [message.content for message in attempt(plain, workshop).messages if message.role == "tool"]
    shown = [
        [line for line in host.splitlines() if toy.normal(line) and toy.normal(line) in toy.normal(own)]
        for host, own in zip(printed(plain), ours, strict=True)
    ]
    assert all(shown), (name, commands, shown)
    script = toy.Script(**{**vars(plain), "shown": shown})
    attempt(script, workshop)
    return script


def main() -> None:
    workshop = Workshop(BubblewrapProvider())
    scripts: list[dict[str, Any]] = [vars(scripted(name, workshop)) for name in task_list.shipped()]
    Path(sys.argv[1]).write_text(json.dumps(scripts))


if __name__ == "__main__":
    main()
