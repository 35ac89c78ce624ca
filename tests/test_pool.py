"""The pool: order, window, errors, cancellation."""

from __future__ import annotations

import threading
import time

import pytest

from pytest_pocket import pool as pools
from pytest_pocket.chat import Cancelled
from pytest_pocket.pool import AHEAD, Pool


def test_results_come_whatever_the_order_they_are_asked_for() -> None:
    pool = Pool(lambda cell: cell * 2, range(100), in_flight=3)
    assert [pool.result(cell) for cell in (99, *range(99))] == [198, *(2 * cell for cell in range(99))]


def test_as_many_are_in_flight_as_allowed_and_no_more() -> None:
    barrier = threading.Barrier(4, timeout=5)
    now, most = 0, 0
    lock = threading.Lock()

    def play(cell: int) -> int:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        barrier.wait()
        with lock:
            now -= 1
        return cell

    pool = Pool(play, range(12), in_flight=4)
    assert [pool.result(cell) for cell in range(12)] == list(range(12))
    assert most == 4


def test_nothing_is_played_before_the_first_request_nor_far_ahead_of_the_last() -> None:
    played: list[int] = []
    pool = Pool(played.append, range(100), in_flight=2)
    time.sleep(0.05)
    assert played == []
    pool.result(0)
    time.sleep(0.1)
    assert 2 * AHEAD <= len(played) <= 2 * AHEAD + 1


def test_one_that_is_waited_for_is_played_though_the_window_is_full_of_others() -> None:
    pool = Pool(lambda cell: cell, range(100), in_flight=1)
    pool.result(0)
    time.sleep(0.05)
    assert pool.result(99) == 99


def test_who_waits_for_a_slow_one_hears_how_many_others_are_played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "PATIENCE", 0.05)
    done = threading.Event()
    slow = Pool(lambda cell: cell or done.wait(5), range(5), in_flight=2)
    heard: list[tuple[int, int]] = []

    def waiting() -> None:
        heard.append((slow.played, slow.total))
        if slow.played == 4:
            done.set()

    assert slow.result(0, waiting) is True
    assert heard[-1] == (4, 5)


def test_an_error_reaches_who_asks_and_no_one_else() -> None:
    def play(cell: int) -> float:
        return 1 / cell

    pool = Pool(play, range(3), in_flight=2)
    with pytest.raises(ZeroDivisionError):
        pool.result(0)
    assert pool.result(1) == 1.0


def test_a_second_request_plays_again() -> None:
    played: list[int] = []
    pool = Pool(played.append, [7], in_flight=1)
    pool.result(7)
    pool.result(7)
    assert played == [7, 7]


def test_cancel_starts_nothing_more_and_does_not_wait_for_the_deaf() -> None:
    started = threading.Event()

    def play(cell: int) -> int:
        started.set()
        time.sleep(30)
        return cell

    pool = Pool(play, range(10), in_flight=2)
    waiting: list[BaseException] = []

    def ask() -> None:
        try:
            pool.result(9)
        except BaseException as error:
            waiting.append(error)

    threading.Thread(target=lambda: pool.result(0), daemon=True).start()
    threading.Thread(target=lambda: pool.result(1), daemon=True).start()
    assert started.wait(5)
    time.sleep(0.05)
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    time.sleep(0.05)
    begin = time.monotonic()
    pool.cancel(seconds=0.2)
    assert time.monotonic() - begin < 1
    asking.join(5)
    assert isinstance(waiting[0], Cancelled)
