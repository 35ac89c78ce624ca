"""What one step of LoRA on the text model of Qwen3.5-0.8B keeps in memory, counted on the meta device.

No weight is allocated and nothing is computed: the tensors that the backward pass saves are counted, of each storage
once.  Recomputed layers keep their inputs alone, and one layer at a time is whole again.

    python tests/bench/bench_memory.py
"""

from __future__ import annotations

import weakref
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, masking_utils

LAYERS, HIDDEN, VOCABULARY = 24, 1024, 248_320
PUBLISHED = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "intermediate_size": 3584,
    "tie_word_embeddings": True,
}
RANK = 32
TARGETS = 0.3
"""The share of tokens that are the assistant's; of our traces it is about that."""
GIB = 2**30


class Saved:
    """Bytes of the storages that are saved for the backward pass."""

    def __init__(self) -> None:
        self.live = 0
        self._held: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> Any:
        """Count a tensor that is not a weight, for as long as it is held."""
        if isinstance(tensor, torch.nn.Parameter):
            return tensor
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self.live += size * (key not in self._held)
        self._held[key] = self._held.get(key, 0) + 1

        class Held:
            held = tensor

        held = Held()
        weakref.finalize(held, self._drop, key, size)
        return held

    def _drop(self, key: int, size: int) -> None:
        self._held[key] -= 1
        if not self._held[key]:
            del self._held[key]
            self.live -= size


def unpack(held: Any) -> torch.Tensor:
    """The tensor again."""
    return held if isinstance(held, torch.Tensor) else held.held


def built(checkpointing: bool) -> Any:
    """The model on the meta device: frozen bfloat16, LoRA in float32."""
    with torch.device("meta"):
        model: Any = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**PUBLISHED)).to(torch.bfloat16)
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def layers_bytes(tokens: int, checkpointing: bool) -> int:
    """What the layers save for a batch of that many tokens, in rows of 1,024."""
    model = built(checkpointing)
    ids = torch.zeros(tokens // 1024, 1024, dtype=torch.long, device="meta")
    saved = Saved()
    with (
        mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None),
        torch.autograd.graph.saved_tensors_hooks(saved.pack, unpack),
    ):
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        assert hidden.shape[-1] == HIDDEN
        return saved.live


def main() -> None:
    """Print the plan for some batches."""
    model = built(False)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"frozen {frozen:,} x 2 bytes = {2 * frozen / GIB:.2f} GiB")
    print(f"LoRA of rank {RANK} {lora:,} x 16 bytes (weight, gradient, AdamW) = {16 * lora / GIB:.2f} GiB")
    table = Table("tokens", "layers' inputs", "one layer whole", "logits", "in all", "without recomputing")
    for tokens in (2048, 4096, 8192):
        whole, inputs = layers_bytes(tokens, False), layers_bytes(tokens, True)
        # bfloat16, float32, its log-softmax and the gradient of each.
        logits = int(TARGETS * tokens) * VOCABULARY * (2 + 4 + 4 + 4)
        fixed = 2 * frozen + 16 * lora + logits
        sums = (inputs, whole // LAYERS, logits, fixed + inputs + whole // LAYERS, fixed + whole)
        table.add_row(str(tokens), *(f"{each / GIB:.2f} GiB" for each in sums))
    Console().print(table)


if __name__ == "__main__":
    main()
