"""The loop, with scripted models and the real sandbox: every way in which an episode can end."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from pytest_pocket import task_list
from pytest_pocket.chat import Cancelled, ChatReply, ChatRequest, EngineError, ToolCall, first_line
from pytest_pocket.conditions import SYSTEM_PROMPTS, Condition
from pytest_pocket.episode import Budget, Episode, Workshop, check_lines, play, reply_seed
from pytest_pocket.sandbox import Limits, Sandbox, SandboxError, SandboxUnavailable
from pytest_pocket.sandbox.bubblewrap import BubblewrapProvider
from pytest_pocket.task import Check, Draw, Final, Instance, Problem, Score, Solution, Task, score

PROVIDER = BubblewrapProvider()
try:
    PROVIDER.probe()
except SandboxUnavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)


class Toy(Task):
    """Put the number in ``in.txt`` into ``out.txt`` and say it."""

    name = "toy"
    group = "write"

    def make(self, draw: Draw) -> Problem:
        number = str(draw.number(100, 999))
        return Problem("Copy in.txt to out.txt and say the number.", {"in.txt": number}, {"number": number})

    def solve(self, instance: Instance) -> Solution:
        yield ToolCall("Bash", {"command": "cp in.txt out.txt"})
        return str(instance.expect["number"])

    def reward(self, instance: Instance, final: Final) -> Score:
        number = instance.expect["number"]
        probed = final.probe({"out.txt": final.text("out.txt") or ""}, "cat out.txt").output.decode()
        return score(
            final,
            Check("copied", float(probed == number), f"out.txt holds {probed!r}"),
            Check("said", float(final.answer == number), f"said {final.answer!r}"),
            may_change=["out.txt"],
        )


Reply = ChatReply | Exception | Callable[[ChatRequest], ChatReply]


class Script:
    """A backend that plays replies in order; the last one for ever."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.requests: list[ChatRequest] = []

    def chat(self, request: ChatRequest) -> ChatReply:
        self.requests.append(request)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, Exception):
            raise reply
        return reply if isinstance(reply, ChatReply) else reply(request)

    def cancel(self) -> None: ...

    def close(self) -> None: ...


TASK = Toy()
INSTANCE = TASK.build(2 * 10**9)
NUMBER = str(INSTANCE.expect["number"])


def bash(command: str, **changes: Any) -> ChatReply:
    return replace(
        ChatReply("", calls=(ToolCall("Bash", {"command": command}),), completion_tokens=10), **changes
    )


def say(text: str, **changes: Any) -> ChatReply:
    return replace(ChatReply(text, completion_tokens=5), **changes)


COPY = bash("cp in.txt out.txt")


class Counting(BubblewrapProvider):
    """Counts the sandboxes that are open."""

    def __init__(self) -> None:
        self.open_now = 0

    def open(self, files: Mapping[str, str], limits: Limits = Limits()) -> Any:
        sandbox = super().open(files, limits)
        self.open_now += 1
        close, closed = sandbox.close, threading.Event()

        def count() -> None:
            if not closed.is_set():
                closed.set()
                self.open_now -= 1
            close()

        sandbox.close = count  # type: ignore[method-assign]
        return sandbox


@pytest.fixture
def workshop() -> Iterator[Workshop]:
    provider = Counting()
    yield Workshop(provider)
    assert provider.open_now == 0


def attempt(workshop: Workshop, *replies: Reply, **options: Any) -> tuple[Episode, Script]:
    script = Script(*replies)
    return play(TASK, INSTANCE, script, workshop, **options), script


def ending(episode: Episode) -> tuple[str, str, float]:
    return episode.outcome, episode.stop, episode.reward


def test_a_solved_episode_passes(workshop: Workshop) -> None:
    episode, script = attempt(workshop, COPY, say(NUMBER, logprob=-3.0, prompt_tokens=7))
    assert ending(episode) == ("passed", "answer", 1.0)
    assert [message.role for message in episode.messages] == ["user", "assistant", "tool", "assistant"]
    assert episode.after["out.txt"].content.decode() == NUMBER
    assert (episode.completion_tokens, episode.prompt_tokens) == (15, 7)
    assert episode.logprob == pytest.approx(-3.0 / 15)
    assert script.requests[1].messages == episode.messages[:-1]
    assert script.requests[0].episode == f"toy:{INSTANCE.seed}"


def test_the_oracle_solves_it_through_the_same_loop(workshop: Workshop) -> None:
    def oracle(request: ChatRequest) -> ChatReply:
        solution = TASK.solve(INSTANCE)
        call = next(solution)
        for message in request.messages:
            if message.role == "tool":
                with pytest.raises(StopIteration) as end:
                    solution.send(message.content)
                return say(end.value.value)
        return ChatReply("", calls=(call,))

    assert attempt(workshop, oracle)[0].outcome == "passed"


@pytest.mark.parametrize("prompt", SYSTEM_PROMPTS)
def test_the_condition_decides_the_opening_and_the_sampling(workshop: Workshop, prompt: str) -> None:
    condition = Condition(prompt, think=True, temperature=0.7)
    _, script = attempt(workshop, say("no"), condition=condition, budget=Budget(reply_tokens=33))
    request = script.requests[0]
    system = [message.content for message in request.messages if message.role == "system"]
    assert system == ([SYSTEM_PROMPTS[prompt]] if prompt != "raw" else [])
    sampling = request.sampling
    assert (sampling.temperature, sampling.think, sampling.max_tokens) == (0.7, True, 33)


@pytest.mark.parametrize("best_of", [1, 2])
def test_log_probabilities_are_asked_for_where_candidates_may_tie(workshop: Workshop, best_of: int) -> None:
    condition = Condition(temperature=0.7, best_of=best_of)
    _, script = attempt(workshop, COPY, say("no"), condition=condition)
    assert [request.sampling.logprob for request in script.requests] == [best_of > 1] * 2


def test_an_answer_without_a_call_is_an_early_stop(workshop: Workshop) -> None:
    assert ending(attempt(workshop, say(NUMBER))[0]) == ("early_stop", "answer", 0.5)


def test_a_wrong_answer_to_what_needs_no_call_is_wrong(workshop: Workshop) -> None:
    task = task_list.find("answer_directly")
    episode = play(task, task.build(INSTANCE.seed), Script(say("no idea")), workshop)
    assert ending(episode) == ("wrong", "answer", 0.0)


def test_a_wrong_result_is_wrong(workshop: Workshop) -> None:
    episode, _ = attempt(workshop, bash("echo 7 > out.txt"), say("7"))
    assert ending(episode) == ("wrong", "answer", 0.0)
    assert episode.score is not None
    assert check_lines(episode.score.checks)[1] == "said: 0 (said '7')"


def test_damage_halves_the_reward(workshop: Workshop) -> None:
    episode, _ = attempt(workshop, bash("cp in.txt out.txt; touch litter"), say(NUMBER))
    assert ending(episode) == ("wrong", "answer", 0.5)


def test_the_same_call_with_the_same_result_is_looping(workshop: Workshop) -> None:
    episode, script = attempt(workshop, COPY)
    # The file is right, nothing was said, and it did not stop by itself.
    assert ending(episode) == ("looping", "looping", 0.25)
    assert len(script.requests) == 4


def test_the_same_call_with_another_result_is_not_looping(workshop: Workshop) -> None:
    count = bash("echo x >> in.txt; wc -l < in.txt")
    assert attempt(workshop, *[count] * 6, say("no"))[0].stop == "answer"


def test_turns_run_out(workshop: Workshop) -> None:
    replies = [bash(f"echo {number}") for number in range(9)]
    episode, script = attempt(workshop, *replies, budget=Budget(turns=3))
    assert ending(episode)[:2] == ("limit", "turns")
    assert len(script.requests) == 3


def test_tokens_run_out_and_bound_the_last_reply(workshop: Workshop) -> None:
    replies = [bash(f"echo {number}") for number in range(9)]
    episode, script = attempt(workshop, *replies, budget=Budget(tokens=25, reply_tokens=15))
    assert ending(episode)[:2] == ("limit", "tokens")
    assert [request.sampling.max_tokens for request in script.requests] == [15, 15, 5]


def test_a_reply_cut_by_its_length_is_a_limit_and_its_text_no_answer(workshop: Workshop) -> None:
    episode, _ = attempt(workshop, COPY, say(NUMBER, finish="length"))
    assert ending(episode) == ("limit", "tokens", 0.25)
    assert episode.answer == ""


def test_seconds_run_out(workshop: Workshop) -> None:
    def slow(request: ChatRequest) -> ChatReply:
        time.sleep(1.1)
        return bash(f"echo {len(request.messages)}")

    assert ending(attempt(workshop, slow, budget=Budget(seconds=1.0))[0])[:2] == ("limit", "seconds")


def test_time_that_was_up_before_the_model_was_asked_is_infra(workshop: Workshop) -> None:
    episode, script = attempt(workshop, say("no"), budget=Budget(seconds=1e-9))
    assert (episode.outcome, script.requests) == ("infra", [])


@pytest.mark.parametrize("how", ["between replies", "in one"])
def test_time_that_runs_out_after_some_was_lost_to_the_engine_is_infra(workshop: Workshop, how: str) -> None:
    """The model may have had enough of it."""

    def slow(request: ChatRequest) -> ChatReply:
        time.sleep(1.1)
        reply = bash(f"echo {len(request.messages)}")
        return replace(reply, evidence={"tries": 2, "lost_seconds": 0.05})

    script = [slow] if how == "between replies" else [slow, replace(say("I was"), finish="time")]
    episode, _ = attempt(workshop, *script, budget=Budget(seconds=1.0 if len(script) == 1 else 90.0))
    assert (episode.outcome, episode.score) == ("infra", None)
    assert "went to tries that the engine did not answer" in episode.detail


def test_a_malformed_call_goes_back_to_the_model_which_may_recover(workshop: Workshop) -> None:
    episode, script = attempt(workshop, say("{", malformed="that is not JSON"), COPY, say(NUMBER))
    assert episode.outcome == "passed"
    assert script.requests[1].messages[-1].content == "Error: that is not JSON"


def test_three_malformed_calls_in_a_row_end_it(workshop: Workshop) -> None:
    episode, script = attempt(workshop, say("{", malformed="no"))
    assert ending(episode)[:2] == ("malformed", "malformed")
    assert len(script.requests) == 3


def test_an_unknown_tool_is_an_error_for_the_model(workshop: Workshop) -> None:
    unknown = ChatReply("", calls=(ToolCall("Fly", {}),))
    episode, script = attempt(workshop, unknown, COPY, say(NUMBER))
    assert episode.outcome == "passed"
    assert "no tool 'Fly'" in script.requests[1].messages[-1].content


def test_a_cut_prompt_is_invalid(workshop: Workshop) -> None:
    episode, _ = attempt(workshop, COPY, say(NUMBER, truncated=True))
    assert ending(episode) == ("truncated", "truncated", 0.0)
    assert episode.invalid
    assert episode.score is None


def test_an_engine_error_is_infra_and_invalid(workshop: Workshop) -> None:
    episode, _ = attempt(workshop, COPY, EngineError("out of memory"))
    assert (episode.outcome, episode.invalid, episode.detail) == ("infra", True, "EngineError: out of memory")


def test_a_failing_setup_is_infra(workshop: Workshop) -> None:
    episode = play(TASK, replace(INSTANCE, setup="echo broken; exit 3"), Script(say("x")), workshop)
    assert episode.outcome == "infra"
    assert "the setup of toy" in episode.detail
    assert "broken" in episode.detail


def test_a_sandbox_that_does_not_open_is_infra() -> None:
    class Broken(BubblewrapProvider):
        def open(self, files: Mapping[str, str], limits: Limits = Limits()) -> Any:
            raise SandboxError("no room")

    assert play(TASK, INSTANCE, Script(say("x")), Workshop(Broken())).detail == "SandboxError: no room"


@pytest.mark.parametrize("fault", [ConnectionError("gone\nfor good"), MemoryError(), KeyError("choices")])
def test_whatever_a_backend_raises_is_infra_and_says_where(workshop: Workshop, fault: Exception) -> None:
    def breaks(request: ChatRequest) -> ChatReply:
        raise fault

    episode, _ = attempt(workshop, COPY, breaks)
    assert ending(episode) == ("infra", "infra", 0.0)
    said = first_line(fault)
    assert re.fullmatch(
        rf"EngineError: the backend broke: {type(fault).__name__}: {said} \(test_episode\.py:\d+\)",
        episode.detail,
    )


def test_what_is_no_reply_is_infra(workshop: Workshop) -> None:
    class Talks(Script):
        def chat(self, request: ChatRequest) -> Any:
            return "hello"

    episode = play(TASK, INSTANCE, Talks(), workshop)
    assert episode.outcome == "infra"
    assert "AttributeError: 'str' object has no attribute 'message'" in episode.detail


def test_a_broken_task_raises_and_leaves_no_sandbox(workshop: Workshop) -> None:
    class Broken(Toy):
        def reward(self, instance: Instance, final: Final) -> Score:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        play(Broken(), INSTANCE, Script(say("x")), workshop)


def test_cancelling_during_a_command_ends_it_at_once_without_an_episode() -> None:
    provider = Counting()
    workshop = Workshop(provider)
    caught: list[BaseException] = []

    def run() -> None:
        try:
            play(TASK, INSTANCE, Script(bash("sleep 60")), workshop)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while not provider.open_now:
        time.sleep(0.01)
    time.sleep(0.1)
    start = time.monotonic()
    workshop.cancel()
    thread.join(30)
    assert time.monotonic() - start < 20
    assert [type(error) for error in caught] == [Cancelled]
    assert provider.open_now == 0


def test_nothing_starts_after_cancelling(workshop: Workshop) -> None:
    workshop.cancel()
    with pytest.raises(Cancelled):
        play(TASK, INSTANCE, Script(say("x")), workshop)


def test_a_cancelled_engine_passes_through(workshop: Workshop) -> None:
    with pytest.raises(Cancelled):
        attempt(workshop, COPY, Cancelled())


def test_reply_seeds_repeat_and_differ_by_seed_sample_and_turn(workshop: Workshop) -> None:
    first = attempt(workshop, COPY, say("no"), seed=3)[1].requests
    again = attempt(workshop, COPY, say("no"), seed=3)[1].requests
    assert [r.sampling.seed for r in first] == [r.sampling.seed for r in again]
    variants = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({reply_seed(seed, INSTANCE, sample, turn) for seed, sample, turn in variants}) == 4


def test_a_closed_sandbox_is_the_protocol_the_loop_asks_for() -> None:
    sandbox: Sandbox = PROVIDER.open({})
    sandbox.close()
    sandbox.close()
