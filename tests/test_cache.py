"""The cache of a batch: whatever joins, grows and leaves, each row keeps its own tokens, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402

from pytest_pocket.backends import cache as caches  # noqa: E402
from pytest_pocket.backends.cache import Kept, Known, close_gaps, cut, give_room, merge, take  # noqa: E402

Rows = list[list[int]]
ROWS = st.lists(st.integers(1, 90), min_size=1, max_size=6)


@pytest.fixture(autouse=True)
def few_spare_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a cache grows often."""
    monkeypatch.setattr(caches, "SPARE_COLUMNS", 3)


def states(rows: Rows) -> Any:
    """Keys of two heads and two numbers a token, of rows of equal length."""
    keys = torch.tensor(rows, dtype=torch.float32)[:, None, :, None]
    return keys * torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, :, None, :]


def holding(rows: Rows) -> tuple[Any, Any]:
    """A stock cache of two layers, padded on the left with rubbish, and its mask."""
    width = max(map(len, rows))
    keys = states([[-7] * (width - len(row)) + row for row in rows])
    cache = DynamicCache()
    for layer in (0, 1):
        cache.update(keys + layer, -keys, layer)
    return cache, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def assert_holds(cache: Any, mask: Any, rows: Rows) -> None:
    assert len(mask) == len(rows)
    for index, row in enumerate(rows):
        columns = mask[index].bool()
        for number, layer in enumerate(cache.layers):
            assert torch.equal(layer.keys[index][:, columns], states([row])[0] + number)
            assert torch.equal(layer.values[index][:, columns], -states([row])[0])
            assert layer.keys.shape == layer.values.shape == (len(rows), 2, mask.shape[1], 2)


@given(st.data())
def test_rows_keep_their_tokens_while_others_join_grow_and_leave(data: st.DataObject) -> None:
    fresh = iter(range(1, 10**6))

    def new(lengths: list[int]) -> Rows:
        return [[next(fresh) for _ in range(length)] for length in lengths]

    rows = new(data.draw(ROWS))
    cache, mask = holding(rows)
    give_room(cache)
    for _ in range(data.draw(st.integers(1, 12))):
        act = data.draw(st.sampled_from(["join", "grow", "leave"]))
        if act == "join":
            more = new(data.draw(ROWS))
            mask = merge(cache, mask, *holding(more))
            rows += more
        elif act == "grow":
            for _ in range(data.draw(st.integers(1, 9))):
                added = new([1] * len(rows))
                for layer in (0, 1):
                    cache.update(states(added) + layer, -states(added), layer)
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                rows = [row + token for row, token in zip(rows, added, strict=True)]
        else:
            stay = data.draw(st.integers(1, len(rows)))
            gone = data.draw(st.permutations(range(len(rows))))[stay:]
            movers = (index for index in range(stay, len(rows)) if index not in gone)
            order = [next(movers) if index in gone else index for index in range(stay)]
            mask = cut(cache, take(cache, mask, order))
            rows = [rows[index] for index in order]
            assert mask[:, 0].any()
        assert_holds(cache, mask, rows)


def test_rows_join_in_the_place_of_those_that_left_without_a_copy_of_the_others() -> None:
    cache, mask = holding([[1] * 9, [2] * 20, [3] * 9])
    give_room(cache)
    for token in (4, 5):
        added = [[token]] * 3
        for layer in (0, 1):
            cache.update(states(added) + layer, -states(added), layer)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    mask = cut(cache, take(cache, mask, [2, 1]))
    place = [layer.keys.data_ptr() for layer in cache.layers]
    mask = merge(cache, mask, *holding([[6] * 22]))
    assert [layer.keys.data_ptr() for layer in cache.layers] == place
    assert_holds(cache, mask, [[3] * 9 + [4, 5], [2] * 20 + [4, 5], [6] * 22])
    mask = merge(cache, mask, *holding([[7]]))  # a fourth finds no place
    assert [layer.keys.data_ptr() for layer in cache.layers] != place


@given(st.lists(st.lists(st.booleans(), min_size=12, max_size=12).filter(any), min_size=1, max_size=5))
def test_gaps_within_rows_are_closed(present: list[list[bool]]) -> None:
    rows = [[10 * row + column for column in range(12)] for row in range(len(present))]
    cache, _ = holding(rows)
    mask = close_gaps(cache, torch.tensor(present).long())
    assert (mask.diff(dim=1) >= 0).all()
    kept = [
        [n for n, there in zip(row, which, strict=True) if there]
        for row, which in zip(rows, present, strict=True)
    ]
    assert_holds(cache, mask, kept)


CONVERSATION = st.lists(st.integers(1, 2), min_size=1, max_size=60)


@given(
    st.lists(CONVERSATION, min_size=1, max_size=8),
    st.lists(CONVERSATION, min_size=1, max_size=4),
    st.integers(0, 9),
)
def test_the_longest_beginning_that_was_read_is_known_and_stands_in_the_cache(
    read: Rows, asked: Rows, more: int
) -> None:
    opening = list(range(1, caches.OPENING_TOKENS))
    read, asked = ([opening + row for row in rows] for rows in (read, asked))
    kept = Kept()
    kept.allow(10**6)
    cache, mask = holding(read)
    for index, row in enumerate(read):
        kept.add(tuple(row), cache, index, mask[index])
    known = [kept.known(tuple(prompt)) for prompt in asked]
    for each, prompt in zip(known, asked, strict=True):
        starts = [
            length for length in range(len(prompt)) if any(row[:length] == prompt[:length] for row in read)
        ]
        longest = max(starts)
        assert each.length == (longest if longest >= caches.OPENING_TOKENS else 0)
        assert each.rest
        assert (*prompt[: each.length], *each.rest) == each.prompt
    width = max(each.length for each in known)
    if width:
        begun = kept.cache(known, width, more)
        lengths = [each.length for each in known]
        mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
        assert_holds(begun, mask, [prompt[:length] for prompt, length in zip(asked, lengths, strict=True)])
        assert all(layer.rooms[0].shape[-2] == width + more for layer in begun.layers)


def test_what_is_kept_stays_within_what_is_allowed_and_goes_in_the_order_of_use() -> None:
    rows = [[number] * 40 for number in range(1, 5)]
    cache, mask = holding(rows)
    kept = Kept()
    kept.allow(120)
    kept.allow(50)
    for index in range(3):
        kept.add(tuple(rows[index]), cache, index, mask[index])
    assert kept.known((*rows[0], 9)).length == 40
    kept.add(tuple(rows[3]), cache, 3, mask[3])
    assert {each.tokens[0] for each in kept.conversations} == {1, 3, 4}
    assert kept.known((*rows[1], 9)) == Known((*rows[1], 9))


def test_a_conversation_takes_the_place_of_what_it_goes_on_from() -> None:
    rows = [[1] * 40, [1] * 40 + [2] * 9, [1] * 40 + [3] * 9]
    cache, mask = holding(rows)
    kept = Kept()
    kept.allow(10**6)
    for index, row in enumerate(rows):
        kept.add(tuple(row), cache, index, mask[index])
    assert [len(each.tokens) for each in kept.conversations] == [49, 49]
