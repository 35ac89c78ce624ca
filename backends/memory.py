"""Memory that runs out: how an engine says so, and what can be given back."""

from __future__ import annotations

import gc


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that there is too little memory: there is no one class for it."""
    said = ("out of memory", "allocate memory", "failed to map segment")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def free_memory() -> None:
    """Give back what nothing holds any more, an accelerator's too."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
