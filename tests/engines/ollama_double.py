"""A double of Ollama's native API, in front of real ``llama-server`` processes.

Ollama itself is in no package registry, so CI cannot have it.  Since 0.30 it hands its models to ``llama-server``;
what it adds is what this double repeats, read from its source (server/routes.go, server/images.go, server/sched.go,
llm/llama_server.go, api/types.go at 0.33): which requests it refuses and in which words, what it fills in, which
messages it drops when a prompt is longer than the window, how it loads and unloads, and how it tells of all that.

Not repeated, and refused with status 501: RENDERER and PARSER of a Modelfile, the reading of JSON calls that a
TEMPLATE asks for, images, ``/api/generate`` with a prompt.  Embeddings and the OpenAI-compatible routes are 404.

    python ollama_double.py --llama-server PATH [--port 11434] [--model NAME=FILE.gguf]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ollama_chat import Turn, moment, whole
from ollama_models import Model, Store, Template, read_gguf
from ollama_requests import Refusal, canonical, check, check_chat, check_create, duration, options_of

VERSION = "0.33.2"
NOT_PULLED = "pull model manifest: file does not exist"


class Handler(BaseHTTPRequestHandler):
    """The routes."""

    protocol_version = "HTTP/1.1"
    store: Store
    _written = False

    def log_message(self, *_: Any) -> None:
        """Say nothing: tests look at answers."""

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_DELETE(self) -> None:
        self._route()

    def _route(self) -> None:
        self._written = False
        blob = self.path.startswith("/api/blobs/")
        routes: dict[str, dict[str, Callable[[], None]]] = {
            "/": {"GET": self._hello, "HEAD": self._hello},
            "/api/version": {"GET": self._version, "HEAD": self._version},
            "/api/tags": {"GET": self._tags, "HEAD": self._tags},
            "/api/ps": {"GET": self._ps},
            "/api/show": {"POST": self._show},
            "/api/chat": {"POST": self._chat},
            "/api/generate": {"POST": self._generate},
            "/api/create": {"POST": self._create},
            "/api/pull": {"POST": self._pull},
            "/api/delete": {"DELETE": self._delete},
            "/api/blobs/": {"HEAD": self._has_blob, "POST": self._put_blob},
        }
        methods = routes.get("/api/blobs/" if blob else self.path.partition("?")[0])
        try:
            if methods is None:
                self._send(404, b"404 page not found", "text/plain")
            elif self.command not in methods:
                self._send(405, b"405 method not allowed", "text/plain")
            else:
                methods[self.command]()
        except Refusal as refusal:
            if self._written:
                # The status is sent already: an error is one more line of the stream.
                self._line({"error": str(refusal)})
                self.wfile.write(b"0\r\n\r\n")
            else:
                self._json({"error": str(refusal)}, refusal.status)
        except ConnectionError:
            self.close_connection = True

    def _send(self, status: int, body: bytes, kind: str = "application/json; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode())

    def _stream(self, values: Iterator[Any]) -> None:
        for value in values:
            self._line(value)
        self.wfile.write(b"0\r\n\r\n")

    def _line(self, value: Any) -> None:
        if not self._written:
            self._written = True
            self.send_response(200)
            self.send_header("Content-Type", "application/x-ndjson")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
        line = json.dumps(value).encode() + b"\n"
        self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
        self.wfile.flush()

    def _gone(self) -> bool:
        """Whether the client has hung up."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def _raw(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _body(self) -> Any:
        raw = self._raw()
        if not raw.strip():
            raise Refusal(400, "missing request body")
        try:
            return json.loads(raw)
        except ValueError as error:
            raise Refusal(400, f"invalid character: {error}") from None

    def _hello(self) -> None:
        self._send(200, b"Ollama is running", "text/plain; charset=utf-8")

    def _version(self) -> None:
        self._json({"version": VERSION})

    def _tags(self) -> None:
        models = sorted(self.store.models.values(), key=lambda model: model.modified, reverse=True)
        self._json({"models": [{**_entry(model), "modified_at": moment(model.modified)} for model in models]})

    def _ps(self) -> None:
        shown = []
        for runner in self.store.running():
            more = {"expires_at": moment(runner.expires), "size_vram": 0, "context_length": runner.context}
            shown.append({**_entry(runner.model), **more})
        self._json({"models": shown})

    def _show(self) -> None:
        body = self._body()
        check(body, {"model": str, "name": str, "verbose": bool}, "ShowRequest")
        model = self.store.find(body.get("model") or body.get("name") or "")
        given = {name: each if isinstance(each, list) else [each] for name, each in model.parameters.items()}
        template = model.template.source if model.template else "{{ .Prompt }}"
        hidden = ("general.name", "tokenizer.chat_template")
        self._json(
            {
                "modelfile": f'# Modelfile generated by "ollama show"\nFROM {model.path}\nTEMPLATE """{template}"""\n',
                "parameters": "\n".join(
                    f"{name:<30} {json.dumps(each)}" for name in given for each in given[name]
                ),
                **{"template": template, "system": model.system, "details": model.details},
                "model_info": {name: value for name, value in model.metadata.items() if name not in hidden},
                **{"capabilities": model.capabilities, "modified_at": moment(model.modified)},
            }
        )

    def _chat(self) -> None:
        body = self._body()
        check_chat(body)
        pieces = Turn(self.store, body, self._gone).pieces()
        if body.get("stream") is False:
            self._json(whole(pieces))
        else:
            self._stream(pieces)

    def _generate(self) -> None:
        """Loading and unloading, as a warm-up and `ollama stop` do it."""
        body = self._body()
        check(body, {"model": str, "prompt": str, "stream": bool, "options": dict}, "GenerateRequest")
        model = self.store.find(body.get("model") or "")
        if body.get("prompt"):
            raise Refusal(501, "the double generates in /api/chat only")
        keep = duration(body.get("keep_alive"))
        if keep:
            options = options_of(model.parameters, body.get("options"))
            self.store.release(self.store.load(model, options, body.get("shift") is not False), keep)
        else:
            self.store.unload(model)
        made = {"model": body["model"], "created_at": moment(datetime.now(UTC)), "response": "", "done": True}
        self._json({**made, "done_reason": "load" if keep else "unload"})

    def _create(self) -> None:
        body = self._body()
        check_create(body)
        steps = self._creating(body, canonical(body.get("model") or body.get("name")))
        if body.get("stream") is False:
            self._json(list(steps)[-1])
        else:
            self._stream(steps)

    def _creating(self, body: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
        parent: Model | None = None
        if body.get("from"):
            try:
                parent = self.store.find(body["from"])
            except Refusal:
                raise Refusal(500, NOT_PULLED) from None
            path, digest = parent.path, parent.digest
        elif body.get("files"):
            if len(body["files"]) > 1:
                raise Refusal(501, "the double makes a model of one GGUF file")
            ((source, digest),) = body["files"].items()
            if source.startswith("/") or ".." in Path(source).parts:
                raise Refusal(400, f"file path must be relative: {source}")
            path = self.store.blob(digest)
            if not path.exists():
                raise Refusal(
                    400, f"blob not found for {source} (digest {digest}): no such file or directory"
                )
            yield {"status": "parsing GGUF"}
        else:
            raise Refusal(400, "neither 'from' or 'files' was specified")
        inherited = parent or Model(name, path, digest, read_gguf(path))
        template = Template.of(body.get("template") or "", self.store.renderer) or inherited.template
        made = Model(
            *(name, path, digest, inherited.metadata, template, body.get("system") or inherited.system),
            {**inherited.parameters, **(body.get("parameters") or {})},
            tuple(body.get("messages") or inherited.messages),
        )
        yield {"status": f"using existing layer {digest}"}
        yield {"status": "writing manifest"}
        self.store.models[name] = made
        yield {"status": "success"}

    def _pull(self) -> None:
        body = self._body()
        canonical(body.get("model") or body.get("name") or "")
        if body.get("stream") is False:
            raise Refusal(500, NOT_PULLED)
        self._stream(iter([{"status": "pulling manifest"}, {"error": NOT_PULLED}]))

    def _delete(self) -> None:
        body = self._body()
        model = self.store.find(body.get("model") or body.get("name") or "")
        self.store.unload(model)
        del self.store.models[model.name]
        self._send(200, b"")

    def _has_blob(self) -> None:
        path = self.store.blob(self.path.rpartition("/")[2])
        self._send(200 if path.exists() else 404, b"")

    def _put_blob(self) -> None:
        raw, digest = self._raw(), self.path.rpartition("/")[2]
        path = self.store.blob(digest)
        got = f"sha256:{hashlib.sha256(raw).hexdigest()}"
        if got != digest.replace("-", ":").lower():
            raise Refusal(400, f'digest mismatch, expected "{digest}", got "{got}"')
        known = path.exists()
        if not known:
            path.write_bytes(raw)
        self._send(200 if known else 201, b"")


def _entry(model: Model) -> dict[str, Any]:
    digest = hashlib.sha256(f"{model.name} {model.digest}".encode()).hexdigest()
    size = model.path.stat().st_size
    return {"name": model.name, "model": model.name, "size": size, "digest": digest, "details": model.details}


def main() -> None:
    parser = argparse.ArgumentParser(description="A double of Ollama in front of llama-server.")
    parser.add_argument("--llama-server", type=Path, required=True, metavar="PATH")
    parser.add_argument("--port", type=int, default=11434, help="0 is any free one")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE.gguf")
    given = parser.parse_args()
    end = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: end.set())
    store = Store(given.llama_server.resolve())
    for model in given.model:
        name, path = canonical(model.partition("=")[0]), Path(model.partition("=")[2]).resolve()
        digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        store.models[name] = Model(name, path, digest, read_gguf(path))
    server = ThreadingHTTPServer(("127.0.0.1", given.port), type("Bound", (Handler,), {"store": store}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        print(f"Listening on http://127.0.0.1:{server.server_port} (version {VERSION})", flush=True)
        end.wait()
    finally:
        store.close()


if __name__ == "__main__":
    main()
