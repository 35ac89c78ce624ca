"""The reference: a checkpoint's own template and tokenizer, against which an engine's prompt is held."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from pytest_pocket.backends.hf import load_tokenizer, render
from pytest_pocket.chat import ChatRequest, Message, ToolCall
from pytest_pocket.registry import ModelError


class Reference:
    """How a checkpoint in a folder renders a request.  Thread-safe.  Raises ModelError."""

    def __init__(self, path: str) -> None:
        try:
            from transformers import AutoConfig

            self._tokenizer = load_tokenizer(path)
            config = AutoConfig.from_pretrained(
                path, local_files_only=Path(path).is_dir(), trust_remote_code=False
            )
        except ImportError:
            raise ModelError(
                "to count a prompt's tokens by ourselves transformers is needed: pip install 'pytest-pocket[hf]'"
            ) from None
        self.window = int(getattr(config.get_text_config(), "max_position_embeddings", 0))
        self._rendering = threading.Lock()

    def ids(self, request: ChatRequest, *, neutral: bool = False) -> list[int]:
        """The prompt's token ids.  A special token's text is the token, as to servers, unless ``neutral``."""
        with self._rendering:
            return render(
                self._tokenizer,
                request.messages,
                request.tools,
                think=request.sampling.think,
                sanitize=neutral,
            )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        with self._rendering:
            return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def spelled(self, calls: Sequence[ToolCall]) -> str:
        """The text of calls as the template writes what an assistant has said."""
        asked = Message("user", "pocket question")
        turns = (asked, Message("assistant", "", calls=tuple(calls)))
        with self._rendering:
            text = str(self._tokenizer.decode(render(self._tokenizer, turns, (), think=False, prompt=False)))
        said = text.rpartition(asked.content)[2].rpartition("</think>")[2]
        start = min(at for mark in ("<tool_call>", "<function=") if (at := said.find(mark)) >= 0)
        return said[start:].rpartition(self._tokenizer.eos_token)[0].strip()
