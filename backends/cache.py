"""The key-value cache of a batch: rows that join and leave without copies of the others, and conversations kept read.

Keys and values are tensors of shape [rows, heads, columns, size]; a mask of shape [rows, columns] says which
columns hold a token.  Those on the left of a shorter row are empty.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SPARE_COLUMNS = 64
"""How many tokens a cache grows by when it is full."""
OPENING_TOKENS = 32
"""What prompts have in common is read once if it is so long; a shorter opening is not worth its bookkeeping."""


@functools.cache
def _roomy_layer() -> Any:
    """The class of a cache layer with room ahead: the stock one copies all of itself at every token."""
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
        keys: Any
        values: Any
        rooms: tuple[Any, Any] = (None, None)

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            if not self.is_initialized:
                return super().update(key_states, value_states, *args, **kwargs)
            keys, self.keys = _appended(self.rooms[0], self.keys, key_states)
            values, self.values = _appended(self.rooms[1], self.values, value_states)
            self.rooms = keys, values
            return self.keys, self.values

        def takes(self, rows: int) -> bool:
            """Whether so many more rows find room without a copy of those that are there."""
            room = self.rooms[0]
            return _is_view(self.keys, room) and len(self.keys) + rows <= len(room)

        def join(self, more: Any, width: int) -> None:
            """Append another layer's rows; both become ``width`` columns wide, with empty ones on the left."""
            keys, self.keys = _stacked(self.rooms[0], self.keys, more.keys, width)
            values, self.values = _stacked(self.rooms[1], self.values, more.values, width)
            self.rooms = keys, values

        def cut(self, columns: int) -> None:
            """Leave out columns on the left."""
            keys, values = (room if room is None else room[..., columns:, :] for room in self.rooms)
            self.rooms = keys, values
            self.keys, self.values = self.keys[..., columns:, :], self.values[..., columns:, :]

        def take(self, order: Sequence[int]) -> None:
            """As :func:`take`."""
            for held in (self.keys, self.values):
                for new, old in enumerate(order):
                    if new != old:
                        held[new] = held[old]
            self.keys, self.values = self.keys[: len(order)], self.values[: len(order)]

    return RoomyLayer


def give_room(cache: Any) -> None:
    """Turn stock layers into roomy ones."""
    from transformers.cache_utils import DynamicLayer

    for layer in getattr(cache, "layers", ()):
        if type(layer) is DynamicLayer:
            layer.__class__ = _roomy_layer()


def _is_view(held: Any, room: Any) -> bool:
    """Whether a tensor begins where its room does: it does not where another one has taken its place."""
    return room is not None and held.data_ptr() == room.data_ptr()


def _appended(room: Any, held: Any, more: Any) -> tuple[Any, Any]:
    """The columns ``held`` and ``more``, as a view of the room that comes with them: of the same one, if they fit."""
    rows, start, end = len(held), held.shape[-2], held.shape[-2] + more.shape[-2]
    if not _is_view(held, room) or end > room.shape[-2]:
        # Rows that left made place for those that join, unless most did: then it is only memory.
        most = len(room) if _is_view(held, room) and len(room) < 2 * rows else rows
        room = held.new_empty((most, held.shape[1], end + SPARE_COLUMNS, held.shape[-1]))
        room[:rows, :, :start] = held
    room[:rows, :, start:end] = more
    return room, room[:rows, :, :end]


def _stacked(room: Any, held: Any, more: Any, width: int) -> tuple[Any, Any]:
    """The last ``width`` columns of both, as a view of the room that comes with them: of the same one, if they fit."""
    rows = len(held) + len(more)
    if not _is_view(held, room) or rows > len(room) or width != held.shape[-2]:
        room = held.new_empty((rows, held.shape[1], width + SPARE_COLUMNS, held.shape[-1]))
        _put(room[: len(held), :, :width], held)
    _put(room[len(held) : rows, :, :width], more)
    return room, room[:rows, :, :width]


def _put(place: Any, part: Any) -> None:
    """The part's last columns go to the right of the place; what is left on its left is empty."""
    width = place.shape[-2]
    start = max(0, width - part.shape[-2])
    place[..., :start, :] = 0
    place[..., start:, :] = part[..., start - width :, :]


def joinable(cache: Any) -> bool:
    """Whether rows can join: not where columns cannot be added on the left (sliding windows, unknown states)."""
    from transformers import cache_utils

    known = {
        _roomy_layer(),
        cache_utils.DynamicLayer,
        getattr(cache_utils, "LinearAttentionLayer", cache_utils.DynamicLayer),
    }
    # A class of its own may hold states beside its layers.
    return type(cache) is cache_utils.DynamicCache and all(type(layer) in known for layer in cache.layers)


def shareable(cache: Any) -> bool:
    """Whether every token is a column of its own, so that a row can begin with the columns of another."""
    from transformers.cache_utils import DynamicLayer

    return joinable(cache) and all(isinstance(layer, DynamicLayer) for layer in cache.layers)


def column_bytes(cache: Any) -> int:
    """The size of one token of one row in a cache whose layers all have keys and values."""
    parts = (part for layer in cache.layers for part in (layer.keys, layer.values))
    return sum(part.shape[1] * part.shape[3] * part.element_size() for part in parts)


def merge(cache: Any, mask: Any, other: Any, others: Any) -> Any:
    """Append the rows of another cache, both as wide as the longest row then is; gives the mask of both.

    Where the rows that are there need not be copied, they stay as wide as they are.
    """
    import torch

    width = max(each.shape[1] - _unused(each) for each in (mask, others))
    roomy = [layer for layer in cache.layers if isinstance(layer, _roomy_layer())]
    if width <= mask.shape[1] and all(layer.takes(len(others)) for layer in roomy):
        width = mask.shape[1]
    for layer, more in zip(cache.layers, other.layers, strict=True):
        if getattr(layer, "keys", None) is not None:
            layer.join(more, width)
        for states in ("conv_states", "recurrent_states"):
            held = getattr(layer, states, {})
            for index, state in held.items():
                if state is not None:
                    held[index] = torch.cat([state, getattr(more, states)[index]])
    pad = torch.nn.functional.pad
    return torch.cat([pad(each[:, -width:], (max(0, width - each.shape[1]), 0)) for each in (mask, others)])


def sharing(cache: Any) -> Any:
    """A cache with the same tensors: those that it is given later are its own."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def take(cache: Any, mask: Any, order: Sequence[int]) -> Any:
    """Row ``order[i]`` becomes row i, and the others leave, in place; gives the mask of those that stay.

    No row may move to the place of one that moves.
    """
    import torch

    chosen = torch.tensor(order, device=mask.device)
    for layer in getattr(cache, "layers", [cache]):
        if isinstance(layer, _roomy_layer()):
            layer.take(order)
        else:
            layer.reorder_cache(chosen)
    return mask.index_select(0, chosen)


def cut(cache: Any, mask: Any) -> Any:
    """Leave out the columns on the left that are empty in every row, in place; gives the mask that is left."""
    empty = _unused(mask)
    for layer in cache.layers:
        if isinstance(layer, _roomy_layer()):
            layer.cut(empty)
    return mask[:, empty:]


def close_gaps(cache: Any, mask: Any) -> Any:
    """Move the tokens of each row together, to the right, in place; gives the mask that is then right."""
    closed = mask.sort(1).values
    for row in (closed != mask).any(1).nonzero().flatten().tolist():
        columns = mask[row].nonzero().squeeze(-1)
        for layer in cache.layers:
            for held in (layer.keys, layer.values):
                held[row, :, -len(columns) :] = held[row].index_select(1, columns)
    return closed


def _unused(mask: Any) -> int:
    """How many columns on the left are empty in every row."""
    return int(mask.argmax(1).min())


@dataclass(frozen=True)
class Known:
    """A prompt, and how much of it a conversation begins with that was kept."""

    prompt: tuple[int, ...]
    length: int = 0
    conversation: Conversation | None = None

    @property
    def rest(self) -> tuple[int, ...]:
        """What is still to be read."""
        return self.prompt[self.length :]


@dataclass(frozen=True, eq=False)
class Conversation:
    """Tokens that were read: of each layer the keys and the values, of shape [heads, tokens, size]."""

    tokens: tuple[int, ...]
    layers: list[tuple[Any, Any]]


class Kept:
    """Conversations that were read, so that the next turn of each reads only what is new to it.

    They may have as many tokens as there were columns in a batch at most, or one of them more: they may take as
    much memory as the batch does.
    """

    def __init__(self) -> None:
        self._most = 0
        self._blank: Any = None
        self.clear()

    def clear(self) -> None:
        """Forget all of them."""
        # The one used last is the last.
        self.conversations: list[Conversation] = []

    def allow(self, tokens: int) -> None:
        """So many tokens may be kept, or more if more were allowed before."""
        self._most = max(self._most, tokens)

    def add(self, tokens: tuple[int, ...], cache: Any, row: int, mask: Any) -> None:
        """Keep the tokens of a row, in place of what these go on from; ``mask`` says which columns they are."""
        columns = mask.nonzero().squeeze(-1)
        layers = [
            (layer.keys[row].index_select(1, columns), layer.values[row].index_select(1, columns))
            for layer in cache.layers
        ]
        if self._blank is None:
            self._blank = sharing(cache)
            give_room(self._blank)
            for layer in self._blank.layers:
                layer.keys = layer.values = None
                layer.rooms = None, None
        others = [each for each in self.conversations if each.tokens != tokens[: len(each.tokens)]]
        self.conversations = [*others, Conversation(tokens, layers)]
        count = sum(len(each.tokens) for each in self.conversations)
        while count > self._most and len(self.conversations) > 1:
            count -= len(self.conversations.pop(0).tokens)

    def known(self, prompt: tuple[int, ...]) -> Known:
        """The longest beginning of a prompt that is kept; never all of it: its last token's logits are asked for."""
        start, length, found = prompt[:-1], 0, None
        for each in self.conversations:
            more = max(OPENING_TOKENS, length + 1)
            if len(start) >= more <= len(each.tokens) and each.tokens[:more] == start[:more]:
                length, found = len(os.path.commonprefix([each.tokens, start])), each  # noqa: RUF071 - of token ids
        if found:
            self.conversations = [*(each for each in self.conversations if each is not found), found]
        return Known(prompt, length, found)

    def cache(self, known: Sequence[Known], width: int, more: int) -> Any:
        """A cache of what is known, a row each, ``width`` columns wide, with room for some more."""
        cache = sharing(self._blank)
        for number, layer in enumerate(cache.layers):
            parts = [each.conversation.layers[number] if each.conversation else None for each in known]
            rooms = []
            for which in (0, 1):
                some = next(part[which] for part in parts if part)
                room = some.new_empty((len(known), len(some), width + more, some.shape[-1]))
                for row, (each, part) in enumerate(zip(known, parts, strict=True)):
                    room[row, :, : width - each.length] = 0
                    if part:
                        room[row, :, width - each.length : width] = part[which][:, : each.length]
                rooms.append(room)
            layer.rooms = rooms[0], rooms[1]
            layer.keys, layer.values = (room[:, :, :width] for room in rooms)
        return cache
