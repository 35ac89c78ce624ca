"""Openings: the first replies of all candidates of best-of-N, sampled in one request where an engine can.

All candidates begin with the same prompt, and part with their first replies.  An engine that samples several replies
to one prompt reads it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pytest_pocket.chat import Backend, ChatReply, ChatRequest


class Openings:
    """A backend for the candidates of one cell, played one after the other, each with the seed of its first reply."""

    def __init__(self, backend: Backend, seeds: Sequence[int]) -> None:
        self._backend = backend
        self._seeds = tuple(seeds)
        self._sampled: dict[int, ChatReply] = {}

    def chat(self, request: ChatRequest) -> ChatReply:
        """Answer one request.  Raises as the engine does."""
        if any(message.role == "assistant" for message in request.messages):
            return self._backend.chat(request)
        seed = request.sampling.seed
        if seed not in self._sampled:
            left = self._seeds[self._seeds.index(seed) :]
            self._sampled |= zip(left, several(self._backend, request, left), strict=False)
        return self._sampled.pop(seed)

    def cancel(self) -> None:
        """Cancel the engine's requests."""
        self._backend.cancel()

    def close(self) -> None:
        """Nothing: the engine is the session's."""


def several(backend: Backend, request: ChatRequest, seeds: Sequence[int]) -> list[ChatReply]:
    """Replies for the seeds, in order: for all in one request where the engine has ``chats``, else for the first alone.

    Raises as ``chat``.
    """
    at_once = getattr(backend, "chats", None)
    if at_once is not None:
        replies: list[ChatReply] = at_once(request, seeds)
        return replies
    return [backend.chat(replace(request, sampling=replace(request.sampling, seed=seeds[0])))]
