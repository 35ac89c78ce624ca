"""The ``openai`` backend: any server with the OpenAI interface (llama.cpp, LM Studio, SGLang, vLLM, a cloud).

``openai:NAME@URL``, or ``openai:NAME`` with ``OPENAI_BASE_URL``; ``OPENAI_API_KEY`` is the key, where one is
needed.  Servers understand more than the common fields, each its own: ``DIALECTS`` has what is needed so
that a temperature means the plain distribution on all of them.

Replies are streamed from the servers in ``STREAMED`` alone, so that a reply which the episode's time ends is the
model's and not a server that hangs.  Others parse calls out of a stream by other, younger code than out of a whole
text, and llama.cpp gives no log-probabilities there.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import httpx
import openai

from pytest_pocket.backends import wire
from pytest_pocket.backends.caller import Caller, Garbled, Watch, check_length, check_whole, in_time, waiting
from pytest_pocket.backends.completion import Answer, Choice
from pytest_pocket.backends.probe import probe
from pytest_pocket.backends.reference import Reference
from pytest_pocket.backends.tripwire import Evidence, Tripwire
from pytest_pocket.chat import Cancelled, ChatReply, ChatRequest, EngineError
from pytest_pocket.registry import ModelError

DIALECTS: dict[str, dict[str, Any]] = {
    "vllm": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True},
    "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "llamacpp": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "typical_p": 1.0, "cache_prompt": True},
}
"""By who ``/v1/models`` says owns a model: fields that switch off what the server would add to the sampling."""
FORCED: dict[str, Callable[[str], dict[str, Any]]] = {
    "vllm": lambda text: {"structured_outputs": {"choice": [text]}},
    "llamacpp": lambda text: {"grammar": f"root ::= {json.dumps(text, ensure_ascii=False)}"},
}
"""How a server is made to write one text and no other."""
BY_SUITE = ("llamacpp", "vllm")
"""Servers whose text is had whole, so that the suite reads the calls in it, as it does for ``hf``.

Found by the conformance suite: vLLM's qwen3_coder parser drops a malformed call without a trace, and makes of a
call that the limit has cut a whole one without arguments; llama.cpp forces a call into the grammar that it takes
the template for, so that a model that was trained on another layout of the same tags writes what it never would.
llama.cpp is asked to leave the text alone (``tool_choice``); vLLM tells the tokens that it sampled.
"""
STREAMED = ("vllm",)
"""Servers that tell the sampled tokens in a stream too, so that how they parse it does not matter."""
COMPLETIONS = "/chat/completions"
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
    of the text: ``engine``, or ``suite``, the default for the servers in ``BY_SUITE``.  ``extra`` is added to
    every request.  Raises ModelError.

    ``supports_think`` and ``supports_temperature`` are what the probe has shown; ``model_window`` is the
    server's context window in tokens, 0 where it does not tell.
    """

    server = "server"
    mend = "start it (llama.cpp: `llama-server -m FILE.gguf --jinja`), or set OPENAI_BASE_URL to where it is"
    wider = "start it with a larger one (llama.cpp: `llama-server -c TOKENS`, for each of its -np slots)"

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
        self._caller = Caller(
            self._explain, (openai.APIConnectionError, httpx.TransportError), _settled, self._has_ended
        )
        self.model_window = 0
        self._proof: Mapping[str, int] = {}
        try:
            self._dialect = self._introduce()
            self._calls_by = calls_by or ("suite" if self._dialect in BY_SUITE else "engine")
            found = probe(self._probed, str(self))
        except BaseException:
            self.close()
            raise
        self._proof = found.evidence()
        self.supports_think = think_by != "none" and found.think != 0
        self.supports_temperature = found.temperature_varies
        self.supports_greedy = found.greedy_holds
        self.caveats = found.caveats(str(self))

    def __str__(self) -> str:
        return f"model {self.name!r} at {self.shown}"

    def chat(self, request: ChatRequest) -> ChatReply:
        """Answer one request.  Raises EngineError for the engine's faults, Cancelled after ``cancel``."""
        try:
            return self._ask(request, request.sampling.max_tokens)[0]
        except openai.APIStatusError as error:
            text = _message(error)
            if UNREADABLE.search(text):
                return self._unread(request, text)
            if error.status_code == 400 and TOO_LONG.search(text):
                return self._without_room(request, text)
            raise EngineError(self._explain(error)) from error
        except (EngineError, Cancelled):
            raise
        except Exception as error:  # an answer that is no completion, in any of the ways there are
            raise EngineError(self._explain(error)) from error

    def forced(self, request: ChatRequest, text: str) -> ChatReply:
        """What the engine makes of a reply with that text, which it is forced to write: for the conformance suite.

        Raises EngineError where this server cannot be forced.
        """
        if self._dialect not in FORCED:
            raise EngineError(f"{self} cannot be made to write a given text")
        try:
            return self._ask(request, request.sampling.max_tokens, FORCED[self._dialect](text))[0]
        except openai.APIStatusError as error:
            if UNREADABLE.search(_message(error)):
                return self._unread(request, _message(error))
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
            reply = self.chat(request)
        except EngineError as error:
            raise ModelError(str(error)) from error
        # Said by the server; what it merely did not count is for the probe to name.
        if reply.truncated and "error" in reply.evidence:
            raise ModelError(self._widen())
        return reply

    def _ask(
        self, request: ChatRequest, max_tokens: int, more: Mapping[str, Any] = {}, count: int = 1
    ) -> list[ChatReply]:
        """So many replies to one request, sampled with its seed and those that follow it."""
        sampling = request.sampling
        body = {**DIALECTS.get(self._dialect, {}), **self._extra, **more}
        if self._think_by == "chat_template_kwargs":
            body["chat_template_kwargs"] = {"enable_thinking": sampling.think}
        fields: dict[str, Any] = {"tools": list(request.tools)} if request.tools else {}
        if request.tools and self._calls_by == "suite" and self._dialect != "vllm":
            fields["tool_choice"] = "none"
        if count > 1:
            fields["n"] = count
        fields |= {
            "model": self.name,
            "messages": wire.openai_messages(request.messages),
            "temperature": sampling.temperature,
            "top_p": 1.0,
            "seed": sampling.seed % 2**31,
            "max_tokens": max_tokens,
            "logprobs": sampling.logprob,
            **body,
        }
        end = in_time(request.seconds)
        tries: list[float] = []

        async def once() -> Answer:
            tries.append(time.monotonic())
            answer = await self._complete(fields, count, end)
            self._check(answer, count, max_tokens)
            return answer

        own, answer = self._caller.call_beside(lambda: self._tripwire.own(request), once, request.seconds)
        return [self._reply(request, answer, index, own, max_tokens, tries) for index in range(count)]

    async def _complete(self, fields: Mapping[str, Any], count: int, end: float | None) -> Answer:
        answer = Answer([Choice() for _ in range(count)])
        # As plain JSON: see completion.py.
        if self._dialect not in STREAMED:
            return answer.fill(await self._client.post(COMPLETIONS, body=fields, cast_to=object))
        watch = Watch(end)
        fields = {**fields, "stream": True, "stream_options": {"include_usage": True}}
        parts = openai.AsyncStream[object]
        async with await self._client.post(
            COMPLETIONS, body=fields, cast_to=object, stream=True, stream_cls=parts
        ) as stream:
            async for chunk in stream:
                known = answer.sampled
                answer.add(chunk)
                for choice in answer.choices:
                    check_length(choice.characters, fields["max_tokens"], self)
                if watch.last(max(1, answer.sampled - known)) and answer.begun:
                    answer.late = True
                    break
        return answer

    def _check(self, answer: Answer, count: int, max_tokens: int) -> None:
        """Raise Garbled for what no model's reply can be."""
        if len(answer.choices) != count:
            raise Garbled(f"{self} answered with {len(answer.choices)} messages, not {count}")
        for choice in answer.choices:
            said = choice.characters or choice.ids or answer.completion_tokens
            check_whole(choice.finish or answer.late, said, self)
            check_length(choice.characters, max_tokens, self)

    def _reply(
        self,
        request: ChatRequest,
        answer: Answer,
        index: int,
        own: Sequence[int] | None,
        max_tokens: int,
        tries: list[float],
    ) -> ChatReply:
        choice, several = answer.choices[index], len(answer.choices) > 1
        late = answer.late and not choice.finish
        told = 0 if several or late else answer.completion_tokens
        completion_tokens = told or len(choice.ids)
        prompt_tokens = answer.prompt_tokens or len(answer.prompt_ids)
        if completion_tokens > max_tokens:
            raise EngineError(
                f"{self} wrote {completion_tokens} tokens where {max_tokens} were allowed: "
                "max_tokens is not honoured"
            )
        # vLLM says "tool_calls" of a call that the limit has cut, too.
        cut = choice.finish == "tool_calls" and completion_tokens >= max_tokens
        finish: Literal["stop", "length"] = "length" if cut or choice.finish == "length" else "stop"
        theirs = wire.Said(
            choice.content,
            choice.thinking,
            tuple((name, arguments) for name, arguments in choice.calls.values()),
        )
        evidence: Evidence = {
            **self._sent(request),
            **waiting(tries),
            "engine": self._dialect,
            "finish_reason": "late" if late else choice.finish,
        }
        if several:
            # The seeds of candidates follow the first one's.
            evidence |= {"seed": request.sampling.seed + index, "sampled_at_once": len(answer.choices)}
        if self._calls_by == "suite" and choice.ids:
            sampled = choice.ids[:-1] if finish == "stop" and not late else choice.ids
            whole = wire.Said(self._decode(sampled))
            parsed = wire.read(whole, request.tools, thinking_open=request.sampling.think)
            if not late:
                evidence["engine_reads_the_same"] = int(
                    wire.read(theirs, request.tools).calls == parsed.calls
                )
        else:
            inside = request.sampling.think and self._calls_by == "suite" and not theirs.thinking
            parsed = wire.read(theirs, request.tools, thinking_open=inside)
        if parsed.thinking and not request.sampling.think and not getattr(self, "supports_think", True):
            raise EngineError(
                f"{self} thinks though it was told not to, and has no switch: think off is not honoured"
            )
        evidence["calls_read_by"] = "engine" if theirs.calls and self._calls_by == "engine" else "suite"
        truncated = self._tripwire.cut(request, prompt_tokens, own, evidence, answer.prompt_ids)
        if truncated:
            evidence["mend"] = self._widen()
        return ChatReply(
            parsed.content,
            thinking=parsed.thinking,
            calls=() if late else parsed.calls,
            malformed="" if late else parsed.malformed,
            finish="time" if late else finish,
            truncated=truncated,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            logprob=choice.logprob,
            evidence=evidence,
            prompt_ids=answer.prompt_ids,
            completion_ids=tuple(choice.ids),
        )

    def _decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included: by the checkpoint's tokenizer, or the server's."""
        if self._reference:
            return self._reference.decode(ids)
        root = self._client.with_options(base_url=self.base_url.removesuffix("/v1"))
        body = {"model": self.name, "tokens": list(ids)}
        told = self._caller.call(lambda: root.post("/detokenize", body=body, cast_to=object), START_SECONDS)
        return str(told["prompt"]) if isinstance(told, dict) else ""

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
            return ChatReply("", truncated=True, evidence={**evidence, "mend": self._widen()})
        count = len(own.ids(request))
        room = own.window - count
        if room <= 0:
            return ChatReply("", finish="length", prompt_tokens=count, evidence=evidence)
        try:
            return self._ask(request, min(room, request.sampling.max_tokens))[0]
        except openai.OpenAIError as error:
            raise EngineError(self._explain(error)) from error

    def _widen(self) -> str:
        """What to do about a window that is too small, in one line."""
        window = f"{self.model_window} tokens" if self.model_window else "a size that it does not tell"
        return f"{self} has a window of {window}, and a prompt did not fit: {self.wider}"

    def _has_ended(self) -> bool:
        """Whether the server, where it is gone, stays so: what only has an address may come back."""
        return False

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
            case openai.APITimeoutError():
                pass
            case openai.APIConnectionError() | httpx.TransportError():
                return f"{self.server} {self.shown} (for {self.name!r}) cannot be reached: {self.mend}"
        return f"{self}: {type(error).__name__}: {one_line(error)}"


def _settled(error: BaseException) -> bool:
    """Whether an error is the server's answer to what the model wrote."""
    return isinstance(error, openai.APIStatusError) and bool(UNREADABLE.search(_message(error)))


def _message(error: openai.APIStatusError) -> str:
    body = error.body
    while isinstance(body, dict):
        body = body.get("error", body.get("message", body.get("detail", "")))
    return one_line(str(body or error.message))


def one_line(error: object) -> str:
    """What is said of an error, on one line of bounded length."""
    return " ".join(str(error).split())[:500]


def parse_target(target: str) -> tuple[str, str | None]:
    """``NAME@URL`` as its parts; a name may hold an ``@`` itself."""
    name, at, url = target.rpartition("@")
    return (name, url) if at and url.startswith("http") else (target, None)
