"""The scripted models: an oracle that solves every task and a no-op that answers at once.

They bound the scale from both ends and measure the suite's own speed.  The oracle keeps no state: it replays
a task's solution over the results that the conversation already holds, so it works from any process.
"""

from __future__ import annotations

import threading

from pytest_pocket.chat import Cancelled, ChatReply, ChatRequest
from pytest_pocket.task_list import find


class NoopBackend:
    """Answers "done" without acting."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def chat(self, request: ChatRequest) -> ChatReply:
        """Answer one request."""
        if self._cancelled.is_set():
            raise Cancelled
        return self.reply(request)

    def reply(self, request: ChatRequest) -> ChatReply:
        """The scripted reply."""
        return ChatReply("done", completion_tokens=1)

    def cancel(self) -> None:
        """Make later requests raise Cancelled."""
        self._cancelled.set()

    def close(self) -> None:
        """Nothing to free."""


class OracleBackend(NoopBackend):
    """Plays each task's own solution."""

    def reply(self, request: ChatRequest) -> ChatReply:
        """The solution's next step, given the tool results so far."""
        name, _, seed = request.episode.partition(":")
        task = find(name)
        solution = task.solve(task.build(int(seed)))
        results = [message.content for message in request.messages if message.role == "tool"]
        try:
            call = next(solution)
            for result in results:
                call = solution.send(result)
        except StopIteration as stop:
            return ChatReply(stop.value, completion_tokens=1)
        return ChatReply("", calls=(call,), completion_tokens=1)
