"""Reading a value out of a final answer, strictly enough that a long text cannot contain its way to a pass.

Small models wrap a right value in a few words.  Accepted are: the value alone; the value after "answer:" on
the last line; the only quoted or bold span of a short answer; the end of a short sentence after "is" or ":".
Of a sentence that denies or offers a choice ("not `x`", "x or `y`"), only all of the answer is read as the value; what
stands in the sentences before it is the answer's own story ("a.ini does not exist, but b.ini says `x`").
"""

from __future__ import annotations

import re

SHORT = 200
"""An answer longer than this many characters must be the value alone."""

_WRAPPING = "\"'`*“”‘’"
_SPAN = re.compile(r"`([^`\n]+)`|\*\*([^*\n]+)\*\*|\"([^\"\n]+)\"")
_TAIL = re.compile(r"(?:\b(?:is|are|was|prints|answer)\b|[:=])\s+(\S[^\n]*)$", re.IGNORECASE)

_DENIES = re.compile(
    r"\b(?:not|no|never|neither|nor|cannot|or|either|maybe|perhaps|might|unsure|wrong|false|incorrect)\b|n['’]t\b",
    re.IGNORECASE,
)


_SENTENCE_END = re.compile(r"[.!?;]\s+|\n|\bbut\b", re.IGNORECASE)


def normal(text: str) -> str:
    """The text without surrounding white space, quotes, emphasis, code fences or a closing full stop."""
    text = re.sub(r"^```[a-z]*\n(.*?)\n?```$", r"\1", text.strip(), flags=re.DOTALL)
    previous = None
    while text != previous:
        previous = text
        text = text.strip().strip(_WRAPPING).removesuffix(".")
    return text


def candidates(answer: str) -> list[str]:
    """The values that an answer may be read as, at most four."""
    found = [normal(answer)]
    stripped = answer.strip()
    if len(stripped) <= SHORT:
        if stripped.count("\n") <= 3 and (
            tail := _TAIL.search(stripped.splitlines()[-1] if stripped else "")
        ):
            before = stripped.removesuffix(tail.group(1))
            found += [normal(tail.group(1))] * (not _denies(before))
        spans = {normal(next(filter(None, groups))) for groups in _SPAN.findall(stripped)}
        if len(spans) == 1 and not _denies(*_SPAN.sub("`", stripped).split("`", 1)):
            found.extend(spans)
    return found


def _denies(before: str, after: str = "") -> bool:
    """Whether the words around a value, from where its sentence begins, deny it or offer it as a choice."""
    return _DENIES.search(_SENTENCE_END.split(before)[-1] + after) is not None


def says(answer: str, value: str) -> bool:
    """Whether the answer is the value."""
    return normal(value) in candidates(answer)


def says_path(answer: str, path: str) -> bool:
    """Whether the answer is the path, written from the workspace root in any usual way."""
    return path in {re.sub(r"^(\./|/workspace/)", "", candidate) for candidate in candidates(answer)}
