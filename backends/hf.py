"""The ``hf`` backend: any causal language model that transformers loads, answering many episodes at once.

Requests come from many threads and are served by one engine thread that keeps a batch going (``batch.py``): before
each step waiting requests join it, and finished ones leave it.  The loop is our own because ``generate`` cannot do
that: a static batch waits for its longest reply while new requests wait for all of it, and ``generate``
spends milliseconds of bookkeeping on every token.  tests/bench/bench_hf.py measures the three ways.

Sampling is exact and belongs to the request, not to the batch: each one draws from its own generator, seeded
by its ``Sampling.seed``, by inverting the distribution function in double precision.

Prompts are rendered with ``sanitize_control_tokens``: ``<|im_end|>`` in a tool's output is text to the model,
never the token, and harmless text gets the same ids as without it.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from pytest_pocket.backends.batch import Engine, Row
from pytest_pocket.backends.deadline import deadline
from pytest_pocket.backends.memory import free_memory, out_of_memory
from pytest_pocket.chat import Cancelled, ChatReply, ChatRequest, EngineError, Message, ToolCall, first_line
from pytest_pocket.parsing import Parsed, leaves_thinking_open, parse
from pytest_pocket.registry import ModelError
from pytest_pocket.vetting import Refused, vet

UNLIMITED = 10**9
TEMPLATE_SECONDS = 10.0
"""How long a chat template may take: it is the model's, and may hold a loop without end."""

_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "pocket_probe",
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"pocket_key": {"type": "string", "description": "A key."}},
            "required": ["pocket_key"],
        },
    },
}
_PROBE_CALL = ToolCall("pocket_probe", {"pocket_key": "pocket value"})
_PROBE_USER = Message("user", "pocket question")


class HFBackend:
    """A transformers model as a :class:`pytest_pocket.chat.Backend`.

    ``path`` is a directory or a hub name; a directory never reaches for the network.  ``adapter`` is a PEFT
    directory; a ``path`` that is itself an adapter brings its base.  ``batch`` bounds the requests that run
    together.  ``dtype`` is a torch dtype's name: float32 on a CPU, elsewhere the checkpoint's own by default.
    Only safetensors are read, and no code that comes with a model is run.  Raises ModelError.

    ``supports_think`` says whether the model's template has a switch for thinking; ``model_window`` is the
    context window in tokens; ``neutral`` that the text of a special token is text.
    """

    neutral = True

    def __init__(
        self,
        path: str,
        *,
        adapter: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch: int = 64,
    ) -> None:
        if batch < 1:
            raise ModelError(f"batch {batch} is not at least 1")
        base, layers = base_of(path, adapter)
        device = pick_device(device)
        dtype = dtype or ("float32" if device == "cpu" else "auto")
        try:
            self._serve(load_model(base, layers, device, dtype), load_tokenizer(base), base, batch)
        except ModelError as error:
            if layers and adapter is None:
                raise ModelError(f"{error} (it is the base that adapter {layers} names)") from error
            raise

    @classmethod
    def around(cls, model: Any, tokenizer: Any, batch: int = 64) -> HFBackend:
        """A backend over a model in memory, which its owner goes on training: call ``weights_changed`` then."""
        backend = cls.__new__(cls)
        backend._serve(model, tokenizer, "the model in memory", batch)
        return backend

    def _serve(self, model: Any, tokenizer: Any, path: str, batch: int) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.device = str(model.device)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self._rendering = threading.Lock()
        self._probe_template(path)
        config = model.config.get_text_config()
        self.model_window = int(getattr(config, "max_position_embeddings", None) or UNLIMITED)
        self._engine = Engine(model, _stop_ids(model, tokenizer), batch)
        self._name = f"transformers {_version()}"

    def weights_changed(self) -> None:
        """Forget what was computed with the weights so far.  No request may be in flight."""
        self._engine.forget()

    def chat(self, request: ChatRequest) -> ChatReply:
        """Answer one request.  Raises EngineError for the engine's faults, Cancelled after ``cancel``."""
        sampling = request.sampling
        try:
            prompt = self._render(request.messages, request.tools, think=sampling.think)
            text = self._decode(prompt)
        except Exception as error:
            raise EngineError(f"the chat template failed: {type(error).__name__}: {error}") from error
        evidence: dict[str, str | int | float] = {
            "prompt_sha256": hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest(),
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "think": int(sampling.think),
            "max_tokens": sampling.max_tokens,
            "engine": self._name,
            "device": self.device,
            "dtype": self.dtype,
        }
        limit = min(sampling.max_tokens, self.model_window - len(prompt))
        if limit <= 0:
            evidence["room"] = self.model_window - len(prompt)
            return ChatReply(
                "", finish="length", prompt_tokens=len(prompt), evidence=evidence, prompt_ids=tuple(prompt)
            )
        row = Row(prompt, limit, sampling.temperature, random.Random(sampling.seed).random, Future())
        self._engine.submit(row)
        row.future.result()
        parsed = self._parse(text, row, request)
        return ChatReply(
            parsed.content,
            thinking=parsed.thinking,
            calls=parsed.calls,
            malformed=parsed.malformed,
            finish=row.finish,
            prompt_tokens=len(prompt),
            completion_tokens=len(row.tokens),
            logprob=row.logprob,
            evidence=evidence,
            prompt_ids=tuple(prompt),
            completion_ids=tuple(row.tokens),
        )

    def forced(self, request: ChatRequest, text: str) -> ChatReply:
        """What this engine makes of a reply with that text: for the conformance suite."""
        prompt = self._decode(self._render(request.messages, request.tools, think=request.sampling.think))
        row = Row([], 0, 0.0, float, Future(), tokens=self._tokenizer.encode(text, add_special_tokens=False))
        return ChatReply(**vars(self._parse(prompt, row, request)))

    def cancel(self) -> None:
        """Make requests in flight, and later ones, raise Cancelled at once."""
        self._engine.stop(Cancelled())

    def close(self) -> None:
        """End the engine thread and free the model."""
        self._engine.stop(EngineError("the model is closed"))
        self._engine.join()
        self._model = None
        free_memory()

    def _render(
        self,
        messages: Iterable[Message],
        tools: Iterable[Mapping[str, Any]],
        *,
        think: bool,
        prompt: bool = True,
    ) -> list[int]:
        """The conversation as token ids; with ``prompt``, ending where the model is to write."""
        # The fast tokenizers keep state while they encode: one thread at a time.
        with self._rendering, deadline(TEMPLATE_SECONDS):
            return render(self._tokenizer, messages, tools, think=think, prompt=prompt)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _parse(self, prompt: str, row: Row, request: ChatRequest) -> Parsed:
        """The reply, taken apart."""
        ids = row.tokens[:-1] if row.finish == "stop" else row.tokens
        text = self._decode(ids)
        if self._response_template:
            return _parse_by_template(self._tokenizer, prompt, text, request.tools)
        return parse(text, thinking_open=self._thinking_open[request.sampling.think], schemas=request.tools)

    def _probe_template(self, path: str) -> None:
        """Find out what the template does, once, rather than trust it.  Raises ModelError.

        Our parser is preferred where it reads what the template writes, because transformers' own
        (``tokenizer.response_template``) says nothing about a malformed call.
        """
        if not self._tokenizer.chat_template:
            raise ModelError(
                f"{path} has no chat template: use an instruction-tuned model, or add chat_template.jinja"
            )

        def shown(*messages: Message, think: bool = False, prompt: bool = False) -> str:
            return self._decode(self._render(messages, [_PROBE_TOOL], think=think, prompt=prompt))

        try:
            offered = shown(_PROBE_USER)
            asked = {think: shown(_PROBE_USER, think=think, prompt=True) for think in (False, True)}
        except Exception as error:
            raise ModelError(
                f"the chat template of {path} fails: {error}; give the model one that works"
            ) from error
        if _PROBE_CALL.name not in offered:
            raise ModelError(
                f"the chat template of {path} ignores tools: use a model whose template renders them"
            )
        try:
            called = shown(_PROBE_USER, Message("assistant", "", calls=(_PROBE_CALL,)))
        except Exception:
            called = ""
        spoken = called.rpartition(_PROBE_USER.content)[2]
        ours = parse(spoken, thinking_open=False, schemas=[_PROBE_TOOL]).calls == (_PROBE_CALL,)
        self._response_template = not ours and getattr(self._tokenizer, "response_template", None) is not None
        if not ours and not self._response_template:
            raise ModelError(
                f"the tool calls of {path} are spelled in an unknown way: set response_template "
                "in its tokenizer_config.json, or serve it with vLLM and use vllm:NAME"
            )
        self.supports_think = asked[True] != asked[False]
        self._thinking_open = {
            think: leaves_thinking_open(text.rpartition(_PROBE_USER.content)[2])
            for think, text in asked.items()
        }


def _parse_by_template(tokenizer: Any, prompt: str, text: str, tools: Sequence[Mapping[str, Any]]) -> Parsed:
    """Take a reply apart with the tokenizer's own ``response_template``."""
    try:
        message = tokenizer.parse_response(text, prefix=prompt, tools=[dict(tool) for tool in tools])
        functions = [call.get("function", call) for call in message.get("tool_calls") or ()]
        calls = tuple(ToolCall(call["name"], dict(call.get("arguments") or {})) for call in functions)
    except Exception as error:
        return Parsed(text, malformed=f"the call cannot be read: {error}")
    thinking = message.get("reasoning_content") or message.get("thinking") or message.get("reasoning") or ""
    return Parsed(str(message.get("content") or ""), thinking=str(thinking), calls=calls)


def base_of(path: str, adapter: str | None) -> tuple[str, str | None]:
    """The base and the adapter; a path that holds only an adapter stands for both.  Raises ModelError."""
    directory = Path(path).expanduser()
    if directory.is_dir():
        path = str(directory)
        alone = (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file()
        if adapter is None and alone:
            path, adapter = _base_named_by(directory), path
    elif _looks_local(path):
        raise ModelError(
            f"no model directory {path!r}: give an existing one, or a hub name like Qwen/Qwen3-0.6B"
        )
    if adapter is not None:
        adapter = str(Path(adapter).expanduser())
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise ModelError(f"no adapter in {adapter!r} (no adapter_config.json): give a PEFT directory")
        if not (Path(adapter) / "adapter_model.safetensors").is_file():
            raise ModelError(f"adapter {adapter!r} has no adapter_model.safetensors: save it as safetensors")
    for folder in filter(Path.is_dir, map(Path, filter(None, (path, adapter)))):
        try:
            vet(folder)
        except Refused as reason:
            raise ModelError(str(reason)) from None
    return path, adapter


def _base_named_by(adapter: Path) -> str:
    """The base that an adapter was trained on: a directory (from here or from the adapter) or a hub name."""
    try:
        base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"adapter {adapter} does not name its base: give the base as path and this as adapter"
        )
    if (adapter / base).is_dir():
        return str(adapter / base)
    if _looks_local(base) and not Path(base).is_dir():
        raise ModelError(
            f"the base of adapter {adapter} is missing: {base!r}; put it there, or give it as path"
        )
    return base


def _looks_local(path: str) -> bool:
    """A hub name is NAME or OWNER/NAME; everything else is meant as a directory."""
    return not path or path[0] in "/.~" or path.count("/") > 1 or path.endswith("/")


def pick_device(device: str | None) -> str:
    """The device of a name; without one, the best there is.  Raises ModelError."""
    import torch

    if device is None:
        device = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        return str(torch.device(device))
    except RuntimeError:
        raise ModelError(f"unknown device {device!r}: use cpu, cuda, cuda:1 or mps") from None


def no_bars() -> None:
    """Keep transformers' own progress bars out of the terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a directory or hub name.  Raises ModelError."""
    from transformers import AutoTokenizer

    no_bars()
    try:
        return AutoTokenizer.from_pretrained(
            path, local_files_only=Path(path).is_dir(), trust_remote_code=False
        )
    except Exception as error:
        raise ModelError(_cannot_load(f"the tokenizer of {path!r}", path, error)) from error


def render(
    tokenizer: Any,
    messages: Iterable[Message],
    tools: Iterable[Mapping[str, Any]],
    *,
    think: bool,
    prompt: bool = True,
    sanitize: bool = True,
) -> list[int]:
    """A conversation as token ids; with ``prompt``, ending where the model is to write.

    With ``sanitize``, the text of a special token is only text.
    """
    return list(
        tokenizer.apply_chat_template(
            [message.to_dict() for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            add_generation_prompt=prompt,
            enable_thinking=think,
            **({"sanitize_control_tokens": True} if sanitize else {}),  # transformers from 5.23 on
            return_dict=False,
        )
    )


def _cannot_load(what: str, path: str, error: BaseException) -> str:
    """Why something cannot be loaded, and what to do, in one line."""
    if out_of_memory(error):
        return f"no memory to load {what}: choose a smaller model, or a smaller dtype (bfloat16)"
    if Path(path).is_dir():
        return f"cannot load {what}: {first_line(error)}; save or fetch it again"
    return (
        f"cannot load {what}: no folder of that name is here, and as a name on the hub: "
        f"{first_line(error).rstrip('.')}; give a folder, or look at the name and the network"
    )


def load_model(path: str, adapter: str | None, device: str, dtype: str) -> Any:
    """The model, ready to run.  Raises ModelError when a weight is missing, rather than run a random one."""
    import torch
    from transformers import AutoModelForCausalLM

    no_bars()
    directory = Path(path)
    local = directory.is_dir()
    if local and not any(directory.glob("*.safetensors")):
        raise ModelError(
            f"{path} has no *.safetensors, and other weights are not read: save the model as safetensors"
        )
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ModelError(f"unknown dtype {dtype!r}: use float32, bfloat16 or float16")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=local,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(_cannot_load(f"model {path!r}", path, error)) from error
    model, info = loaded
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if missing:
        raise ModelError(
            f"the weights of {path} lack {len(missing)} tensors ({missing[0]}, ...): fetch them again"
        )
    if adapter is not None:
        model = _add_adapter(model, path, adapter)
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError, MemoryError) as error:
        if out_of_memory(error):
            raise ModelError(_cannot_load(f"{path!r} on {device}", path, error)) from error
        raise ModelError(f"cannot put {path} on {device}: {first_line(error)}") from error


def _add_adapter(model: Any, path: str, adapter: str) -> Any:
    import torch
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # PEFT only warns when an adapter does not fit its base, and leaves those layers untouched.
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            adapted = PeftModel.from_pretrained(model, adapter, local_files_only=True)
    except Exception as error:
        raise ModelError(f"adapter {adapter} does not fit {path}: {first_line(error)}") from error
    # Merging rounds the weights, which in half precision changes the model.
    return adapted.merge_and_unload() if model.dtype == torch.float32 else adapted


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a reply: the generation config's, the tokenizer's, and ChatML's."""
    declared = model.generation_config.eos_token_id
    ids = {*(declared if isinstance(declared, list) else [declared]), tokenizer.eos_token_id}
    ids.add(tokenizer.added_tokens_encoder.get("<|im_end|>"))
    return frozenset(token for token in ids if token is not None)


def _version() -> str:
    import transformers

    return str(transformers.__version__)
