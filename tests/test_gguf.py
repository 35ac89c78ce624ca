"""GGUF files, and models of Ollama made of them: the engines read what the checkpoint says."""

from __future__ import annotations

import functools
import hashlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import engine_fixtures
import pytest
from engine_fixtures import find
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TEMPLATE, byte_tokenizer, make_qwen3, make_qwen3_5, qwen3_5_template
from typer.testing import CliRunner

from pytest_pocket import tools
from pytest_pocket.chat import ChatRequest, Message, Sampling, ToolCall
from pytest_pocket.cli import app
from pytest_pocket.parsing import parse
from pytest_pocket.registry import ModelError, shipped

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
pytest.importorskip("ollama")
httpx = pytest.importorskip("httpx")

from pytest_pocket.backends import gguf_file, modelfile, wire  # noqa: E402
from pytest_pocket.backends.hf import HFBackend, load_tokenizer  # noqa: E402

CHECKPOINT = shipped() / "rlvr-v1"
RENDER = Path(__file__).parent / "engines" / "render.go"
SCHEMAS = {schema["function"]["name"]: schema["function"]["parameters"] for schema in tools.SCHEMAS}


# --- conversations -----------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60),
    st.text("0123456789 \n\tab{}<>\"'é漢😀", max_size=60),
    st.lists(st.sampled_from(["{{ .System }}", "<tools>", "</think>", "a.py", "12345", "\r\n", "  "])).map(
        "".join
    ),
)
VALUES = {"string": TEXTS, "integer": st.integers(0, 10**15), "boolean": st.booleans()}


@st.composite
def calls(draw: st.DrawFn) -> ToolCall:
    """A call of one of the suite's tools, its arguments in the order of the schema, some left out."""
    name = draw(st.sampled_from(sorted(SCHEMAS)))
    properties = SCHEMAS[name]["properties"].items()
    return ToolCall(
        name, {key: draw(VALUES[kind["type"]]) for key, kind in properties if draw(st.booleans())}
    )


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    messages = [Message("system", draw(TEXTS))] if draw(st.booleans()) else []
    messages.append(Message("user", draw(TEXTS)))
    for _ in range(draw(st.integers(0, 3))):
        called = tuple(draw(st.lists(calls(), max_size=2)))
        messages.append(Message("assistant", draw(TEXTS), thinking=draw(st.just("") | TEXTS), calls=called))
        messages += [Message("tool", draw(TEXTS), name=call.name) for call in called]
        if not called:
            messages.append(Message("user", draw(TEXTS)))
    return messages


def jinja(
    messages: Sequence[Message], offered: Sequence[Any], think: bool, template: str | None = None
) -> str:
    return str(
        tokenizer().apply_chat_template(
            [message.to_dict() for message in messages],
            tools=list(offered) or None,
            add_generation_prompt=True,
            enable_thinking=think,
            tokenize=False,
            chat_template=template,
        )
    )


@functools.cache
def tokenizer() -> Any:
    return load_tokenizer(str(CHECKPOINT))


# --- the file ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint, in its own bfloat16."""
    path = tmp_path_factory.mktemp("gguf") / "rlvr-v1.gguf"
    gguf_file.write(str(CHECKPOINT), path)
    return path


def weights(path: Path) -> dict[str, Any]:
    tensors = gguf.GGUFReader(path).tensors
    return {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in tensors}


def field(path: Path, name: str) -> Any:
    return gguf.GGUFReader(path).fields[name].contents()


def test_every_weight_comes_back_bit_for_bit(written: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    saved = load_file(CHECKPOINT / "model.safetensors")
    in_full = tmp_path / "full.gguf"
    gguf_file.write(str(CHECKPOINT), in_full, dtype="float32")
    for path, kind in ((written, "BF16"), (in_full, "F32")):
        read = weights(path)
        assert len(read) == len(saved)
        assert (read["token_embd.weight"] == saved["model.embed_tokens.weight"].float().numpy()).all()
        for layer in range(3):
            for ours, theirs in (("attn_q", "self_attn.q_proj"), ("attn_k_norm", "self_attn.k_norm"),
                                 ("ffn_down", "mlp.down_proj"), ("ffn_norm", "post_attention_layernorm")):  # fmt: skip
                tensor = saved[f"model.layers.{layer}.{theirs}.weight"].float().numpy()
                assert (read[f"blk.{layer}.{ours}.weight"] == tensor).all()
        kinds = {each.name: each.tensor_type.name for each in gguf.GGUFReader(path).tensors}
        assert {name for name, each in kinds.items() if each != kind} <= {
            name for name in kinds if "norm" in name
        }
        assert {each for name, each in kinds.items() if "norm" in name} == {"F32"}


def test_the_file_tells_the_model_s_shape_and_where_replies_end(written: Path) -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert field(written, "general.architecture") == "qwen3"
    for name, key in (
        ("context_length", "max_position_embeddings"),
        ("block_count", "num_hidden_layers"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
    ):
        assert field(written, f"qwen3.{name}") == config[key]
    assert field(written, "qwen3.rope.freq_base") == config["rope_parameters"]["rope_theta"]
    assert field(written, "tokenizer.ggml.eos_token_id") == config["eos_token_id"]
    assert field(written, "tokenizer.ggml.add_bos_token") is False


def test_engines_return_the_tags_that_replies_are_read_by(written: Path) -> None:
    known = dict(
        zip(field(written, "tokenizer.ggml.tokens"), field(written, "tokenizer.ggml.token_type"), strict=True)
    )
    assert known["<|im_end|>"] == known["<|im_start|>"] == gguf.TokenType.CONTROL
    for tag in ("<think>", "</think>", "<tool_call>", "<function=", "</parameter>"):
        assert known[tag] == gguf.TokenType.USER_DEFINED


def test_an_adapter_is_merged_in_full_precision(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = make_qwen3(tmp_path / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    gguf_file.write(str(base), tmp_path / "base.gguf")
    gguf_file.write(str(base), tmp_path / "given.gguf", adapter=str(tmp_path / "adapter"))
    gguf_file.write(str(tmp_path / "adapter"), tmp_path / "alone.gguf")
    plain, given_, alone = (weights(tmp_path / f"{name}.gguf") for name in ("base", "given", "alone"))
    merged = adapted.merge_and_unload().model.layers[1].self_attn.q_proj.weight.detach().numpy()
    assert (given_["blk.1.attn_q.weight"] == merged).all()
    assert (given_["blk.1.attn_q.weight"] != plain["blk.1.attn_q.weight"]).any()
    assert all((given_[name] == alone[name]).all() for name in given_)
    kinds = {each.tensor_type.name for each in gguf.GGUFReader(tmp_path / "given.gguf").tensors}
    assert kinds == {"F32"}


def test_another_architecture_is_named_with_the_way_that_converts_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'qwen3_5_text'.*convert_hf_to_gguf\.py.*ollama create") as caught:
        gguf_file.write(str(make_qwen3_5(tmp_path / "model")), tmp_path / "x.gguf")
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.glob("*.gguf"))


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="dtype 'int8'"):
        gguf_file.write(str(CHECKPOINT), tmp_path / "x.gguf", dtype="int8")
    with pytest.raises(ModelError, match="cannot write"):
        gguf_file.write(str(CHECKPOINT), tmp_path / "nowhere" / "x.gguf")
    (tmp_path / "taken.gguf").mkdir()
    with pytest.raises(ModelError, match="cannot write"):
        gguf_file.write(str(CHECKPOINT), tmp_path / "taken.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.gguf"]


# --- the tokenizer -----------------------------------------------------------------------------------------------


def bpe(pieces: str, corpus: list[str]) -> Any:
    """A tokenizer trained on the spot, split by these pieces."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pieces), "isolated"), level])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<|im_end|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")  # type: ignore[no-untyped-call]


PAIRS = [f"{number:02}" for number in range(100)]


def test_the_family_s_pre_tokenizer_is_the_one_that_training_uses() -> None:
    from pytest_pocket.training.tokenizer import PIECES

    assert gguf_file.FAMILY_PIECES == PIECES


def test_qwen_s_tokenizer_keeps_its_merges_and_its_name() -> None:
    made = bpe(gguf_file.QWEN_PIECES, ["some words and words"] * 9)
    vocabulary = gguf_file.vocabulary_of(made, len(made) + 5)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", "qwen2")
    assert "w or" in vocabulary.merges
    assert vocabulary.tokens[-1] == f"[PAD{len(made) + 4}]"
    assert vocabulary.types[-1] == gguf.TokenType.UNUSED


def test_bytes_need_no_pre_tokenizer() -> None:
    assert gguf_file.vocabulary_of(byte_tokenizer(), 0).merges == ()


@pytest.mark.parametrize(
    ("pieces", "corpus", "named"),
    [
        (r"\S+|\s", ["some words"], r"no pre-tokenizer for '\\\\S\+\|\\\\s'"),
        (gguf_file.FAMILY_PIECES, ["12 12 34"], "2 pairs of digits"),
        (gguf_file.FAMILY_PIECES, [*PAIRS, "naïve é é"], "other tokens"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(
    pieces: str, corpus: list[str], named: str
) -> None:
    with pytest.raises(ModelError, match=named):
        gguf_file.vocabulary_of(bpe(pieces, corpus * 3), 0)


# --- the Jinja template ------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(conversations(), st.booleans(), st.booleans())
def test_the_template_in_the_file_renders_the_same(
    messages: list[Message], offered: bool, think: bool
) -> None:
    given_tools = tools.SCHEMAS if offered else ()
    in_file = gguf_file.llama_template(TEMPLATE.read_text())
    assert jinja(messages, given_tools, think, in_file) == jinja(messages, given_tools, think)


def test_the_template_in_the_file_has_no_tag_of_training_s_and_the_mark_of_our_spelling(
    written: Path,
) -> None:
    told = field(written, "tokenizer.chat_template")
    assert "generation -%}" in TEMPLATE.read_text()
    assert "generation -%}" not in told
    assert told.startswith("{#- '<tool_call><function=' ~ tool_call.name ~ '>' -#}")
    assert gguf_file.llama_template(qwen3_5_template()) == qwen3_5_template()


# --- llama-server ------------------------------------------------------------------------------------------------


@contextmanager
def serving(weights: Path) -> Iterator[Any]:
    """A client of a real ``llama-server`` that runs this file."""
    program = find("llama-server", "llama.sh")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "-m", weights, "--port", str(port), "--jinja", "-c", "2048", "-np", "1", "-t", "1"]
    log = weights.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            for _ in range(600):
                assert process.poll() is None, log.read_text()[-2000:]
                with suppress(httpx.TransportError):
                    if client.get("/health").is_success:
                        break
                time.sleep(0.1)
            yield client
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The shipped checkpoint in float32, in ``llama-server``."""
    path = tmp_path_factory.mktemp("llama") / "model.gguf"
    gguf_file.write(str(CHECKPOINT), path, dtype="float32")
    with serving(path) as client:
        yield client


def tokens(llama: Any, text: str) -> list[int]:
    asked = {"content": text, "add_special": True, "parse_special": True}
    found: list[int] = llama.post("/tokenize", json=asked).raise_for_status().json()["tokens"]
    return found


@settings(max_examples=300)
@given(st.data())
def test_llama_cpp_reads_the_tokens_that_the_model_was_trained_on(llama: Any, data: st.DataObject) -> None:
    text = data.draw(TEXTS | st.text("abcdeghinorstu_", max_size=80) | st.lists(TEXTS).map("".join))
    assert tokens(llama, text) == tokenizer().encode(text)


def test_llama_cpp_reads_source_code_as_the_model_was_trained_on_it(llama: Any) -> None:
    for path in (Path(json.__file__), Path(__file__), RENDER):
        text = path.read_text()
        assert tokens(llama, text) == tokenizer().encode(text)


def test_llama_cpp_reads_qwen_s_own_tokenizer_too(tmp_path: Path) -> None:
    made = bpe(
        gguf_file.QWEN_PIECES, [Path(json.__file__).read_text(), "It's 1234 words, naïve 漢字\r\n\n  x"]
    )
    model = make_qwen3(tmp_path / "model")
    made.save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    with torch.no_grad():
        from transformers import Qwen3Config, Qwen3ForCausalLM

        Qwen3ForCausalLM(Qwen3Config(**{**config, "vocab_size": len(made) + 3})).save_pretrained(model)
    gguf_file.write(str(model), tmp_path / "model.gguf")
    with serving(tmp_path / "model.gguf") as client:
        for text in (
            *Path(__file__).read_text().split("\n\n"),
            "Don't  12 345\t\r\n 漢字😀 naïve  \n\n x<|im_end|>",
        ):
            assert tokens(client, text) == made.encode(text)


def test_one_character_is_read_as_a_space_and_no_other(llama: Any) -> None:
    assert tokens(llama, "a\u2581b") == tokenizer().encode("a b")


@settings(max_examples=30)
@given(st.data())
def test_llama_cpp_renders_the_prompt_that_the_model_was_trained_on(llama: Any, data: st.DataObject) -> None:
    messages, think = data.draw(conversations()), data.draw(st.booleans())
    asked = {"messages": wire.openai_messages(messages), "tools": list(tools.SCHEMAS)}
    for message in asked["messages"]:
        message["reasoning_content"] = message.pop("reasoning", "")
    asked |= {"chat_template_kwargs": {"enable_thinking": think}}
    reply = llama.post("/apply-template", json=asked)
    assert reply.raise_for_status().json()["prompt"] == jinja(messages, tools.SCHEMAS, think)


@pytest.mark.parametrize("think", [False, True])
def test_llama_cpp_writes_the_reply_that_transformers_writes(llama: Any, think: bool) -> None:
    backend = HFBackend(str(CHECKPOINT), device="cpu")
    for asked in (
        "Which file defines the function parse_date?",
        "Run report.py and say what it prints.",
        "Hello 1234",
    ):
        messages = (Message("user", asked),)
        reply = backend.chat(ChatRequest(messages, tools.SCHEMAS, Sampling(think=think, max_tokens=48)))
        prompt = jinja(messages, tools.SCHEMAS, think)
        told = llama.post(
            "/completion",
            json={
                "prompt": prompt,
                "n_predict": 48,
                "temperature": 0,
                "repeat_penalty": 1,
                "return_tokens": True,
            },
        ).json()
        assert tuple(told["tokens"]) == reply.completion_ids
        read = parse(told["content"], thinking_open=think, schemas=tools.SCHEMAS)
        assert (read.content, read.thinking, read.calls) == (reply.content, reply.thinking, reply.calls)
    backend.close()


def test_llama_cpp_hands_out_calls_and_thinking_exactly(llama: Any) -> None:
    backend = HFBackend(str(CHECKPOINT), device="cpu")
    called = 0
    for asked in (
        "Run report.py and say what it prints.",
        "Create notes.txt with the content: hello",
        "List *.md files.",
    ):
        messages = [Message("user", asked)]
        reply = backend.chat(ChatRequest(tuple(messages), tools.SCHEMAS, Sampling(think=True, max_tokens=96)))
        told = llama.post(
            "/v1/chat/completions",
            json={
                "messages": wire.openai_messages(messages),
                "tools": list(tools.SCHEMAS),
                "temperature": 0,
                "max_tokens": 96,
                "chat_template_kwargs": {"enable_thinking": True},
            },
        ).json()["choices"][0]["message"]
        if reply.calls:
            called += 1
            functions = [call["function"] for call in told["tool_calls"]]
            assert [ToolCall(each["name"], json.loads(each["arguments"])) for each in functions] == list(
                reply.calls
            )
            assert told["reasoning_content"] == reply.thinking
    backend.close()
    assert called


# --- Ollama's template -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Renders chats with a template in Go; the answer of tests/engines/render.go."""
    program = tmp_path_factory.mktemp("go") / "render"
    subprocess.run([engine_fixtures.go(), "build", "-o", program, RENDER], check=True)

    def run(template: str, *chats: dict[str, Any]) -> Any:
        asked = json.dumps({"template": template, "chats": chats})
        return json.loads(
            subprocess.run([program], input=asked.encode(), capture_output=True, check=True).stdout
        )

    return run


@functools.cache
def described() -> modelfile.Modelfile:
    return modelfile.modelfile(str(CHECKPOINT))


def chat(messages: Sequence[Message], offered: Sequence[Any], think: bool) -> dict[str, Any]:
    return {"messages": wire.ollama_messages(messages), "tools": list(offered), "think": think}


@settings(max_examples=100)
@given(st.data())
def test_ollama_renders_the_prompt_that_the_model_was_trained_on(go: Any, data: st.DataObject) -> None:
    messages, think = data.draw(conversations()), data.draw(st.booleans())
    offered = data.draw(st.lists(st.sampled_from(tools.SCHEMAS), unique_by=id) | st.just(list(tools.SCHEMAS)))
    told = go(described().template, chat(messages, offered, think))
    assert told["prompts"] == [jinja(messages, offered, think)]


def test_ollama_orders_the_parameters_of_other_tools_by_name(go: Any) -> None:
    parameters = {
        "type": "object",
        "properties": {"b": {"type": "string"}, "a": {"type": "string"}},
        "required": ["b"],
    }
    other = {"type": "function", "function": {"name": "Other", "description": "", "parameters": parameters}}
    call = ToolCall("Other", {"z": 1, "path": "p", "y": [True, None]})
    messages = [
        Message("user", "q"),
        Message("assistant", "", calls=(call,)),
        Message("tool", "r", name="Other"),
    ]
    (prompt,) = go(described().template, chat(messages, [*tools.SCHEMAS[:1], other], False))["prompts"]
    assert "<tools>Read(file_path, offset?, limit?) Other(a?, b)</tools>" in prompt
    written = "<parameter=path>\np\n</parameter><parameter=y>\n[true,null]\n</parameter><parameter=z>\n1\n</parameter>"
    assert f"<function=Other>{written}</function>" in prompt


def test_ollama_finds_thinking_and_takes_no_text_for_a_call(go: Any) -> None:
    told = go(described().template)
    assert told["thinking"] == ["<think>", "</think>"]
    assert told["tag"] in described().parameters["stop"]


def test_the_parameters_are_those_that_the_suite_measures_with() -> None:
    window = json.loads((CHECKPOINT / "config.json").read_text())["max_position_embeddings"]
    assert described().parameters == {
        "num_ctx": window,
        "temperature": 0,
        "repeat_penalty": 1,
        "stop": ["<|im_end|>"],
    }


def test_a_checkpoint_with_another_template_keeps_its_own(tmp_path: Path) -> None:
    path = make_qwen3(tmp_path / "model")
    (path / "chat_template.jinja").write_text(qwen3_5_template())
    assert modelfile.modelfile(str(path)).template == ""
    assert "TEMPLATE" not in modelfile.modelfile(str(path)).text(Path("x.gguf"))


# --- the command -------------------------------------------------------------------------------------------------


def pocket(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["ollama", "create", *map(str, arguments)])
    return result.exit_code, result.output


class Ollama(ThreadingHTTPServer):
    """What of Ollama's interface makes a model: it takes blobs by their digest, and makes a model of known ones."""

    def __init__(self, version: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.version = version
        self.blobs: dict[str, bytes] = {}
        self.made: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: Ollama

    def do_GET(self) -> None:
        found = self.path == "/api/version"
        self._answer(
            200 if found else 404, {"version": self.server.version} if found else {"error": "not found"}
        )

    def do_POST(self) -> None:
        body = self._body()
        if self.path.startswith("/api/blobs/"):
            digest = self.path.removeprefix("/api/blobs/")
            if digest != f"sha256:{hashlib.sha256(body).hexdigest()}":
                self._answer(400, {"error": "digest does not match"})
                return
            self.server.blobs[digest] = body
            self._answer(201, {})
        elif self.path == "/api/create":
            asked = json.loads(body)
            if " " in asked["model"] or not set(asked["files"].values()) <= self.server.blobs.keys():
                self._answer(400, {"error": "invalid model name"})
                return
            self.server.made.append(asked)
            self._answer(200, {"status": "success"})

    def _body(self) -> bytes:
        if length := self.headers["content-length"]:
            return self.rfile.read(int(length))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, data: dict[str, Any]) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ollama]:
    made = Ollama("0.33.2")
    monkeypatch.setenv("OLLAMA_HOST", made.url)
    yield made
    made.shutdown()
    made.server_close()


def test_a_checkpoint_becomes_a_model_of_the_server_that_the_environment_names(
    server: Ollama, written: Path
) -> None:
    status, said = pocket("rlvr-v1")
    assert (status, said) == (
        0,
        f"rlvr-v1 in Ollama 0.33.2 at {server.url}: run it with --pocket-model=ollama:rlvr-v1\n",
    )
    (made,) = server.made
    assert made["model"] == "rlvr-v1"
    assert [server.blobs[digest] for digest in made["files"].values()] == [written.read_bytes()]
    assert made["template"] == described().template
    assert made["parameters"] == described().parameters


def test_the_server_and_the_name_can_be_given(server: Ollama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "http://127.0.0.1:9")
    status, said = pocket("rlvr-v1", "--host", server.url, "--as", "mine:v2", "--json")
    assert status == 0, said
    assert json.loads(said) == {
        "model": "rlvr-v1",
        "ollama": "mine:v2",
        "server": f"Ollama 0.33.2 at {server.url}",
    }
    assert server.made[0]["model"] == "mine:v2"


def test_the_output_is_for_ollama_s_own_command(written: Path, tmp_path: Path) -> None:
    status, said = pocket("rlvr-v1", "--output", tmp_path / "my.gguf")
    assert status == 0, said
    assert (tmp_path / "my.gguf").read_bytes() == written.read_bytes()
    text = (tmp_path / "my.Modelfile").read_text()
    assert text.startswith("FROM ./my.gguf\n")
    assert f'TEMPLATE """{described().template}"""\n' in text
    assert text.endswith(
        'PARAMETER num_ctx 2048\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1\nPARAMETER stop "<|im_end|>"\n'
    )
    assert f"ollama create rlvr-v1 --file {tmp_path / 'my.Modelfile'}" in said
    status, said = pocket("rlvr-v1", "--output", tmp_path / "my.gguf")
    assert (status, said) == (2, f"pocket: {tmp_path / 'my.gguf'} exists: give another --output\n")


@pytest.mark.parametrize(
    ("version", "arguments", "said"),
    [
        ("0.29.3", ["rlvr-v1"], "Ollama 0.29.3 at {url} is too old: update it to 0.30.0 or newer"),
        ("0.33.2", ["oracle"], "model 'oracle' is no checkpoint (its backend is 'oracle')"),
        ("0.33.2", ["nothing"], "unknown model 'nothing'"),
        ("0.33.2", ["rlvr-v1", "--as", "a b"], "Ollama at {url} refused 'a b': invalid model name"),
        (
            "0.33.2",
            ["rlvr-v1", "--host", "http://127.0.0.1:9"],
            "start it with `ollama serve`, or give --host",
        ),
        ("0.33.2", ["rlvr-v1", "--host", "{url}/elsewhere"], "no Ollama"),
        ("0.33.2", ["rlvr-v1", "--dtype", "int8"], "unknown dtype 'int8'"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(
    server: Ollama, version: str, arguments: list[str], said: str
) -> None:
    server.version = version
    status, told = pocket(*(argument.format(url=server.url) for argument in arguments))
    assert status == 2
    assert said.format(url=server.url) in told
    assert len(told.strip().splitlines()) == 1
    assert server.made == []
