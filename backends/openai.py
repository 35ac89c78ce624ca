"""The ``openai`` backend: any server with the OpenAI interface (llama.cpp, LM Studio, SGLang, vLLM, a cloud).

``openai:NAME@URL``, or ``openai:NAME`` with ``OPENAI_BASE_URL``; ``OPENAI_API_KEY`` is the key, where one is
needed.  Servers understand more than the common fields, each its own: ``DIALECTS`` has what is needed so
that a temperature means the plain distribution on all of them.

Replies are not streamed: servers parse calls out of a stream by other, younger code than out of a whole text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import httpx
import openai

from pytest_pocket.backends import wire
from pytest_pocket.backends.caller import Caller
from pytest_pocket.backends.probe import probe
from pytest_pocket.backends.reference import Reference
from pytest_pocket.backends.tripwire import Evidence, Tripwire
from pytest_pocket.chat import ChatReply, ChatRequest, EngineError
from pytest_pocket.registry import ModelError

DIALECTS: dict[str, dict[str, Any]] = {
    "vllm": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True},
    "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "llamacpp": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "typical_p": 1.0, "cache_prompt": True},
}
"""By who ``/v1/models`` says owns a model: fields that switch off what the server would add to the sampling."""
CALLS_BY = {"llamacpp": "suite"}
"""Who reads the calls, where it is not the engine.

llama.cpp forces the text of a call into the grammar that it takes a template for: a model that was trained on
another layout of the same tags then writes what it never would.  So it is asked for the text alone.
"""
THINK_BY = ("chat_template_kwargs", "none")
START_SECONDS = 300.0
"""How long a probe may take: a server may load the model at its first request."""
TOO_LONG = re.compile(
    r"maximum context length|exceed_context_size|context (size|length|window)|max_model_len|too many tokens",
    re.I,
)
UNREADABLE = re.compile(
    r"does not match the expected|[Ff]ailed to parse|error parsing tool call|Invalid tool call"
)
"""A server's error that is the model's fault: what it wrote is no call that the server can read."""


class OpenAIBackend:
    """A model of an OpenAI-compatible server as a :class:`pytest_pocket.chat.Backend`.

    ``think_by`` says how thinking is switched: by the template's ``enable_thinking``, or ``none`` for a server
    that takes no such field, where thinking cannot be asked for.  ``reference`` is the folder of the same
    checkpoint, where it is known: prompts are then held against it.  ``calls_by`` says who reads the calls out
    of the text: ``engine``, or ``suite``, and then the engine is asked not to (``tool_choice``); ``CALLS_BY`` has
    the defaults.  ``extra`` is added to every request.  Raises ModelError.

    ``supports_think`` and ``supports_temperature`` are what the probe has shown; ``model_window`` is the
    server's context window in tokens, 0 where it does not tell.
    """

    server = "server"
    mend = "start it, or set OPENAI_BASE_URL"

    def __init__(
        self,
        name: str,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        think_by: str = "chat_template_kwargs",
        reference: str | None = None,
        calls_by: str | None = None,
        extra: Mapping[str, Any] = {},
    ) -> None:
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        if not base_url:
            raise ModelError(
                f"openai:{name} names no server: write openai:{name}@http://localhost:8080/v1, or set OPENAI_BASE_URL"
            )
        if not re.match(r"https?://[^/]", base_url):
            raise ModelError(f"server address {base_url!r} is no http address: write http://HOST:PORT/v1")
        if think_by not in THINK_BY:
            raise ModelError(f"think_by {think_by!r}: choose from {', '.join(THINK_BY)}")
        if calls_by not in (None, "engine", "suite"):
            raise ModelError(f"calls_by {calls_by!r}: choose from engine, suite")
        self.name, self.base_url = name, base_url.rstrip("/")
        # What is shown and recorded is without a password that the address may hold.
        self.shown = str(httpx.URL(self.base_url).copy_with(userinfo=b""))
        self._think_by = think_by
        self._extra = dict(extra)
        self._reference = Reference(reference) if reference else None
        self._tripwire = Tripwire(self._reference)
        self._client = openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=api_key or os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=0,  # the caller retries, for all engines in one way
            timeout=None,  # and knows how long an episode has
        )
        self._caller = Caller(self._explain, (openai.APIConnectionError,))
        self.model_window = 0
        self._proof: Mapping[str, int] = {}
        try:
            self._dialect = self._introduce()
            self._calls_by = calls_by or CALLS_BY.get(self._dialect, "engine")
            found = probe(self._probed, str(self))
        except BaseException:
            self.close()
            raise
        self._proof = found.evidence()
        self.supports_think = think_by != "none" and found.think != 0
        self.supports_temperature = found.temperature_varies

    def __str__(self) -> str:
        return f"model {self.name!r} at {self.shown}"

    def chat(self, request: ChatRequest) -> ChatReply:
        """Answer one request.  Raises EngineError for the engine's faults, Cancelled after ``cancel``."""
        try:
            return self._ask(request, request.sampling.max_tokens)
        except openai.APIStatusError as error:
            text = _message(error)
            if UNREADABLE.search(text):
                return self._unread(request, text)
            if error.status_code == 400 and TOO_LONG.search(text):
                return self._without_room(request, text)
            raise EngineError(self._explain(error)) from error
        except openai.OpenAIError as error:
            raise EngineError(self._explain(error)) from error

    def cancel(self) -> None:
        """Make requests in flight, and later ones, raise Cancelled at once."""
        self._caller.cancel()

    def close(self) -> None:
        """Hang up."""
        self._caller.close(self._client.close)

    def _introduce(self) -> str:
        """Find out whose server this is and whether it has the model.  Raises ModelError."""
        try:
            listed = self._caller.call(lambda: self._client.models.list(), START_SECONDS)
        except (EngineError, openai.OpenAIError) as error:
            raise ModelError(self._explain(error)) from None
        known = {model.id: model for model in listed.data}
        model = known.get(self.name)
        if model is None:
            raise ModelError(
                f"{self.server} {self.shown} has no model {self.name!r} but {', '.join(known) or 'none'}: "
                "give one of these, or start it with the right model"
            )
        told = model.model_extra or {}
        self.model_window = int(told.get("max_model_len") or (told.get("meta") or {}).get("n_ctx") or 0)
        return str(model.owned_by)

    def _probed(self, request: ChatRequest) -> ChatReply:
        try:
            return self.chat(request)
        except EngineError as error:
            raise ModelError(str(error)) from error

    def _ask(self, request: ChatRequest, max_tokens: int) -> ChatReply:
        sampling = request.sampling
        body = {**DIALECTS.get(self._dialect, {}), **self._extra}
        if self._think_by == "chat_template_kwargs":
            body["chat_template_kwargs"] = {"enable_thinking": sampling.think}
        fields: dict[str, Any] = {"tools": list(request.tools)} if request.tools else {}
        if request.tools and self._calls_by == "suite":
            fields["tool_choice"] = "none"
        completion = self._caller.call(
            lambda: self._client.chat.completions.create(
                model=self.name,
                messages=wire.openai_messages(request.messages),  # type: ignore[arg-type]
                temperature=sampling.temperature,
                top_p=1.0,
                seed=sampling.seed % 2**31,
                max_tokens=max_tokens,
                logprobs=True,
                extra_body=body,
                **fields,
            ),
            request.seconds,
        )
        return self._reply(request, completion)

    def _reply(self, request: ChatRequest, completion: Any) -> ChatReply:
        if not getattr(completion, "choices", None) or completion.choices[0].message is None:
            raise EngineError(f"{self} answered without a message")
        choice = completion.choices[0]
        said = wire.Said(
            choice.message.content or "",
            _text(choice.message, "reasoning_content") or _text(choice.message, "reasoning"),
            tuple((call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()),
        )
        parsed, reader = wire.read(said, request.tools)
        if parsed.thinking and not request.sampling.think and not getattr(self, "supports_think", True):
            raise EngineError(
                f"{self} thinks though it was told not to, and has no switch: think off is not honoured"
            )
        usage = completion.usage
        prompt_tokens = usage.prompt_tokens if usage else 0
        told = completion.model_extra or {}
        prompt_ids = tuple(told.get("prompt_token_ids") or ())
        evidence: Evidence = {
            **self._sent(request),
            "engine": self._dialect,
            "finish_reason": str(choice.finish_reason),
            "calls_read_by": reader,
        }
        return ChatReply(
            parsed.content,
            thinking=parsed.thinking,
            calls=parsed.calls,
            malformed=parsed.malformed,
            finish="length" if choice.finish_reason == "length" else "stop",
            truncated=self._tripwire.cut(request, prompt_tokens, evidence, prompt_ids),
            prompt_tokens=prompt_tokens,
            completion_tokens=usage.completion_tokens if usage else 0,
            logprob=_logprob(choice),
            evidence=evidence,
            prompt_ids=prompt_ids,
            completion_ids=tuple((choice.model_extra or {}).get("token_ids") or ()),
        )

    def _sent(self, request: ChatRequest) -> Evidence:
        sampling = request.sampling
        return {
            **self._proof,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "think": int(sampling.think),
            "max_tokens": sampling.max_tokens,
            "server": self.shown,
            "window": self.model_window,
        }

    def _unread(self, request: ChatRequest, text: str) -> ChatReply:
        """The reply that a server could not read, and so did not pass on."""
        evidence = {**self._sent(request), "engine": self._dialect, "error": text[:500]}
        problem = "the call cannot be read: write it exactly as the tools are described"
        return ChatReply("", malformed=problem, evidence=evidence)

    def _without_room(self, request: ChatRequest, text: str) -> ChatReply:
        """A prompt that leaves no room: the model's own limit where the server's window is the model's."""
        evidence = {**self._sent(request), "engine": self._dialect, "error": text[:500]}
        own = self._reference
        if own is None or not own.window or self.model_window < own.window:
            return ChatReply("", truncated=True, evidence=evidence)
        count = len(own.ids(request))
        room = own.window - count
        if room <= 0:
            return ChatReply("", finish="length", prompt_tokens=count, evidence=evidence)
        try:
            return self._ask(request, min(room, request.sampling.max_tokens))
        except openai.OpenAIError as error:
            raise EngineError(self._explain(error)) from error

    def _explain(self, error: Exception) -> str:
        """An error in one line: the model, the server, what to do."""
        match error:
            case EngineError():
                return str(error)
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                return f"{self.server} {self.shown} refuses the key for {self.name!r}: set OPENAI_API_KEY"
            case openai.NotFoundError():
                return f"{self.server} {self.shown} has no model {self.name!r}, or is no /v1 address: {_message(error)}"
            case openai.APIStatusError():
                return f"{self} answered {error.status_code}: {_message(error)}"
            case openai.APIConnectionError() if not isinstance(error, openai.APITimeoutError):
                return f"{self.server} {self.shown} (for {self.name!r}) cannot be reached: {self.mend}"
        return f"{self}: {type(error).__name__}: {first_line(error)}"


def _message(error: openai.APIStatusError) -> str:
    body = error.body
    while isinstance(body, dict):
        body = body.get("error", body.get("message", body.get("detail", "")))
    return first_line(str(body or error.message))


def first_line(error: object) -> str:
    """What is said of an error, on one line of bounded length."""
    return " ".join(str(error).split())[:500]


def _text(message: Any, key: str) -> str:
    value = (message.model_extra or {}).get(key)
    return value if isinstance(value, str) else ""


def _logprob(choice: Any) -> float | None:
    if choice.logprobs is None or not choice.logprobs.content:
        return None
    return float(sum(token.logprob for token in choice.logprobs.content))


def parse_target(target: str) -> tuple[str, str | None]:
    """``NAME@URL`` as its parts; a name may hold an ``@`` itself."""
    name, at, url = target.rpartition("@")
    return (name, url) if at and url.startswith("http") else (target, None)
