"""The reference: a checkpoint's own template and tokenizer, against which an engine's prompt is held."""

from __future__ import annotations

import threading
from pathlib import Path

from pytest_pocket.backends.hf import load_tokenizer, render
from pytest_pocket.chat import ChatRequest
from pytest_pocket.registry import ModelError


class Reference:
    """How a checkpoint in a folder renders a request.  Thread-safe.  Raises ModelError."""

    def __init__(self, path: str) -> None:
        try:
            from transformers import AutoConfig

            self._tokenizer = load_tokenizer(path)
            config = AutoConfig.from_pretrained(path, local_files_only=Path(path).is_dir())
        except ImportError:
            raise ModelError(
                "to count a prompt's tokens by ourselves transformers is needed: pip install 'pytest-pocket[hf]'"
            ) from None
        self.window = int(getattr(config.get_text_config(), "max_position_embeddings", 0))
        self._rendering = threading.Lock()

    def ids(self, request: ChatRequest) -> list[int]:
        """The prompt's token ids, special tokens in the text taken as such, as servers do."""
        with self._rendering:
            return render(
                self._tokenizer,
                request.messages,
                request.tools,
                think=request.sampling.think,
                sanitize=False,
            )
