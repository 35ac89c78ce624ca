"""The tripwire: whether an engine has read all of the prompt that it was given.

Servers cut a prompt that is too long for their window, and say nothing.  With a checkpoint's own tokenizer at hand
the engine's count is held against ours, exactly.  Without it two bounds are left that hold for every tokenizer: a
word is at least one token, and a conversation only grows.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

from pytest_pocket.backends.reference import Reference
from pytest_pocket.chat import ChatRequest, Message

KEPT = 4096
"""How many conversations are remembered."""
LAYOUT = 16
"""Tokens by which a template may shorten what it rendered before: Qwen's drops the empty thinking of old turns."""
Evidence = dict[str, str | int | float]


class Tripwire:
    """Holds each prompt's count against what it must at least be.  Thread-safe."""

    def __init__(self, reference: Reference | None) -> None:
        self._reference = reference
        self._counts: OrderedDict[bytes, int] = OrderedDict()
        self._lock = threading.Lock()

    def own(self, request: ChatRequest) -> Sequence[int] | None:
        """The prompt's ids by the checkpoint's own tokenizer, where it is known: what the count is held against."""
        return None if self._reference is None else self._reference.ids(request)

    def cut(
        self,
        request: ChatRequest,
        counted: int,
        own: Sequence[int] | None,
        evidence: Evidence,
        prompt_ids: Sequence[int] = (),
    ) -> bool:
        """Whether the engine, which counted so many tokens, has read less than it was given.

        ``own`` is what ``own`` has told of the request.  What the count was held against goes into ``evidence``.
        """
        if own is not None:
            evidence["own_prompt_tokens"] = len(own)
            if prompt_ids:
                evidence["prompt_is_reference"] = int(tuple(own) == tuple(prompt_ids))
            return counted < len(own)
        least = self._least(request)
        evidence["least_prompt_tokens"] = least
        with self._lock:
            self._counts[_key(request, len(request.messages))] = counted
            while len(self._counts) > KEPT:
                self._counts.popitem(last=False)
        return counted < least

    def _least(self, request: ChatRequest) -> int:
        """A lower bound of the prompt's tokens."""
        messages = request.messages
        least = _words(messages)
        if any(message.thinking for message in messages):
            return least  # templates leave out old thinking, so that a prompt may well shrink
        for known in range(len(messages) - 1, 0, -1):
            with self._lock:
                before = self._counts.get(_key(request, known))
            if before is not None:
                return max(least, before + _words(messages[known:]) - LAYOUT)
        return least


def _words(messages: Sequence[Message]) -> int:
    return sum(len(message.content.split()) for message in messages)


def _key(request: ChatRequest, count: int) -> bytes:
    """Of the first ``count`` messages, under the same switch and tools."""
    said = repr((request.messages[:count], request.tools, request.sampling.think))
    return hashlib.sha256(said.encode(errors="surrogatepass")).digest()
