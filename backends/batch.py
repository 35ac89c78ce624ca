"""Requests that decode together: one engine thread, and the batch that rows join before a step and leave after it."""

from __future__ import annotations

import inspect
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from pytest_pocket.backends.cache import (
    OPENING_TOKENS,
    Kept,
    Known,
    close_gaps,
    column_bytes,
    cut,
    give_room,
    joinable,
    merge,
    shareable,
    sharing,
    take,
)
from pytest_pocket.backends.memory import free_memory, out_of_memory
from pytest_pocket.chat import EngineError, first_line

JOIN_SHARE = 4
"""Waiting requests join once there is one for this many running: those that are read together share a pass."""
JOIN_STEPS = 8
"""No request waits for longer than this many steps, if there is room in the batch."""
PADDING = 128
"""Prompts of unlike lengths are read apart where the work of more tokens than these would be lost in padding."""
LAUNCHES = 32
"""So many times more may be lost on what is not a CPU: there a pass costs its launches."""
ATTENDED = 512
"""To look back at so many columns costs a token as much as all else that it goes through; in larger models more."""
LONG = 2
"""A row is long that is so many times as long as the one in the middle."""
STEP_BYTES = 2**24
"""What a step costs on a CPU beside its reading, in bytes that could be read meanwhile."""


@dataclass(eq=False)
class Row:
    """One request on its way through the batch."""

    prompt: list[int]
    limit: int
    temperature: float
    draw: Callable[[], float]
    future: Future[Row]
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    finish: Literal["stop", "length"] = "length"

    @property
    def length(self) -> int:
        """How many tokens it has, its prompt's among them."""
        return len(self.prompt) + len(self.tokens)


class Engine:
    """The thread that owns the model: takes rows from a queue, and resolves their futures."""

    def __init__(self, model: Any, stop_ids: frozenset[int], batch: int) -> None:
        self._kept = Kept()
        self._batch = Batch(model, stop_ids, self._kept)
        self._apart = Batch(model, stop_ids, self._kept)
        """The rows that have become so long that they are stepped by themselves."""
        self._size = batch
        self._waiting: deque[Row] = deque()
        self._known: set[Row] = set()
        self._changed = threading.Condition()
        self._ended: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="pocket-hf", daemon=True)
        self._thread.start()

    def submit(self, row: Row) -> None:
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
        """Drop the conversations that are kept read."""
        self._kept.clear()

    def join(self) -> None:
        """Wait until the thread has ended, and let go of the model."""
        self._thread.join()
        self._kept.clear()
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

    def _next(self, steps: int) -> list[Row] | None:
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

    def _join(self, rows: list[Row]) -> None:
        """Let rows join.  A fault while their prompts are read is theirs alone."""
        try:
            read = self._read(rows)
        except Exception as error:
            self._fail(rows, error)
        else:
            self._work(self._batch, lambda: self._batch.join(*read), rows)

    def _read(self, rows: list[Row]) -> tuple[list[Row], Any, Any, Any]:
        """The rows with their prompts read, once more where what is kept took the memory that they needed."""
        try:
            return self._batch.read(rows)
        except Exception as error:
            if not (self._kept.conversations and out_of_memory(error)):
                raise
        self._kept.clear()
        free_memory()
        return self._batch.read(rows)

    def _step(self) -> None:
        """One token for every row."""
        if long := self._batch.long():
            self._move(self._batch, self._apart, long)
        elif self._batch.saved_by(self._apart) < 0:
            self._move(self._apart, self._batch, self._apart.rows)
        for batch in (self._batch, self._apart):
            if batch.rows:
                self._work(batch, batch.step)

    def _move(self, batch: Batch, other: Batch, rows: list[Row]) -> None:
        """Let rows go over to another batch.  A fault ends every row of both."""
        running = [*batch.rows, *other.rows]
        try:
            other.take_from(batch, rows)
        except Exception as error:
            batch.clear()
            other.clear()
            self._fail(running, error)

    def _work(self, batch: Batch, advance: Callable[[], list[Row]], joining: Sequence[Row] = ()) -> None:
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

    def _fail(self, rows: Iterable[Row], error: Exception) -> None:
        if out_of_memory(error):
            self._kept.clear()
        with self._changed:
            for row in rows:
                self._resolve(row, _engine_error(error))
        free_memory()

    def _resolve(self, row: Row, error: Exception | None = None) -> None:
        self._known.discard(row)
        try:
            if error is None:
                row.future.set_result(row)
            else:
                row.future.set_exception(error)
        except InvalidStateError:
            pass  # stop() came first


class Batch:
    """The rows that decode together: a left-padded cache, and a mask of shape [rows, cached tokens].

    ``joinable`` is False for caches that cannot be padded later (sliding windows, states that we do not
    know): such models run one batch to its end before the next.
    """

    def __init__(self, model: Any, stop_ids: frozenset[int], kept: Kept) -> None:
        self._model = model
        self._stop_ids = stop_ids
        self._kept = kept
        parameters = inspect.signature(_forward_of(model)).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._positions = "position_ids" in parameters
        self._lasting = self._positions and _lasting_keys(model)
        self.clear()
        self.joinable = True
        self._shareable = False

    @cached_property
    def _weight_bytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in self._model.parameters())

    def clear(self) -> None:
        """Forget all rows."""
        self.rows: list[Row] = []
        self._cache: Any = None
        self._mask: Any = None

    def release(self) -> None:
        """Forget all rows and the model."""
        self.clear()
        self._model = None

    def read(self, rows: Sequence[Row]) -> tuple[list[Row], Any, Any, Any]:
        """Run new prompts through the model, each once; the batch stays as it is.

        Gives the rows in an order of its own, and in that order their cache, their last logits, and their mask.
        """
        import torch

        wanted: dict[tuple[int, ...], list[Row]] = {}
        for row in rows:
            wanted.setdefault(tuple(row.prompt), []).append(row)
        known = self._known(wanted)
        first, *others = self._alike(known)
        cache, logits, mask = self._read(first)
        for part in others:
            more, theirs, columns = self._read(part)
            give_room(cache)
            mask = merge(cache, mask, more, columns)
            logits = torch.cat([logits, theirs])
        ordered = [row for each in known for row in wanted[each.prompt]]
        if len(known) < len(rows):
            chosen = [number for number, each in enumerate(known) for _ in wanted[each.prompt]]
            rows_of = torch.tensor(chosen, device=mask.device)
            cache.reorder_cache(rows_of)
            logits, mask = logits[rows_of], mask[rows_of]
        return ordered, cache, logits, mask

    def _known(self, prompts: Iterable[tuple[int, ...]]) -> list[Known]:
        """What is known of prompts, those with the least to read first.

        What those of which the least is known have in common beyond that (system prompt, tools) is read before.
        A state that is not a column a token (linear attention) cannot have padding after it: of prompts of such
        models nothing is known.
        """
        import torch

        if not self._shareable:
            return [Known(prompt) for prompt in prompts]
        known = [self._kept.known(prompt) for prompt in prompts]
        least = min(each.length for each in known)
        new = [each.prompt[:-1] for each in known if each.length == least]
        shared = tuple(os.path.commonprefix(new))  # noqa: RUF071 - of token ids
        if len(new) > 1 and len(shared) - least >= OPENING_TOKENS:
            ids = torch.tensor([shared], device=self._model.device)
            cache, _, mask = self._forward(ids, torch.ones_like(ids), None)
            self._kept.add(shared, cache, 0, mask[0])
            known = [self._kept.known(prompt) for prompt in prompts]
        return sorted(known, key=lambda each: (len(each.rest), each.length))

    def _alike(self, known: Sequence[Known]) -> Iterator[Sequence[Known]]:
        """Prompts, those with the least to read first, in parts whose padding costs less than another pass."""
        allowed = PADDING * (1 if self._model.device.type == "cpu" else LAUNCHES)
        part: list[Known] = []
        for each in known:
            if part and self._shareable and _lost([*part, each]) > allowed:
                yield part
                part = []
            part.append(each)
        yield part

    def _read(self, known: Sequence[Known]) -> tuple[Any, Any, Any]:
        """Run what is not known of prompts through the model in one pass."""
        import torch

        seen = max(each.length for each in known)
        width = max(len(each.rest) for each in known)
        pads = [width - len(each.rest) for each in known]
        device = self._model.device
        ids = torch.tensor(
            [[*[0] * pad, *each.rest] for pad, each in zip(pads, known, strict=True)], device=device
        )
        mask = torch.tensor(
            [
                [*[0] * (seen - each.length), *[1] * each.length, *[0] * pad, *[1] * (width - pad)]
                for pad, each in zip(pads, known, strict=True)
            ],
            device=device,
        )
        if not seen:
            return self._forward(ids, mask, None)
        cache, logits, mask = self._forward(ids, mask, self._kept.cache(known, seen, width))
        return cache, logits, close_gaps(cache, mask)

    def join(self, rows: Sequence[Row], cache: Any, logits: Any, mask: Any) -> list[Row]:
        """Add rows that were read, and draw their first tokens; gives those that this finished."""
        self._add(rows, cache, mask)
        return self._advance(rows, logits)

    def long(self) -> list[Row]:
        """The rows for whose sake the others read so many empty columns that a step of their own costs less.

        A step of their own reads the weights once more.  On a CPU, that is: elsewhere a step costs its launches.
        """
        if not self._shareable or self._model.device.type != "cpu" or len(self.rows) < 2:
            return []
        ordered = sorted(row.length for row in self.rows)
        most = LONG * ordered[len(ordered) // 2]
        others = [length for length in ordered if length <= most]
        saved = self._saved(len(others), self._mask.shape[1] - others[-1])
        return [row for row in self.rows if row.length > most] if saved > 0 else []

    def saved_by(self, apart: Batch) -> float:
        """How many bytes fewer are read because the rows of another batch step by themselves; negative: more.

        A step's own cost counts half, so that rows do not come and go.
        """
        if not self.rows or not apart.rows:
            return 0
        return self._saved(len(self.rows), apart._mask.shape[1] - self._mask.shape[1], share=0.5)

    def _saved(self, rows: int, columns: int, share: float = 1.0) -> float:
        """What rows do not read if they are so many columns narrower, less what a step of their own reads."""
        return rows * columns * column_bytes(self._cache) - share * (self._weight_bytes + STEP_BYTES)

    def take_from(self, other: Batch, rows: Sequence[Row]) -> None:
        """Take over rows of another batch."""
        self._add(rows, *other._copied(rows))
        other._leave(set(rows))

    def _copied(self, rows: Sequence[Row]) -> tuple[Any, Any]:
        """The cache and the mask of some rows alone."""
        import torch

        chosen = torch.tensor([self.rows.index(row) for row in rows], device=self._mask.device)
        cache = sharing(self._cache)
        cache.batch_select_indices(chosen)
        return cache, self._mask.index_select(0, chosen)

    def _add(self, rows: Sequence[Row], cache: Any, mask: Any) -> None:
        """Add rows that were read, on the right of those that are there."""
        self.joinable = joinable(cache)
        self._shareable = self._lasting and shareable(cache)
        give_room(cache)
        if self.rows:
            self._mask = merge(self._cache, self._mask, cache, mask)
        else:
            self._cache, self._mask = cache, mask
        self.rows = [*self.rows, *rows]

    def step(self) -> list[Row]:
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

    def _advance(self, rows: Sequence[Row], logits: Any) -> list[Row]:
        """Give each of these rows its next token; take the finished ones out of the batch."""

        tokens, logprobs = draw(logits, rows)
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

    def _leave(self, gone: set[Row]) -> None:
        """Take rows out: what ended its turn is kept.  The last rows move to their places, and no other is copied."""
        self._keep(gone)
        stay = len(self.rows) - len(gone)
        if not stay:
            self.clear()
            return
        movers = (index for index in range(stay, len(self.rows)) if self.rows[index] not in gone)
        order = [next(movers) if row in gone else index for index, row in enumerate(self.rows[:stay])]
        self.rows = [self.rows[index] for index in order]
        self._mask = take(self._cache, self._mask, order)
        if self.joinable:
            self._mask = cut(self._cache, self._mask)

    def _keep(self, gone: set[Row]) -> None:
        """Keep the conversations that may go on, if there is memory for it."""
        if not self._shareable:
            return
        self._kept.allow(len(self.rows) * self._mask.shape[1])
        for index, row in enumerate(self.rows):
            if row in gone and row.finish == "stop" and not math.isnan(row.logprob):
                try:
                    self._kept.add((*row.prompt, *row.tokens[:-1]), self._cache, index, self._mask[index])
                except Exception as error:
                    if not out_of_memory(error):
                        raise
                    self._kept.clear()


def _lost(known: Sequence[Known]) -> float:
    """How many tokens' work is lost in the padding of prompts that are read in one pass."""
    width, seen = max(len(each.rest) for each in known), max(each.length for each in known)
    return sum(width - len(each.rest) + width * (seen - each.length) / ATTENDED for each in known)


def draw(logits: Any, rows: Sequence[Row]) -> tuple[list[int], list[float]]:
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


def _engine_error(error: Exception) -> EngineError:
    if out_of_memory(error):
        return EngineError("the engine ran out of memory: reduce --pocket-in-flight")
    return EngineError(f"the engine failed: {type(error).__name__}: {first_line(error)}")


def _not_a_number() -> EngineError:
    return EngineError("the model computed not-a-number; try dtype float32")


def _lasting_keys(model: Any) -> bool:
    """Whether a key stays right while its row grows: the frequencies of some models change with the length."""
    told = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    each = (told, *(value for value in told.values() if isinstance(value, dict)))
    return not any(str(value.get("rope_type")) in ("dynamic", "longrope") for value in each)


def _forward_of(model: Any) -> Any:
    return model.get_base_model().forward if hasattr(model, "get_base_model") else model.forward
