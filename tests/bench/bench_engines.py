"""vLLM driven by the suite against vLLM's own load generator: tokens per second, and what prefix caching saves.

One server, the same first turns of the tasks with the same tools, the same number of tokens for each (the end
token is ignored), the same number of requests at a time; all ways take turns.  The suite asks for every token's id, in
parts of a stream, and for best-of-N for log-probabilities besides; the generator asks for none, and gets nearly no
parts where the server's parser holds calls back, or with ``SAME`` for what the suite does.  Then episodes are played,
and the server tells how many of their prompts' tokens it had computed before.  ``vllm`` must be on the PATH.

    python tests/bench/bench_engines.py --out reports/bench/engines.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from bench_hf import MAX_TOKENS, requests
from setting import setting, write

from pytest_pocket.backends.vllm import VLLMBackend
from pytest_pocket.chat import ChatRequest
from pytest_pocket.conditions import Condition
from pytest_pocket.registry import Registry
from pytest_pocket.tools import SCHEMAS
from pytest_pocket.training.evaluate import episodes

IN_FLIGHT = 16
SAME = {"return_token_ids": True}


def by_the_suite(backend: VLLMBackend, asked: list[ChatRequest]) -> float:
    """Tokens per second of the backend, called from as many threads as episodes are in flight."""
    start = time.perf_counter()
    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        replies = list(threads.map(backend.chat, asked))
    return sum(reply.completion_tokens for reply in replies) / (time.perf_counter() - start)


def by_its_own(
    name: str, tokenizer: str, base_url: str, asked: list[ChatRequest], more: dict[str, Any]
) -> float:
    """Tokens per second of ``vllm bench serve``, which asks for ``more``."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.jsonl")
        prompts.write_text("".join(json.dumps({"prompt": each.messages[0].content}) + "\n" for each in asked))
        command = ["vllm", "bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
        command += ["--base-url", base_url.removesuffix("/v1"), "--model", name, "--tokenizer", tokenizer]
        command += ["--dataset-name", "custom", "--dataset-path", str(prompts), "--skip-chat-template"]
        command += ["--custom-output-len", str(MAX_TOKENS), "--ignore-eos", "--temperature", "0"]
        command += ["--num-prompts", str(len(asked)), "--max-concurrency", str(IN_FLIGHT), "--disable-tqdm"]
        body = {"tools": SCHEMAS, "chat_template_kwargs": {"enable_thinking": False}, **more}
        command += ["--disable-shuffle", "--extra-body", json.dumps(body)]
        command += ["--save-result", "--result-dir", folder, "--result-filename", "result.json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
        result = json.loads(Path(folder, "result.json").read_text())
    if result["completed"] != len(asked):
        raise SystemExit(f"vllm bench serve completed {result['completed']} of {len(asked)} requests")
    return float(result["output_throughput"])


def counters(base_url: str) -> dict[str, float]:
    """What the server counts of its prefix cache, in tokens."""
    lines = httpx.get(base_url.removesuffix("/v1") + "/metrics", trust_env=False).text.splitlines()
    found = dict.fromkeys(("queries", "hits"), 0.0)
    for line in lines:
        for key in found:
            if line.startswith(f"vllm:prefix_cache_{key}_total{{"):
                found[key] += float(line.rsplit(maxsplit=1)[1])
    return found


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Tokens per second both ways, each repeat and the medians, and the share of prompt tokens that were cached."""
    registry = Registry()
    model = registry.resolve(f"vllm:{name}")
    backend = registry.build(model)
    assert isinstance(backend, VLLMBackend)
    base_url = backend.base_url
    version = httpx.get(base_url.removesuffix("/v1") + "/version", trust_env=False).json()["version"]
    asked = [replace(each, sampling=replace(each.sampling, max_tokens=MAX_TOKENS)) for each in requests()]
    candidates = [replace(each, sampling=replace(each.sampling, logprob=True)) for each in asked]
    endless = VLLMBackend(backend.name, base_url, extra={"ignore_eos": True}, reference=model.target)
    try:
        theirs = (backend.name, model.target, base_url, asked)
        ways = {
            "suite": lambda: by_the_suite(endless, asked),
            "suite, as for best-of-N": lambda: by_the_suite(endless, candidates),
            "vllm bench serve": lambda: by_its_own(*theirs, {}),
            "the same fields": lambda: by_its_own(*theirs, SAME),
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(repeats + 1):
            # Each way goes first as often as the others: what came before may leave the machine slower.
            turns = [*ways][repeat % len(ways) :] + [*ways][: repeat % len(ways)]
            for way in turns:
                rate = ways[way]()
                if repeat:  # the first round is for warming up
                    rates[way].append(round(rate, 1))
        before = counters(base_url)
        played = episodes(backend, "dev", 2, Condition("raw"), IN_FLIGHT)
        after = counters(base_url)
    finally:
        endless.close()
        backend.close()
    medians = {way: statistics.median(values) for way, values in rates.items()}
    queried = after["queries"] - before["queries"]
    return {
        "model": name,
        "vllm": version,
        "in_flight": IN_FLIGHT,
        "requests": len(asked),
        "tokens_a_request": MAX_TOKENS,
        "tokens_per_second": rates,
        "medians": medians,
        "ratio": round(medians["suite"] / medians["vllm bench serve"], 3),
        "ratio_best_of": round(medians["suite, as for best-of-N"] / medians["vllm bench serve"], 3),
        "ratio_same_fields": round(medians["suite"] / medians["the same fields"], 3),
        "prefix_cache": {
            "episodes": len(played),
            "turns": sum(len(episode.replies) for episode in played),
            "prompt_tokens": int(queried),
            "found_in_the_cache": round((after["hits"] - before["hits"]) / queried, 3),
        },
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="rlvr-v1")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    where = setting("openai", repeats=options.repeats)
    result = {**measure(options.model, options.repeats), "setting": where}
    write(result, options.out)
    print(
        json.dumps(
            {
                key: result[key]
                for key in ("medians", "ratio", "ratio_best_of", "ratio_same_fields", "prefix_cache")
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
