"""The ``vllm`` backend: a vLLM server, the user's own or one that the session starts.

``VLLM_BASE_URL``, or the option ``base_url``, names a running server (``VLLM_API_KEY`` its key).  Without one the
session starts ``vllm serve`` for the model's base; every LoRA checkpoint on that base is loaded into the same
server and addressed by its name.  ``POCKET_VLLM_ARGS`` are more arguments for it, as in
``POCKET_VLLM_ARGS="--max-model-len 8192 --gpu-memory-utilization 0.6"``.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import openai

from pytest_pocket.backends.openai import OpenAIBackend, one_line
from pytest_pocket.backends.process import Process, free_port
from pytest_pocket.chat import ChatReply, ChatRequest
from pytest_pocket.registry import Model, ModelError

STREAM_INTERVAL = 16
"""Tokens in a part of a stream: each part costs the server and us processor time, however little is in it.

Few enough that a server which writes 3.2 tokens a second, to each request, sends one within caller.MARGIN, before
an episode's time is up; where a slower one's reply is ended by time, that is the server's fault and not the model's.
"""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The LoRA ranks that vLLM can make room for."""
START_SECONDS = 900.0


class VLLMBackend(OpenAIBackend):
    """A model of a vLLM server.  ``started`` is the server that the session started for it, where it did."""

    server = "vLLM"
    wider = (
        "start it with `vllm serve MODEL --max-model-len TOKENS`, or without: POCKET_VLLM_ARGS of the session"
    )
    mend = "start it with `vllm serve MODEL --enable-auto-tool-choice --tool-call-parser NAME`, or unset VLLM_BASE_URL"

    def __init__(self, name: str, base_url: str, *, started: Started | None = None, **options: Any) -> None:
        self._started = started
        super().__init__(name, base_url, api_key=os.environ.get("VLLM_API_KEY"), **options)

    def chats(self, request: ChatRequest, seeds: Sequence[int]) -> list[ChatReply]:
        """So many replies to one request.  vLLM gives each the seed after the last one's: the first seed counts.

        Raises as ``chat``.
        """
        first = replace(request, sampling=replace(request.sampling, seed=seeds[0]))
        if len(seeds) == 1:
            return [self.chat(first)]
        try:
            return self._ask(first, first.sampling.max_tokens, count=len(seeds))
        except openai.APIStatusError:
            # What is wrong with the prompt is wrong with each reply.
            return [self.chat(first)] * len(seeds)

    def close(self) -> None:
        """Hang up, and end the server with its last model."""
        super().close()
        if self._started:
            self._started.release()
            self._started = None

    def _has_ended(self) -> bool:
        return self._started is not None and not self._started.process.running

    def _explain(self, error: Exception) -> str:
        said = super()._explain(error)
        lost = isinstance(error, openai.APIConnectionError | httpx.TransportError)
        if self._started and lost and self._started.process.ended():
            return f"the vLLM server of {self.name!r} has died: {self._started.process.last()}"
        return said


@dataclass
class Started:
    """A server of this session, and how many models use it."""

    process: Process
    base_url: str
    users: int = 0
    key: tuple[str, ...] = field(default=(), repr=False)

    def release(self) -> None:
        """One user less; the last one ends the server."""
        with _lock:
            self.users -= 1
            if self.users:
                return
            _servers.pop(self.key, None)
        self.process.close()


_servers: dict[tuple[str, ...], Started] = {}
_lock = threading.RLock()


def build(model: Model, siblings: Sequence[Model]) -> VLLMBackend:
    """The engine of a model.  ``siblings`` are all the models of this backend that the session has, it included."""
    options = dict(model.options)
    name = str(options.pop("served", "") or model.target)
    base_url = options.pop("base_url", None) or os.environ.get("VLLM_BASE_URL")
    arguments = [*shlex.split(os.environ.get("POCKET_VLLM_ARGS", "")), *options.pop("serve", ())]
    if base_url:
        return VLLMBackend(name, base_url, **options)
    with _server_of(model, name, siblings, arguments) as started:
        if model.adapter:
            _load_adapter(started.base_url, name, model.adapter)
        return VLLMBackend(name, started.base_url, started=started, **options)


@contextmanager
def _server_of(
    model: Model, name: str, siblings: Sequence[Model], arguments: Sequence[str]
) -> Iterator[Started]:
    """The server that holds a model's base, started if it is not there; given back when what follows fails."""
    with _lock:
        # Full weights under another name are the same server only if they are the same folder.
        key = (model.target, *arguments)
        if key not in _servers:
            _servers[key] = _start(model, name, siblings, arguments, key)
        started = _servers[key]
        started.users += 1
    try:
        yield started
    except BaseException:
        started.release()
        raise


def _start(
    model: Model, name: str, siblings: Sequence[Model], arguments: Sequence[str], key: tuple[str, ...]
) -> Started:
    program = shutil.which("vllm")
    if program is None:
        raise ModelError(
            "the command `vllm` is missing: pip install 'pytest-pocket[vllm]', or set VLLM_BASE_URL to a running server"
        )
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    of_base = [each for each in siblings if each.target == model.target]
    names = [str(each.options.get("served") or each.target) for each in of_base if not each.adapter]
    command = [program, "serve", model.target, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", *(names or [f"{name}-base"]), "--enable-prefix-caching"]
    command += ["--stream-interval", str(STREAM_INTERVAL)]
    command += ["--enable-auto-tool-choice", *_parsers(model.target)]
    if adapters := [each.adapter for each in of_base if each.adapter]:
        command += [
            "--enable-lora",
            "--max-lora-rank",
            str(_rank(adapters)),
            "--max-loras",
            str(len(adapters)),
        ]
    process = Process(
        [*command, *arguments],
        f"{address}/health",
        environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"},
        seconds=START_SECONDS,
    )
    return Started(process, f"{address}/v1", key=key)


def _parsers(target: str) -> list[str]:
    """The tool parser and the reasoning parser, by how the model's template spells calls and thinking."""
    template = _template(target)
    if "<function=" in template:
        tools = "qwen3_coder"
    elif not template or "<tool_call>" in template:
        tools = "hermes"
    else:
        raise ModelError(
            f"the chat template of {target} spells tool calls in an unknown way: start vLLM yourself with the right "
            "--tool-call-parser, and set VLLM_BASE_URL"
        )
    reasoning = ["--reasoning-parser", "qwen3"] if "</think>" in template else []
    return ["--tool-call-parser", tools, *reasoning]


def _template(target: str) -> str:
    """The chat template of a folder or of a hub name; empty where it is not known."""
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        try:
            path = Path(target) / file if Path(target).is_dir() else Path(_fetched(target, file))
            text = path.read_text()
            found = text if file.endswith(".jinja") else json.loads(text).get("chat_template", "")
        except (OSError, ValueError):
            continue
        if found:
            return str(found)
    return ""


def _fetched(name: str, file: str) -> str:
    """A file of the hub, from its cache where it is there.  Raises OSError, ValueError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(hf_hub_download(name, file))
    except HfHubHTTPError as error:
        raise OSError(one_line(error)) from None


def _rank(adapters: Sequence[str]) -> int:
    """The smallest room that holds every adapter."""
    ranks = []
    for adapter in adapters:
        try:
            config: Mapping[str, Any] = json.loads((Path(adapter) / "adapter_config.json").read_text())
            ranks.append(int(config["r"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"no LoRA adapter in {adapter!r}: {one_line(error)}") from None
    return next((rank for rank in RANKS if rank >= max(ranks)), RANKS[-1])


def _load_adapter(base_url: str, name: str, adapter: str) -> None:
    given = {"lora_name": name, "lora_path": str(Path(adapter).resolve())}
    answer = httpx.post(f"{base_url}/load_lora_adapter", json=given, timeout=120, trust_env=False)
    if not answer.is_success:
        raise ModelError(f"vLLM does not load adapter {name!r} from {adapter}: {one_line(answer.text)}")
