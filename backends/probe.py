"""Questions at the start of a session that show whether a server does what it is told.

A server that ignores a field answers as if nothing were wrong.  But every server counts the tokens of the prompt
that it rendered: a system prompt, tools or a switch for thinking that changes nothing in that count has not
reached it.  What sampling obeys shows in what comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pytest_pocket.chat import ChatReply, ChatRequest, Message, Sampling
from pytest_pocket.conditions import SYSTEM_PROMPTS
from pytest_pocket.registry import ModelError
from pytest_pocket.tools import SCHEMAS

QUESTION = (Message("user", "Write ten words that have nothing to do with each other."),)
SYSTEM = (Message("system", SYSTEM_PROMPTS["full"]),)
REPLY_TOKENS = 24
HOT = 2.0


@dataclass(frozen=True)
class Proof:
    """What was shown.  Token counts are what each condition added to one prompt; ``think`` may be negative.

    ``greedy_repeats``: no seed changed a reply at temperature 0; ``greedy_holds``: at least two seeds gave the same.
    """

    system: int
    tools: int
    think: int
    greedy_repeats: bool
    greedy_holds: bool
    seed_repeats: bool
    temperature_varies: bool

    def evidence(self) -> dict[str, int]:
        """For each reply's record."""
        return {f"probe_{name}": int(value) for name, value in vars(self).items()}

    def caveats(self, where: str) -> tuple[str, ...]:
        """What a user must know of the numbers, though they are valid."""
        said = []
        if not self.greedy_repeats:
            said.append(f"{where} gives other replies at temperature 0 from one time to the next")
        if not self.seed_repeats:
            said.append(f"{where} gives other replies for the same seed: its samples cannot be drawn again")
        return tuple(said)


def probe(chat: Callable[[ChatRequest], ChatReply], where: str) -> Proof:
    """Ask a server.  ``where`` names model and server.  Raises ModelError when prompts do not arrive whole."""

    def count(messages: tuple[Message, ...], tools: bool, think: bool = False) -> int:
        request = ChatRequest(messages, SCHEMAS if tools else (), Sampling(think=think, max_tokens=1))
        counted = chat(request).prompt_tokens
        if counted <= 0:
            raise ModelError(
                f"{where} does not say how many tokens a prompt has: without that no condition can be proven; "
                "use a server that reports usage"
            )
        return counted

    def said(temperature: float, seed: int) -> tuple[str, ...]:
        sampling = Sampling(temperature, seed, max_tokens=REPLY_TOKENS)
        reply = chat(ChatRequest(QUESTION, (), sampling))
        return reply.thinking, reply.content, repr(reply.calls), reply.malformed

    plain = count(QUESTION, tools=False)
    offered = count(QUESTION, tools=True)
    hot = [said(HOT, seed) for seed in (1, 1, 2, 3)]
    greedy = {said(0.0, seed) for seed in (1, 2, 3)}
    found = Proof(
        system=count((*SYSTEM, *QUESTION), tools=False) - plain,
        tools=offered - plain,
        think=count(QUESTION, tools=True, think=True) - offered,
        greedy_repeats=len(greedy) == 1,
        greedy_holds=len(greedy) < 3,
        seed_repeats=hot[0] == hot[1],
        temperature_varies=len(set(hot[1:])) > 1,
    )
    if found.system < len(SYSTEM[0].content.split()):
        raise ModelError(f"{where} drops system prompts: give the model a chat template that renders them")
    if found.tools < len(SCHEMAS):
        raise ModelError(
            f"{where} drops tools: start it with tool calls enabled, or give the model a template that renders them"
        )
    return found
