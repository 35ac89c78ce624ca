"""What Ollama takes and what it refuses: the types of a request's fields, its options, its durations and names."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

OPTIONS: dict[str, Any] = {
    **{
        "num_keep": 4,
        "seed": -1,
        "num_predict": -1,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.0,
        "typical_p": 1.0,
    },
    **{"temperature": 0.8, "repeat_last_n": 64, "repeat_penalty": 1.1, "presence_penalty": 0.0},
    **{
        "frequency_penalty": 0.0,
        "stop": None,
        "num_ctx": 4096,
        "num_batch": 512,
        "num_gpu": -1,
        "num_thread": 0,
    },
    **{"main_gpu": None, "use_mmap": None},
}
"""``api.DefaultOptions``, with the window of a machine that has little graphics memory."""
FOREVER = timedelta(days=365 * 100)
_NAME = re.compile(r"(?:(?:[\w.-]+(?::\d+)?/)?[\w.-]+/)?[\w][\w.-]*(?::[\w.-]+)?")
_LEVELS = ("high", "medium", "low", "max")
_GO = {str: "string", bool: "bool", int: "int", list: "[]interface {}", dict: "map[string]interface {}"}
_KINDS = {str: "string", bool: "bool", int: "number", float: "number", list: "array", dict: "object"}
_DURATION = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|ms|s|m|h)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}

Types = Mapping[str, type]
_CHAT: Types = {
    **dict.fromkeys(("stream", "truncate", "shift", "logprobs", "_debug_render_only"), bool),
    **{"model": str, "messages": list, "tools": list, "options": dict, "top_logprobs": int},
}
_MESSAGE: Types = {
    **dict.fromkeys(("role", "content", "thinking", "tool_name", "tool_call_id"), str),
    **{"images": list, "tool_calls": list},
}
_CREATE: Types = {
    **dict.fromkeys(("model", "name", "from", "template", "system", "renderer", "parser", "quantize"), str),
    **{"files": dict, "adapters": dict, "parameters": dict, "messages": list, "stream": bool},
}


class Refusal(Exception):
    """What the client is told instead of an answer."""

    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.status = status


def canonical(name: str) -> str:
    """``rlvr-v1`` as ``rlvr-v1:latest``.  Raises Refusal."""
    if not name:
        raise Refusal(400, "model is required")
    if not _NAME.fullmatch(name):
        raise Refusal(400, "invalid model name")
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def check(given: Any, types: Types, of: str) -> None:
    """Refuse what Go's decoder refuses: a field of another type.  Unknown fields and nulls are ignored."""
    if not isinstance(given, dict):
        raise Refusal(400, f"json: cannot unmarshal {_kind(given)} into Go value of type api.{of}")
    for name, wanted in types.items():
        value = given.get(name)
        if value is not None and type(value) is not wanted:
            into = f"Go struct field {of}.{name} of type {_GO[wanted]}"
            raise Refusal(400, f"json: cannot unmarshal {_kind(value)} into {into}")


def check_chat(given: Any) -> None:
    check(given, _CHAT, "ChatRequest")
    for message in given.get("messages") or ():
        check_message(message, "ChatRequest.messages")
    for tool in given.get("tools") or ():
        check(tool, {"type": str, "function": dict}, "ChatRequest.tools")
    if not 0 <= (given.get("top_logprobs") or 0) <= 20:
        raise Refusal(400, "top_logprobs must be between 0 and 20")
    think = given.get("think")
    if think is not None and not isinstance(think, bool) and think not in _LEVELS:
        levels = '"high", "medium", "low", "max", true, or false'
        if isinstance(think, str):
            raise Refusal(400, f"invalid think value: {json.dumps(think)} (must be {levels})")
        raise Refusal(400, f"think must be a boolean or string ({levels})")


def check_message(message: Any, of: str) -> None:
    check(message, _MESSAGE, of)
    if message.get("images"):
        raise Refusal(501, "the double has no images")
    for call in message.get("tool_calls") or ():
        check(call, {"id": str, "function": dict}, f"{of}.tool_calls")
        # Text for arguments, as in OpenAI's interface, is what clients get wrong.
        function: Types = {"name": str, "arguments": dict, "index": int}
        check(call.get("function") or {}, function, f"{of}.tool_calls.function")


def check_create(given: Any) -> None:
    check(given, _CREATE, "CreateRequest")
    for message in given.get("messages") or ():
        check_message(message, "CreateRequest.messages")
    if (given.get("parameters") or {}).get("typical_p") is not None:
        elsewhere = "cannot be set as a model parameter; pass it as a request option instead"
        raise Refusal(400, f"typical_p is deprecated and {elsewhere}")
    if given.get("adapters"):
        raise Refusal(400, "LoRA adapters are no longer supported")
    if not _NAME.fullmatch(given.get("model") or given.get("name") or ""):
        raise Refusal(400, "invalid model name")
    if given.get("quantize"):
        instead = "quantize GGUF models with llama.cpp tools before importing"
        raise Refusal(400, f"create-time quantization is only supported for safetensors imports; {instead}")
    for name in ("renderer", "parser"):
        if given.get(name):
            raise Refusal(501, f"the double has no {name}")


def options_of(parameters: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The defaults, then a model's own parameters, then the request's options.  Unknown ones are ignored."""
    options = {**OPTIONS, "num_ctx": int(os.environ.get("OLLAMA_CONTEXT_LENGTH") or OPTIONS["num_ctx"])}
    for name, value in [*parameters.items(), *(given or {}).items()]:
        if name in options and value is not None:
            options[name] = _option(name, value)
    options["num_ctx"] = max(options["num_ctx"], 4)
    return options


def _option(name: str, value: Any) -> Any:
    """An option's value as Go's types have it.  Raises Refusal."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name == "stop":
        if not isinstance(value, list):
            raise Refusal(500, f'option "{name}" must be of type array')
        if not all(isinstance(each, str) for each in value):
            raise Refusal(500, f'option "{name}" must be of an array of strings')
    elif name == "use_mmap":
        if not isinstance(value, bool):
            raise Refusal(500, f'option "{name}" must be of type boolean')
    elif isinstance(OPTIONS[name], float):
        if not number:
            raise Refusal(500, f'option "{name}" must be of type float32')
    elif not number:
        raise Refusal(500, f'option "{name}" must be of type integer')
    else:
        return int(value)
    return value


def duration(given: Any) -> timedelta:
    """``keep_alive``: seconds, or text like ``5m``; negative is for ever.  Raises Refusal."""
    if given is None:
        return timedelta(minutes=5)
    if isinstance(given, int | float) and not isinstance(given, bool):
        return timedelta(seconds=given) if given >= 0 else FOREVER
    if not isinstance(given, str):
        raise Refusal(400, f"Unsupported type: '{_kind(given)}'")
    rest = given.removeprefix("-").removeprefix("+")
    parts = _DURATION.findall(rest)
    if rest != "0" and (not parts or "".join(map("".join, parts)) != rest):
        raise Refusal(400, f'time: invalid duration "{given}"')
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    return FOREVER if given.startswith("-") else timedelta(seconds=seconds)


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "null")
