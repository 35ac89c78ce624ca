"""A checkpoint as one GGUF file, for llama.cpp's ``llama-server`` and for Ollama, which runs it.

Dense Qwen3 only, which the tiny family is: its tensors need another name each and nothing else.

The tokenizer is the hard part, because llama.cpp does not read a pre-tokenizer from the file: it knows a fixed list
of them by name, and a checkpoint written under the wrong name runs, and reads other tokens than it was trained on.
So a tokenizer is written only if it is one that llama.cpp is known to read alike:

- Qwen's, under its name ``qwen2``.  llama.cpp leaves out its NFC normalization.
- the tiny family's.  No name in the list splits numbers into pairs of digits, so it is written for llama.cpp's other
  tokenizer, SentencePiece's, which has no pieces: it merges the neighbours whose token scores best, the leftmost
  first among equals.  With a merge's rank for a score that is BPE, and pieces need no borders where no token
  crosses one; pairs of digits, of one score all, form from the left as the pieces do.  One text is read otherwise:
  U+2581, SentencePiece's sign for a space, is read as a space.
- one without merges, whose tokens are bytes.

Of the special tokens only ChatML's own (``<|...|>``) are control tokens here: engines leave those out of what they
return, and the tags of calls and of thinking are what a reply is read by.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_pocket.backends.hf import base_of, load_model, load_tokenizer
from pytest_pocket.registry import ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURE = "qwen3"
DTYPES = ("auto", "float32", "bfloat16", "float16")
FAMILY_PIECES = r"[A-Za-z]+|[0-9]{1,2}|\n| +|[^A-Za-z0-9\n ]"
"""The tiny family's pre-tokenizer (``training.tokenizer.PIECES``, which a test holds this against)."""
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "\u2581"
_MARK = "{#- '<tool_call><function=' ~ tool_call.name ~ '>' -#}"
"""What llama.cpp knows by that calls are not spelled as Qwen3-Coder's, with newlines: it would force those on ours."""
_GENERATION = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llama.cpp's terms.

    ``model`` is ``gpt2`` (byte-level BPE: ``pre`` and ``merges`` count) or ``llama`` (SentencePiece: ``scores``
    do).  ``tokens`` and ``types`` (``gguf.TokenType``) are by id.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()


def write(model_dir: str, output: Path, adapter: str | None = None, dtype: str = "auto") -> None:
    """Write a checkpoint as a GGUF file, whole or not at all.  Raises ModelError.

    ``model_dir`` is a directory or a hub name, ``adapter`` a PEFT directory that is merged.  Matrices are in
    ``dtype``; ``auto`` is the checkpoint's own, and float32 with an adapter, because rounding a merged weight changes
    the model.  Vectors (the norms) are always float32.
    """
    import gguf

    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: use {', '.join(DTYPES)}")
    path, adapter = base_of(model_dir, adapter)
    config = _config(path)
    tokenizer = load_tokenizer(path)
    vocabulary = vocabulary_of(tokenizer, config.vocab_size)
    own = str(config.dtype).removeprefix("torch.")
    kind = _kind("float32" if dtype == "auto" and adapter else own if dtype == "auto" else dtype)
    model = load_model(path, adapter, "cpu", "float32")
    partial = output.with_name(f".{output.name}.partial")
    try:
        writer = gguf.GGUFWriter(partial, ARCHITECTURE)
        _add_shape(writer, config, kind)
        _add_vocabulary(writer, vocabulary, tokenizer, config)
        for name, tensor, as_kind in _tensors(model, config, kind):
            writer.add_tensor(name, tensor, raw_dtype=as_kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, output)
    except OSError as error:
        raise ModelError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def llama_template(template: str) -> str:
    """A chat template as llama.cpp reads it best; it renders the same.

    The tags that only training needs (``{% generation %}``) become empty comments, which trim the space around them
    as the tags did.  Calls that are spelled without newlines between their tags are marked as such (see ``_MARK``).
    """
    mark = _MARK if "<tool_call><function=" in template else ""
    return mark + _GENERATION.sub(r"{#\1 \2#}", template)


def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """A transformers tokenizer in llama.cpp's terms, filled up to ``size`` tokens.

    Raises ModelError where llama.cpp would read other tokens.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe, pieces = data["model"], _pieces(data["pre_tokenizer"])
    merges = [tuple(merge) for merge in bpe.get("merges", ())]
    added = {token["id"]: token for token in data["added_tokens"]}
    if bpe["type"] != "BPE" or pieces is None or data["normalizer"] not in (None, {"type": "NFC"}):
        raise ModelError(f"the tokenizer ({bpe['type']}) is no byte-level BPE: {_OTHER_ENGINE}")
    texts = {index: text for text, index in bpe["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    ids = range(max(size, max(texts) + 1))
    types = tuple(_type(added.get(index), index in texts) for index in ids)
    tokens = tuple(texts.get(index, f"[PAD{index}]") for index in ids)
    if pieces == FAMILY_PIECES:
        return _by_scores(tokens, types, merges, added.keys())
    if merges and pieces != QWEN_PIECES:
        raise ModelError(f"llama.cpp has no pre-tokenizer for {pieces!r}: {_OTHER_ENGINE}")
    return Vocabulary("gpt2", "qwen2", tokens, types, merges=tuple(" ".join(merge) for merge in merges))


_OTHER_ENGINE = "run it with another engine, as hf:PATH or vllm:PATH"
_ELSEWHERE = (
    "convert it with llama.cpp's convert_hf_to_gguf.py, or give `ollama create` its folder of safetensors"
)


def _config(path: str) -> Any:
    """The configuration of a model that can be converted.  Raises ModelError."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(
            path, local_files_only=Path(path).is_dir(), trust_remote_code=False
        )
    except Exception as error:
        raise ModelError(
            f"cannot read the configuration of {path!r}: {str(error).splitlines()[0]}"
        ) from error
    if config.model_type != ARCHITECTURE:
        raise ModelError(
            f"architecture {config.model_type!r} of {path} is not converted here, only {ARCHITECTURE!r}: {_ELSEWHERE}"
        )
    rope = config.rope_parameters.get("rope_type", "default")
    unusual = {f"rope_type {rope!r}": rope != "default", "attention_bias": config.attention_bias}
    unusual["use_sliding_window"] = config.use_sliding_window
    if named := [name for name, given in unusual.items() if given]:
        raise ModelError(f"{', '.join(named)} of {path} is not converted here: {_ELSEWHERE}")
    return config


def _kind(dtype: str) -> Any:
    import gguf

    kinds = gguf.GGMLQuantizationType
    return {"bfloat16": kinds.BF16, "float16": kinds.F16}.get(dtype, kinds.F32)


def _add_shape(writer: GGUFWriter, config: Any, kind: Any) -> None:
    import gguf

    files = gguf.LlamaFileType
    writer.add_file_type({"BF16": files.MOSTLY_BF16, "F16": files.MOSTLY_F16}.get(kind.name, files.ALL_F32))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, tokenizer: Any, config: Any) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(False)
    else:
        writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(False)
    ends = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else config.eos_token_id
    if isinstance(ends, int):
        writer.add_eos_token_id(ends)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(llama_template(tokenizer.chat_template))


def _tensors(model: Any, config: Any, kind: Any) -> Iterator[tuple[str, Any, Any]]:
    """The model's tensors: the name in a GGUF file, the data, and its type."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        known = names.get_name(name, try_suffixes=(".weight",))
        if known is None:
            raise ModelError(f"the weight {name!r} is unknown to the gguf package: {_ELSEWHERE}")
        as_kind = kind if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32
        yield known, gguf.quants.quantize(tensor.numpy(), as_kind), as_kind


def _pieces(pre_tokenizer: Any) -> str | None:
    """The regular expression that a byte-level tokenizer splits by; empty without one, None for other tokenizers."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    match steps:
        case [{"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}]:
            return ""
        case [
            {"type": "Split", "pattern": {"Regex": str(pieces)}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ]:
            return pieces
    return None


def _type(added: Any, known: bool) -> int:
    import gguf

    if added is not None:
        control = added["special"] and added["content"].startswith("<|")
        return int(gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED)
    return int(gguf.TokenType.NORMAL if known else gguf.TokenType.UNUSED)


def _by_scores(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[tuple[str, ...]], added: Any
) -> Vocabulary:
    """The tiny family's vocabulary for SentencePiece's tokenizer.  Raises ModelError where that reads other tokens."""
    import gguf
    from gguf.vocab import bytes_to_unicode

    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    ranks = {"".join(merge): rank for rank, merge in enumerate(merges)}
    pairs = {text: rank for text, rank in ranks.items() if text.isdigit()}
    plain = {_spelled(text, byte_of) for index, text in enumerate(tokens) if index not in added}
    crossing = [text for text in ranks if not _one_piece(text, byte_of)]
    formed = [
        tokens[index]
        for index in added
        if any({tokens[index][:cut], tokens[index][cut:]} <= plain for cut in range(1, len(tokens[index])))
    ]
    if len(ranks) != len(merges) or len(pairs) not in (0, 100) or crossing or formed:
        odd = ", ".join(map(repr, [*crossing, *formed][:3])) or f"{len(pairs)} pairs of digits"
        raise ModelError(f"llama.cpp would read other tokens than this tokenizer ({odd}): train it anew")
    one_score = min(pairs.values(), default=0)
    texts, kinds, scores = [], [], []
    for index, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        scores.append(-float(one_score if text in pairs else ranks.get(text, 0)))
        if index in added or (text not in byte_of and text not in ranks):
            texts.append(text)
            kinds.append(kind)
            continue
        spelled = _spelled(text, byte_of)
        texts.append(spelled)
        kinds.append(int(gguf.TokenType.BYTE) if spelled.startswith("<0x") else kind)
    return Vocabulary("llama", "default", tuple(texts), tuple(kinds), scores=tuple(scores))


def _spelled(text: str, byte_of: dict[str, int]) -> str:
    """A token as SentencePiece writes it: text as it is, a space as its sign, any other byte by its number."""
    raw = bytes(byte_of.get(char, 0) for char in text)
    if len(raw) == 1 and not 0x20 <= raw[0] < 0x7F:
        return f"<0x{raw[0]:02X}>"
    return raw.decode(errors="replace").replace(" ", SPACE)


def _one_piece(text: str, byte_of: dict[str, int]) -> bool:
    """Whether a merged token never reaches over a border of pieces, nor into a character of several bytes."""
    raw = bytes(byte_of.get(char, 0) for char in text)
    return raw.isascii() and re.fullmatch(FAMILY_PIECES, raw.decode()) is not None
