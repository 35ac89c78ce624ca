"""What batching buys: replies and episodes per second of the ``hf`` backend against ``generate``, on a model of the suite.

Three ways to answer the same greedy requests, taking turns so that a busy machine slows them alike:
``generate`` one request at a time, ``generate`` in static batches, and the backend with threads in flight.
The requests are the first turns of the tasks on dev, with the tools, as an episode sends them.  Then whole episodes on
dev, greedy, with the raw prompt: played one after the other by ``generate``, and by the backend with as many in flight.

    python tests/bench/bench_hf.py --model sft-run6 --out reports/bench/hf.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setting import setting, write

from pytest_pocket import task_list
from pytest_pocket.backends.hf import HFBackend
from pytest_pocket.chat import Backend, ChatReply, ChatRequest, Message, Sampling
from pytest_pocket.conditions import Condition
from pytest_pocket.parsing import parse
from pytest_pocket.registry import Registry
from pytest_pocket.task import instance_seed
from pytest_pocket.tools import SCHEMAS
from pytest_pocket.training.evaluate import episodes

IN_FLIGHT = 32
INSTANCES = 5
PLAYED = 12
"""Instances of each task of which whole episodes are played."""
MAX_TOKENS = 96


def requests() -> list[ChatRequest]:
    """The first turn of the first dev instances of every task."""
    return [
        ChatRequest(
            (Message("user", task.build(instance_seed("dev", index)).prompt),),
            SCHEMAS,
            Sampling(max_tokens=MAX_TOKENS),
        )
        for task in task_list.shipped().values()
        for index in range(INSTANCES)
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


class Generate:
    """``generate`` as an engine: one request at a time, greedy."""

    def __init__(self, backend: HFBackend) -> None:
        self._backend = backend

    def chat(self, request: ChatRequest) -> ChatReply:
        """Answer one request."""
        import torch

        tokenizer, model = self._backend._tokenizer, self._backend._model
        prompt = self._backend._render(request.messages, request.tools, think=False)
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([prompt]), max_new_tokens=request.sampling.max_tokens, do_sample=False
            )
        said = output[0][len(prompt) :].tolist()
        ended = said[-1] == tokenizer.eos_token_id
        text = self._backend._decode(said[:-1] if ended else said)
        parsed = parse(text, thinking_open=self._backend._thinking_open[False], schemas=request.tools)
        return ChatReply(
            parsed.content,
            calls=parsed.calls,
            malformed=parsed.malformed,
            finish="stop" if ended else "length",
            prompt_tokens=len(prompt),
            completion_tokens=len(said),
        )

    def cancel(self) -> None:
        """Nothing is in flight."""

    def close(self) -> None:
        """The backend closes the model."""


def whole_episodes(backend: HFBackend, repeats: int) -> dict[str, Any]:
    """Episodes per second of both ways, the medians, and their ratio."""
    ways: dict[str, tuple[Backend, int]] = {
        "one_at_a_time": (Generate(backend), 1),
        "in_flight": (backend, IN_FLIGHT),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    passed = set()
    for _ in range(repeats):
        for way, (engine, threads) in ways.items():
            backend.weights_changed()
            start = time.perf_counter()
            played = episodes(engine, "dev", PLAYED, Condition("raw"), threads)
            rates[way].append(round(len(played) / (time.perf_counter() - start), 2))
            if broken := [episode.detail for episode in played if episode.invalid]:
                raise SystemExit(broken[0])
            passed.add(sum(episode.outcome == "passed" for episode in played))
    medians = {way: statistics.median(values) for way, values in rates.items()}
    return {
        "played": len(played),
        "passed": sorted(passed),
        "episodes_per_second": rates,
        "medians": medians,
        "ratio": round(medians["in_flight"] / medians["one_at_a_time"], 2),
    }


def measure(model: str, repeats: int) -> dict[str, Any]:
    """Requests per second of each way: every repeat, the medians, and their ratios to one at a time; and episodes."""

    ways: list[Callable[[HFBackend], None]] = [one_at_a_time, static_batches, in_flight]
    rates: dict[str, list[float]] = {way.__name__: [] for way in ways}
    backend = HFBackend(Registry().resolve(model).target)
    parameters = sum(weight.numel() for weight in backend._model.parameters())
    count = len(requests())
    for repeat in range(repeats + 1):
        for way in ways:
            backend.weights_changed()  # or every repeat's prompts would be known from the one before
            start = time.perf_counter()
            way(backend)
            if repeat:  # the first is for warming up
                rates[way.__name__].append(round(count / (time.perf_counter() - start), 2))
    whole = whole_episodes(backend, max(1, repeats // 2))
    backend.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "model": model,
        "parameters": parameters,
        "in_flight": IN_FLIGHT,
        "requests_per_second": rates,
        "medians": medians,
        "ratios": {name: round(value / medians["one_at_a_time"], 2) for name, value in medians.items()},
        "episodes": whole,
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sft-run6")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, help="torch threads; by default as many as torch takes by itself"
    )
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    where = setting("torch", "transformers", torch_threads=torch.get_num_threads())
    result = {**measure(options.model, options.repeats), "setting": where}
    write(result, options.out)
    for name, median in result["medians"].items():
        print(f"{name:16} {median:8.1f} requests/s  x{result['ratios'][name]:.2f}")
    print(f"whole episodes: {result['episodes']['medians']} a second, x{result['episodes']['ratio']:.2f}")


if __name__ == "__main__":
    main()
