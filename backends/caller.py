"""What the engines behind HTTP share: threads that wait for an asynchronous client, with bounded retries.

A thread cannot be interrupted while it reads from a socket; a task of an event loop can, at once, and the
engine then sees the connection end and stops generating.  So every request is a task.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import tenacity

from pytest_pocket.chat import Cancelled, EngineError

T = TypeVar("T")
W = TypeVar("W")
TRIES = 4
LONGEST_WAIT = 8.0
"""Seconds between two tries, at most; an engine that is busy says itself (Retry-After) when to come back."""
PATIENCE = 20.0
"""Seconds for which all requests together wait for a server that is gone and has answered before."""
LONGEST_LOOK = 2.0
"""Seconds between two looks whether it is back, at most."""
SECONDS = 600.0
"""How long a request may take that belongs to no episode."""
MARGIN = 5.0
"""Seconds before an episode's end from which on the next part ends a reply that is being written."""
SLOWEST = 1.0
"""Tokens a second: an engine that writes more slowly is at fault where time ends a reply, and not the model."""
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that may be gone at the next try."""
TOKEN_CHARACTERS = 1024
"""More than any token of any vocabulary has."""


class Garbled(EngineError):
    """An answer that no model's reply can be: it may be another one at the next try."""


class Watch:
    """Watches over one try of a reply that is streamed.

    ``end`` is when the reply must be taken as it is, on the clock of the event loop: the first part after it is
    the last.  An engine that has stalled sends none, and its time runs out.
    """

    def __init__(self, end: float | None) -> None:
        self._end = end
        self._first = time.monotonic()
        self._tokens = 0

    def last(self, tokens: int = 1) -> bool:
        """Take note of a part of so many tokens; whether it is to be the last.

        Raises TimeoutError where the engine is too slow.
        """
        now = time.monotonic()
        if not self._tokens:
            self._first = now
        self._tokens += tokens
        if self._end is None or now < self._end:
            return False
        if self._tokens < SLOWEST * (now - self._first):
            raise TimeoutError(f"{self._tokens} tokens in {now - self._first:.0f} s")
        return True


class Caller:
    """Awaits one client's requests for many threads.

    ``explain`` puts an error into one line for the user: the model, the server, what to do.  ``lost`` are the
    client's errors that mean that no answer came at all.  ``settled`` says of an error whether it is an answer
    all the same, which would be the same at the next try: engines answer 500 to a model's malformed call.
    ``ended`` says whether a server that is gone stays so: one of the session's own whose process has ended.
    """

    def __init__(
        self,
        explain: Callable[[Exception], str],
        lost: tuple[type[Exception], ...],
        settled: Callable[[BaseException], bool],
        ended: Callable[[], bool] = lambda: False,
    ) -> None:
        self._explain = explain
        self._lost = lost
        self._settled = settled
        self._ended = ended
        self._loop = asyncio.new_event_loop()
        self._known: set[concurrent.futures.Future[Any]] = set()
        self._lock = threading.Lock()
        self._cancelled = False
        self._answered = 0.0
        """When the server last answered anything; 0 before the first time."""
        self._gone: float | None = None
        """Since when nobody is answered."""
        self._given_up = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="pocket-http", daemon=True)
        self._thread.start()

    def call(self, request: Callable[[], Awaitable[T]], seconds: float | None = None) -> T:
        """The result of a request, tried again while its error may pass.

        Raises EngineError for the server's faults, Cancelled after ``cancel``; other errors are the caller's to
        understand: answers of the server that are no fault of the line.
        """
        return self.call_beside(lambda: None, request, seconds)[1]

    def call_beside(
        self, work: Callable[[], W], request: Callable[[], Awaitable[T]], seconds: float | None = None
    ) -> tuple[W, T]:
        """What ``work`` gives, which this thread does while the engine works on its answer, and the answer."""
        with self._lock:
            if self._cancelled:
                raise Cancelled
            seconds = SECONDS if seconds is None else seconds
            future = asyncio.run_coroutine_threadsafe(self._persist(request, seconds), self._loop)
            self._known.add(future)
        try:
            return work(), future.result()
        except concurrent.futures.CancelledError:
            raise Cancelled from None
        except TimeoutError as error:
            raise EngineError(
                f"{self._explain(error)}: no reply within {seconds:.0f} s; "
                "raise --pocket-timeout, or lower --pocket-in-flight"
            ) from None
        except Exception as error:
            if self._may_pass(error):
                raise EngineError(self._explain(error)) from error
            raise
        finally:
            future.cancel()  # it is done, unless ``work`` has failed
            with self._lock:
                self._known.discard(future)

    def cancel(self) -> None:
        """Make requests in flight, and later ones, raise Cancelled.  From any thread."""
        with self._lock:
            self._cancelled = True
            known = tuple(self._known)
        for future in known:
            future.cancel()

    def close(self, client: Callable[[], Awaitable[None]]) -> None:
        """Cancel, close the client, and end the thread."""
        self.cancel()
        if self._loop.is_closed():
            return
        closing = asyncio.run_coroutine_threadsafe(_hang_up(client), self._loop)
        concurrent.futures.wait([closing], timeout=2.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=2.0)
        if not self._thread.is_alive():
            self._loop.close()

    async def _persist(self, request: Callable[[], Awaitable[T]], seconds: float) -> T:
        losses: list[float] = []
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(self._may_pass),
            wait=_pause,
            stop=lambda state: self._enough(state, losses),
            reraise=True,
        )

        async def once() -> T:
            try:
                answer = await request()
            except Exception as error:
                if not isinstance(error, (*self._lost, TimeoutError)):
                    self._heard()
                raise
            self._heard()
            return answer

        async with asyncio.timeout(seconds):
            result: T = await retrying(once)
        return result

    def _heard(self) -> None:
        """The server is there."""
        self._answered, self._gone, self._given_up = time.monotonic(), None, False

    def _enough(self, state: tenacity.RetryCallState, losses: list[float]) -> bool:
        """Whether a request has been tried often enough; ``losses`` are the ends of the outages in which it was lost.

        Where nobody is answered any more, all wait together for a while, and then ask once: a run of many episodes
        is neither lost to a server that starts again, nor waits for each where it stays away.
        """
        tired = state.attempt_number >= TRIES
        if not isinstance(state.outcome and state.outcome.exception(), self._lost):
            return tired
        now = time.monotonic()
        self._gone = self._gone or now
        if losses and self._answered < losses[-1]:
            losses[-1] = now  # the same outage
        else:
            losses.append(now)
        if now - self._gone > PATIENCE or (tired and (not self._answered or self._ended())):
            self._given_up = True
        return self._given_up or len(losses) >= TRIES

    def _may_pass(self, error: BaseException) -> bool:
        """Whether the same request may be answered at the next try: a status that passes, or no answer at all."""
        if self._settled(error) or isinstance(error, TimeoutError | Cancelled):
            return False
        status = getattr(error, "status_code", None)
        return isinstance(error, Exception) if status is None else status in PASSING


def in_time(seconds: float | None) -> float | None:
    """When a reply that is being written must be taken as it is, on the clock of the event loop."""
    return None if seconds is None else time.monotonic() + max(seconds - MARGIN, 0.8 * seconds)


def check_length(characters: int, max_tokens: int, where: object) -> None:
    """Raise Garbled for a reply that is longer than any that so many tokens can make."""
    if characters > max_tokens * TOKEN_CHARACTERS:
        raise Garbled(f"{where} wrote {characters} characters where {max_tokens} tokens were allowed")


def check_whole(ended: object, said: object, where: object) -> None:
    """Raise Garbled for a reply that was cut off on its way, or in which there is nothing."""
    if not ended:
        raise Garbled(f"{where} ended its reply in the middle")
    if not said:
        raise Garbled(f"{where} answered with nothing, not even a token that ends a reply")


def waiting(tries: list[float]) -> dict[str, int | float]:
    """What a record says of tries that began at these times, where the last one alone was answered."""
    return {"tries": len(tries), "lost_seconds": round(tries[-1] - tries[0], 3)} if len(tries) > 1 else {}


def _pause(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    response = getattr(error, "response", None)
    try:
        asked = float(response.headers["retry-after"]) if response is not None else 0.0
    except (KeyError, ValueError):
        asked = 0.0
    longest = LONGEST_LOOK if response is None else LONGEST_WAIT
    jittered = tenacity.wait_random_exponential(multiplier=0.25, max=longest)(state)
    # "nan" is a number for Python, and compares with nothing.
    return (min(asked, LONGEST_WAIT) if asked > 0 else 0.0) + jittered


async def _hang_up(client: Callable[[], Awaitable[None]]) -> None:
    """Let cancelled tasks end, then close the client they used."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    await asyncio.gather(*others, return_exceptions=True)
    await client()
