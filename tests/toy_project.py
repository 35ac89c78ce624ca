"""A user's project with a task, models and backends of its own, for the tests of the plugin."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

# pytester forgets modules that an in-process run imports; these are slow to import, or cannot be imported twice.
from pytest_pocket import report, session, task_list  # noqa: F401

task_list.shipped()

TOY = '''
import time

from pytest_pocket import *
from pytest_pocket.registry import Model, ModelError


class Greet(Task):
    name = "greet"
    group = "greeting"

    def make(self, draw):
        word = draw.pick(["ada", "bob", "cyd"]) + str(draw.number(0, 999))
        return Problem(f"Greet the one in name.txt.", {"name.txt": word}, {"word": word})

    def solve(self, instance):
        word = yield ToolCall("Bash", {"command": "cat name.txt"})
        return f"hello {instance.expect['word']}"

    def reward(self, instance, final):
        return score(final, Check("greeting", float(final.answer == f"hello {instance.expect['word']}"), final.answer))


class Scripted:
    """Does what its target says."""

    def __init__(self, model):
        if model.target == "unloadable":
            raise ModelError("the weights of 'unloadable' are missing: fetch them")
        print("LOADED", model.name)
        self.target, self.cancelled, self.calls = model.target, False, 0
        if model.target == "thoughtless":
            self.supports_think = False

    def chat(self, request):
        turn = sum(message.role == "tool" for message in request.messages)
        if self.target == "broken":
            raise EngineError("the engine is on fire")
        if self.target == "cut":
            return ChatReply("", truncated=True)
        if self.target == "even":
            seed = int(request.episode.split(":")[1])
            if seed % 2 == 0 and not turn:
                return ChatReply("", calls=(ToolCall("Bash", {"command": "cat name.txt"}),), completion_tokens=3)
            word = request.messages[-1].content.strip() if turn else "nobody"
            return ChatReply(f"hello {word}", prompt_tokens=5, completion_tokens=3)
        if self.target == "hostile":
            return ChatReply("\\x1b[31mred\\x00\\ud800\\x9b2J\\u202e ]]> \\ufffe", calls=() if turn else (
                ToolCall("Bash", {"command": "printf '\\\\033[2J\\\\000\\\\377'", "\\x1b]0;title\\x07": "\\udfff"}),))
        if self.target == "slow":
            for _ in range(600):
                if self.cancelled:
                    raise Cancelled
                time.sleep(0.1)
        if self.target == "late":
            time.sleep(1.0 if request.episode.endswith("0") else 0.0)
        if self.target == "sleeper":
            return ChatReply("", calls=(ToolCall("Bash", {"command": "sleep 9.753"}),))
        if self.target == "flaky":
            self.calls += 1
            if self.calls % 2:
                raise EngineError("lost")
        return ChatReply("hello stranger", completion_tokens=2)

    def cancel(self):
        self.cancelled = True

    def close(self):
        pass


def pytest_pocket_tasks():
    return [Greet()]


def pytest_pocket_backends():
    return {"toy": Scripted}


def pytest_pocket_models():
    return [Model("half-right", "toy", "even")]
'''


class Project:
    """A folder with ``conftest.py`` as above, in which pytest runs."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.path = pytester.path
        pytester.makeconftest(TOY)

    def run(self, *args: str, sandbox: str = "none", plugins: Sequence[str] = ()) -> pytest.RunResult:
        """Run pytest in this process, without isolation unless ``sandbox`` says so."""
        return self.pytester.runpytest_inprocess(*self._arguments(args, sandbox), *named(plugins))

    def start(self, *args: str, sandbox: str = "none", plugins: Sequence[str] = ()) -> pytest.RunResult:
        """Run pytest in a process of its own, with few plugins, for it is they that take time to start."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
            mine = named(("pytest_pocket.plugin", *plugins))
            return self.pytester.runpytest_subprocess(*mine, *self._arguments(args, sandbox), timeout=60)

    def _arguments(self, args: Sequence[str], sandbox: str) -> list[str]:
        return [
            *named(("no:randomly", "no:hypothesispytest")),
            f"--pocket-sandbox={sandbox}",
            "--pocket-records=records",
            *args,
        ]

    def records(self) -> list[dict[str, Any]]:
        """The records that the last run left."""
        lines = (self.path / "records" / "episodes.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def named(plugins: Sequence[str]) -> list[str]:
    """The arguments that load plugins."""
    return [argument for plugin in plugins for argument in ("-p", plugin)]


def table(result: pytest.RunResult) -> list[str]:
    """The lines of the table that closes a session."""
    lines = result.outlines
    start = next(number for number, line in enumerate(lines) if line.startswith("mean reward and pass@1"))
    return [line for line in lines[start:] if not line.startswith("pocket:")]


def processes(command: str, *, within: bool = False) -> list[int]:
    """The processes whose command line is, or has ``within`` it, these words."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if (command in words if within else words.strip() == command) and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
