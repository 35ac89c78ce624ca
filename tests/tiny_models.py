"""Tiny models with random weights, made on the spot: real engines for the tests, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).parents[1] / "training" / "chat_template.jinja"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<function=", "</function>", "<parameter=", "</parameter>", "<tools>", "</tools>"),
]


def qwen3_5_template() -> str:
    """The chat template of Qwen3.5-0.8B, as TRL has it."""
    from trl.chat_template_utils import qwen3_5_nothink_chat_template

    return str(qwen3_5_nothink_chat_template)


def byte_tokenizer(template: str = "") -> Any:
    """One token a byte, ChatML's special tokens, the tags of tool calls; by default the tiny family's template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in TAGS])
    fast: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = template or TEMPLATE.read_text()
    return fast


def make_qwen3(directory: Path, *, seed: int = 0, window: int = 1024, **shape: Any) -> Path:
    """A dense Qwen3 with random weights, saved as safetensors."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = byte_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=window,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=0.2,
        **{
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            **shape,
        },
    )
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_qwen3_5(directory: Path, *, seed: int = 0, window: int = 1024, template: str = "") -> Path:
    """A Qwen3.5 text model with random weights: one layer of linear attention, one of full attention."""
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    tokenizer = byte_tokenizer(template)
    config = Qwen3_5TextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=window,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=0.2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    torch.manual_seed(seed)
    Qwen3_5ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
