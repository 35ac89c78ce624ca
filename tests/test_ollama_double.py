"""The double of Ollama, seen through Ollama's own client: what backends and CI rely on where Ollama is not to be had."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import engine_fixtures
import pytest

from pytest_pocket import tools

ollama = pytest.importorskip("ollama")
pytest.importorskip("gguf")
pytest.importorskip("transformers")

CHECKPOINT = Path(str(resources.files("pytest_pocket.training"))) / "checkpoints" / "rlvr-v1"
GREEDY = {"temperature": 0, "repeat_penalty": 1, "num_predict": 60}
ASK = [{"role": "user", "content": "What is the port in config.toml?"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    *({"role": role, "content": f"{role} {n}"} for n in range(30) for role in ("user", "assistant")),
    {"role": "user", "content": "What is 2+2?"},
]
MUTE = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""


@pytest.fixture(scope="module")
def client(ollama_double: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of a double with one checkpoint, as three models.

    ``plain`` has its Jinja template alone, ``template`` a TEMPLATE too, ``mute`` one without tools and thinking.
    """
    from pytest_pocket.backends import gguf_file, modelfile

    folder = tmp_path_factory.mktemp("gguf")
    shutil.copytree(CHECKPOINT, folder / "mute", ignore=shutil.ignore_patterns("*.png"))
    (folder / "mute" / "chat_template.jinja").write_text(MUTE)
    client = ollama.Client(host=ollama_double)
    given = modelfile.modelfile(str(CHECKPOINT))
    for name, source in (("plain", CHECKPOINT), ("mute", folder / "mute")):
        gguf_file.write(str(source), folder / f"{name}.gguf")
        digest = client.create_blob(folder / f"{name}.gguf")
        client.create(name, files={"model.gguf": digest}, parameters={"temperature": 0})
    if shutil.which("go"):
        client.create("template", from_="plain", template=given.template, parameters=dict(given.parameters))
    yield client
    for model in client.list().models:
        client.delete(model.model)


@pytest.fixture
def template(client: Any) -> str:
    engine_fixtures.go()
    return "template"


def raw(client: Any, path: str = "/api/chat", **body: Any) -> dict[str, Any]:
    """What the official client has no argument for."""
    answer: dict[str, Any] = client._request_raw("POST", path, json={"stream": False, **body}).json()
    return answer


def refused(client: Any, path: str = "/api/chat", **body: Any) -> tuple[int, str]:
    with pytest.raises(ollama.ResponseError) as caught:
        raw(client, path, **body)
    return caught.value.status_code, caught.value.error


def test_it_lists_and_shows_the_models_that_were_made(client: Any) -> None:
    assert {"plain:latest", "mute:latest"} <= {model.model for model in client.list().models}
    shown = client.show("plain")
    assert shown.modelinfo["qwen3.context_length"] == 2048
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert "tokenizer.chat_template" not in shown.modelinfo
    assert client.show("PLAIN:latest").details.format == "gguf"
    assert client.show("mute").capabilities == ["completion"]


def test_a_call_comes_with_its_arguments_as_an_object(client: Any) -> None:
    reply = client.chat("plain", ASK, tools=tools.SCHEMAS, think=False, options=GREEDY)
    (call,) = reply.message.tool_calls
    assert call.function.name in {schema["function"]["name"] for schema in tools.SCHEMAS}
    assert all(isinstance(value, str) for value in call.function.arguments.values())
    assert (reply.done, reply.done_reason, reply.message.content) == (True, "stop", "")
    assert reply.prompt_eval_count > reply.eval_count > 0
    assert reply.total_duration >= reply.eval_duration > 0


def test_with_a_template_calls_are_left_in_the_text(client: Any, template: str) -> None:
    reply = client.chat(template, ASK, tools=tools.SCHEMAS, think=False, options=GREEDY)
    assert not reply.message.tool_calls
    assert reply.message.content.startswith("<tool_call><function=")
    assert reply.message.content.endswith("</function></tool_call>")


@pytest.mark.parametrize("name", ["plain", "template"])
def test_thinking_is_split_from_the_content(client: Any, name: str, request: pytest.FixtureRequest) -> None:
    if name == "template":
        request.getfixturevalue("template")
    thought = client.chat(name, ASK, tools=tools.SCHEMAS, think=True, options=GREEDY).message
    assert thought.thinking
    assert "</think>" not in thought.thinking + thought.content
    assert not client.chat(name, ASK, tools=tools.SCHEMAS, think=False, options=GREEDY).message.thinking


def test_a_model_that_can_think_does_unless_it_is_told_not_to(client: Any) -> None:
    assert client.chat("plain", ASK, tools=tools.SCHEMAS, options=GREEDY).message.thinking


@pytest.mark.parametrize("name", ["plain", "template"])
def test_a_stream_is_the_whole_answer_in_pieces(
    client: Any, name: str, request: pytest.FixtureRequest
) -> None:
    if name == "template":
        request.getfixturevalue("template")
    whole = client.chat(name, ASK, think=True, options=GREEDY)
    pieces = list(client.chat(name, ASK, think=True, options=GREEDY, stream=True))
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert "".join(piece.message.content for piece in pieces) == whole.message.content
    assert "".join(piece.message.thinking or "" for piece in pieces) == (whole.message.thinking or "")
    assert pieces[-1].eval_count == whole.eval_count


@pytest.mark.parametrize("name", ["plain", "template"])
def test_a_long_conversation_loses_its_oldest_messages_without_a_word(
    client: Any, name: str, request: pytest.FixtureRequest
) -> None:
    if name == "template":
        request.getfixturevalue("template")
    reply = client.chat(name, TALK, think=False, options={**GREEDY, "num_ctx": 256})
    assert reply.prompt_eval_count <= 256
    debug = raw(
        client, model=name, messages=TALK, think=False, options={"num_ctx": 256}, _debug_render_only=True
    )
    prompt = debug["_debug_info"]["rendered_template"]
    assert "Be brief." in prompt
    assert "What is 2+2?" in prompt
    assert "user 0<" not in prompt
    assert "user 29<" in prompt


def test_truncate_false_makes_a_long_conversation_an_error(client: Any) -> None:
    status, said = refused(client, model="plain", messages=TALK, truncate=False, options={"num_ctx": 256})
    assert status == 400
    assert "exceeds the available context size (256 tokens)" in said


def test_a_message_that_does_not_fit_is_an_error_or_loses_its_middle(client: Any, template: str) -> None:
    one = {
        "messages": [{"role": "user", "content": "one two three four " * 100}],
        "options": {"num_ctx": 256},
    }
    assert refused(client, model="plain", **one)[0] == 400
    assert raw(client, model=template, **one)["prompt_eval_count"] < 256
    status, said = refused(client, model=template, shift=False, **one)
    assert status == 400
    assert said.startswith("the prompt is longer than the context length")


def test_the_window_is_4096_tokens_or_the_models_own_and_is_told(client: Any) -> None:
    client.chat("plain", ASK, options={"num_predict": 1})
    assert _window(client, "plain") == 2048
    client.chat("plain", ASK, options={"num_predict": 1, "num_ctx": 512})
    assert _window(client, "plain") == 512


def test_keep_alive_says_how_long_a_model_stays(client: Any) -> None:
    client.chat("plain", ASK, options={"num_predict": 1}, keep_alive="10m")
    (running,) = [model for model in client.ps().models if model.model == "plain:latest"]
    assert 590 < running.expires_at.timestamp() - time.time() < 601
    client.chat("plain", ASK, options={"num_predict": 1}, keep_alive=0)
    assert _window(client, "plain") is None
    assert client.generate("plain", keep_alive=-1).done_reason == "load"
    assert client.generate("plain", keep_alive=0).done_reason == "unload"
    assert _window(client, "plain") is None
    assert refused(client, model="plain", messages=ASK, keep_alive="soon") == (
        400,
        'time: invalid duration "soon"',
    )


def test_options_are_honoured_and_unknown_ones_are_not_missed(client: Any) -> None:
    short = client.chat("plain", ASK, options={**GREEDY, "num_predict": 3, "no_such_option": 1})
    assert (short.done_reason, short.eval_count) == ("length", 3)
    warm = {**GREEDY, "temperature": 1.5, "top_k": 0, "top_p": 1.0, "seed": 7}
    said = [client.chat("plain", ASK, think=False, options=warm).message.content for _ in range(2)]
    assert said[0] == said[1]
    others = {
        client.chat("plain", ASK, think=False, options={**warm, "seed": n}).message.content for n in range(5)
    }
    assert len(others) > 1
    whole = client.chat("plain", ASK, think=False, options=GREEDY).message.content
    stopped = client.chat("plain", ASK, think=False, options={**GREEDY, "stop": [whole[3:6]]}).message.content
    assert stopped == whole[: whole.index(whole[3:6])]


def test_what_a_model_cannot_do_is_refused(client: Any) -> None:
    assert refused(client, model="mute", messages=ASK, tools=list(tools.SCHEMAS)) == (
        *(400, "registry.ollama.ai/library/mute:latest does not support tools"),
    )
    assert refused(client, model="mute", messages=ASK, think=True) == (
        400,
        '"mute" does not support thinking',
    )
    assert (
        raw(client, model="mute", messages=ASK, think=False, options=GREEDY)["message"]["role"] == "assistant"
    )


@pytest.mark.parametrize(
    ("status", "said", "body"),
    [
        (404, "model 'nobody' not found", {"model": "nobody"}),
        (400, "model is required", {"model": ""}),
        (400, "invalid model name", {"model": "a b"}),
        (
            400,
            "json: cannot unmarshal number into Go struct field ChatRequest.model of type string",
            {"model": 1},
        ),
        (400, "ChatRequest.messages of type []interface {}", {"messages": "hello"}),
        (
            400,
            "ChatRequest.messages.content of type string",
            {"messages": [{"role": "user", "content": ["x"]}]},
        ),
        (
            400,
            "ChatRequest.messages.tool_calls.function.arguments of type map[string]interface {}",
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "Read", "arguments": "{}"}}]}
                ]
            },
        ),
        (400, 'invalid think value: "very"', {"think": "very"}),
        (400, "top_logprobs must be between 0 and 20", {"top_logprobs": 21}),
        (500, 'option "num_ctx" must be of type integer', {"options": {"num_ctx": "4096"}}),
        (500, 'option "temperature" must be of type float32', {"options": {"temperature": "0"}}),
        (500, 'option "stop" must be of type array', {"options": {"stop": "x"}}),
        (400, "logprobs is not supported with tools", {"tools": list(tools.SCHEMAS), "logprobs": True}),
    ],
)
def test_what_ollama_refuses_it_refuses(client: Any, status: int, said: str, body: dict[str, Any]) -> None:
    answered = refused(client, **{"model": "plain", "messages": ASK, **body})
    assert answered[0] == status
    assert said in answered[1]


def test_log_probabilities_come_where_llama_server_gives_them(client: Any, template: str) -> None:
    reply = client.chat("plain", ASK, think=False, logprobs=True, options=GREEDY)
    assert len(reply.logprobs) >= reply.eval_count - 1
    assert all(token.logprob <= 0 for token in reply.logprobs)
    assert client.chat(
        template, ASK, tools=tools.SCHEMAS, think=False, logprobs=True, options=GREEDY
    ).logprobs


def test_a_blob_must_be_what_its_digest_says(client: Any) -> None:
    unknown = "sha256:" + "0" * 64
    assert client._client.head(f"/api/blobs/{unknown}").status_code == 404
    assert (
        client._client.post(f"/api/blobs/{unknown}", content=b"x")
        .json()["error"]
        .startswith("digest mismatch")
    )
    assert refused(client, "/api/create", model="new", files={"model.gguf": unknown})[0] == 400
    assert refused(client, "/api/create", model="new") == (400, "neither 'from' or 'files' was specified")
    assert refused(client, "/api/create", model="new", **{"from": "nobody"})[0] == 500


def test_a_deleted_model_is_gone(client: Any) -> None:
    client.create("copy", from_="plain", system="Say yes.")
    assert (
        "Say yes."
        in raw(client, model="copy", messages=ASK, _debug_render_only=True)["_debug_info"][
            "rendered_template"
        ]
    )
    client.delete("copy")
    assert refused(client, model="copy", messages=ASK)[0] == 404
    with pytest.raises(ollama.ResponseError, match="not found"):
        client.delete("copy")


def test_requests_at_once_are_answered_alike(client: Any) -> None:
    def ask(_: int) -> str:
        return str(client.chat("plain", ASK, think=False, options=GREEDY).message)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(16)))) == 1


def test_a_client_that_hangs_up_stops_the_model(client: Any) -> None:
    long = {
        "format": {"type": "array", "items": {"type": "integer"}, "minItems": 400},
        "options": {"num_predict": 400},
    }
    begun = time.monotonic()
    assert client.chat("mute", ASK, **long).eval_count == 400
    whole = time.monotonic() - begun
    pieces = client.chat("mute", ASK, stream=True, **long)
    next(pieces)
    pieces.close()
    begun = time.monotonic()
    client.chat("mute", ASK, options={"num_predict": 1})
    assert time.monotonic() - begun < whole / 2


def test_ending_it_ends_its_llama_servers(llama_server_binary: Path, tmp_path: Path) -> None:
    from pytest_pocket.backends import gguf_file

    gguf_file.write(str(CHECKPOINT), tmp_path / "model.gguf")
    mine = f"mine={tmp_path / 'model.gguf'}"
    with engine_fixtures.started_double(llama_server_binary, "--model", mine) as (process, address):
        ollama.Client(host=address).generate("mine")
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        (child,) = map(int, found.stdout.split())
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def _window(client: Any, name: str) -> int | None:
    return next(
        (model.context_length for model in client.ps().models if model.model == f"{name}:latest"), None
    )
