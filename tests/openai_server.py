"""A small server with the OpenAI interface whose faults a test chooses.  Real engines have none on demand."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, object]
Said = dict[str, Any]


def count(body: Said) -> int:
    """The tokens of a prompt: its words, those of the tools, and one for the switch of thinking."""
    texts = [str(message["content"]) for message in body["messages"]] + [json.dumps(body.get("tools", ""))]
    think = body.get("chat_template_kwargs", {}).get("enable_thinking", False)
    return sum(len(text.split()) for text in texts) + 1 + int(think)


def reply(body: Said, **message: Any) -> Said:
    """An honest completion: temperature and seed show in it."""
    said = f"hello {body['seed'] if body['temperature'] else ''}"
    tokens = min(2, body["max_tokens"])
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": said, **message},
            }
        ],
        "usage": {
            "prompt_tokens": count(body),
            "completion_tokens": tokens,
            "total_tokens": count(body) + tokens,
        },
    }


def honest(body: Said) -> Answer:
    """What a good server answers."""
    return 200, reply(body)


class Server:
    """The server: ``answer`` makes each chat's status and body; ``seen`` are the requests."""

    def __init__(self, port: int = 0) -> None:
        self.answer: Callable[[Said], Answer] = honest
        self.seen: list[Said] = []
        self.headers: dict[str, str] = {}
        self.key = ""
        self.models: list[Said] = [{"id": "tiny", "object": "model", "owned_by": "test", "created": 0}]
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                if server.key and self.headers["authorization"] != f"Bearer {server.key}":
                    self._send(401, {"error": {"message": "wrong key"}})
                else:
                    self._send(200, {"object": "list", "data": server.models})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.seen.append(body)
                status, said = server.answer(body)
                if status:
                    self._send(status, said)
                else:
                    self.close_connection = True  # and not a word

            def _send(self, status: int, said: object) -> None:
                data = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                for name, value in server.headers.items():
                    self.send_header(name, value)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has given up
                    self.wfile.write(data)

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop listening, and hang up where a connection is still open."""
        self.answer = lambda body: (0, None)
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def serving(port: int = 0) -> Iterator[Server]:
    """A server for one test."""
    server = Server(port)
    try:
        yield server
    finally:
        server.close()
