"""pytest-pocket: how far can a very small language model go as a coding agent?

Only what a third-party task, backend or model needs is public here; importing it loads no engine.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_pocket.chat import (
        Backend,
        Cancelled,
        ChatReply,
        ChatRequest,
        EngineError,
        Message,
        Sampling,
        ToolCall,
    )
    from pytest_pocket.task import (
        SUITE_VERSION,
        Check,
        Draw,
        Final,
        Instance,
        Kinds,
        Problem,
        Score,
        Solution,
        Task,
        score,
    )

__version__ = "0.1.0"

__all__ = [
    "SUITE_VERSION",
    "Backend",
    "Cancelled",
    "ChatReply",
    "ChatRequest",
    "Check",
    "Draw",
    "EngineError",
    "Final",
    "Instance",
    "Kinds",
    "Message",
    "Problem",
    "Sampling",
    "Score",
    "Solution",
    "Task",
    "ToolCall",
    "score",
]


def __getattr__(name: str) -> object:
    """Imported when first asked for: a project that merely has the plugin installed pays for none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pytest_pocket import chat, task

    found: object = getattr(chat, name, None) or getattr(task, name)
    globals()[name] = found
    return found
