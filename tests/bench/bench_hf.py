"""What batching buys: requests per second of the ``hf`` backend against ``generate``, on a tiny random model.

Three ways to answer the same greedy requests, taking turns so that a busy machine slows them alike:
``generate`` one request at a time, ``generate`` in static batches, and the backend with threads in flight.
Run it with ``tests`` on PYTHONPATH: ``PYTHONPATH=tests python tests/bench/bench_hf.py OUTPUT.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tiny_models import make_qwen3

from pytest_pocket.backends.hf import HFBackend
from pytest_pocket.chat import ChatRequest, Message, Sampling

IN_FLIGHT = 32
REQUESTS = 96
REPEATS = 5
SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
TOOL = {
    "type": "function",
    "function": {
        "name": "Read",
        "parameters": {"type": "object", "properties": {"file_path": {"type": "string"}}},
    },
}


def requests() -> list[ChatRequest]:
    """Prompts of 90 to 150 tokens, replies of 8 to 48: short and long ones mixed, as in an agent's loop."""
    return [
        ChatRequest(
            (Message("user", f"{number}: " + "What does the file say? " * (1 + number % 3)),),
            (TOOL,),
            Sampling(max_tokens=8 + (number * 7) % 41),
        )
        for number in range(REQUESTS)
    ]


def generate(backend: HFBackend, batch: Sequence[ChatRequest]) -> None:
    """Answer a batch with ``model.generate``, rendering and decoding included."""
    import torch

    tokenizer, model = backend._tokenizer, backend._model
    prompts = [backend._render(request.messages, request.tools, think=False) for request in batch]
    longest = max(request.sampling.max_tokens for request in batch)
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**padded, max_new_tokens=longest, do_sample=False)
    for row, request in zip(output, batch, strict=True):
        start = padded["input_ids"].shape[1]
        tokenizer.decode(row[start : start + request.sampling.max_tokens])


def one_at_a_time(backend: HFBackend) -> None:
    """Each request by its own ``generate``."""
    for request in requests():
        generate(backend, [request])


def static_batches(backend: HFBackend) -> None:
    """``generate`` over as many requests as are in flight; each batch waits for its longest reply."""
    todo = requests()
    for start in range(0, len(todo), IN_FLIGHT):
        generate(backend, todo[start : start + IN_FLIGHT])


def in_flight(backend: HFBackend) -> None:
    """The backend, called from as many threads as episodes are in flight."""
    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        list(threads.map(backend.chat, requests()))


def measure(repeats: int = REPEATS) -> dict[str, Any]:
    """Requests per second of each way: every repeat, the medians, and their ratios to one at a time."""
    import torch

    ways: list[Callable[[HFBackend], None]] = [one_at_a_time, static_batches, in_flight]
    rates: dict[str, list[float]] = {way.__name__: [] for way in ways}
    with tempfile.TemporaryDirectory() as directory:
        backend = HFBackend(str(make_qwen3(Path(directory), num_key_value_heads=2, head_dim=64, **SHAPE)))
        parameters = sum(weight.numel() for weight in backend._model.parameters())
        for repeat in range(repeats + 1):
            for way in ways:
                start = time.perf_counter()
                way(backend)
                if repeat:  # the first is for warming up
                    rates[way.__name__].append(REQUESTS / (time.perf_counter() - start))
        backend.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "parameters": parameters,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "in_flight": IN_FLIGHT,
        "requests_per_second": rates,
        "medians": medians,
        "ratios": {name: value / medians["one_at_a_time"] for name, value in medians.items()},
    }


def main() -> None:
    """Measure, print, and write JSON to the path given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    result = measure()
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    for name, median in result["medians"].items():
        print(f"{name:16} {median:8.1f} requests/s  x{result['ratios'][name]:.2f}")


if __name__ == "__main__":
    main()
