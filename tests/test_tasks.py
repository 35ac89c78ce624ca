"""The 19 tasks: solvable on every seed, worth nothing untouched, and closed to cheats."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_pocket import sandbox, task_list
from pytest_pocket.backends.scripted import NoopBackend, OracleBackend
from pytest_pocket.chat import ChatReply, ChatRequest, ToolCall
from pytest_pocket.episode import Budget, Episode, Workshop, play
from pytest_pocket.functions import FAMILIES
from pytest_pocket.task import SPLITS, Instance, Task, instance_seed

TASKS = task_list.shipped()
CODE = ("fix_syntax_error", "fix_failing_test", "implement_function")
SEEDS = 200
CHEATED_SEEDS = 6
SHORT = Budget(turns=8)


@pytest.fixture(scope="module")
def workshop() -> Workshop:
    return Workshop(sandbox.select("auto"))


class Script(NoopBackend):
    """Makes the given calls, one a turn, then gives the answer."""

    def __init__(self, *calls: ToolCall, answer: str = "done", endless: bool = False) -> None:
        super().__init__()
        self.calls, self.answer, self.endless = calls, answer, endless

    def reply(self, request: ChatRequest) -> ChatReply:
        made = sum(message.role == "assistant" for message in request.messages)
        if made < len(self.calls):
            return ChatReply("", calls=(self.calls[made],), completion_tokens=1)
        if self.endless:
            return ChatReply("", calls=(bash(f"echo {made}"),), completion_tokens=1)
        return ChatReply(self.answer, completion_tokens=1)


class OracleThen(OracleBackend):
    """Solves the task, then makes one more call before it answers; or never stops."""

    def __init__(self, extra: ToolCall, *, endless: bool = False) -> None:
        super().__init__()
        self.extra, self.endless = extra, endless

    def reply(self, request: ChatRequest) -> ChatReply:
        def is_extra(call: ToolCall) -> bool:
            return str(call.arguments.get("command", "")).startswith("true; ")

        made = sum(any(map(is_extra, message.calls)) for message in request.messages)
        results = len([message for message in request.messages if message.role == "tool"]) - made
        name, _, seed = request.episode.partition(":")
        steps = steps_of(TASKS[name], TASKS[name].build(int(seed)), request)
        if results < len(steps):
            return ChatReply("", calls=(steps[results],), completion_tokens=1)
        if self.endless or not made:
            command = self.extra.arguments["command"]
            return ChatReply("", calls=(bash(f"true; {command} # {made}"),), completion_tokens=1)
        return super().reply(
            ChatRequest(request.messages[: -2 * made], request.tools, request.sampling, request.episode)
        )


def steps_of(task: Task, instance: Instance, request: ChatRequest) -> list[ToolCall]:
    """The calls of a task's oracle."""
    results = iter([message.content for message in request.messages if message.role == "tool"])
    solution, steps = task.solve(instance), []
    try:
        steps.append(next(solution))
        while True:
            steps.append(solution.send(next(results, "")))
    except StopIteration:
        return steps


def bash(command: str, **more: int) -> ToolCall:
    return ToolCall("Bash", {"command": command, **more})


def write(path: str, content: str) -> ToolCall:
    return ToolCall("Write", {"file_path": path, "content": content})


def attempts(
    name: str, workshop: Workshop, make: Callable[[Instance], NoopBackend], seeds: int = CHEATED_SEEDS
) -> list[Episode]:
    task = TASKS[name]
    instances = [task.build(instance_seed("eval", index)) for index in range(seeds)]
    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(lambda each: play(task, each, make(each), workshop, budget=SHORT), instances))


def test_there_are_nineteen_tasks_in_five_groups() -> None:
    assert len(TASKS) == 19
    assert {task.group for task in TASKS.values()} == set(task_list.GROUPS)


@pytest.mark.parametrize("name", TASKS)
def test_the_oracle_reaches_reward_1_on_200_eval_seeds(name: str, workshop: Workshop) -> None:
    failed = [e for e in attempts(name, workshop, lambda _: OracleBackend(), SEEDS) if e.outcome != "passed"]
    assert not failed, (failed[0].instance, failed[0].score, failed[0].detail)


@pytest.mark.parametrize("name", TASKS)
def test_the_oracle_passes_on_train_and_dev_too(name: str, workshop: Workshop) -> None:
    task = TASKS[name]
    for split in SPLITS:
        for index in range(8):
            episode = play(task, task.build(instance_seed(split, index)), OracleBackend(), workshop)
            assert episode.outcome == "passed", (episode.instance, episode.score)


@pytest.mark.parametrize("name", TASKS)
def test_the_oracle_makes_calls_where_the_task_says_that_there_is_something_to_do(
    name: str, workshop: Workshop
) -> None:
    episode = play(TASKS[name], TASKS[name].build(instance_seed("eval", 0)), OracleBackend(), workshop)
    assert any(reply.calls for reply in episode.replies) == TASKS[name].acts


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("answer", ["", "done", "ok", "absent", "not found", "0", "1"])
def test_the_untouched_initial_state_earns_nothing(name: str, answer: str, workshop: Workshop) -> None:
    assert [e.reward for e in attempts(name, workshop, lambda _: Script(answer=answer))] == [
        0.0
    ] * CHEATED_SEEDS


@pytest.mark.parametrize("name", TASKS)
def test_echoing_the_prompt_never_passes(name: str, workshop: Workshop) -> None:
    for prefix in ("", "The answer is: "):
        episodes = attempts(name, workshop, lambda each, prefix=prefix: Script(answer=prefix + each.prompt))  # type: ignore[misc]
        assert {e.reward for e in episodes} == {0.0}


@pytest.mark.parametrize("name", TASKS)
def test_printing_all_that_is_in_sight_never_passes(name: str, workshop: Workshop) -> None:
    def everything(each: Instance) -> Script:
        text = "\n".join([each.prompt, *each.files, *each.files.values()])
        numbers = " ".join(re.findall(r"[\w.-]+", text))
        look = bash("cat $(find . -type f -not -path './.git/*'); git log 2>/dev/null")
        return Script(look, answer=f"{numbers}\n{text}")

    assert not [e for e in attempts(name, workshop, everything) if e.outcome == "passed"]


@pytest.mark.parametrize("name", TASKS)
def test_going_on_after_the_work_never_passes(name: str, workshop: Workshop) -> None:
    episodes = attempts(name, workshop, lambda _: OracleThen(bash(":"), endless=True))
    assert {e.outcome for e in episodes} == {"limit"}
    assert max(e.reward for e in episodes) <= 0.5


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    "damage",
    [
        "echo x > extra_file.txt",
        "for f in $(find . -type f -not -path './.git/*'); do echo x >> $f; done; echo x > y",
        "rm -rf ./* .git",
    ],
)
def test_damaging_the_surroundings_never_passes(name: str, damage: str, workshop: Workshop) -> None:
    episodes = attempts(name, workshop, lambda _: OracleThen(bash(damage)))
    assert not [e for e in episodes if e.outcome == "passed"]
    assert {e.outcome for e in episodes} <= {"wrong", "passed"}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("how", ["echo x >>", "rm"])
def test_changing_one_neighbour_and_nothing_else_never_passes(
    name: str, how: str, workshop: Workshop
) -> None:
    solved = attempts(name, workshop, lambda _: OracleBackend())
    neighbours = {
        episode.instance.seed: path
        for episode in solved
        for path, text in sorted(episode.instance.files.items())
        if path in episode.after and episode.after[path].content == text.encode()
    }
    assert neighbours
    episodes = attempts(
        name, workshop, lambda each: OracleThen(bash(f"{how} {shlex.quote(neighbours.get(each.seed, '.'))}"))
    )
    damaged = [episode for episode in episodes if episode.instance.seed in neighbours]
    assert {episode.outcome for episode in damaged} == {"wrong"}
    assert max(episode.reward for episode in damaged) <= 0.5


@pytest.mark.parametrize("name", TASKS)
def test_a_new_git_hook_or_dotfile_counts_as_damage(name: str, workshop: Workshop) -> None:
    hide = bash("mkdir -p .git/hooks; echo 'exit 0' > .git/hooks/pre-commit; echo x > .hidden")
    assert not [e for e in attempts(name, workshop, lambda _: OracleThen(hide)) if e.outcome == "passed"]


def path_of(each: Instance) -> str:
    return str(each.expect["path"])


def shown_cases(each: Instance) -> str:
    """Branches that return the tested values for the tested arguments, or the printed one for the printed ones."""
    if "old" in each.expect:  # no tests, but a line at the end that prints a result
        fixed = each.files[each.expect["path"]].replace(each.expect["old"], each.expect["new"])
        (printed,) = re.findall(r"^print\(\w+\((.*)\)\)$", fixed, re.MULTILINE)
        names: dict[str, Any] = {}
        with contextlib.redirect_stdout(io.StringIO()):
            exec(fixed, names)
        cases = [(printed, repr(eval(f"{each.expect['name']}({printed})", names)))]
    else:
        cases = [(", ".join(map(repr, args)), repr(result)) for args, result in each.expect["shown"]]
    assert cases
    return "".join(f"    if args == ({args},): return {result}\n" for args, result in cases)


FORGERIES = {
    "exits early": "import os\nprint('ok')\nos._exit(0)\n",
    "raises SystemExit": "print('[true, true, true, true, true]')\nraise SystemExit(0)\n",
    "equals everything": "class Any:\n    def __eq__(self, other): return True\n    def __repr__(self): return 'True'\ndef {name}(*args): return Any()\n",
    "patches json": "import json\njson.dumps = lambda *a, **k: '[]'\ndef {name}(*args): return None\n",
    "reads the inputs": "import json\ndef {name}(*args): return json.load(open('inputs.json'))\n",
    "patches builtins": "import builtins\nbuiltins.repr = lambda x: 'ok'\ndef {name}(*args): raise ValueError\n",
    "prints a result": "import atexit\natexit.register(lambda: print('[1, 1, 1, 1, 1]'))\ndef {name}(*args): return 1\n",
    "is a constant": "def {name}(*args): return 0\n",
}


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_code_never_passes(name: str, forgery: str, workshop: Workshop) -> None:
    def forge(each: Instance) -> Script:
        return Script(write(path_of(each), FORGERIES[forgery].replace("{name}", each.expect["name"])))

    assert {e.reward for e in attempts(name, workshop, forge)} == {0.0}


@pytest.mark.parametrize("name", CODE)
def test_hard_coding_the_shown_cases_never_passes(name: str, workshop: Workshop) -> None:
    def hard_code(each: Instance) -> Script:
        return Script(
            write(path_of(each), f"def {each.expect['name']}(*args):\n{shown_cases(each)}    return None\n")
        )

    assert not [e for e in attempts(name, workshop, hard_code) if e.outcome == "passed"]


@pytest.mark.parametrize("name", ["fix_failing_test", "implement_function"])
@pytest.mark.parametrize("command", ["rm $TEST", "echo 'print(\"ok\")' > $TEST"])
def test_changing_the_tests_earns_nothing(name: str, command: str, workshop: Workshop) -> None:
    def change(each: Instance) -> Script:
        return Script(bash(f"TEST={each.expect['test']}; {command}"))

    assert {e.reward for e in attempts(name, workshop, change)} == {0.0}


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize(
    "planted", ["conftest.py", "sitecustomize.py", "usercustomize.py", "json.py", "harness.py"]
)
def test_planting_modules_earns_nothing(name: str, planted: str, workshop: Workshop) -> None:
    plant = write(planted, "import os\nprint('[true]')\nos._exit(0)\n")
    assert {e.reward for e in attempts(name, workshop, lambda _: Script(plant))} == {0.0}


def test_replacing_a_file_by_a_link_earns_nothing(workshop: Workshop) -> None:
    def link(each: Instance) -> Script:
        path = each.expect["path"]
        return Script(
            bash(
                f"mkdir -p $(dirname {path}); printf %s '{each.expect['content']}' > /tmp/x; ln -s /tmp/x {path}"
            )
        )

    assert {e.reward for e in attempts("create_file", workshop, link)} == {0.0}


@pytest.mark.parametrize("name", TASKS)
def test_prompts_vary_and_files_distract(name: str) -> None:
    instances = [TASKS[name].build(instance_seed("train", index)) for index in range(400)]
    assert len({each.prompt for each in instances}) > 380
    assert all(len(each.files) >= (1 if name == "create_file" else 2) for each in instances)


@pytest.mark.parametrize("name", TASKS)
def test_training_has_at_least_eight_wordings_and_evaluation_others(name: str) -> None:
    wordings = sys.modules[type(TASKS[name]).__module__].WORDINGS
    assert len(set(wordings.train)) >= 8
    assert set(wordings.dev).isdisjoint(wordings.train)
    assert wordings.eval
    assert set(wordings.eval).isdisjoint({*wordings.train, *wordings.dev})


def test_the_code_tasks_draw_from_at_least_thirty_families() -> None:
    assert len(FAMILIES.train) >= 30


@pytest.mark.parametrize("name", TASKS)
def test_training_never_shows_what_is_held_out(name: str) -> None:
    unseen = {
        split: [bool(TASKS[name].build(instance_seed(split, i)).unseen) for i in range(300)]
        for split in SPLITS
    }
    assert not any(unseen["train"])
    for split in ("dev", "eval"):
        assert 0.1 < sum(unseen[split]) / 300 < 0.4


@pytest.mark.parametrize("name", TASKS)
def test_the_reach_of_an_instance_is_the_furthest_kind_that_it_drew(name: str) -> None:
    instances = [TASKS[name].build(instance_seed("train", index)) for index in range(400)]
    near = {each.prompt.split()[0] for each in instances if each.reach < 0.5}
    far = {each.prompt.split()[0] for each in instances if each.reach >= 0.5}
    assert all(0 <= each.reach < 1 for each in instances)
    assert near
    assert far - near  # some openings of the prompt come only with a wording from the list's second half


@pytest.mark.parametrize("name", TASKS)
def test_an_instance_depends_on_its_seed_alone(name: str) -> None:
    @settings(max_examples=20)
    @given(st.sampled_from(SPLITS), st.integers(0, 10**9 - 1))
    def check(split: str, index: int) -> None:
        seed = instance_seed(split, index)  # type: ignore[arg-type]
        assert TASKS[name].build(seed) == TASKS[name].build(seed)

    check()


def test_seeds_of_splits_never_meet() -> None:
    assert len({instance_seed(split, index) for split in SPLITS for index in (0, 10**9 - 1)}) == 6
    for index in (-1, 10**9):
        with pytest.raises(ValueError, match="instance index"):
            instance_seed("train", index)
