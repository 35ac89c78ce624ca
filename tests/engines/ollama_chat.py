"""One request of ``/api/chat``, from its checks to its last piece.

There are two ways, as in Ollama: a model with a TEMPLATE is rendered by it, and llama-server continues the text
(``/completion``); any other is a chat of llama-server's own (``/v1/chat/completions``), which renders the Jinja
template in the file and lets the model write only calls that it can read.
"""

from __future__ import annotations

import http.client
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

from ollama_models import Model, Runner, Store, Template
from ollama_requests import Refusal, duration, options_of

Message = Mapping[str, Any]
Piece = dict[str, Any]
REPEATS = 100
"""Tokens that are alike in a row, after which Ollama gives up on a completion."""


class Turn:
    """A chat request that is being answered.  ``gone`` tells that nobody listens any more."""

    def __init__(self, store: Store, request: Mapping[str, Any], gone: Callable[[], bool]) -> None:
        self._store, self._gone = store, gone
        self._request = dict(request)
        self._begun = time.perf_counter_ns()
        self._loaded = 0

    def pieces(self) -> Iterator[Piece]:
        """What is streamed; the last piece has ``done``.  Raises Refusal, at any point."""
        request = self._request
        model = self._store.find(request.get("model") or "")
        keep = duration(request.get("keep_alive"))
        if not request.get("messages") and not keep:
            self._store.unload(model)
            yield self._piece(done=True, done_reason="unload")
            return
        if request.get("tools") and "tools" not in model.capabilities:
            raise Refusal(400, f"registry.ollama.ai/library/{model.name} does not support tools")
        if "thinking" in model.capabilities:
            request["think"] = True if request.get("think") is None else request["think"]
        elif request.get("think"):
            raise Refusal(400, f'"{request["model"]}" does not support thinking')
        options = options_of(model.parameters, request.get("options"))
        runner = self._store.load(model, options, request.get("shift") is not False)
        try:
            self._loaded = time.perf_counter_ns() - self._begun
            if request.get("messages"):
                yield from self._answer(model, runner, options)
            else:
                yield self._piece(done=True, done_reason="load")
        finally:
            self._store.release(runner, keep)

    def _answer(self, model: Model, runner: Runner, options: dict[str, Any]) -> Iterator[Piece]:
        request = self._request
        messages: Sequence[Message] = [*model.messages, *request["messages"]]
        if model.system and request["messages"][0].get("role") != "system":
            messages = [{"role": "system", "content": model.system}, *messages]
        if model.family == "qwen3":
            messages = without_old_thinking(messages)
        options = {**options, "num_ctx": min(options["num_ctx"], runner.context)}
        template = model.rendered

        def render(those: Sequence[Message]) -> str:
            if template:
                return template.render(those, request.get("tools"), request.get("think"))
            answer = runner.post("/apply-template", native(request, those, options))
            return str(json.loads(answer.read())["prompt"])

        if request.get("truncate") is not False and (template or len(messages) > 1):
            fits = lambda those: len(runner.tokens(render(those))) <= options["num_ctx"]  # noqa: E731
            messages = cut(messages, fits, keep_tool_turns=template is not None)
        if request.get("_debug_render_only"):
            yield self._piece(_debug_info={"rendered_template": render(messages)})
            return
        limit = 10 * runner.context
        if not 0 <= options["num_predict"] <= limit:
            options["num_predict"] = limit
        with runner.slots:
            if template:
                yield from self._rendered(template, runner, render(messages), options)
            else:
                yield from self._native(runner, native(request, messages, options))

    def _native(self, runner: Runner, body: Mapping[str, Any]) -> Iterator[Piece]:
        calls: dict[int, dict[str, str]] = {}
        with closing(runner.post("/v1/chat/completions", {**body, "stream": True})) as answer:
            for event in self._events(answer):
                if event.get("error"):
                    raise Refusal(500, f"llama-server chat error: {_go(event['error'])}")
                if not event.get("choices"):
                    continue
                choice = event["choices"][0]
                delta = choice.get("delta") or {}
                for part in delta.get("tool_calls") or ():
                    call = calls.setdefault(part.get("index", 0), {"id": "", "name": "", "arguments": ""})
                    call["id"] += part.get("id") or ""
                    for name in ("name", "arguments"):
                        call[name] += (part.get("function") or {}).get(name) or ""
                said = {"content": delta.get("content"), "thinking": delta.get("reasoning_content")}
                tokens = (choice.get("logprobs") or {}).get("content") or []
                if choice.get("finish_reason") is not None:
                    said["tool_calls"] = [_call(at, calls[at]) for at in sorted(calls)]
                    reason = "length" if choice["finish_reason"] == "length" else "stop"
                    yield self._piece(said, done=True, done_reason=reason, tokens=tokens, event=event)
                    return
                if said["content"] or said["thinking"] or tokens:
                    yield self._piece(said, tokens=tokens)

    def _rendered(
        self, template: Template, runner: Runner, prompt: str, options: Mapping[str, Any]
    ) -> Iterator[Piece]:
        request = self._request
        thinking = Thinking(*template.thinking) if request.get("think") and template.thinking[0] else None
        if thinking and prompt.rstrip().endswith(thinking.opening):
            thinking.add(thinking.opening)
        calls = Calls(template.tag) if request.get("tools") else None
        for text, event in self._completion(runner, template, prompt, options):
            done = bool(event.get("stop"))
            said = {"content": text, "thinking": ""}
            if thinking:
                said["thinking"], said["content"] = thinking.add(text)
                if not (said["thinking"] or said["content"] or done):
                    continue
            if calls:
                said["content"] = calls.add(said["content"])
                if done and not said["content"]:
                    said["content"] = calls.rest()
            tokens = event.get("completion_probabilities") or []
            if done:
                reason = "length" if event.get("stop_type") == "limit" else "stop"
                yield self._piece(said, done=True, done_reason=reason, tokens=tokens, event=event)
            elif said["content"] or said["thinking"] or tokens:
                yield self._piece(said, tokens=tokens)

    def _completion(
        self, runner: Runner, template: Template, prompt: str, options: Mapping[str, Any]
    ) -> Iterator[tuple[str, Piece]]:
        request = self._request
        body = {**_sampling(options), "stream": True, "prompt": self._shortened(runner, prompt, options)}
        if request.get("tools") and template.tag not in ("{", "["):
            body["preserved_tokens"] = [
                template.tag.partition(">")[0] + ">" if ">" in template.tag else template.tag
            ]
        if request.get("logprobs"):
            body["n_probs"] = max(request.get("top_logprobs") or 0, 1)
        if isinstance(request.get("format"), dict):
            body["json_schema"] = request["format"]
        elif request.get("format"):
            raise Refusal(501, "the double knows a JSON schema as format with a TEMPLATE, and no other")
        last, repeated = "", 0
        with closing(runner.post("/completion", body)) as answer:
            for event in self._events(answer):
                text = str(event.get("content") or "")
                repeated = repeated + 1 if text.strip() == last else 0
                last = text.strip()
                if repeated > REPEATS:
                    raise Refusal(500, "prediction aborted, token repeat limit reached")
                if text or event.get("stop"):
                    yield text, event
                if event.get("stop"):
                    return

    def _shortened(self, runner: Runner, prompt: str, options: Mapping[str, Any]) -> str | list[int]:
        """A prompt that is still too long loses its middle: what is before half the window, but for ``num_keep``."""
        window = options["num_ctx"]
        if self._request.get("truncate") is False or window <= 1 or len(prompt.encode()) < window:
            return prompt
        tokens = runner.tokens(prompt, special=True)
        if len(tokens) <= window - 1:
            return prompt
        if not runner.shift:
            what = "shorten the prompt, adjust the context length in settings, or use a model with a longer context length"
            raise Refusal(
                400, f"the prompt is longer than the context length currently available to the model; {what}"
            )
        keep = min(len(tokens) if options["num_keep"] < 0 else options["num_keep"], window - 1)
        limit = window - max((window - keep) // 2, 1)
        return tokens[:keep] + tokens[keep + len(tokens) - limit :]

    def _events(self, answer: http.client.HTTPResponse) -> Iterator[Piece]:
        for line in answer:
            if self._gone():
                return
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])

    def _piece(
        self,
        said: Mapping[str, Any] = {},
        *,
        done: bool = False,
        tokens: Sequence[Mapping[str, Any]] = (),
        event: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Piece:
        message = {"role": "assistant", "content": said.get("content") or ""}
        message |= {name: said[name] for name in ("thinking", "tool_calls") if said.get(name)}
        made: Piece = {"model": self._request.get("model"), "created_at": moment(datetime.now(UTC))}
        made |= {"message": message, "done": done, **more}
        if tokens:
            made["logprobs"] = [_logprob(token, bool(self._request.get("top_logprobs"))) for token in tokens]
        if event is not None:
            spent, timings = time.perf_counter_ns() - self._begun, event.get("timings") or {}
            counts = {
                **{"total_duration": spent, "load_duration": self._loaded},
                "prompt_eval_count": timings.get("cache_n", 0) + timings.get("prompt_n", 0),
                "prompt_eval_duration": int(timings.get("prompt_ms", 0) * 1e6),
                "eval_count": timings.get("predicted_n", 0),
                "eval_duration": int(timings.get("predicted_ms", 0) * 1e6),
            }
            made |= {name: count for name, count in counts.items() if count}
        return made


class Thinking:
    """Ollama's ``thinking.Parser``: what is between the tags, if the text begins with the first of them."""

    def __init__(self, opening: str, closing_tag: str) -> None:
        self.opening, self._closing = opening, closing_tag
        self._state, self._text = "before", ""

    def add(self, text: str) -> tuple[str, str]:
        """The thinking and the content that are certain after ``text``."""
        self._text += text
        if self._state == "before":
            begun = self._text.lstrip()
            if begun.startswith(self.opening):
                self._state, self._text = "began", begun[len(self.opening) :]
            elif self.opening.startswith(begun):
                return "", ""
            else:
                self._state = "after"
        if self._state == "began" and (stripped := self._text.lstrip()):
            self._state, self._text = "inside", stripped
        if self._state == "inside":
            thought, found, after = self._text.partition(self._closing)
            if found:
                self._state, self._text = "ended", after
                return thought, self.add("")[1]
            held = _overlap(self._text, self._closing)
            self._text = self._text[len(self._text) - held :]
            return thought[: len(thought) - held], ""
        if self._state == "ended" and (stripped := self._text.lstrip()):
            self._state, self._text = "after", stripped
        if self._state != "after":
            return "", ""
        content, self._text = self._text, ""
        return "", content


class Calls:
    """Ollama's ``tools.Parser``, up to where the tag of a call appears: what follows it is refused."""

    def __init__(self, tag: str) -> None:
        self._tag, self._text = tag, ""

    def add(self, text: str) -> str:
        self._text += text
        if self._tag in self._text:
            raise Refusal(501, f"the double reads no calls with a TEMPLATE, and {self._tag!r} begins one")
        held = _overlap(self._text, self._tag)
        content, self._text = self._text[: len(self._text) - held], self._text[len(self._text) - held :]
        return content

    def rest(self) -> str:
        return self._text


def _overlap(text: str, tag: str) -> int:
    return next((size for size in range(min(len(tag), len(text)), 0, -1) if text.endswith(tag[:size])), 0)


def whole(pieces: Iterator[Piece]) -> Piece:
    """The answer of a request that is not streamed: the last piece, with the text, calls and tokens of all."""
    last: Piece = {}
    text = {"content": "", "thinking": ""}
    calls: list[Any] = []
    tokens: list[Any] = []
    for last in pieces:
        for name in text:
            text[name] += last["message"].get(name, "")
        calls += last["message"].get("tool_calls", [])
        tokens += last.get("logprobs", [])
    if last:
        found = {**text, "tool_calls": calls}
        last["message"] = {"role": "assistant", **{k: v for k, v in found.items() if v or k == "content"}}
        last |= {"logprobs": tokens} if tokens else {}
    return last


def native(request: Mapping[str, Any], messages: Sequence[Message], options: Mapping[str, Any]) -> Piece:
    """A chat as Ollama puts it to llama-server.  Earlier thinking is not passed on."""
    body = {**_sampling(options), "messages": [_message(message) for message in messages]}
    if request.get("tools"):
        body["tools"] = request["tools"]
    if request.get("logprobs"):
        body |= {"logprobs": True, "top_logprobs": max(request.get("top_logprobs") or 0, 1)}
    if (think := request.get("think")) is not None:
        effort = {"reasoning_effort": think} if isinstance(think, str) else {}
        body["chat_template_kwargs"] = {"enable_thinking": bool(think), **effort}
    wanted = request.get("format")
    if wanted == "json":
        body["response_format"] = {"type": "json_object"}
    elif isinstance(wanted, dict):
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "schema", "schema": wanted}}
    elif wanted:
        said = json.dumps(json.dumps(wanted))
        raise Refusal(500, f'invalid format: {said}; expected "json" or a valid JSON Schema object')
    return body


def _sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    same = (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "stop",
        "typical_p",
        "seed",
        "repeat_penalty",
        "repeat_last_n",
    )
    body = {name: options[name] for name in (*same, "frequency_penalty", "presence_penalty")}
    return {**body, "cache_prompt": True, "n_predict": options["num_predict"], "n_keep": options["num_keep"]}


def _message(message: Message) -> dict[str, Any]:
    made: dict[str, Any] = {
        "role": str(message.get("role", "")).lower(),
        "content": message.get("content") or "",
    }
    for given, name in (("tool_call_id", "tool_call_id"), ("tool_name", "name")):
        if message.get(given):
            made[name] = message[given]
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        made.setdefault("tool_calls", []).append(
            {
                **({"id": call["id"]} if call.get("id") else {}),
                **{"index": function.get("index", 0), "type": "function"},
                "function": {
                    "name": function.get("name", ""),
                    "arguments": json.dumps(function.get("arguments") or {}),
                },
            }
        )
    return made


def without_old_thinking(messages: Sequence[Message]) -> list[Message]:
    """Assistant turns before the last user turn without the ``<think>`` at their head."""
    last = max((at for at, message in enumerate(messages) if message.get("role") == "user"), default=-1)
    kept: list[Message] = []
    for at, message in enumerate(messages):
        if message.get("role") == "assistant" and at < last:
            message = {
                **message,
                "content": Thinking("<think>", "</think>").add(message.get("content") or "")[1],
            }
        kept.append(message)
    return kept


def cut(
    messages: Sequence[Message], fits: Callable[[Sequence[Message]], bool], *, keep_tool_turns: bool
) -> Sequence[Message]:
    """The newest messages that fit, and every system message; the last one always, whether it fits or not.

    With a TEMPLATE a tool's result is never parted from the turn that asked for it.
    """
    kept = messages
    for at in range(len(messages)):
        start = _call_of(messages, at) if keep_tool_turns else at
        system = [message for message in messages[:start] if message.get("role") == "system"]
        kept = [*system, *messages[start:]]
        if fits(kept):
            break
    return kept


def _call_of(messages: Sequence[Message], at: int) -> int:
    start = at
    while start > 0 and messages[at].get("role") == "tool" and messages[start - 1].get("role") == "tool":
        start -= 1
    if messages[at].get("role") == "tool" and start > 0 and messages[start - 1].get("tool_calls"):
        return start - 1
    return at


def _call(at: int, call: Mapping[str, str]) -> dict[str, Any]:
    arguments: Any = {}
    if call["arguments"].strip():
        try:
            arguments = json.loads(call["arguments"])
        except ValueError as error:
            said = f'llama-server returned invalid tool call arguments for "{call["name"]}": {error}'
            raise Refusal(500, said) from None
    identity = call["id"] or f"call_{secrets.token_hex(4)}"
    return {"id": identity, "function": {"index": at, "name": call["name"], "arguments": arguments}}


def _logprob(token: Mapping[str, Any], top: bool) -> dict[str, Any]:
    made = {"token": token["token"], "logprob": token["logprob"], "bytes": list(token["token"].encode())}
    if top:
        made["top_logprobs"] = [_logprob(each, False) for each in token.get("top_logprobs") or ()]
    return made


def _go(value: Any) -> str:
    """How Go prints a decoded JSON value."""
    if isinstance(value, dict):
        return "map[" + " ".join(f"{key}:{_go(value[key])}" for key in sorted(value)) + "]"
    return str(value)


def moment(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")
