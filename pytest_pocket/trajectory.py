"""Trajectories as text: what a failed test shows, short enough to read and harmless to a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping

from pytest_pocket.attempt import Attempt
from pytest_pocket.chat import Message, ToolCall
from pytest_pocket.episode import Episode, check_lines

LINES = 6
"""How many lines of one message are shown."""
WIDTH = 160
"""How many characters of one line are shown."""
TURNS = 24
"""How many messages are shown; of a longer trajectory the middle is left out."""


def compact(attempt: Attempt) -> str:
    """An attempt in a few lines: how it ended and why, then the prompt, each call and result, the answer.

    The first line stands for all of them in a summary.
    """
    episode = attempt.episode
    lines = [_headline(episode), f"  {_about(attempt)}"]
    if len(failed := _failed(episode)) > 1:
        lines += [f"  check {safe(line)}" for line in failed]
    if episode.score and episode.instance.expect:
        lines.append(f"  expected {_expected(episode.instance.expect)}")
    shown = [message for message in episode.messages if message.role != "system"]
    blocks = [list(_message(message)) for message in shown]
    if len(blocks) > TURNS:
        left_out = len(blocks) - TURNS
        blocks[TURNS // 2 : -TURNS // 2] = [[f"  [{left_out} messages left out]"]]
    return "\n".join([*lines, *(line for block in blocks for line in block)])


def safe(text: str) -> str:
    """Text on one line, every control, format, surrogate or unassigned character shown as an escape."""
    return "".join(map(_safe, text))


def _safe(char: str) -> str:
    if unicodedata.category(char)[0] == "C" or char in "\u2028\u2029":
        return char.encode("unicode_escape", errors="backslashreplace").decode("ascii")
    return char


def _headline(episode: Episode) -> str:
    reason = safe("; ".join(_failed(episode)))[:WIDTH]
    return f"{episode.outcome}: {reason}" if reason else episode.outcome


def _failed(episode: Episode) -> list[str]:
    """The checks that do not hold; for an invalid episode, what went wrong."""
    return check_lines(episode.score.checks) if episode.score else [episode.detail]


def _about(attempt: Attempt) -> str:
    """The instance, the limits it met, what it cost."""
    cell, episode = attempt.cell, attempt.episode
    reward = "invalid" if episode.score is None else f"reward {episode.reward:.3g}"
    turns = len(episode.replies)
    parts = [
        f"{cell.task} run {cell.run} (seed {episode.instance.seed})",
        f"{safe(cell.model)} {cell.condition.slug}",
        reward,
        f"stop: {episode.stop} after {turns} turn{'s' * (turns != 1)}",
        f"{episode.prompt_tokens}+{episode.completion_tokens} tokens",
        f"{episode.seconds:.1f} s",
    ]
    if len(attempt.episodes) > 1:
        ends = ", ".join(each.outcome for each in attempt.episodes)
        parts.append(f"candidate {attempt.chosen + 1} of {len(attempt.episodes)} ({ends})")
    return " · ".join(parts)


def _expected(expect: Mapping[str, object]) -> str:
    """What the task knows of the right result, on one line: the answer above all, where there is one."""
    return safe(", ".join(f"{key} {value!r}"[:WIDTH] for key, value in expect.items()))[: 2 * WIDTH]


def _message(message: Message) -> Iterator[str]:
    if message.thinking:
        yield from _block("thinks", message.thinking)
    if message.content or not (message.calls or message.thinking):
        yield from _block(
            {"tool": "result", "assistant": "says"}.get(message.role, message.role), message.content
        )
    for call in message.calls:
        yield from _block("calls", _call(call))


def _call(call: ToolCall) -> str:
    arguments = ", ".join(f"{key}={value!r}" for key, value in call.arguments.items())
    return f"{call.name}({arguments})"


def _block(head: str, text: str) -> Iterator[str]:
    lines = text.split("\n")
    while len(lines) > 1 and not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines[:LINES]):
        cut = f" [{len(line) - WIDTH} more characters]" if len(line) > WIDTH else ""
        yield f"  {head if number == 0 else '':>6} | {safe(line[:WIDTH])}{cut}"
    if len(lines) > LINES:
        yield f"  {'':>6} | [{len(lines) - LINES} more lines]"
