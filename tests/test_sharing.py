"""Engines served by the controller: what crosses the wire, and what happens when one end goes."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pytest_pocket.chat import Cancelled, ChatReply, ChatRequest, EngineError, Message, Sampling, ToolCall
from pytest_pocket.registry import ModelError
from pytest_pocket.sharing import RemoteBackend, Server, watch

REQUEST = ChatRequest((Message("user", "hi"),), (), Sampling(), "greet:1")


@contextmanager
def _serving(chat: Callable[[str, ChatRequest], ChatReply]) -> Iterator[Server]:
    server = Server(lambda model, request, seeds: [chat(model, request)])
    try:
        yield server
    finally:
        server.close()


def _remote(server: Server, model: str = "m") -> RemoteBackend:
    return RemoteBackend(server.address, server.authkey, model)


def test_requests_and_replies_cross_whole() -> None:
    reply = ChatReply(
        "a\ud800\0", calls=(ToolCall("Read", {"x": [1, None]}),), logprob=-1.5, prompt_ids=(1, 2)
    )
    seen = []

    def chat(model: str, request: ChatRequest) -> ChatReply:
        seen.append((model, request))
        return reply

    with _serving(chat) as server:
        assert _remote(server, "name").chat(REQUEST) == reply
    assert seen == [("name", REQUEST)]


def test_several_replies_to_one_request_cross_at_once() -> None:
    server = Server(lambda model, request, seeds: [ChatReply(str(seed)) for seed in seeds])
    replies = _remote(server).chats(REQUEST, (7, 8, 9))
    server.close()
    assert [reply.content for reply in replies] == ["7", "8", "9"]


@pytest.mark.parametrize("error", [EngineError("fire"), Cancelled(), ModelError("no weights")], ids=repr)
def test_errors_cross_as_themselves(error: Exception) -> None:
    def chat(model: str, request: ChatRequest) -> ChatReply:
        raise error

    with _serving(chat) as server:
        with pytest.raises(type(error)) as caught:
            _remote(server).chat(REQUEST)
        assert str(caught.value) == str(error)


def test_an_unknown_error_and_a_reply_that_cannot_cross_are_the_engines_fault() -> None:
    replies = [ChatReply("", evidence={"lock": threading.Lock()})]  # type: ignore[dict-item]

    def chat(model: str, request: ChatRequest) -> ChatReply:
        return replies.pop()

    with _serving(chat) as server:
        remote = _remote(server)
        with pytest.raises(EngineError, match="cannot cross"):
            remote.chat(REQUEST)
        with pytest.raises(EngineError, match=r"the backend broke: IndexError: .* \(test_sharing\.py:\d+\)"):
            remote.chat(REQUEST)


def test_requests_of_several_workers_meet_in_the_engine() -> None:
    meeting = threading.Barrier(3, timeout=5)

    def chat(model: str, request: ChatRequest) -> ChatReply:
        meeting.wait()
        return ChatReply("met")

    with _serving(chat) as server:
        answers: list[str] = []
        threads = [
            threading.Thread(target=lambda remote=remote: answers.append(remote.chat(REQUEST).content))
            for remote in [_remote(server), *[_remote(server)] * 2]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
        assert answers == ["met"] * 3


def test_a_worker_that_waits_is_cancelled_when_the_controller_closes() -> None:
    released = threading.Event()

    def chat(model: str, request: ChatRequest) -> ChatReply:
        released.wait(10)
        return ChatReply("late")

    with _serving(chat) as server:
        threading.Timer(0.1, server.close).start()
        start = time.monotonic()
        with pytest.raises(Cancelled):
            _remote(server).chat(REQUEST)
        assert time.monotonic() - start < 8
        released.set()
    with pytest.raises(Cancelled):
        _remote(server).chat(REQUEST)


def test_a_worker_can_cancel_its_own_requests() -> None:
    released = threading.Event()

    def chat(model: str, request: ChatRequest) -> ChatReply:
        released.wait(10)
        return ChatReply("late")

    with _serving(chat) as server:
        remote = _remote(server)
        threading.Timer(0.1, remote.cancel).start()
        with pytest.raises(Cancelled):
            remote.chat(REQUEST)
        with pytest.raises(Cancelled):
            remote.chat(REQUEST)
        released.set()


def test_the_death_of_a_worker_disturbs_no_other() -> None:
    with _serving(lambda model, request: ChatReply("fine")) as server:
        process = multiprocessing.get_context("spawn").Process(
            target=_die, args=(server.address, server.authkey)
        )
        process.start()
        process.join(20)
        assert process.exitcode == 9
        assert _remote(server).chat(REQUEST).content == "fine"


def _die(address: str, authkey: bytes) -> None:
    RemoteBackend(address, authkey, "m").chat(REQUEST)
    os._exit(9)


def test_a_peer_without_the_key_is_refused_and_others_are_served() -> None:
    with _serving(lambda model, request: ChatReply("fine")) as server:
        with pytest.raises(Cancelled):
            RemoteBackend(server.address, b"wrong", "m").chat(REQUEST)
        assert _remote(server).chat(REQUEST).content == "fine"


def test_a_watcher_learns_that_the_controller_has_closed_and_no_file_remains() -> None:
    ended = threading.Event()
    server = Server(lambda model, request, seeds: [ChatReply("")])
    watch(server.address, server.authkey, ended.set)
    time.sleep(0.1)
    assert not ended.is_set()
    server.close()
    assert ended.wait(2)
    assert not os.path.exists(server.address)
