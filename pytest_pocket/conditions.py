"""Conditions: the ways in which a model is asked, and the system prompts that go with them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from pytest_pocket.chat import Message

SYSTEM_PROMPTS: dict[str, str] = {
    "raw": "",
    "full": (
        "You are a coding agent. You work in one directory with the tools you are given.\n"
        "Look before you answer: use a tool when the answer is in a file or in a command's output.\n"
        "Change only what you are asked to change. When you are done, reply without a tool call, and give "
        "only the answer that was asked for."
    ),
    "verbose": (
        "You are a coding agent that works in one directory of a Linux machine, with the tools you are given.\n"
        "\n"
        "Rules for tools\n"
        "- Use Read to look at a file, Glob to find files by name, Grep to find text, Bash to run a command.\n"
        "- Use Write to create a file with exact content, and Edit to change a part of an existing one.\n"
        "- Paths are relative to the directory you start in. Call one tool at a time and read its result.\n"
        "- If a call fails, read the error, correct the call, and try again; do not repeat the same call.\n"
        "- Never invent the content of a file, the output of a command, or a path: look.\n"
        "- If no tool is needed, answer at once.\n"
        "\n"
        "Rules for changes\n"
        "- Change only what you are asked to change, and leave every other file and line as it was.\n"
        "- Do not edit tests to make them pass, and do not leave helper files behind.\n"
        "- After a change to code, run it or its tests once to see that it works.\n"
        "\n"
        "Rules for the end\n"
        "- Stop as soon as the work is done: reply without a tool call.\n"
        "- If you were asked for a value, reply with the value alone, without explanation.\n"
        "- If what you were asked for does not exist, say so."
    ),
}
"""The system prompt of each ``--pocket-prompt`` value.  ``raw`` has none: the model gets the tools alone."""

THINK = {"off": False, "on": True}


class ConditionError(ValueError):
    """A condition that cannot be run, said in one line: what, the value, what to do."""


@dataclass(frozen=True, order=True)
class Condition:
    """One way of asking.  ``slug`` is its part of a test id, made for ``-k``."""

    prompt: str = "raw"
    think: bool = False
    temperature: float = 0.0
    best_of: int = 1

    def __post_init__(self) -> None:
        if self.prompt not in SYSTEM_PROMPTS:
            raise ConditionError(f"unknown prompt {self.prompt!r}: choose from {', '.join(SYSTEM_PROMPTS)}")
        if not 0.0 <= self.temperature <= 10.0:
            raise ConditionError(f"temperature {self.temperature:g} is not in [0, 10]")
        if self.best_of < 1:
            raise ConditionError(f"best-of {self.best_of} is not at least 1")
        if self.best_of > 1 and self.temperature == 0:
            raise ConditionError(
                f"best-of {self.best_of} at temperature 0 would repeat one answer {self.best_of} times: "
                "set --pocket-temperature above 0"
            )

    @property
    def slug(self) -> str:
        think = "think_on" if self.think else "think_off"
        temperature = f"t{self.temperature:g}"
        best_of = f"-bo{self.best_of}" if self.best_of > 1 else ""
        return f"{self.prompt}-{think}-{temperature}{best_of}"

    def messages(self, prompt: str) -> tuple[Message, ...]:
        """The conversation that opens an episode."""
        system = SYSTEM_PROMPTS[self.prompt]
        opening = (Message("system", system),) if system else ()
        return (*opening, Message("user", prompt))


def grid(
    prompts: Iterable[str], thinks: Iterable[str], temperatures: Iterable[str], best_ofs: Iterable[str]
) -> list[Condition]:
    """The product of the options' values, as given on the command line, in their order.

    Raises ConditionError for a value that no condition can have.
    """
    conditions = []
    for prompt, think, temperature, best_of in itertools.product(prompts, thinks, temperatures, best_ofs):
        if think not in THINK:
            raise ConditionError(f"unknown think value {think!r}: choose from {', '.join(THINK)}")
        try:
            degrees = float(temperature)
        except ValueError:
            raise ConditionError(f"temperature {temperature!r} is no number: write 0 or 0.7") from None
        try:
            candidates = int(best_of)
        except ValueError:
            raise ConditionError(f"best-of {best_of!r} is no whole number: write 1 or 4") from None
        conditions.append(Condition(prompt, THINK[think], degrees, candidates))
    return list(dict.fromkeys(conditions))
