"""What Ollama has: the models that were made, and those that are loaded, each in a ``llama-server`` of its own."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from ollama_requests import Refusal, canonical

_ROUND_TRIPS = ("tool_response", "tool_results", "ipython", *(f"role{close} == {quote}tool{quote}"
                for close in ("']", '"]', "") for quote in ("'", '"')))  # fmt: skip
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Template:
    """A Go template, and what Ollama infers from it (``render.go``): the tags of thinking and of calls."""

    source: str
    program: Path

    @classmethod
    def of(cls, source: str, program: Path) -> Template | None:
        """The template of a ``/api/create``, compiling ``render.go`` first where needed.  Raises Refusal."""
        if not source:
            return None
        if not program.exists():
            go = shutil.which("go")
            if go is None:
                raise Refusal(
                    501,
                    "the double renders a TEMPLATE with `go`, which is missing: sudo apt install golang-go",
                )
            source_file = Path(__file__).with_name("render.go")
            subprocess.run(
                [go, "build", "-o", program, source_file],
                check=True,
                env={**os.environ, "GO111MODULE": "off"},
            )
        made = cls(source, program)
        if made._ask([]) is None:
            raise Refusal(400, "template error: template cannot be parsed")
        return made

    @cached_property
    def thinking(self) -> tuple[str, str]:
        opening, closing = (self._ask([]) or {})["thinking"]
        return (opening, closing) if opening and closing else ("", "")

    @cached_property
    def tag(self) -> str:
        return (self._ask([]) or {})["tag"] or "{"

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any, think: Any) -> str:
        answer = self._ask([{"messages": messages, "tools": tools or [], "think": bool(think)}])
        if answer is None:
            raise Refusal(500, "template: cannot be executed")
        return str(answer["prompts"][0])

    def _ask(self, chats: list[Any]) -> dict[str, Any] | None:
        asked = json.dumps({"template": self.source, "chats": chats})
        ran = subprocess.run([self.program], input=asked, capture_output=True, text=True)
        return json.loads(ran.stdout) if ran.returncode == 0 else None


@dataclass(frozen=True)
class Model:
    """What ``/api/create`` made."""

    name: str
    path: Path
    digest: str
    metadata: Mapping[str, Any]
    template: Template | None = None
    system: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Mapping[str, Any], ...] = ()
    modified: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def family(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def jinja(self) -> str:
        return str(self.metadata.get("tokenizer.chat_template", ""))

    @property
    def context(self) -> int:
        """The tokens that it was trained for; a window is never wider."""
        return int(self.metadata[f"{self.family}.context_length"])

    @property
    def rendered(self) -> Template | None:
        """The TEMPLATE, unless llama-server is preferred: where the file's own can more, or alone shows results."""
        if self.template is None:
            return None
        ours, theirs = self._of_template(self.template), self._of_jinja()
        source = self.template.source
        go_trips = ".ToolCalls" in source and any(
            each in source for each in ('eq .Role "tool"', "tool_response", "TOOL_RESULTS")
        )
        trips = "tool_calls" in self.jinja and any(each in self.jinja for each in _ROUND_TRIPS)
        if len(theirs) > len(ours):
            preferred = not go_trips or trips
        else:
            preferred = set(theirs) == set(ours) and "tools" in ours and trips and not go_trips
        return None if preferred else self.template

    @property
    def capabilities(self) -> list[str]:
        return ["completion", *(self._of_template(self.rendered) if self.rendered else self._of_jinja())]

    @property
    def details(self) -> dict[str, Any]:
        size = self.path.stat().st_size / 4
        scale, letter = next(((s, x) for s, x in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if size >= s), (1, ""))
        kinds = {0: "F32", 1: "F16", 32: "BF16"}
        return {
            **{"parent_model": "", "format": "gguf", "family": self.family, "families": [self.family]},
            "parameter_size": f"{size / scale:.2f}{letter}",
            "quantization_level": kinds.get(self.metadata.get("general.file_type", 0), "unknown"),
        }

    def _of_jinja(self) -> list[str]:
        tools = "tools" in self.jinja or "tool_call" in self.jinja
        thinking = ("<think>" in self.jinja and "</think>" in self.jinja) or "enable_thinking" in self.jinja
        return ["tools"] * tools + ["thinking"] * thinking

    @staticmethod
    def _of_template(template: Template) -> list[str]:
        return ["tools"] * (".Tools" in template.source) + ["thinking"] * bool(template.thinking[0])


def read_gguf(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file; long arrays come back empty, as ``/api/show`` gives them.  Raises Refusal."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise Refusal(400, "unknown type")
        _, _, count = struct.unpack("<IQQ", file.read(20))
        return {_text(file): _value(file, *struct.unpack("<I", file.read(4))) for _ in range(count)}


def _text(file: BinaryIO) -> str:
    return file.read(*struct.unpack("<Q", file.read(8))).decode(errors="replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == 8:
        return _text(file)
    if kind == 9:
        of, length = struct.unpack("<IQ", file.read(12))
        values = [_value(file, of) for _ in range(length)]
        return values if length <= 5 else []
    code = "<" + _NUMBERS[kind]
    return struct.unpack(code, file.read(struct.calcsize(code)))[0]


class Runner:
    """A model that is loaded: a llama-server with the arguments that Ollama gives it."""

    def __init__(self, program: Path, model: Model, options: Mapping[str, Any], shift: bool) -> None:
        self.model, self.shift = model, shift
        self.context = min(options["num_ctx"], model.context)
        self.settings = settings(model, options, shift)
        parallel = int(os.environ.get("OLLAMA_NUM_PARALLEL") or 1)
        self.slots = threading.Semaphore(parallel)
        self.users = 0
        self.expires = datetime.now(UTC)
        self.port = _free_port()
        command: list[Any] = [program, "--model", model.path, "--host", "127.0.0.1", "--port", self.port]
        command += ["--no-webui", "--offline", "-c", self.context * parallel, "-np", parallel]
        command += ["-b", options["num_batch"], "-ub", options["num_batch"], "--flash-attn", "auto"]
        command += ["-t", options["num_thread"]] if options["num_thread"] else []
        command += ["--no-jinja", "--chat-template", "chatml"] if model.rendered else []
        command += ["--context-shift", "--keep", options["num_keep"]] if shift else []
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT
        )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def post(self, path: str, body: Mapping[str, Any]) -> http.client.HTTPResponse:
        """One request.  Raises Refusal with what llama-server said, word for word."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
        except OSError as error:
            why = "this may be due to resource limitations or an internal error, check ollama server logs for details"
            raise Refusal(500, f"model runner has unexpectedly stopped, {why}") from error
        if answer.status >= 400:
            raise Refusal(answer.status, answer.read().decode().strip())
        return answer

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        return list(
            json.loads(self.post("/tokenize", {"content": text, "add_special": special}).read())["tokens"]
        )

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _wait(self) -> None:
        until = time.monotonic() + 300
        while time.monotonic() < until:
            if self._process.poll() is not None:
                self._log.seek(0)
                last = self._log.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise Refusal(500, f"llama-server process has terminated: {last}")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise Refusal(500, "timed out waiting for llama-server to start - ")


def settings(model: Model, options: Mapping[str, Any], shift: bool) -> tuple[Any, ...]:
    """What cannot be changed without loading anew."""
    names = ("num_batch", "num_gpu", "num_thread", "main_gpu", "use_mmap")
    return (model, min(options["num_ctx"], model.context), shift, *(options[name] for name in names))


def _free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return int(it.getsockname()[1])


class Store:
    """All models, by name with tag, and the runners of those that are loaded."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self.models: dict[str, Model] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="ollama-double-")
        self._loaded: dict[str, Runner] = {}
        self._changed = threading.Condition()

    @property
    def renderer(self) -> Path:
        return Path(self._folder.name, "render")

    def blob(self, digest: str) -> Path:
        if not re.fullmatch(r"sha256[:-][0-9a-fA-F]{64}", digest):
            raise Refusal(400, "invalid digest format")
        return Path(self._folder.name, digest.replace(":", "-"))

    def find(self, name: str) -> Model:
        """The model of a name, upper and lower case being one.  Raises Refusal."""
        wanted = canonical(name).lower()
        for known, model in self.models.items():
            if known.lower() == wanted:
                return model
        raise Refusal(404, f"model '{name}' not found")

    def load(self, model: Model, options: Mapping[str, Any], shift: bool) -> Runner:
        """A runner with these settings, for one more user; one with others is ended once nobody uses it."""
        wanted = settings(model, options, shift)
        with self._changed:
            while True:
                self._sweep()
                runner = self._loaded.get(model.name)
                if runner and runner.settings != wanted and runner.users:
                    self._changed.wait(1)
                    continue
                if runner and runner.settings != wanted:
                    self._loaded.pop(model.name).close()
                if model.name not in self._loaded:
                    self._loaded[model.name] = Runner(self.program, model, options, shift)
                runner = self._loaded[model.name]
                runner.users += 1
                return runner

    def release(self, runner: Runner, keep: timedelta) -> None:
        with self._changed:
            runner.users -= 1
            runner.expires = datetime.now(UTC) + keep
            self._sweep()
            self._changed.notify_all()

    def unload(self, model: Model) -> None:
        with self._changed:
            if runner := self._loaded.get(model.name):
                runner.expires = datetime.now(UTC)
                self._sweep()

    def running(self) -> list[Runner]:
        with self._changed:
            self._sweep()
            return sorted(self._loaded.values(), key=lambda runner: runner.expires, reverse=True)

    def close(self) -> None:
        with self._changed:
            for runner in self._loaded.values():
                runner.close()
            self._loaded.clear()
        self._folder.cleanup()

    def _sweep(self) -> None:
        now = datetime.now(UTC)
        for name, runner in list(self._loaded.items()):
            if not runner.users and runner.expires <= now:
                self._loaded.pop(name).close()
