"""The ``ollama`` backend: Ollama's own interface, ``/api/chat``.

Its OpenAI-compatible route ignores ``think`` and cannot set ``num_ctx``; the native one does both.  Ollama cuts a
prompt that is longer than its window without a word, and its window is 4096 tokens unless it is told: so
``num_ctx`` is always sent, what was loaded is asked for, and each prompt's count is held against what it must be.

Replies are streamed, as Ollama's own clients do: a reply that the episode's time ends is then told from a
server that hangs.  ``OLLAMA_HOST`` names the server; without one that answers, the session starts ``ollama serve``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, cast

import httpx
import ollama

from pytest_pocket.backends import wire
from pytest_pocket.backends.caller import Caller, Watch, check_length, check_whole, in_time, waiting
from pytest_pocket.backends.openai import one_line
from pytest_pocket.backends.probe import probe
from pytest_pocket.backends.process import Process, free_port
from pytest_pocket.backends.reference import Reference
from pytest_pocket.backends.tripwire import Evidence, Tripwire
from pytest_pocket.chat import Cancelled, ChatReply, ChatRequest, EngineError
from pytest_pocket.registry import ModelError

NUM_CTX = 32768
"""Tokens: an episode of 12 turns with long tool results fits.  A model with a smaller window gets its own."""
OLDEST = (0, 10, 0)
"""The first version that tells the window with which it has loaded a model; 0.9 brought ``think``."""
START_SECONDS = 300.0
"""How long the first request may take: it loads the model."""
MALFORMED = re.compile(
    r"error parsing tool call|invalid tool call arguments|XML syntax error|invalid character|"
    r"unexpected end of JSON|failed to parse",
    re.I,
)
"""How an error reads that is the model's fault: it wrote a call that Ollama cannot read (ollama#12884)."""
REPEATS = re.compile(r"token repeat limit reached", re.I)
"""How Ollama tells that it has given up on a model that says one token over and over: others let it, to its limit."""
TOO_LONG = re.compile(r"(exceeds?|longer than).{0,40}context", re.I)
PLAIN: dict[str, Any] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""What switches off all that Ollama, or a model's own parameters, add to sampling."""


class OllamaBackend:
    """A model of an Ollama server as a :class:`pytest_pocket.chat.Backend`.

    ``num_ctx`` is the window in tokens that the model is loaded with, by default the model's own up to
    ``NUM_CTX``.  ``keep_alive`` is how long Ollama keeps the model after a request.  ``reference`` is the folder
    of the same checkpoint, where it is known.  Raises ModelError.
    """

    def __init__(
        self,
        name: str,
        host: str | None = None,
        *,
        num_ctx: int | None = None,
        keep_alive: str = "10m",
        reference: str | None = None,
    ) -> None:
        self.name = name
        self._keep_alive = keep_alive
        self._reference = Reference(reference) if reference else None
        self._tripwire = Tripwire(self._reference)
        self._started: Process | None = None
        if not (host or os.environ.get("OLLAMA_HOST") or _answers("http://127.0.0.1:11434")):
            self._started, host = _start()
        try:
            self._client = ollama.AsyncClient(host=host)
            self.host = str(self._client._client.base_url.copy_with(userinfo=b"")).rstrip("/")
            self._caller = Caller(
                self._explain, (httpx.TransportError, ConnectionError), _settled, self._has_ended
            )
            self._options: dict[str, Any] = {}
            self._capabilities = self._introduce(num_ctx)
            found = probe(self._probed, str(self))
            self.model_window = self._loaded()
        except BaseException:
            self.close()
            raise
        self._proof = found.evidence()
        self.supports_think = "thinking" in self._capabilities and found.think != 0
        self.supports_temperature = found.temperature_varies
        self.supports_greedy = found.greedy_holds
        self.caveats = found.caveats(str(self))

    def __str__(self) -> str:
        return f"model {self.name!r} of Ollama at {self.host}"

    def chat(self, request: ChatRequest) -> ChatReply:
        """Answer one request.  Raises EngineError for the engine's faults, Cancelled after ``cancel``."""
        heard = _Heard()
        try:
            end = in_time(request.seconds)
            own, _ = self._caller.call_beside(
                lambda: self._tripwire.own(request),
                lambda: self._stream(request, heard, end),
                request.seconds or START_SECONDS,
            )
        except ollama.ResponseError as error:
            text = one_line(error.error)
            evidence = {**self._sent(request), "error": text}
            if MALFORMED.search(text):
                problem = "the call cannot be read: write it exactly as the tools are described"
                return ChatReply("", malformed=problem, evidence=evidence)
            if REPEATS.search(text):
                said = wire.Said("".join(heard.content), "".join(heard.thinking))
                parsed = wire.read(said, request.tools)
                return ChatReply(
                    parsed.content,
                    thinking=parsed.thinking,
                    finish="length",
                    completion_tokens=len(heard.content),
                    evidence=evidence,
                )
            if TOO_LONG.search(text):
                return ChatReply("", truncated=True, evidence={**evidence, "mend": self._widen()})
            raise EngineError(self._explain(error)) from error
        except (EngineError, Cancelled):
            raise
        except Exception as error:  # an answer that is none of Ollama's
            raise EngineError(self._explain(error)) from error
        return self._reply(request, heard, own)

    def cancel(self) -> None:
        """Make requests in flight, and later ones, raise Cancelled at once."""
        self._caller.cancel()
        if self._started:
            self._started.cancel()

    def close(self) -> None:
        """Hang up, and end the server if the session has started it."""
        if hasattr(self, "_caller"):
            self._caller.close(self._client._client.aclose)
        if self._started:
            self._started.close()
            self._started = None

    def _introduce(self, num_ctx: int | None) -> frozenset[str]:
        """Find out what the server and the model can do, and settle the window.  Raises ModelError."""
        try:
            version = self._caller.call(lambda: self._client._client.get("/api/version"), 30).json()[
                "version"
            ]
            shown = self._caller.call(lambda: self._client.show(self.name), 60)
        except ollama.ResponseError as error:
            raise ModelError(self._explain(error)) from None
        except EngineError as error:
            raise ModelError(str(error)) from None
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise ModelError(
                f"what answers at {self.host} (for {self.name!r}) is no Ollama: set OLLAMA_HOST; {one_line(error)}"
            ) from None
        self._version = str(version)
        if _numbers(self._version) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise ModelError(
                f"Ollama {version} at {self.host} (for {self.name!r}) is too old: update it to {oldest} or newer "
                "(https://ollama.com/download)"
            )
        capabilities = frozenset(shown.capabilities or ())
        if "tools" not in capabilities:
            raise ModelError(
                f"{self} does not support tools: use a model whose template has them, or make one with "
                "`pocket ollama create`"
            )
        info = shown.modelinfo or {}
        own = next((int(value) for key, value in info.items() if key.endswith(".context_length")), NUM_CTX)
        self._options = {**PLAIN, "num_ctx": num_ctx or min(own, NUM_CTX)}
        if num_ctx and num_ctx > own:
            raise ModelError(
                f"num_ctx {num_ctx} is more than the {own} tokens that {self} was made for: set the option to {own}"
            )
        return capabilities

    def _probed(self, request: ChatRequest) -> ChatReply:
        if request.sampling.think and "thinking" not in self._capabilities:
            from dataclasses import replace

            request = replace(request, sampling=replace(request.sampling, think=False))
        try:
            reply = self.chat(request)
        except EngineError as error:
            raise ModelError(str(error)) from error
        if reply.truncated:
            raise ModelError(self._widen())
        return reply

    def _loaded(self) -> int:
        """The window that the server has really loaded the model with.  Raises ModelError."""
        try:
            running = self._caller.call(lambda: self._client.ps(), 30)
        except (ollama.ResponseError, EngineError) as error:
            raise ModelError(str(error)) from None
        wanted = int(self._options["num_ctx"])
        for model in running.models:
            if _same_tag(self.name, str(model.model or model.name)):
                loaded = int(model.context_length or 0)
                if 0 < loaded < wanted:
                    raise ModelError(
                        f"{self} was loaded with a window of {loaded} tokens, not {wanted}: free memory, or set the "
                        "option num_ctx lower (prompts that do not fit are then marked truncated)"
                    )
                return loaded or wanted
        raise ModelError(
            f"{self} is not among the running models after a request: keep_alive is {self._keep_alive!r}"
        )

    async def _stream(self, request: ChatRequest, heard: _Heard, end: float | None) -> None:
        sampling = request.sampling
        heard.clear()
        heard.tries.append(time.monotonic())
        watch = Watch(end)
        stream = await self._client.chat(
            self.name,
            wire.ollama_messages(request.messages),
            tools=list(request.tools) or None,
            stream=True,
            think=sampling.think if "thinking" in self._capabilities else None,
            options={
                **self._options,
                "temperature": sampling.temperature,
                "seed": sampling.seed % 2**31,
                "num_predict": sampling.max_tokens,
            },
            keep_alive=self._keep_alive,
        )
        async with contextlib.aclosing(cast(AsyncGenerator[Any, None], stream)):
            async for part in stream:
                heard.add(part)
                check_length(heard.characters, sampling.max_tokens, self)
                if watch.last() and heard.anything:
                    heard.late = True
                    break
        check_whole(heard.done or heard.late, heard.anything or heard.completion_tokens, self)

    def _reply(self, request: ChatRequest, heard: _Heard, own: Sequence[int] | None) -> ChatReply:
        said = wire.Said("".join(heard.content), "".join(heard.thinking), tuple(heard.calls))
        parsed = wire.read(said, request.tools)
        evidence: Evidence = {
            **self._sent(request),
            **waiting(heard.tries),
            "finish_reason": heard.reason,
            "calls_read_by": "engine" if heard.calls else "suite",
        }
        if parsed.thinking and not request.sampling.think and not getattr(self, "supports_think", True):
            raise EngineError(
                f"{self} thinks though it was told not to, and has no switch: think off is not honoured"
            )
        late = heard.late and not heard.done
        if heard.completion_tokens > request.sampling.max_tokens:
            raise EngineError(
                f"{self} wrote {heard.completion_tokens} tokens where {request.sampling.max_tokens} were allowed: "
                "num_predict is not honoured"
            )
        truncated = not late and self._tripwire.cut(request, heard.prompt_tokens, own, evidence)
        if truncated:
            evidence["mend"] = self._widen()
        return ChatReply(
            parsed.content,
            thinking=parsed.thinking,
            calls=() if late else parsed.calls,
            malformed="" if late else parsed.malformed,
            finish="time" if late else "length" if heard.reason == "length" else "stop",
            truncated=truncated,
            prompt_tokens=heard.prompt_tokens,
            completion_tokens=heard.completion_tokens,
            evidence=evidence,
        )

    def _sent(self, request: ChatRequest) -> Evidence:
        sampling = request.sampling
        return {
            **getattr(self, "_proof", {}),
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "think": int(sampling.think),
            "max_tokens": sampling.max_tokens,
            "server": self.host,
            "engine": f"ollama {self._version}",
            "num_ctx": int(self._options["num_ctx"]),
            "window": getattr(self, "model_window", 0),
        }

    def _widen(self) -> str:
        """What to do about a window that is too small, in one line."""
        return (
            f"{self} has a window of {self._options['num_ctx']} tokens, and a prompt did not fit: set the option "
            "num_ctx higher ([tool.pocket.models.NAME] options), or take a model that was made for more"
        )

    def _has_ended(self) -> bool:
        return self._started is not None and not self._started.running

    def _explain(self, error: Exception) -> str:
        """An error in one line: the model, the server, what to do."""
        lost = isinstance(error, httpx.TransportError | ConnectionError)
        if self._started and lost and self._started.ended():
            return f"the Ollama server of {self.name!r} has died: {self._started.last()}"
        match error:
            case ollama.ResponseError(status_code=404):
                return f"Ollama at {self.host} has no model {self.name!r}: ollama pull {self.name}"
            case ollama.ResponseError(status_code=401 | 403):
                return f"Ollama at {self.host} refuses the key: set OLLAMA_API_KEY"
            case ollama.ResponseError():
                return f"{self} answered {error.status_code}: {one_line(error.error)}"
            case httpx.TransportError() | ConnectionError():
                mend = "start it with `ollama serve`, or set OLLAMA_HOST"
                return f"Ollama at {self.host} (for {self.name!r}) cannot be reached: {mend}"
        return f"{self}: {type(error).__name__}: {one_line(error)}"


class _Heard:
    """What has come of a reply."""

    def __init__(self) -> None:
        self.tries: list[float] = []
        self.clear()

    def clear(self) -> None:
        self.late = False
        self.characters = 0
        self.content: list[str] = []
        self.thinking: list[str] = []
        self.calls: list[tuple[str, Any]] = []
        self.done = False
        self.reason = ""
        self.prompt_tokens = self.completion_tokens = 0

    @property
    def anything(self) -> bool:
        return bool(self.characters or self.calls)

    def add(self, part: Any) -> None:
        self.characters += len(part.message.content or "") + len(part.message.thinking or "")
        self.content.append(part.message.content or "")
        self.thinking.append(part.message.thinking or "")
        self.calls += [
            (call.function.name, call.function.arguments) for call in part.message.tool_calls or ()
        ]
        if part.done:
            self.done = True
            self.reason = part.done_reason or ""
            self.prompt_tokens = part.prompt_eval_count or 0
            self.completion_tokens = part.eval_count or 0


def _settled(error: BaseException) -> bool:
    """Whether an error is the server's answer to what the model wrote."""
    if not isinstance(error, ollama.ResponseError):
        return False
    text = one_line(error.error)
    return any(each.search(text) for each in (MALFORMED, REPEATS, TOO_LONG))


_lock = threading.Lock()


def _answers(host: str) -> bool:
    try:
        return httpx.get(f"{host}/api/version", timeout=2, trust_env=False).is_success
    except httpx.TransportError:
        return False


def _start() -> tuple[Process, str]:
    """A server of this session.  Raises ModelError."""
    program = shutil.which("ollama")
    if program is None:
        raise ModelError(
            "no Ollama answers at http://127.0.0.1:11434, and the command `ollama` is missing: install it from "
            "https://ollama.com/download, or set OLLAMA_HOST"
        )
    host = f"http://127.0.0.1:{free_port()}"
    process = Process(
        [program, "serve"], f"{host}/api/version", environment={"OLLAMA_HOST": host}, seconds=60
    )
    return process, host


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _same_tag(asked: str, running: str) -> bool:
    """``rlvr-v1`` and ``rlvr-v1:latest`` are one model."""
    return running == asked or running == f"{asked}:latest"
