"""The pool: many episodes in flight in one process, so that engines batch.

pytest asks for results one after the other; the pool plays ahead of it, a window of cells at a time, in the
same order.  The window is bounded, because a finished attempt that waits to be asked for holds its workspace.
Threads are daemons: an engine that ignores a cancellation cannot keep the interpreter alive.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

from pytest_pocket.chat import Cancelled

C = TypeVar("C", bound=Hashable)
R = TypeVar("R")

PATIENCE = 20.0
"""Seconds that a result is waited for before the one who waits says so; then again."""
AHEAD = 4
"""How many cells a window holds for each one in flight: slow ones at its head must not starve the engine."""


class Pool(Generic[C, R]):
    """Plays cells by ``play`` on ``in_flight`` threads.  The first request starts it."""

    def __init__(self, play: Callable[[C], R], cells: Iterable[C], in_flight: int) -> None:
        self._play = play
        self._futures: dict[C, Future[R]] = {cell: Future() for cell in cells}
        self._waiting = OrderedDict(self._futures)
        self._threads = [
            threading.Thread(target=self._work, name=f"pocket-{number}", daemon=True)
            for number in range(min(in_flight, len(self._futures)))
        ]
        self._window = in_flight * AHEAD
        self._begun = 0
        self._claimed = 0
        self.played = 0
        self.total = len(self._futures)
        self._changed = threading.Condition()

    def result(self, cell: C, waiting: Callable[[], None] = lambda: None) -> R:
        """The result of a cell, waited for.  Raises what ``play`` raised, Cancelled after ``cancel``.

        A cell that was asked for before, or that is not the pool's, is played here and now: a rerun is a
        fresh attempt.  ``waiting`` is called whenever ``PATIENCE`` has gone by.
        """
        future = self._claim(cell)
        if future is None:
            return self._play(cell)
        while not wait([future], PATIENCE).done:
            waiting()
        return future.result()

    def cancel(self, seconds: float = 1.0) -> None:
        """Start nothing more, and wait for what is in flight; the caller has cancelled engines and sandboxes."""
        with self._changed:
            for future in self._waiting.values():
                future.set_exception(Cancelled())
            self._waiting.clear()
            self._changed.notify_all()
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _claim(self, cell: C) -> Future[R] | None:
        """Take a cell's future out of the pool, and play next what pytest waits for, whatever the order."""
        with self._changed:
            for thread in self._threads:
                if thread.ident is None:
                    thread.start()
            future = self._futures.pop(cell, None)
            if future is None:
                return None
            self._claimed += 1
            if cell in self._waiting:
                self._waiting.move_to_end(cell, last=False)
            self._changed.notify_all()
            return future

    def _work(self) -> None:
        while (taken := self._next()) is not None:
            cell, future = taken
            try:
                future.set_result(self._play(cell))
            except BaseException as error:
                future.set_exception(error)
            with self._changed:
                self.played += 1
            del cell, future, taken  # a result may hold a whole workspace

    def _next(self) -> tuple[C, Future[R]] | None:
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting or self._begun - self._claimed < self._window)
            if not self._waiting:
                return None
            self._begun += 1
            return self._waiting.popitem(last=False)
