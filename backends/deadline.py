"""A limit on the time of code that somebody else wrote and that runs in this process: a chat template's loops."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TooSlow(Exception):
    """The code was ended because its time was up."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise TooSlow in this thread, at the next step of the interpreter, once the block has taken that long.

    A single call into C is not interrupted.
    """
    thread = ctypes.c_ulong(threading.get_ident())
    changing = threading.Lock()
    over = fired = False

    def fire() -> None:
        nonlocal fired
        with changing:
            if not over:
                fired = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TooSlow))

    timer = threading.Timer(seconds, fire)
    timer.daemon = True
    timer.start()
    try:
        yield
    except TooSlow:
        raise TooSlow(f"it takes longer than {seconds:g} s") from None
    finally:
        with changing:
            over = True
            if fired:
                # It may not have been raised yet, and must not be raised elsewhere.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)
        timer.cancel()
