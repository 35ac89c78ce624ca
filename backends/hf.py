"""The ``hf`` backend: any causal language model that transformers loads, answering many episodes at once.

Requests come from many threads and are served by one engine thread that keeps a batch going: before each step
waiting requests join it, and finished ones leave it.  The loop is our own because ``generate`` cannot do
that: a static batch waits for its longest reply while new requests wait for all of it, and ``generate``
spends milliseconds of bookkeeping on every token.  tests/bench/bench_hf.py measures the three ways.

Sampling is exact and belongs to the request, not to the batch: each one draws from its own generator, seeded
by its ``Sampling.seed``, by inverting the distribution function in double precision.

Prompts are rendered with ``sanitize_control_tokens``: ``<|im_end|>`` in a tool's output is text to the model,
never the token, and harmless text gets the same ids as without it.
"""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import inspect
import json
import math
import os
import random
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pytest_pocket.backends.deadline import deadline
from pytest_pocket.chat import Cancelled, ChatReply, ChatRequest, EngineError, Message, ToolCall, first_line
from pytest_pocket.parsing import Parsed, leaves_thinking_open, parse
from pytest_pocket.registry import ModelError
from pytest_pocket.vetting import Refused, vet

JOIN_SHARE = 4
"""Waiting requests join once there is one for this many running: each join copies the whole cache."""
TRIM_SHARE = 4
"""Empty columns on the left are cut off once they are more than one in this many: each cut copies the cache."""
SPARE_COLUMNS = 64
"""How many tokens a cache grows by when it is full."""
OPENINGS = 8
"""How many openings of prompts (system prompt, tools) are kept read; a run has one a condition."""
OPENING_TOKENS = 32
"""A shorter one is not worth its bookkeeping."""
JOIN_STEPS = 8
"""No request waits for longer than this many steps, if there is room in the batch."""
PADDING = 128
"""Prompts of unlike lengths are read apart where they would be padded by more tokens than these."""
LONG = 2
"""A row is long that is so many times as long as the one in the middle."""
STEP_BYTES = 2**24
"""What a step costs on a CPU beside its reading, in bytes that could be read meanwhile."""
UNLIMITED = 10**9
TEMPLATE_SECONDS = 10.0
"""How long a chat template may take: it is the model's, and may hold a loop without end."""

_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "pocket_probe",
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"pocket_key": {"type": "string", "description": "A key."}},
            "required": ["pocket_key"],
        },
    },
}
_PROBE_CALL = ToolCall("pocket_probe", {"pocket_key": "pocket value"})
_PROBE_USER = Message("user", "pocket question")


@dataclass(eq=False)
class _Row:
    """One request on its way through the batch."""

    prompt: list[int]
    limit: int
    temperature: float
    draw: Callable[[], float]
    future: Future[_Row]
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    finish: Literal["stop", "length"] = "length"

    @property
    def length(self) -> int:
        """How many tokens it has, its prompt's among them."""
        return len(self.prompt) + len(self.tokens)


class HFBackend:
    """A transformers model as a :class:`pytest_pocket.chat.Backend`.

    ``path`` is a directory or a hub name; a directory never reaches for the network.  ``adapter`` is a PEFT
    directory; a ``path`` that is itself an adapter brings its base.  ``batch`` bounds the requests that run
    together.  ``dtype`` is a torch dtype's name: float32 on a CPU, elsewhere the checkpoint's own by default.
    Only safetensors are read, and no code that comes with a model is run.  Raises ModelError.

    ``supports_think`` says whether the model's template has a switch for thinking; ``model_window`` is the
    context window in tokens; ``neutral`` that the text of a special token is text.
    """

    neutral = True

    def __init__(
        self,
        path: str,
        *,
        adapter: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch: int = 64,
    ) -> None:
        if batch < 1:
            raise ModelError(f"batch {batch} is not at least 1")
        base, layers = base_of(path, adapter)
        device = pick_device(device)
        dtype = dtype or ("float32" if device == "cpu" else "auto")
        try:
            self._serve(load_model(base, layers, device, dtype), load_tokenizer(base), base, batch)
        except ModelError as error:
            if layers and adapter is None:
                raise ModelError(f"{error} (it is the base that adapter {layers} names)") from error
            raise

    @classmethod
    def around(cls, model: Any, tokenizer: Any, batch: int = 64) -> HFBackend:
        """A backend over a model in memory, which its owner goes on training: call ``weights_changed`` then."""
        backend = cls.__new__(cls)
        backend._serve(model, tokenizer, "the model in memory", batch)
        return backend

    def _serve(self, model: Any, tokenizer: Any, path: str, batch: int) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.device = str(model.device)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self._rendering = threading.Lock()
        self._probe_template(path)
        config = model.config.get_text_config()
        self.model_window = int(getattr(config, "max_position_embeddings", None) or UNLIMITED)
        self._engine = _Engine(model, _stop_ids(model, tokenizer), batch)
        self._name = f"transformers {_version()}"

    def weights_changed(self) -> None:
        """Forget what was computed with the weights of before.  No request may be in flight."""
        self._engine.forget()

    def chat(self, request: ChatRequest) -> ChatReply:
        """Answer one request.  Raises EngineError for the engine's faults, Cancelled after ``cancel``."""
        sampling = request.sampling
        try:
            prompt = self._render(request.messages, request.tools, think=sampling.think)
            text = self._decode(prompt)
        except Exception as error:
            raise EngineError(f"the chat template failed: {type(error).__name__}: {error}") from error
        evidence: dict[str, str | int | float] = {
            "prompt_sha256": hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest(),
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "think": int(sampling.think),
            "max_tokens": sampling.max_tokens,
            "engine": self._name,
            "device": self.device,
            "dtype": self.dtype,
        }
        limit = min(sampling.max_tokens, self.model_window - len(prompt))
        if limit <= 0:
            evidence["room"] = self.model_window - len(prompt)
            return ChatReply(
                "", finish="length", prompt_tokens=len(prompt), evidence=evidence, prompt_ids=tuple(prompt)
            )
        row = _Row(prompt, limit, sampling.temperature, random.Random(sampling.seed).random, Future())
        self._engine.submit(row)
        row.future.result()
        parsed = self._parse(text, row, request)
        return ChatReply(
            parsed.content,
            thinking=parsed.thinking,
            calls=parsed.calls,
            malformed=parsed.malformed,
            finish=row.finish,
            prompt_tokens=len(prompt),
            completion_tokens=len(row.tokens),
            logprob=row.logprob,
            evidence=evidence,
            prompt_ids=tuple(prompt),
            completion_ids=tuple(row.tokens),
        )

    def forced(self, request: ChatRequest, text: str) -> ChatReply:
        """What this engine makes of a reply with that text: for the conformance suite."""
        prompt = self._decode(self._render(request.messages, request.tools, think=request.sampling.think))
        row = _Row([], 0, 0.0, float, Future(), tokens=self._tokenizer.encode(text, add_special_tokens=False))
        return ChatReply(**vars(self._parse(prompt, row, request)))

    def cancel(self) -> None:
        """Make requests in flight, and later ones, raise Cancelled at once."""
        self._engine.stop(Cancelled())

    def close(self) -> None:
        """End the engine thread and free the model."""
        self._engine.stop(EngineError("the model is closed"))
        self._engine.join()
        self._model = None
        _free_memory()

    def _render(
        self,
        messages: Iterable[Message],
        tools: Iterable[Mapping[str, Any]],
        *,
        think: bool,
        prompt: bool = True,
    ) -> list[int]:
        """The conversation as token ids; with ``prompt``, ending where the model is to write."""
        # The fast tokenizers keep state while they encode: one thread at a time.
        with self._rendering, deadline(TEMPLATE_SECONDS):
            return render(self._tokenizer, messages, tools, think=think, prompt=prompt)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _parse(self, prompt: str, row: _Row, request: ChatRequest) -> Parsed:
        """The reply, taken apart."""
        ids = row.tokens[:-1] if row.finish == "stop" else row.tokens
        text = self._decode(ids)
        if self._response_template:
            return _parse_by_template(self._tokenizer, prompt, text, request.tools)
        return parse(text, thinking_open=self._thinking_open[request.sampling.think], schemas=request.tools)

    def _probe_template(self, path: str) -> None:
        """Find out what the template does, once, rather than trust it.  Raises ModelError.

        Our parser is preferred where it reads what the template writes, because transformers' own
        (``tokenizer.response_template``) says nothing about a malformed call.
        """
        if not self._tokenizer.chat_template:
            raise ModelError(
                f"{path} has no chat template: use an instruction-tuned model, or add chat_template.jinja"
            )

        def shown(*messages: Message, think: bool = False, prompt: bool = False) -> str:
            return self._decode(self._render(messages, [_PROBE_TOOL], think=think, prompt=prompt))

        try:
            offered = shown(_PROBE_USER)
            asked = {think: shown(_PROBE_USER, think=think, prompt=True) for think in (False, True)}
        except Exception as error:
            raise ModelError(
                f"the chat template of {path} fails: {error}; give the model one that works"
            ) from error
        if _PROBE_CALL.name not in offered:
            raise ModelError(
                f"the chat template of {path} ignores tools: use a model whose template renders them"
            )
        try:
            called = shown(_PROBE_USER, Message("assistant", "", calls=(_PROBE_CALL,)))
        except Exception:
            called = ""
        spoken = called.rpartition(_PROBE_USER.content)[2]
        ours = parse(spoken, thinking_open=False, schemas=[_PROBE_TOOL]).calls == (_PROBE_CALL,)
        self._response_template = not ours and getattr(self._tokenizer, "response_template", None) is not None
        if not ours and not self._response_template:
            raise ModelError(
                f"the tool calls of {path} are spelled in an unknown way: set response_template "
                "in its tokenizer_config.json, or serve it with vLLM and use vllm:NAME"
            )
        self.supports_think = asked[True] != asked[False]
        self._thinking_open = {
            think: leaves_thinking_open(text.rpartition(_PROBE_USER.content)[2])
            for think, text in asked.items()
        }


class _Engine:
    """The thread that owns the model: takes rows from a queue, and resolves their futures."""

    def __init__(self, model: Any, stop_ids: frozenset[int], batch: int) -> None:
        self._batch = _Batch(model, stop_ids)
        self._apart = _Batch(model, stop_ids)
        """The rows that have become so long that they are stepped by themselves."""
        self._size = batch
        self._waiting: deque[_Row] = deque()
        self._known: set[_Row] = set()
        self._changed = threading.Condition()
        self._ended: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="pocket-hf", daemon=True)
        self._thread.start()

    def submit(self, row: _Row) -> None:
        """Queue a row; its future resolves when it is finished.  Raises what ``stop`` was given."""
        with self._changed:
            if self._ended:
                raise self._ended
            self._waiting.append(row)
            self._known.add(row)
            self._changed.notify()

    def stop(self, reason: Exception) -> None:
        """Fail every row, present and future, with the reason; the thread ends after the current step."""
        with self._changed:
            self._ended = self._ended or reason
            self._waiting.clear()
            for row in tuple(self._known):
                self._resolve(row, self._ended)
            self._changed.notify()

    def forget(self) -> None:
        """Drop the openings that are kept read."""
        self._batch.forget()

    def join(self) -> None:
        """Wait until the thread has ended, and let go of the model."""
        self._thread.join()
        self._batch.release()
        self._apart.release()

    def _run(self) -> None:
        import torch

        with torch.inference_mode():
            steps = 0
            while (joining := self._next(steps)) is not None:
                steps = 0 if joining else steps + 1
                if joining:
                    self._join(joining)
                else:
                    self._step()
        self._batch.clear()
        self._apart.clear()

    def _next(self, steps: int) -> list[_Row] | None:
        """The rows that join now, none to go on with those running; None when the engine has to end."""
        with self._changed:
            running = len(self._batch.rows) + len(self._apart.rows)
            while not self._ended and not running and not self._waiting:
                self._changed.wait()
            if self._ended:
                return None
            room = self._size - running if self._batch.joinable else self._size * (not running)
            if steps < JOIN_STEPS and len(self._waiting) * JOIN_SHARE < min(running, room * JOIN_SHARE):
                return []
            return [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]

    def _join(self, rows: list[_Row]) -> None:
        """Let rows join.  A fault while their prompts are read is theirs alone."""
        try:
            read = self._batch.read(rows)
        except Exception as error:
            self._fail(rows, error)
        else:
            self._work(self._batch, lambda: self._batch.join(rows, *read), rows)

    def _step(self) -> None:
        """One token for every row."""
        if long := self._batch.long():
            self._work(self._batch, lambda: self._apart.take_from(self._batch, long))
        for batch in (self._batch, self._apart):
            if batch.rows:
                self._work(batch, batch.step)

    def _work(self, batch: _Batch, advance: Callable[[], list[_Row]], joining: Sequence[_Row] = ()) -> None:
        """Let a batch advance, and resolve what that finished.  A fault ends every row of it."""
        running = batch.rows
        try:
            finished = advance()
        except Exception as error:
            batch.clear()
            self._fail([*running, *joining], error)
            return
        with self._changed:
            for row in finished:
                self._resolve(row, _not_a_number() if math.isnan(row.logprob) else None)

    def _fail(self, rows: Iterable[_Row], error: Exception) -> None:
        with self._changed:
            for row in rows:
                self._resolve(row, _engine_error(error))
        _free_memory()

    def _resolve(self, row: _Row, error: Exception | None = None) -> None:
        self._known.discard(row)
        try:
            if error is None:
                row.future.set_result(row)
            else:
                row.future.set_exception(error)
        except InvalidStateError:
            pass  # stop() came first


class _Batch:
    """The rows that decode together: a left-padded cache, and a mask of shape [rows, cached tokens].

    ``joinable`` is False for caches that cannot be padded later (sliding windows, states that we do not
    know): such models run one batch to its end before the next.
    """

    def __init__(self, model: Any, stop_ids: frozenset[int]) -> None:
        self._model = model
        self._stop_ids = stop_ids
        parameters = inspect.signature(_forward_of(model)).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._positions = "position_ids" in parameters
        self._weight_bytes = sum(each.numel() * each.element_size() for each in model.parameters())
        self.clear()
        self.joinable = True
        self._shareable = False
        # The one used last is the last.
        self._openings: list[tuple[tuple[int, ...], Any]] = []

    def clear(self) -> None:
        """Forget all rows."""
        self.rows: list[_Row] = []
        self._cache: Any = None
        self._mask: Any = None

    def forget(self) -> None:
        """Drop the openings that are kept read."""
        self._openings = []

    def release(self) -> None:
        """Forget all rows and the model."""
        self.clear()
        self.forget()
        self._model = None

    def read(self, rows: Sequence[_Row]) -> tuple[Any, Any, Any]:
        """Run new prompts through the model, each once; the batch stays as it is."""
        import torch

        wanted = [tuple(row.prompt) for row in rows]
        if not self._shareable:
            return self._read(wanted)
        prompts = sorted(set(wanted), key=len)
        first, *others = self._alike(prompts)
        cache, logits, mask = self._read(first)
        for part in others:
            more, theirs, columns = self._read(part)
            _give_room(cache)
            mask = _merge(cache, mask, more, columns)
            logits = torch.cat([logits, theirs])
        if prompts != wanted:
            chosen = torch.tensor([prompts.index(prompt) for prompt in wanted], device=mask.device)
            cache.batch_select_indices(chosen)
            logits, mask = logits[chosen], mask[chosen]
        return cache, logits, mask

    def _alike(self, prompts: Sequence[tuple[int, ...]]) -> Iterator[Sequence[tuple[int, ...]]]:
        """Prompts, given by length, in parts whose padding costs less than another pass; on a CPU alone."""
        start = padding = 0
        for end in range(1, len(prompts)):
            padding += (end - start) * (len(prompts[end]) - len(prompts[end - 1]))
            if padding > PADDING and self._model.device.type == "cpu":
                yield prompts[start:end]
                start, padding = end, 0
        yield prompts[start:]

    def _read(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Any, Any, Any]:
        """Run prompts through the model in one pass."""
        import torch

        opening, cache = self._opening(prompts)
        rests = [prompt[len(opening) :] for prompt in prompts]
        width = max(map(len, rests))
        pads = [width - len(rest) for rest in rests]
        device = self._model.device
        ids = torch.tensor(
            [[*[0] * pad, *rest] for pad, rest in zip(pads, rests, strict=True)], device=device
        )
        seen = [1] * len(opening)
        mask = torch.tensor([[*seen, *[0] * pad, *[1] * (width - pad)] for pad in pads], device=device)
        return self._forward(ids, mask, cache)

    def _opening(self, prompts: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], Any]:
        """What all these prompts begin with, and its cache for as many rows; nothing where it is not known.

        The same system prompt and tools open every prompt of a condition: they are read once.  A state that
        is not a column a token (linear attention) cannot have padding after it, so it is not shared.
        """
        import torch

        if not self._shareable:
            return (), None
        # The last token of a prompt is always read: its logits are asked for.
        starts = [prompt[:-1] for prompt in prompts]
        known = [held for held in self._openings if all(start[: len(held[0])] == held[0] for start in starts)]
        if known:
            found = max(known, key=lambda held: len(held[0]))
            self._openings.remove(found)
        else:
            shared = tuple(os.path.commonprefix(starts))  # noqa: RUF071 - of token ids
            if len(prompts) < 2 or len(shared) < OPENING_TOKENS:
                return (), None
            ids = torch.tensor([shared], device=self._model.device)
            found = (shared, self._forward(ids, torch.ones_like(ids), None)[0])
        self._openings = [*self._openings, found][-OPENINGS:]
        cache = copy.deepcopy(found[1])
        cache.batch_repeat_interleave(len(prompts))
        return found[0], cache

    def join(self, rows: Sequence[_Row], cache: Any, logits: Any, mask: Any) -> list[_Row]:
        """Add rows that were read, and draw their first tokens; gives those that this finished."""
        self.joinable = _joinable(cache)
        self._shareable = _shareable(cache)
        self._add(rows, cache, mask)
        return self._advance(rows, logits)

    def long(self) -> list[_Row]:
        """The rows for whose sake the others read so many empty columns that a step of their own costs less.

        A step of their own reads the weights once more.  On a CPU, that is: elsewhere a step costs its launches.
        """
        if not self._shareable or self._model.device.type != "cpu" or len(self.rows) < 2:
            return []
        ordered = sorted(row.length for row in self.rows)
        most = LONG * ordered[len(ordered) // 2]
        others = [length for length in ordered if length <= most]
        saved = len(others) * (self._mask.shape[1] - others[-1]) * _column_bytes(self._cache)
        dear = saved > self._weight_bytes + STEP_BYTES
        return [row for row in self.rows if row.length > most] if dear else []

    def take_from(self, other: _Batch, rows: Sequence[_Row]) -> list[_Row]:
        """Take over rows of another batch; none of them finishes by that."""
        self._add(rows, *other._copied(rows))
        other._leave(set(rows))
        return []

    def _copied(self, rows: Sequence[_Row]) -> tuple[Any, Any]:
        """The cache and the mask of some rows alone."""
        import torch

        chosen = torch.tensor([self.rows.index(row) for row in rows], device=self._mask.device)
        cache = copy.copy(self._cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        cache.batch_select_indices(chosen)
        return cache, self._mask.index_select(0, chosen)

    def _add(self, rows: Sequence[_Row], cache: Any, mask: Any) -> None:
        """Add rows that were read, on the right of those that are there."""
        _give_room(cache)
        if self.rows:
            self._mask = _merge(self._cache, self._mask, cache, mask)
        else:
            self._cache, self._mask = cache, mask
        self.rows = [*self.rows, *rows]

    def step(self) -> list[_Row]:
        """Decode one token for every row; gives the rows that this finished, which have left the batch."""
        import torch

        ids = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self._model.device)
        mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        self._cache, logits, self._mask = self._forward(ids, mask, self._cache)
        return self._advance(self.rows, logits)

    def _forward(self, ids: Any, mask: Any, cache: Any) -> tuple[Any, Any, Any]:
        """Run the model; gives the cache, the last logits in float32, and the mask."""
        options = dict(self._options)
        if self._positions:
            positions = (mask.cumsum(1) - 1).clamp_(min=0)
            options["position_ids"] = positions[:, -ids.shape[1] :]
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **options,
        )
        return output.past_key_values, output.logits[:, -1].float(), mask

    def _advance(self, rows: Sequence[_Row], logits: Any) -> list[_Row]:
        """Give each of these rows its next token; take the finished ones out of the batch."""

        tokens, logprobs = _draw(logits, rows)
        finished = []
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            row.tokens.append(token)
            row.logprob += logprob
            if token in self._stop_ids:
                row.finish = "stop"
            if row.finish == "stop" or len(row.tokens) >= row.limit or math.isnan(logprob):
                finished.append(row)
        if finished:
            self._leave(set(finished))
        return finished

    def _leave(self, gone: set[_Row]) -> None:
        """Take rows out.  The last ones move to their places, so that the others need not be copied."""
        import torch

        stay = len(self.rows) - len(gone)
        if not stay:
            self.clear()
            return
        movers = (index for index in range(stay, len(self.rows)) if self.rows[index] not in gone)
        order = [next(movers) if row in gone else index for index, row in enumerate(self.rows[:stay])]
        self.rows = [self.rows[index] for index in order]
        chosen = torch.tensor(order, device=self._mask.device)
        self._mask = self._mask.index_select(0, chosen)
        for layer in getattr(self._cache, "layers", [self._cache]):
            if isinstance(layer, _roomy_layer()):
                layer.take(order)
            else:
                layer.reorder_cache(chosen)
        unused = int(self._mask.argmax(1).min())
        if self.joinable and unused * TRIM_SHARE > self._mask.shape[1]:
            self._mask = self._mask[:, unused:]
            _pad(self._cache, -unused)


def _draw(logits: Any, rows: Sequence[_Row]) -> tuple[list[int], list[float]]:
    """The next token of each row, and its log-probability at temperature 1.

    Temperature 0 takes the most likely token.  Above, u uniform in [0, 1) picks the first token at which the
    cumulated probability exceeds u: an exact draw, from one number of the row's own generator.
    """
    import torch

    chosen = logits.argmax(-1)
    hot = [index for index, row in enumerate(rows) if row.temperature > 0]
    if hot:
        # Apple's GPUs have no double precision.
        device = "cpu" if logits.device.type == "mps" else logits.device
        scores = logits[hot].to(device).double()
        scores -= scores.max(-1, keepdim=True).values
        scores /= torch.tensor(
            [[rows[index].temperature] for index in hot], dtype=scores.dtype, device=device
        )
        cumulated = scores.softmax(-1).cumsum(-1)
        numbers = torch.tensor([[rows[index].draw()] for index in hot], dtype=scores.dtype, device=device)
        drawn = torch.searchsorted(cumulated, numbers * cumulated[:, -1:], right=True)
        chosen[hot] = drawn.squeeze(-1).clamp_(max=logits.shape[-1] - 1).to(chosen.device)
    logprobs = logits.gather(-1, chosen[:, None]).squeeze(-1) - logits.logsumexp(-1)
    return chosen.tolist(), logprobs.tolist()


@functools.cache
def _roomy_layer() -> Any:
    """The class of a cache layer with room ahead: the stock one copies all of itself at every token."""
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
        rooms: tuple[Any, Any] = (None, None)

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            if not self.is_initialized:
                return super().update(key_states, value_states, *args, **kwargs)
            keys, self.keys = _appended(self.rooms[0], self.keys, key_states)
            values, self.values = _appended(self.rooms[1], self.values, value_states)
            self.rooms = keys, values
            return self.keys, self.values

        def join(self, more: Any, width: int) -> None:
            """Append another layer's rows; both become ``width`` columns wide, with empty ones on the left."""
            keys, self.keys = _stacked(self.keys, more.keys, width)
            values, self.values = _stacked(self.values, more.values, width)
            self.rooms = keys, values

        def take(self, order: Sequence[int]) -> None:
            """Row ``order[i]`` becomes row i; no row that moves is one that another has moved to."""
            both: list[Any] = [self.keys, self.values]
            for held in both:
                for new, old in enumerate(order):
                    if new != old:
                        held[new] = held[old]
            self.keys, self.values = (held[: len(order)] for held in both)

    return RoomyLayer


def _give_room(cache: Any) -> None:
    from transformers.cache_utils import DynamicLayer

    for layer in getattr(cache, "layers", ()):
        if type(layer) is DynamicLayer:
            layer.__class__ = _roomy_layer()


def _appended(room: Any, held: Any, more: Any) -> tuple[Any, Any]:
    """The columns ``held`` and ``more``, as a view of the room that comes with them: of the same one, if it fits.

    Tensors are of shape [rows, heads, columns, size].  What is held is no view of the room where another
    tensor took its place (rows joined, or the cache was padded).
    """
    start, end = held.shape[-2], held.shape[-2] + more.shape[-2]
    rows = len(held)
    if room is None or held.data_ptr() != room.data_ptr() or end > room.shape[-2]:
        room = held.new_empty((*held.shape[:2], end + SPARE_COLUMNS, held.shape[-1]))
        room[..., :start, :] = held
    room[:rows, :, start:end] = more
    return room, room[:rows, :, :end]


def _stacked(held: Any, more: Any, width: int) -> tuple[Any, Any]:
    """The rows of both, ``width`` columns wide, as a view of a room that comes with them: copied once."""
    room = held.new_empty((len(held) + len(more), held.shape[1], width + SPARE_COLUMNS, held.shape[-1]))
    for rows, part in ((room[: len(held)], held), (room[len(held) :], more)):
        start = width - part.shape[-2]
        rows[..., :start, :] = 0
        rows[..., start:width, :] = part
    return room, room[..., :width, :]


def _joinable(cache: Any) -> bool:
    from transformers import cache_utils

    known = {
        _roomy_layer(),
        cache_utils.DynamicLayer,
        getattr(cache_utils, "LinearAttentionLayer", cache_utils.DynamicLayer),
    }
    return all(type(layer) in known for layer in getattr(cache, "layers", [None]))


def _shareable(cache: Any) -> bool:
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) in (DynamicLayer, _roomy_layer()) for layer in getattr(cache, "layers", [None]))


def _column_bytes(cache: Any) -> int:
    """The size of one token of one row in a cache whose layers all have keys and values."""
    parts = (part for layer in cache.layers for part in (layer.keys, layer.values))
    return sum(part.shape[1] * part.shape[3] * part.element_size() for part in parts)


def _pad(cache: Any, count: int) -> None:
    """Add ``count`` empty columns on the left of a cache's keys and values; cut them off when negative."""
    import torch

    if count:
        for layer in cache.layers:
            if getattr(layer, "keys", None) is not None:
                layer.keys = torch.nn.functional.pad(layer.keys, (0, 0, count, 0))
                layer.values = torch.nn.functional.pad(layer.values, (0, 0, count, 0))


def _merge(cache: Any, mask: Any, other: Any, others: Any) -> Any:
    """Append the rows of another cache, both as wide as the wider one then is; gives the mask of both."""
    import torch

    width = max(mask.shape[1], others.shape[1])
    for layer, more in zip(cache.layers, other.layers, strict=True):
        if getattr(layer, "keys", None) is not None:
            layer.join(more, width)
        for states in ("conv_states", "recurrent_states"):
            held = getattr(layer, states, {})
            for index, state in held.items():
                if state is not None:
                    held[index] = torch.cat([state, getattr(more, states)[index]])
    pad = torch.nn.functional.pad
    return torch.cat([pad(each, (width - each.shape[1], 0)) for each in (mask, others)])


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that there is too little memory: torch has no one class for it."""
    said = ("out of memory", "allocate memory")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def _engine_error(error: Exception) -> EngineError:
    if out_of_memory(error):
        return EngineError("the engine ran out of memory: reduce --pocket-in-flight")
    return EngineError(f"the engine failed: {type(error).__name__}: {first_line(error)}")


def _not_a_number() -> EngineError:
    return EngineError("the model computed not-a-number; try dtype float32")


def _parse_by_template(tokenizer: Any, prompt: str, text: str, tools: Sequence[Mapping[str, Any]]) -> Parsed:
    """Take a reply apart with the tokenizer's own ``response_template``."""
    try:
        message = tokenizer.parse_response(text, prefix=prompt, tools=[dict(tool) for tool in tools])
        functions = [call.get("function", call) for call in message.get("tool_calls") or ()]
        calls = tuple(ToolCall(call["name"], dict(call.get("arguments") or {})) for call in functions)
    except Exception as error:
        return Parsed(text, malformed=f"the call cannot be read: {error}")
    thinking = message.get("reasoning_content") or message.get("thinking") or message.get("reasoning") or ""
    return Parsed(str(message.get("content") or ""), thinking=str(thinking), calls=calls)


def base_of(path: str, adapter: str | None) -> tuple[str, str | None]:
    """The base and the adapter; a path that holds only an adapter stands for both.  Raises ModelError."""
    directory = Path(path).expanduser()
    if directory.is_dir():
        path = str(directory)
        alone = (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file()
        if adapter is None and alone:
            path, adapter = _base_named_by(directory), path
    elif _looks_local(path):
        raise ModelError(
            f"no model directory {path!r}: give an existing one, or a hub name like Qwen/Qwen3-0.6B"
        )
    if adapter is not None:
        adapter = str(Path(adapter).expanduser())
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise ModelError(f"no adapter in {adapter!r} (no adapter_config.json): give a PEFT directory")
        if not (Path(adapter) / "adapter_model.safetensors").is_file():
            raise ModelError(f"adapter {adapter!r} has no adapter_model.safetensors: save it as safetensors")
    for folder in filter(Path.is_dir, map(Path, filter(None, (path, adapter)))):
        try:
            vet(folder)
        except Refused as reason:
            raise ModelError(str(reason)) from None
    return path, adapter


def _base_named_by(adapter: Path) -> str:
    """The base that an adapter was trained on: a directory (from here or from the adapter) or a hub name."""
    try:
        base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"adapter {adapter} does not name its base: give the base as path and this as adapter"
        )
    if (adapter / base).is_dir():
        return str(adapter / base)
    if _looks_local(base) and not Path(base).is_dir():
        raise ModelError(
            f"the base of adapter {adapter} is missing: {base!r}; put it there, or give it as path"
        )
    return base


def _looks_local(path: str) -> bool:
    """A hub name is NAME or OWNER/NAME; everything else is meant as a directory."""
    return not path or path[0] in "/.~" or path.count("/") > 1 or path.endswith("/")


def pick_device(device: str | None) -> str:
    """The device of a name; without one, the best there is.  Raises ModelError."""
    import torch

    if device is None:
        device = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        return str(torch.device(device))
    except RuntimeError:
        raise ModelError(f"unknown device {device!r}: use cpu, cuda, cuda:1 or mps") from None


def no_bars() -> None:
    """Keep transformers' own progress bars out of the terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a directory or hub name.  Raises ModelError."""
    from transformers import AutoTokenizer

    no_bars()
    try:
        return AutoTokenizer.from_pretrained(
            path, local_files_only=Path(path).is_dir(), trust_remote_code=False
        )
    except Exception as error:
        raise ModelError(_cannot_load(f"the tokenizer of {path!r}", path, error)) from error


def render(
    tokenizer: Any,
    messages: Iterable[Message],
    tools: Iterable[Mapping[str, Any]],
    *,
    think: bool,
    prompt: bool = True,
    sanitize: bool = True,
) -> list[int]:
    """A conversation as token ids; with ``prompt``, ending where the model is to write.

    With ``sanitize``, the text of a special token is only text.
    """
    return list(
        tokenizer.apply_chat_template(
            [message.to_dict() for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            add_generation_prompt=prompt,
            enable_thinking=think,
            **({"sanitize_control_tokens": True} if sanitize else {}),  # transformers from 5.23 on
            return_dict=False,
        )
    )


def _cannot_load(what: str, path: str, error: BaseException) -> str:
    """Why something cannot be loaded, and what to do, in one line."""
    if out_of_memory(error):
        return f"no memory to load {what}: choose a smaller model, or a smaller dtype (bfloat16)"
    if Path(path).is_dir():
        return f"cannot load {what}: {first_line(error)}; save or fetch it again"
    return (
        f"cannot load {what}: no folder of that name is here, and as a name on the hub: "
        f"{first_line(error).rstrip('.')}; give a folder, or look at the name and the network"
    )


def load_model(path: str, adapter: str | None, device: str, dtype: str) -> Any:
    """The model, ready to run.  Raises ModelError when a weight is missing, rather than run a random one."""
    import torch
    from transformers import AutoModelForCausalLM

    no_bars()
    directory = Path(path)
    local = directory.is_dir()
    if local and not any(directory.glob("*.safetensors")):
        raise ModelError(
            f"{path} has no *.safetensors, and other weights are not read: save the model as safetensors"
        )
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ModelError(f"unknown dtype {dtype!r}: use float32, bfloat16 or float16")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=local,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(_cannot_load(f"model {path!r}", path, error)) from error
    model, info = loaded
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if missing:
        raise ModelError(
            f"the weights of {path} lack {len(missing)} tensors ({missing[0]}, ...): fetch them again"
        )
    if adapter is not None:
        model = _add_adapter(model, path, adapter)
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError, MemoryError) as error:
        if out_of_memory(error):
            raise ModelError(_cannot_load(f"{path!r} on {device}", path, error)) from error
        raise ModelError(f"cannot put {path} on {device}: {first_line(error)}") from error


def _add_adapter(model: Any, path: str, adapter: str) -> Any:
    import torch
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # PEFT only warns when an adapter does not fit its base, and leaves those layers untouched.
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            adapted = PeftModel.from_pretrained(model, adapter, local_files_only=True)
    except Exception as error:
        raise ModelError(f"adapter {adapter} does not fit {path}: {first_line(error)}") from error
    # Merging rounds the weights, which in half precision changes the model.
    return adapted.merge_and_unload() if model.dtype == torch.float32 else adapted


def _forward_of(model: Any) -> Any:
    return model.get_base_model().forward if hasattr(model, "get_base_model") else model.forward


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a reply: the generation config's, the tokenizer's, and ChatML's."""
    declared = model.generation_config.eos_token_id
    ids = {*(declared if isinstance(declared, list) else [declared]), tokenizer.eos_token_id}
    ids.add(tokenizer.added_tokens_encoder.get("<|im_end|>"))
    return frozenset(token for token in ids if token is not None)


def _version() -> str:
    import transformers

    return str(transformers.__version__)


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
