"""Shards: a run divided over the jobs of a CI, or over machines, to be joined by ``pocket merge``."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

MAX_SHARDS = 10_000


@dataclass(frozen=True)
class Shard:
    """One of ``count`` parts, numbered from 1."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def holds(self, task: str, run: int) -> bool:
        """Whether an instance belongs to this shard; models and conditions follow it, so that pairs stay together.

        Depends on nothing else, so it is the same in every process and however tests are selected or ordered.
        The runs of a task are dealt out one by one, each task beginning with another shard.
        """
        return (zlib.crc32(task.encode()) + run) % self.count == self.index - 1


def parse(value: str) -> Shard:
    """The shard that ``I/N`` names.  Raises ValueError, in words for the user."""
    if found := re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", value):
        shard = Shard(int(found[1]), int(found[2]))
        if 1 <= shard.index <= shard.count <= MAX_SHARDS:
            return shard
    raise ValueError(f"{value!r}: give I/N, such as 2/4, with I from 1 to N and N at most {MAX_SHARDS}")
