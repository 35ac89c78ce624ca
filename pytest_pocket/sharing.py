"""Sharing: one copy of the weights, however many xdist workers there are.

The controller serves its engines over a Unix socket in a folder that only this user can enter; each
worker's :class:`RemoteBackend` asks it.  A thread of the controller serves each connection, so that requests
of several workers meet in the engine and are batched there.  An engine is loaded at the first request for it,
once.  The messages are pickles, and read only from peers that know the session's key.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from pytest_pocket.chat import Cancelled, ChatReply, ChatRequest, EngineError
from pytest_pocket.registry import fault

LONGEST_PATH = 90
"""A Unix socket's path may have about 100 bytes."""


class Server:
    """Answers workers until ``close``, by ``chats(model, request, seeds)``, from a thread for each connection."""

    def __init__(self, chats: Callable[[str, ChatRequest, Sequence[int]], list[ChatReply]]) -> None:
        self._chats = chats
        self._folder = _private_folder()
        self.authkey = secrets.token_bytes(32)
        self._listener = Listener(
            os.path.join(self._folder, "engines"), "AF_UNIX", backlog=64, authkey=self.authkey
        )
        self.address = str(self._listener.address)
        self._connections: set[Connection[Any, Any]] = set()
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._accept, name="pocket-server", daemon=True).start()

    def close(self) -> None:
        """Hang up.  Workers that wait for a reply, or only watch, see the session end at once."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            connections = tuple(self._connections)
        for connection in connections:
            _hang_up(connection)
        # Closing a listener does not wake a thread that accepts on it; a visitor does.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as visitor:
            visitor.connect(self.address)
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept()
            except (OSError, EOFError, AuthenticationError):
                continue
            with self._lock:
                if self._closed:
                    connection.close()
                    return
                self._connections.add(connection)
            threading.Thread(
                target=self._serve, args=(connection,), name="pocket-worker", daemon=True
            ).start()

    def _serve(self, connection: Connection[Any, Any]) -> None:
        try:
            with connection:
                while True:
                    model, request, seeds = connection.recv()
                    _send(connection, self._answer(model, request, seeds))
        except (OSError, EOFError):
            pass  # the worker has gone, or the session ends
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _answer(self, model: str, request: ChatRequest, seeds: Sequence[int]) -> list[ChatReply] | Exception:
        """Replies for the seeds, or the exception to raise in the worker."""
        try:
            return self._chats(model, request, seeds)
        except Exception as error:
            return fault(error)


class RemoteBackend:
    """A model whose engine the controller holds.  Each thread has a connection of its own."""

    def __init__(self, address: str, authkey: bytes, model: str) -> None:
        self._address = address
        self._authkey = authkey
        self._model = model
        self._mine = threading.local()
        self._open: set[Connection[Any, Any]] = set()
        self._lock = threading.Lock()
        self._cancelled = False

    def chat(self, request: ChatRequest) -> ChatReply:
        """Answer one request.  Raises ModelError when the engine cannot load, Cancelled when its owner ends."""
        return self.chats(request, (request.sampling.seed,))[0]

    def chats(self, request: ChatRequest, seeds: Sequence[int]) -> list[ChatReply]:
        """Replies for the seeds, as :func:`pytest_pocket.openings.several`.  Raises as ``chat``."""
        try:
            connection = self._connection()
            connection.send((self._model, request, tuple(seeds)))
            answer: list[ChatReply] | Exception = connection.recv()
        except (OSError, EOFError, AuthenticationError):
            # Not an engine's fault: the controller has closed, or this session is cancelled.
            raise Cancelled from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def cancel(self) -> None:
        """Hang up: requests in flight, and later ones, raise Cancelled."""
        with self._lock:
            self._cancelled = True
            connections = tuple(self._open)
        for connection in connections:
            _hang_up(connection)

    def close(self) -> None:
        """Hang up.  The engine is the controller's."""
        self.cancel()

    def _connection(self) -> Connection[Any, Any]:
        connection: Connection[Any, Any] | None = getattr(self._mine, "connection", None)
        if connection is None:
            connection = Client(self._address, "AF_UNIX", authkey=self._authkey)
            self._mine.connection = connection
            with self._lock:
                self._open.add(connection)
        if self._cancelled:
            raise Cancelled
        return connection


def watch(address: str, authkey: bytes, ended: Callable[[], None]) -> None:
    """Call ``ended`` from another thread when the controller closes or dies: nothing may outlive the session."""

    def wait() -> None:
        with contextlib.suppress(OSError, EOFError, AuthenticationError):
            Client(address, "AF_UNIX", authkey=authkey).recv()
        ended()

    threading.Thread(target=wait, name="pocket-watch", daemon=True).start()


def _private_folder() -> str:
    folder = tempfile.mkdtemp(prefix="pocket-")
    if len(os.fsencode(folder)) <= LONGEST_PATH:
        return folder
    os.rmdir(folder)
    return tempfile.mkdtemp(prefix="pocket-", dir="/tmp")


def _send(connection: Connection[Any, Any], answer: object) -> None:
    try:
        connection.send(answer)
    except OSError:
        raise
    except Exception as error:
        connection.send(EngineError(f"the reply cannot cross to a worker: {type(error).__name__}: {error}"))


def _hang_up(connection: Connection[Any, Any]) -> None:
    """End a connection on which another thread may be waiting: closing alone would not wake it."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)
