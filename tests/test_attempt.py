"""Attempts: ids, pairing of instances, and the choice among candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from pytest_pocket import task_list
from pytest_pocket.attempt import Attempt, Cell, attempt, cell_properties, choose
from pytest_pocket.backends.scripted import NoopBackend
from pytest_pocket.chat import Cancelled, ChatReply, ChatRequest
from pytest_pocket.conditions import Condition
from pytest_pocket.episode import Budget, Ending, Episode, Workshop
from pytest_pocket.options import OptionError, Options, read
from pytest_pocket.sandbox import FileState
from pytest_pocket.sandbox.local import LocalProvider
from pytest_pocket.task import Score
from pytest_pocket.trajectory import compact

INSTANCE = task_list.find("read_value").build(2_000_000_000)


def _episode(
    answer: str,
    files: Mapping[str, bytes] = {},
    logprob: float | None = None,
    outcome: Ending = "wrong",
    reward: float = 0.0,
) -> Episode:
    reply = ChatReply(answer, completion_tokens=1, logprob=logprob)
    after = {path: FileState("file", content) for path, content in files.items()}
    score = None if outcome == "infra" else Score((), reward, 1.0, 1.0)
    return Episode(INSTANCE, Condition(), (), (reply,), outcome, "answer", score, answer, after, 0.0)


def test_an_id_names_model_condition_run_and_sample() -> None:
    cell = Cell("read_value", "rlvr-v1", Condition(), 1)
    assert cell.id == "rlvr-v1-raw-think_off-t0-r01"
    sampled = Cell("read_value", "hf:a/b", Condition("full", True, 0.7, 4), 12, 1, 3, "hf_a_b")
    assert sampled.id == "hf_a_b-full-think_on-t0.7-bo4-r12-s2"


def test_the_instance_of_a_run_is_the_same_for_every_model_and_condition() -> None:
    one = Cell("read_value", "a", Condition(), 2).instance("eval", 0)
    other = Cell("read_value", "b", Condition("full", True, 1.0), 2, 5).instance("eval", 0)
    assert one == other
    assert one.seed == 2_000_000_001
    assert Cell("read_value", "a", Condition(), 1).instance("dev", 3).seed == 1_000_030_000


def test_the_answer_that_most_share_is_chosen_whatever_its_reward() -> None:
    episodes = [_episode("7", reward=1.0, outcome="passed"), _episode("8"), _episode(" `8`. ")]
    assert choose(episodes) == 1


def test_workspaces_vote_too() -> None:
    episodes = [_episode("done", {"a": b"1"}), _episode("done", {"a": b"2"}), _episode("done", {"a": b"2"})]
    assert choose(episodes) == 1
    assert (
        choose([_episode("x", {"a": b"bc"}), _episode("x", {"ab": b"c"}), _episode("x", {"ab": b"c"})]) == 1
    )


def test_a_tie_goes_to_the_most_probable_if_all_have_a_probability_else_to_the_first() -> None:
    assert (
        choose([_episode("1", logprob=-2.0), _episode("2", logprob=-1.0), _episode("3", logprob=-3.0)]) == 1
    )
    assert choose([_episode("1", logprob=-2.0), _episode("2"), _episode("3", logprob=-1.0)]) == 0


def test_invalid_episodes_have_no_vote() -> None:
    lost = _episode("", outcome="infra")
    assert choose([lost, lost, _episode("5")]) == 2
    assert choose([lost, lost]) == 0


class _Numbers:
    """Answers with the seed of its request."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def chat(self, request: ChatRequest) -> ChatReply:
        self.seeds.append(request.sampling.seed)
        return ChatReply(str(request.sampling.seed), prompt_tokens=3, completion_tokens=2)

    def cancel(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def workshop() -> Workshop:
    return Workshop(LocalProvider())


def test_candidates_and_samples_draw_with_seeds_of_their_own(workshop: Workshop) -> None:
    backend = _Numbers()
    condition = Condition(temperature=1.0, best_of=3)
    done = [
        attempt(Cell("read_value", "m", condition, 1, sample, 2), backend, workshop, Budget(), 0, "eval")
        for sample in range(2)
    ]
    assert len(set(backend.seeds)) == 6
    properties = {**cell_properties(done[0].cell, "toy"), **done[0].properties()}
    assert (properties["prompt_tokens"], properties["completion_tokens"], properties["turns"]) == (9, 6, 1)
    assert all(type(value) in (str, int, float) for value in properties.values())


class _AtOnce(_Numbers):
    """Samples all candidates' first replies in one request."""

    def chats(self, request: ChatRequest, seeds: Sequence[int]) -> list[ChatReply]:
        self.seeds.append(len(seeds))
        return [replace(self.chat(request), content=str(seed)) for seed in seeds]


def test_candidates_open_with_one_request_where_the_engine_samples_several(workshop: Workshop) -> None:
    one_by_one, at_once = _Numbers(), _AtOnce()
    cell = Cell("read_value", "m", Condition(temperature=1.0, best_of=3), 1)
    answers = [
        [episode.answer for episode in attempt(cell, backend, workshop, Budget(), 0, "eval").episodes]
        for backend in (one_by_one, at_once)
    ]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == at_once.seeds[0] == 3


def test_an_attempt_that_is_cancelled_says_nothing(workshop: Workshop) -> None:
    workshop.cancel()
    with pytest.raises(Cancelled):
        attempt(Cell("read_value", "m", Condition(), 1), _Numbers(), workshop, Budget(), 0, "eval")


def test_a_trajectory_is_short_and_harmless() -> None:
    messages = (
        tuple(Condition("full").messages("go\x1b[2J"))
        + (ChatReply("y" * 1000 + "\n" * 50 + "end").message(),) * 40
    )
    episode = replace(_episode("z"), messages=messages)
    text = compact(Attempt(Cell("read_value", "m", Condition("full"), 1), (episode,), 0))
    assert "\x1b" not in text
    assert "You are a coding agent" not in text
    assert "[840 more characters]" in text
    assert "messages left out]" in text
    assert len(text.splitlines()) < 200


def test_a_failure_shows_what_the_task_expected(workshop: Workshop) -> None:
    cell = Cell("read_value", "m", Condition(), 1)
    done = attempt(cell, NoopBackend(), workshop, Budget(), 0, "eval")
    right = done.episode.instance.expect["value"]
    assert f"  expected value {right!r}, " in compact(done)


def _read(**given: str) -> Options:
    return read(lambda name: given.get(name, ""))


def test_the_defaults_are_the_headline_conditions() -> None:
    options = _read(model="oracle")
    assert options.conditions == (Condition("raw"), Condition("full"))
    assert (options.runs, options.samples, options.split, options.in_flight) == (1, 1, "eval", 16)
    assert options.fail_under is None


def test_runs_of_different_seeds_never_share_an_instance() -> None:
    last = Cell("read_value", "m", Condition(), _read(runs="10000").runs).instance("eval", 0).seed
    first = Cell("read_value", "m", Condition(), 1).instance("eval", 1).seed
    assert last < first
    with pytest.raises(OptionError, match="100000"):
        _read(seed="100000")
