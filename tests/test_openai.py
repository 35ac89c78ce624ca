"""The ``openai`` backend against servers that do what they should not; real ones are in test_engines.py."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("openai")

import openai_server
from openai_server import Answer, Said, Server, honest, reply

from pytest_pocket.backends import caller
from pytest_pocket.backends.openai import OpenAIBackend, parse_target
from pytest_pocket.backends.process import free_port
from pytest_pocket.chat import Cancelled, ChatReply, ChatRequest, EngineError, Message, Sampling
from pytest_pocket.registry import ModelError
from pytest_pocket.session import check_conditions
from pytest_pocket.tools import SCHEMAS

QUESTION = (Message("user", "How many words does this question have?"),)
REQUEST = ChatRequest(QUESTION, SCHEMAS, Sampling())
NOTHING: Said = {"model": "tiny", "messages": [], "max_tokens": 9, "temperature": 0}


@pytest.fixture
def server() -> Iterator[Server]:
    with openai_server.serving() as server:
        yield server


@pytest.fixture
def backend(server: Server) -> Iterator[OpenAIBackend]:
    backend = OpenAIBackend("tiny", server.url)
    server.seen.clear()
    yield backend
    backend.close()


def altered(change: Callable[[Said], None]) -> Callable[[Said], Answer]:
    """An answer to another request than the one that was sent."""

    def answer(body: Said) -> Answer:
        body = {**body, "messages": list(body["messages"])}
        change(body)
        return honest(body)

    return answer


def first(*answers: Answer) -> Callable[[Said], Answer]:
    """These answers one after the other, then honest ones."""
    left = list(answers)
    return lambda body: left.pop(0) if left else honest(body)


def test_a_request_arrives_as_it_was_meant(server: Server, backend: OpenAIBackend) -> None:
    reply = backend.chat(ChatRequest(QUESTION, SCHEMAS, Sampling(0.7, 2**40 + 5, True, 99)))
    sent = server.seen[-1]
    assert (sent["temperature"], sent["seed"], sent["max_tokens"], sent["top_p"]) == (0.7, 5, 99, 1.0)
    assert sent["chat_template_kwargs"] == {"enable_thinking": True}
    assert [tool["function"]["name"] for tool in sent["tools"]] == [
        schema["function"]["name"] for schema in SCHEMAS
    ]
    assert not reply.truncated
    assert {"temperature", "seed", "think", "probe_system", "probe_tools", "server"} <= reply.evidence.keys()


@pytest.mark.parametrize("wanted", [False, True])
def test_log_probabilities_are_asked_for_where_they_are_wanted(
    server: Server, backend: OpenAIBackend, wanted: bool
) -> None:
    backend.chat(ChatRequest(QUESTION, SCHEMAS, Sampling(logprob=wanted)))
    assert server.seen[-1]["logprobs"] is wanted


def test_no_server_is_one_line_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(ModelError, match=f"{url}.*'tiny'.*cannot be reached: start it"):
        OpenAIBackend("tiny", url)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ModelError, match="set OPENAI_BASE_URL"):
        OpenAIBackend("tiny")


@pytest.mark.parametrize(
    ("url", "said"), [("localhost:80/v1", "no http address"), ("ftp://host/v1", "no http address")]
)
def test_an_address_that_is_none(url: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        OpenAIBackend("tiny", url)


def test_a_password_in_the_address_is_not_shown(server: Server) -> None:
    backend = OpenAIBackend("tiny", server.url.replace("127.0.0.1", "me:secret@127.0.0.1"))
    shown = f"{backend} {backend.chat(REQUEST).evidence}"
    backend.close()
    assert "127.0.0.1" in shown
    assert "secret" not in shown


def test_a_model_that_the_server_lacks(server: Server) -> None:
    with pytest.raises(ModelError, match="has no model 'big' but tiny"):
        OpenAIBackend("big", server.url)


def test_a_wrong_key(server: Server) -> None:
    server.key = "right"
    with pytest.raises(ModelError, match="refuses the key for 'tiny': set OPENAI_API_KEY"):
        OpenAIBackend("tiny", server.url, api_key="wrong")
    OpenAIBackend("tiny", server.url, api_key="right").close()


def drop_system(body: Said) -> None:
    body["messages"] = [each for each in body["messages"] if each["role"] != "system"]


def drop_tools(body: Said) -> None:
    body.pop("tools", None)


def drop_think(body: Said) -> None:
    body.pop("chat_template_kwargs", None)


def drop_temperature(body: Said) -> None:
    body["temperature"] = 0


@pytest.mark.parametrize(
    ("drop", "said"), [(drop_system, "drops system prompts"), (drop_tools, "drops tools")]
)
def test_a_server_that_drops_a_part_of_the_prompt_is_refused(
    server: Server, drop: Callable[[Said], None], said: str
) -> None:
    server.answer = altered(drop)
    with pytest.raises(ModelError, match=said):
        OpenAIBackend("tiny", server.url)


def test_a_server_that_counts_nothing_is_refused(server: Server) -> None:
    server.answer = lambda body: (200, {**reply(body), "usage": None})
    with pytest.raises(ModelError, match="how many tokens"):
        OpenAIBackend("tiny", server.url)


@pytest.mark.parametrize(
    ("drop", "think", "hot", "said"),
    [
        (drop_think, True, False, "--pocket-think on"),
        (drop_temperature, False, True, "--pocket-temperature above 0 changes nothing"),
    ],
)
def test_a_condition_that_changes_nothing_is_refused_before_the_run(
    server: Server, drop: Callable[[Said], None], think: bool, hot: bool, said: str
) -> None:
    server.answer = altered(drop)
    backend = OpenAIBackend("tiny", server.url)
    check_conditions("tiny", backend, think=False, hot=False)
    with pytest.raises(ModelError, match=said):
        check_conditions("tiny", backend, think, hot)
    backend.close()


def test_a_server_that_always_draws_is_refused_at_temperature_0(server: Server) -> None:
    server.answer = altered(lambda body: body.__setitem__("temperature", 1))
    backend = OpenAIBackend("tiny", server.url)
    check_conditions("tiny", backend, think=False, hot=True)
    with pytest.raises(ModelError, match=r"--pocket-temperature 0: .* another reply for each seed"):
        check_conditions("tiny", backend, think=False, hot=False, cold=True)
    backend.close()


def test_seeds_that_do_not_repeat_are_told(server: Server, backend: OpenAIBackend) -> None:
    assert backend.caveats == ()
    numbers = itertools.count()
    server.answer = altered(lambda body: body.__setitem__("seed", next(numbers)))
    other = OpenAIBackend("tiny", server.url)
    (caveat,) = other.caveats
    assert "'tiny'" in caveat
    assert "other replies for the same seed" in caveat
    other.close()


def test_a_limit_that_is_not_honoured_is_an_engines_error(server: Server, backend: OpenAIBackend) -> None:
    server.answer = lambda body: honest({**body, "max_tokens": 99})
    with pytest.raises(EngineError, match="wrote 2 tokens where 1 were allowed"):
        backend.chat(ChatRequest(QUESTION, (), Sampling(max_tokens=1)))


def test_thinking_that_cannot_be_switched_off_is_invalid_not_scored(server: Server) -> None:
    server.answer = altered(drop_think)
    backend = OpenAIBackend("tiny", server.url)
    server.answer = lambda body: (200, reply(body, reasoning_content="hm"))
    with pytest.raises(EngineError, match="think off is not honoured"):
        backend.chat(REQUEST)
    backend.close()


def test_a_prompt_that_was_cut_is_truncated(server: Server, backend: OpenAIBackend) -> None:
    long = Message("tool", "word " * 500, name="Read")
    conversation = (*QUESTION, Message("assistant", "I look."), long)
    whole = backend.chat(ChatRequest(conversation, SCHEMAS, Sampling()))
    server.answer = altered(lambda body: body["messages"].__delitem__(slice(1, None)))
    cut = backend.chat(ChatRequest((*conversation, Message("assistant", "x")), SCHEMAS, Sampling()))
    assert (whole.truncated, cut.truncated) == (False, True)
    assert cut.evidence["least_prompt_tokens"] > cut.prompt_tokens


def test_a_window_that_is_too_small_is_truncated(server: Server, backend: OpenAIBackend) -> None:
    error = {"error": {"message": "This model's maximum context length is 64 tokens.", "code": 400}}
    server.answer = lambda body: (400, error)
    assert backend.chat(REQUEST).truncated


@pytest.mark.parametrize(
    "answer",
    [
        (429, {"error": {"message": "busy"}}),
        (500, {"error": {"message": "CUDA error"}}),
        (503, {"error": {"message": "loading"}}),
        (0, None),
        (200, b'{"choices": [{"mess'),
        (200, {"choices": []}),
    ],
    ids=["429", "500", "503", "reset", "half", "no choice"],
)
def test_a_fault_that_passes_is_tried_again(server: Server, backend: OpenAIBackend, answer: Answer) -> None:
    server.answer = first(answer, answer)
    said = backend.chat(REQUEST)
    assert said.content == "hello "
    assert len(server.seen) == 3
    assert said.evidence["tries"] == 3
    assert float(said.evidence["lost_seconds"]) > 0


def test_retry_after_is_obeyed(server: Server, backend: OpenAIBackend) -> None:
    server.headers["retry-after"] = "1"
    server.answer = first((429, {"error": {"message": "busy"}}))
    start = time.monotonic()
    backend.chat(REQUEST)
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize("asked", ["nan", "-1", "soon", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_retry_after_that_is_no_time_waits_for_nothing(
    server: Server, backend: OpenAIBackend, asked: str
) -> None:
    server.headers["retry-after"] = asked
    server.answer = first((429, {"error": {"message": "busy"}}))
    assert backend.chat(replace(REQUEST, seconds=20)).content == "hello "


@pytest.mark.parametrize(
    "answer",
    [
        (500, {"error": {"message": "CUDA error"}}),
        (200, b"not JSON"),
        (200, {"choices": []}),
        (200, b'{"choices": [{"mess'),
        (200, {"choices": [{"index": 0, "finish_reason": "stop", "message": None}]}),
        (200, {"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": ""}}]}),
        (200, reply(NOTHING, content="a" * 10**7)),
    ],
    ids=["500", "garbage", "no choice", "half", "no message", "nothing", "10 MB"],
)
def test_an_engines_fault_is_an_engines_error(server: Server, backend: OpenAIBackend, answer: Answer) -> None:
    server.answer = lambda body: answer
    with pytest.raises(EngineError, match=r"model 'tiny' at http://127\.0\.0\.1"):
        backend.chat(REQUEST)


def test_a_call_that_the_server_could_not_read_is_the_models_fault(
    server: Server, backend: OpenAIBackend
) -> None:
    server.answer = lambda body: (
        500,
        {"error": {"message": "The model output does not match the expected peg-native format"}},
    )
    reply = backend.chat(REQUEST)
    assert reply.malformed
    assert len(server.seen) == 1
    assert "peg-native" in str(reply.evidence["error"])


def call(arguments: str) -> dict[str, Any]:
    return {
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "Read", "arguments": arguments}}],
    }


@pytest.mark.parametrize(
    ("message", "calls", "malformed"),
    [
        (call('{"file_path": "ü"}'), [("Read", {"file_path": "ü"})], False),
        (call('{"file_path": '), [], True),
        (call("[1]"), [], True),
        (
            {"content": '<tool_call>{"name": "Read", "arguments": {"file_path": "a"}}</tool_call>'},
            [("Read", {"file_path": "a"})],
            False,
        ),
        ({"content": "<tool_call>Read(a)"}, [], True),
    ],
    ids=["call", "broken JSON", "no object", "left in the text", "malformed in the text"],
)
def test_calls_are_read_and_broken_ones_told(
    server: Server, backend: OpenAIBackend, message: Said, calls: list[Any], malformed: bool
) -> None:
    server.answer = lambda body: (200, reply(body, **message))
    said = backend.chat(REQUEST)
    assert [(each.name, each.arguments) for each in said.calls] == calls
    assert bool(said.malformed) is malformed


def test_a_server_that_hangs_is_given_up_in_time(server: Server, backend: OpenAIBackend) -> None:
    release = threading.Event()
    server.answer = lambda body: (release.wait(20), honest(body))[1]
    with pytest.raises(EngineError, match="no reply within"):
        backend.chat(ChatRequest(QUESTION, (), Sampling(), seconds=0.5))
    release.set()


def test_cancel_ends_a_request_at_once(server: Server, backend: OpenAIBackend) -> None:
    release, ended = threading.Event(), threading.Event()
    server.answer = lambda body: (release.wait(20), honest(body))[1]

    def ask() -> None:
        with pytest.raises(Cancelled):
            backend.chat(REQUEST)
        ended.set()

    threading.Thread(target=ask).start()
    while not server.seen:
        time.sleep(0.01)
    backend.cancel()
    assert ended.wait(5)
    release.set()
    with pytest.raises(Cancelled):
        backend.chat(REQUEST)


def test_many_requests_at_once(server: Server, backend: OpenAIBackend) -> None:
    gate = threading.Barrier(32, timeout=120)
    server.answer = lambda body: (gate.wait(), honest(body))[1]
    replies: list[ChatReply] = []
    threads = [threading.Thread(target=lambda: replies.append(backend.chat(REQUEST))) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replies) == 32


def test_a_dead_server_is_waited_for_once_and_costs_later_episodes_no_retries(
    server: Server, backend: OpenAIBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller, "PATIENCE", 3.0)
    server.close()
    start = time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        for lost in [threads.submit(backend.chat, REQUEST) for _ in range(8)]:
            with pytest.raises(EngineError, match="cannot be reached"):
                lost.result()
    assert 3 < time.monotonic() - start < 10
    start = time.monotonic()
    for _ in range(20):
        with pytest.raises(EngineError, match="cannot be reached"):
            backend.chat(REQUEST)
    assert time.monotonic() - start < 5


def test_a_server_that_is_restarted_costs_no_reply(server: Server, backend: OpenAIBackend) -> None:
    assert backend.chat(REQUEST).content
    server.close()
    with ThreadPoolExecutor(8) as threads:
        replies = [threads.submit(backend.chat, REQUEST) for _ in range(8)]
        time.sleep(4)  # longer than four tries take
        with openai_server.serving(server.port):
            assert all(reply.result().content for reply in replies)


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("tiny", ("tiny", None)),
        ("tiny@http://host:1/v1", ("tiny", "http://host:1/v1")),
        ("org/a@b", ("org/a@b", None)),
        ("a@b@https://host/v1", ("a@b", "https://host/v1")),
    ],
)
def test_a_target_is_a_name_and_perhaps_an_address(target: str, parts: tuple[str, str | None]) -> None:
    assert parse_target(target) == parts


def test_a_reply_that_time_ends_is_the_models_where_its_tokens_came_fast_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    by_part, by_four = caller.Watch(end=104.0), caller.Watch(end=104.0)
    assert not by_part.last()
    assert not by_four.last(4)
    now = 105.0
    assert by_four.last(4)
    with pytest.raises(TimeoutError, match="2 tokens in 5 s"):
        by_part.last()
