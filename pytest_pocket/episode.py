"""One episode: a model, a fresh workspace, a loop of calls and results, a score.

The loop is the whole agent.  The same function is the test that pytest runs, the source of training data
and the environment of reinforcement learning, so that what is measured is what is trained.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pytest_pocket import tools
from pytest_pocket.chat import (
    Backend,
    Cancelled,
    ChatReply,
    ChatRequest,
    EngineError,
    Message,
    Sampling,
)
from pytest_pocket.conditions import Condition
from pytest_pocket.registry import fault
from pytest_pocket.sandbox import CommandResult, FileState, Limits, Sandbox, SandboxError, SandboxProvider
from pytest_pocket.task import Check, Final, Instance, Score, Task

Ending = Literal["passed", "wrong", "looping", "early_stop", "malformed", "limit", "truncated", "infra"]
INVALID: frozenset[str] = frozenset({"truncated", "infra"})
MALFORMED_IN_A_ROW = 3
SAME_CALL_IN_A_ROW = 4


@dataclass(frozen=True)
class Budget:
    """What one episode may spend.  ``tokens`` counts what the model writes over all turns."""

    turns: int = 12
    tokens: int = 4096
    reply_tokens: int = 1024
    seconds: float = 120.0


@dataclass(frozen=True)
class Episode:
    """How an attempt went.  ``outcome`` is its one entry in the failure ledger; ``score`` is None when invalid."""

    instance: Instance
    condition: Condition
    messages: tuple[Message, ...]
    replies: tuple[ChatReply, ...]
    outcome: Ending
    stop: str
    score: Score | None
    answer: str
    after: Mapping[str, FileState]
    seconds: float
    detail: str = ""

    @property
    def reward(self) -> float:
        return self.score.reward if self.score else 0.0

    @property
    def invalid(self) -> bool:
        return self.outcome in INVALID

    @property
    def completion_tokens(self) -> int:
        return sum(reply.completion_tokens for reply in self.replies)

    @property
    def prompt_tokens(self) -> int:
        return sum(reply.prompt_tokens for reply in self.replies)

    @property
    def logprob(self) -> float | None:
        """Mean log-probability (nats) of the sampled tokens; None where the backend gives none."""
        known = [reply.logprob for reply in self.replies if reply.logprob is not None]
        return sum(known) / self.completion_tokens if known and self.completion_tokens else None


class Workshop:
    """Opens the sandboxes of a session, and can close all of them at once when it is cancelled."""

    def __init__(self, provider: SandboxProvider, limits: Limits = Limits()) -> None:
        self.provider = provider
        self.limits = limits
        self._open: set[Sandbox] = set()
        self._lock = threading.Lock()
        self._cancelled = False

    def open(self, files: Mapping[str, str]) -> Sandbox:
        """A fresh sandbox.  Raises Cancelled after ``cancel``."""
        if self._cancelled:
            raise Cancelled
        sandbox = self.provider.open(files, self.limits)
        with self._lock:
            if not self._cancelled:
                self._open.add(sandbox)
                return sandbox
        sandbox.close()
        raise Cancelled

    def close(self, sandbox: Sandbox) -> None:
        """End one sandbox."""
        with self._lock:
            self._open.discard(sandbox)
        sandbox.close()

    @property
    def cancelled(self) -> bool:
        """Whether the session is ending: an episode that was open then says nothing."""
        return self._cancelled

    def cancel(self) -> None:
        """Kill every open sandbox, and let none be opened any more."""
        with self._lock:
            self._cancelled = True
            sandboxes = tuple(self._open)
        for sandbox in sandboxes:
            sandbox.close()

    def probe(self, files: Mapping[str, str], script: str) -> CommandResult:
        """Run a script over the given files alone, in a fresh sandbox."""
        sandbox = self.open(files)
        try:
            return sandbox.run(script)
        finally:
            self.close(sandbox)


def reply_seed(seed: int, instance: Instance, sample: int, turn: int) -> int:
    """The sampling seed of one reply: depends on nothing but these four, so runs repeat and models pair."""
    key = f"{seed}:{instance.task}:{instance.seed}:{sample}:{turn}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=6).digest())


def prepared(instance: Instance, workshop: Workshop) -> Sandbox:
    """A sandbox with the instance in it, as a model finds it.  Raises SandboxError, Cancelled."""
    sandbox = workshop.open(instance.files)
    try:
        if instance.setup and (made := sandbox.run(instance.setup)).status:
            raise SandboxError(
                f"the setup of {instance.task}:{instance.seed} failed: {made.output.decode(errors='replace')}"
            )
    except BaseException:
        workshop.close(sandbox)
        raise
    return sandbox


def play(
    task: Task,
    instance: Instance,
    backend: Backend,
    workshop: Workshop,
    condition: Condition = Condition(),
    *,
    budget: Budget = Budget(),
    seed: int = 0,
    sample: int = 0,
) -> Episode:
    """Let a model attempt an instance.  The model's faults and the engine's end in the ledger, never in an exception.

    Raises Cancelled when the session ends in the middle, and whatever a broken task raises.
    """
    start = time.monotonic()
    messages = list(condition.messages(instance.prompt))
    replies: list[ChatReply] = []

    def end(
        outcome: Ending,
        stop: str,
        score: Score | None = None,
        after: Mapping[str, FileState] = {},
        detail: str = "",
    ) -> Episode:
        answer = replies[-1].content if stop == "answer" else ""
        seconds = time.monotonic() - start
        return Episode(
            instance,
            condition,
            tuple(messages),
            tuple(replies),
            outcome,
            stop,
            score,
            answer,
            after,
            seconds,
            detail,
        )

    sandbox: Sandbox | None = None
    try:
        sandbox = prepared(instance, workshop)
        before = sandbox.snapshot()
        # Candidates of best-of-N settle ties by it.
        sampling = Sampling(condition.temperature, 0, condition.think, 0, logprob=condition.best_of > 1)
        stop = ""
        malformed = 0
        repeats: Counter[object] = Counter()
        while not stop:
            spent = sum(reply.completion_tokens for reply in replies)
            if len(replies) >= budget.turns:
                stop = "turns"
            elif spent >= budget.tokens:
                stop = "tokens"
            elif time.monotonic() - start >= budget.seconds:
                stop = "seconds"
            if stop:
                break
            sampling = replace(
                sampling,
                seed=reply_seed(seed, instance, sample, len(replies)),
                max_tokens=min(budget.reply_tokens, budget.tokens - spent),
            )
            left = budget.seconds - (time.monotonic() - start)
            request = ChatRequest(
                tuple(messages), tools.SCHEMAS, sampling, f"{instance.task}:{instance.seed}", left
            )
            reply, message = _answered(backend, request)
            replies.append(reply)
            messages.append(message)
            if reply.truncated:
                return end(
                    "truncated",
                    "truncated",
                    detail=str(
                        reply.evidence.get("mend")
                        or "the engine cut the prompt: give it a larger context window"
                    ),
                )
            if reply.finish != "stop":
                stop = "seconds" if reply.finish == "time" else "tokens"
            elif reply.malformed:
                malformed += 1
                messages.append(Message("user", f"Error: {reply.malformed}"))
                stop = "malformed" if malformed >= MALFORMED_IN_A_ROW else ""
            elif not reply.calls:
                stop = "answer"
            else:
                results = [tools.run(call, sandbox) for call in reply.calls]
                messages.extend(
                    Message("tool", result.text, name=call.name)
                    for call, result in zip(reply.calls, results, strict=True)
                )
                malformed = 0 if any(result.ok for result in results) else malformed
                turn = (
                    repr([(call.name, dict(call.arguments)) for call in reply.calls]),
                    tuple(r.text for r in results),
                )
                repeats = Counter({turn: repeats[turn] + 1})
                stop = "looping" if repeats[turn] >= SAME_CALL_IN_A_ROW else ""
        if stop == "seconds" and not replies:
            raise SandboxError(f"the sandbox was not ready within the episode's {budget.seconds:g} s")
        if stop == "seconds" and (lost := sum(map(_lost, replies))):
            raise EngineError(
                f"the episode ran out of time, of which {lost:.1f} s went to tries that the engine did not answer"
            )
        after = sandbox.snapshot()
        workshop.close(sandbox)
        calls = sum(len(reply.calls) for reply in replies)
        answer = replies[-1].content if stop == "answer" else ""
        final = Final(answer, before, after, stop == "answer", calls, workshop.probe)
        score = task.reward(instance, final)
        return end(ledger(task, score, stop, calls), stop, score, after)
    except (EngineError, SandboxError) as error:
        if workshop.cancelled:
            raise Cancelled from error
        return end("infra", "infra", detail=f"{type(error).__name__}: {error}")
    finally:
        if sandbox is not None:
            workshop.close(sandbox)


def _answered(backend: Backend, request: ChatRequest) -> tuple[ChatReply, Message]:
    """What a backend replies.  Whatever else it raises, out of memory too, is the engine's fault: an EngineError."""
    try:
        reply = backend.chat(request)
        return reply, reply.message()
    except Exception as error:
        if (told := fault(error)) is error:
            raise
        raise told from error


def _lost(reply: ChatReply) -> float:
    """Seconds of failed tries, and between them, before the one that was answered."""
    return float(reply.evidence.get("lost_seconds", 0))


def ledger(task: Task, score: Score, stop: str, calls: int) -> Ending:
    """The one name for how a valid episode ended."""
    if score.passed:
        return "passed"
    if stop in ("looping", "malformed"):
        return "looping" if stop == "looping" else "malformed"
    if stop != "answer":
        return "limit"
    # It ended its turn by itself: with something to do and nothing done, or with a wrong result.
    return "early_stop" if task.acts and calls == 0 else "wrong"


def check_lines(checks: tuple[Check, ...]) -> list[str]:
    """The checks that do not hold, one readable line each."""
    return [
        f"{check.name}: {check.value:g}" + (f" ({check.detail})" if check.detail else "")
        for check in checks
        if check.value < 1
    ]
