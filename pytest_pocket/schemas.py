"""The published shape of a run directory: JSON Schemas (draft 2020-12) of its two files."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

NAMES = ("run", "episode")
"""``run.json``, and one line of ``episodes.jsonl``."""


def text(name: str) -> str:
    """The schema of that name, as it is published."""
    return (resources.files("pytest_pocket") / "schema" / f"{name}.json").read_text()


def load(name: str) -> dict[str, Any]:
    """The schema of that name."""
    found: dict[str, Any] = json.loads(text(name))
    return found
