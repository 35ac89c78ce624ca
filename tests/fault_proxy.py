"""A proxy in front of an engine, which does to its replies what engines and networks do on bad days.

Which request meets a fault, which one, and for how many tries follows from a seed and from the request's own bytes, so
that it is the same in each session, whatever the order.  Only requests of episodes are touched: those that ask for more
tokens than a probe does.  Whole replies and streams of lines (Ollama's) are both understood.

    async with FaultProxy(upstream, ["reset"], share=0.2, seed=1) as proxy: ... proxy.url ... proxy.injected
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import httpx

PROBED = 100
"""No probe asks for more tokens."""
TRIES = (1, 2, 99)
"""For how many tries of one request a fault may last: the last one outlasts all of them."""
DEAD_SECONDS = (0.3, 2.0)
"""When an engine that died is started again: within the tries of one request, or beyond them."""
FLOOD = 10 * 2**20
GARBAGE = b"\x00\xff<html>\xfe no engine says this \x80" * 20
HOP = ("connection", "transfer-encoding", "content-length", "keep-alive")


class Hang(Exception):
    """Nothing is sent any more, and the connection stays."""


class Reset(Exception):
    """The connection is reset."""


class Mortal(Protocol):
    """An engine that can die.  Both calls block."""

    def kill(self) -> None:
        """Let its process die."""

    def revive(self) -> None:
        """Start it again where it was, if it is dead, and wait until it answers."""


class FaultProxy:
    """The proxy, in the running event loop."""

    def __init__(
        self, upstream: str, kinds: Sequence[str], share: float, seed: int, engine: Mortal | None = None
    ) -> None:
        if unknown := set(kinds).difference(FAULTS):
            raise ValueError(f"unknown faults {sorted(unknown)}: choose from {', '.join(FAULTS)}")
        if "dies" in kinds and engine is None:
            raise ValueError("the fault 'dies' needs an engine that can")
        self.kinds, self.share, self.seed, self.engine = list(kinds), share, seed, engine
        self.injected: Counter[str] = Counter()
        self.requests = 0
        self._upstream = httpx.AsyncClient(base_url=upstream, timeout=None, trust_env=False)
        self._tries: Counter[bytes] = Counter()
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._returning: list[asyncio.Task[None]] = []
        self.port = 0

    async def __aenter__(self) -> FaultProxy:
        await self._listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await asyncio.gather(*self._returning)  # raises where the engine did not come back
        finally:
            self._vanish()
            await self._upstream.aclose()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._converse, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def _vanish(self) -> None:
        """As when the process dies: nothing listens, and every connection is reset."""
        if self._server:
            self._server.close()
            self._server = None
        for writer in tuple(self._open):
            _reset(writer)

    def die(self, seconds: float) -> None:
        """Let the engine die, and start it again after a while."""
        engine = self.engine
        if self._server is None or engine is None:
            return  # dead already

        async def come_back() -> None:
            await asyncio.to_thread(engine.kill)
            await asyncio.sleep(seconds)
            await asyncio.to_thread(engine.revive)
            await self._listen()

        self._vanish()
        self._returning.append(asyncio.create_task(come_back()))

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                method, path, headers = _parsed(head)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await self._answer(writer, method, path, headers, body)
        except Hang:
            with contextlib.suppress(OSError):
                await reader.read()  # until the other side hangs up
        except Reset:
            _reset(writer)
        except (OSError, asyncio.IncompleteReadError, httpx.TransportError):
            pass  # the other side has hung up, or we have died
        finally:
            self._open.discard(writer)
            writer.close()

    async def _answer(
        self, writer: asyncio.StreamWriter, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> None:
        fault, lasting = self._fault(body)
        if fault:
            self.injected[fault] += 1
        if fault in INSTEAD:
            await INSTEAD[fault](self, writer, lasting)
            return
        sent = {name: value for name, value in headers.items() if name not in ("host", *HOP)}
        told = await self._upstream.request(method, path, headers=sent, content=body)
        kind = told.headers.get("content-type", "")
        if fault and told.is_success:
            await WITHIN[fault](writer, kind, told.content)
        else:
            await _send(writer, told.status_code, kind, told.content)

    def _fault(self, body: bytes) -> tuple[str, bool]:
        """The fault of this try of a request, if any, and whether it outlasts all tries."""
        try:
            asked = json.loads(body) if body else {}
        except ValueError:
            return "", False
        limit = asked.get("max_tokens") or asked.get("options", {}).get("num_predict") or 0
        if limit <= PROBED:
            return "", False
        self.requests += 1
        key = hashlib.sha256(json.dumps([self.seed, asked], sort_keys=True).encode()).digest()
        draw = random.Random(key)
        if draw.random() >= self.share:
            return "", False
        kind, tries = draw.choice(self.kinds), draw.choice(TRIES)
        self._tries[key] += 1
        return (kind, tries == TRIES[-1]) if self._tries[key] <= tries else ("", False)


async def _send(writer: asyncio.StreamWriter, status: int, kind: str, body: bytes, *more: str) -> None:
    """A whole answer."""
    _begin(writer, status, kind, len(body), *more)
    writer.write(body)
    await writer.drain()


def _begin(writer: asyncio.StreamWriter, status: int, kind: str, length: int, *more: str) -> None:
    lines = [f"HTTP/1.1 {status} Fault", f"content-type: {kind}", f"content-length: {length}", *more]
    writer.write("\r\n".join([*lines, "", ""]).encode())


def _parsed(head: bytes) -> tuple[str, str, dict[str, str]]:
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    method, path, _ = first.split(" ", 2)
    pairs = (line.partition(":") for line in lines)
    return method, path, {name.strip().lower(): value.strip() for name, _, value in pairs}


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST, not with FIN."""
    found: socket.socket | None = writer.get_extra_info("socket")
    if found is not None:
        with contextlib.suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


# Faults in place of a reply


async def _dead(proxy: FaultProxy, writer: asyncio.StreamWriter, lasting: bool) -> None:
    proxy.die(DEAD_SECONDS[lasting])
    raise Reset


async def _hang(proxy: FaultProxy, writer: asyncio.StreamWriter, lasting: bool) -> None:
    raise Hang


async def _reset_at_once(proxy: FaultProxy, writer: asyncio.StreamWriter, lasting: bool) -> None:
    raise Reset


def _status(
    status: int, body: object, *headers: str
) -> Callable[[FaultProxy, asyncio.StreamWriter, bool], Awaitable[None]]:
    async def answer(proxy: FaultProxy, writer: asyncio.StreamWriter, lasting: bool) -> None:
        await _send(writer, status, "application/json", json.dumps(body).encode(), *headers)

    return answer


# Faults in a reply


async def _cut(writer: asyncio.StreamWriter, kind: str, body: bytes) -> None:
    """Half of the reply, then a reset."""
    _begin(writer, 200, kind, len(body))
    writer.write(body[: len(body) // 2])
    await writer.drain()
    await asyncio.sleep(0.05)  # a reset throws away what was not read yet
    raise Reset


async def _stall(writer: asyncio.StreamWriter, kind: str, body: bytes) -> None:
    """Half of the reply, then nothing."""
    _begin(writer, 200, kind, len(body))
    writer.write(body[: len(body) // 2])
    await writer.drain()
    raise Hang


async def _drip(writer: asyncio.StreamWriter, kind: str, body: bytes) -> None:
    """Half of the reply, then a byte each second."""
    _begin(writer, 200, kind, len(body))
    half = len(body) // 2
    for part in (body[:half], *(body[place : place + 1] for place in range(half, len(body)))):
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(1.0)


async def _half(writer: asyncio.StreamWriter, kind: str, body: bytes) -> None:
    """Half of the reply, as if it were all."""
    await _send(writer, 200, kind, body[: len(body) // 2])


async def _garbage(writer: asyncio.StreamWriter, kind: str, body: bytes) -> None:
    """Bytes that are no JSON, in the middle of a stream or in place of a whole."""
    lines = body.splitlines(keepends=True)
    if len(lines) > 1:
        lines.insert(len(lines) // 2, GARBAGE + b"\n")
    await _send(writer, 200, kind, b"".join(lines) if len(lines) > 1 else GARBAGE)


async def _empty(writer: asyncio.StreamWriter, kind: str, body: bytes) -> None:
    """A reply without a choice (of Ollama, without a line)."""
    told = _objects(body)
    told[-1]["choices"] = []
    await _send(writer, 200, kind, b"" if len(told) > 1 else json.dumps(told[-1]).encode())


async def _hollow(writer: asyncio.StreamWriter, kind: str, body: bytes) -> None:
    """A reply of nothing: a choice whose message is empty, and not a token."""
    last = _objects(body)[-1]
    if "choices" in last:
        last["choices"] = [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": ""}}
        ]
        last["usage"]["completion_tokens"] = 0
    else:
        last["message"], last["eval_count"] = {"role": "assistant", "content": ""}, 0
    await _send(writer, 200, kind, json.dumps(last).encode() + b"\n")


async def _flood(writer: asyncio.StreamWriter, kind: str, body: bytes) -> None:
    """A reply of 10 MB, its count of tokens as it was."""
    told = _objects(body)
    message = told[0]["choices"][0]["message"] if "choices" in told[0] else told[0]["message"]
    message["content"] = "word " * (FLOOD // 5)
    await _send(writer, 200, kind, b"\n".join(json.dumps(each).encode() for each in told) + b"\n")


def _objects(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in body.splitlines() if line.strip()]


INSTEAD: dict[str, Callable[[FaultProxy, asyncio.StreamWriter, bool], Awaitable[None]]] = {
    "dies": _dead,
    "hangs": _hang,
    "reset": _reset_at_once,
    "429": _status(429, {"error": {"message": "busy"}}, "retry-after: 1"),
    "500": _status(500, {"error": {"message": "CUDA error"}}),
    "503": _status(503, {"error": {"message": "Loading model"}}),
}
WITHIN: dict[str, Callable[[asyncio.StreamWriter, str, bytes], Awaitable[None]]] = {
    "cut": _cut,
    "stall": _stall,
    "drip": _drip,
    "half": _half,
    "garbage": _garbage,
    "empty": _empty,
    "hollow": _hollow,
    "flood": _flood,
}
FAULTS = (*INSTEAD, *WITHIN)
ENDLESS = frozenset({"hangs", "stall", "drip"})
"""Faults that only the episode's own time ends."""


@contextmanager
def faulty(
    upstream: str, kinds: Sequence[str], share: float, seed: int, engine: Mortal | None = None
) -> Iterator[FaultProxy]:
    """A proxy in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def wait(work: Awaitable[Any]) -> None:
        async def run() -> None:
            await work

        asyncio.run_coroutine_threadsafe(run(), loop).result(300)

    proxy = FaultProxy(upstream, kinds, share, seed, engine)
    wait(proxy.__aenter__())
    try:
        yield proxy
    finally:
        try:
            wait(proxy.__aexit__())
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(5)
