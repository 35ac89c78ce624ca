"""Stock TRL's trainers beside ours, on the same tiny model, the same texts and the same instances.

    python tests/bench/bench_trl.py --out reports/bench/trl.json

SFT: steps of four traces each, AdamW in all, Muon in ours besides.  GRPO: groups of eight attempts at the same training
instances; TRL's ``GRPOTrainer`` plays them through ``environment_factory`` over our sandbox and tools, ours through the
suite's loop.  Both end an episode at the same limits: so many tokens a reply, so many replies, and the first reply that
holds no readable call, which the suite's loop otherwise hands back.  Their tokens are counted alike: those that the
model wrote, and its prompts'.  CPU seconds are of the process and its sandboxes, and say more than wall seconds on a
shared machine.  All alternate; medians of the repeats.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from setting import setting, write
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.chat_template_utils import qwen3_5_template

from pytest_pocket import sandbox, task_list, tools
from pytest_pocket.backends.hf import HFBackend
from pytest_pocket.chat import Backend, ChatReply, ChatRequest, ToolCall
from pytest_pocket.episode import Workshop, play
from pytest_pocket.registry import shipped
from pytest_pocket.sandbox import Sandbox
from pytest_pocket.task import Final, instance_seed
from pytest_pocket.training import data, fit, recipe, rlvr

PARENTS = ("sft-run6", "base")
"""Whose rollouts: of a model so sure that the attempts of a group are alike, and of one whose are all different."""
TRACES_A_STEP = 4
GROUP = 8
PLAN = recipe.load("tiny")
ROOM = 2048
"""The tiny models' window: TRL counts tools' results as part of a completion, the suite does not."""


def loaded(parent: str = "sft-run6") -> tuple[Any, Any]:
    """A shipped model and its tokenizer."""
    path = shipped() / parent
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(path, local_files_only=True)


def spent() -> float:
    """CPU seconds of this process and of the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


@contextmanager
def timed(into: dict[str, float]) -> Iterator[None]:
    """Put the wall and CPU seconds of what is done inside into a table."""
    wall, cpu = time.monotonic(), spent()
    yield
    into |= {"wall_seconds": round(time.monotonic() - wall, 2), "cpu_seconds": round(spent() - cpu, 2)}


def texts(tokenizer: Any, steps: int) -> list[fit.Rendered]:
    """What is learned from: oracles' traces of training instances."""
    workshop, teacher = Workshop(sandbox.select("auto")), data.Teacher(0.0, 0)
    names = list(task_list.shipped())
    found = []
    for number in range(TRACES_A_STEP * steps):
        task = task_list.find(names[number % len(names)])
        episode = play(task, task.build(instance_seed("train", number)), teacher, workshop)
        found.append(fit.render(tokenizer, data.trace(episode, False), "raw", think=False, everything=False))
    return found


def ours_sft(found: list[fit.Rendered], muon_lr: float) -> dict[str, float]:
    """Our loop over the texts."""
    model, _ = loaded()
    tokens = sum(len(text.ids) for text in found)
    plan = replace(PLAN.sft, tokens=tokens, muon_lr=muon_lr, adam_lr=1e-4)
    batches = ([found[start : start + TRACES_A_STEP]] for start in range(0, len(found), TRACES_A_STEP))
    table: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, timed(table):
        fit.fit_model(model, batches, plan, fit.State(Path(folder) / "state"))
    return table


def trl_sft(found: list[fit.Rendered]) -> dict[str, float]:
    """TRL's SFTTrainer over the same ids, masked alike."""
    model, tokenizer = loaded()
    rows = Dataset.from_list([{"input_ids": text.ids, "assistant_masks": text.targets} for text in found])
    table: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder, per_device_train_batch_size=TRACES_A_STEP, num_train_epochs=1, learning_rate=1e-4, report_to=[],
            save_strategy="no", logging_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
            disable_tqdm=True, max_length=None,
        )  # fmt: skip
        trainer = SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
        with timed(table):
            trainer.train()
    return table


class Environment:
    """Our sandbox and tools as TRL wants an environment."""

    workshop = Workshop(sandbox.select("auto"))

    def __init__(self) -> None:
        self._open: Sandbox | None = None
        self._calls = 0

    def reset(self, task: str, seed: int, **row: Any) -> None:
        """A fresh workspace for an instance."""
        self._end()
        self._task = task_list.find(task)
        self._instance = self._task.build(seed)
        self._open = self.workshop.open(self._instance.files)
        if self._instance.setup:
            self._open.run(self._instance.setup)
        self._before = self._open.snapshot()
        self._calls = 0

    def _end(self) -> None:
        if self._open:
            self.workshop.close(self._open)
        self._open = None

    def _run(self, name: str, arguments: dict[str, Any]) -> str:
        assert self._open
        self._calls += 1
        given = {key: value for key, value in arguments.items() if value is not None}
        return tools.run(ToolCall(name, given), self._open).text

    def _reward(self, answer: str, stopped: bool) -> float:
        assert self._open
        after = self._open.snapshot()
        self._end()
        final = Final(answer, self._before, after, stopped, self._calls, self.workshop.probe)
        return self._task.reward(self._instance, final).reward

    def Read(self, file_path: str, offset: int | None = None, limit: int | None = None) -> str:
        """Read a file.

        Args:
            file_path: The path.
            offset: The first line.
            limit: How many lines.
        """
        return self._run("Read", {"file_path": file_path, "offset": offset, "limit": limit})

    def Write(self, file_path: str, content: str) -> str:
        """Write a file.

        Args:
            file_path: The path.
            content: What it holds.
        """
        return self._run("Write", {"file_path": file_path, "content": content})

    def Edit(self, file_path: str, old_string: str, new_string: str, replace_all: bool | None = None) -> str:
        """Replace text in a file.

        Args:
            file_path: The path.
            old_string: What stands there.
            new_string: What shall.
            replace_all: Everywhere.
        """
        return self._run(
            "Edit",
            {
                "file_path": file_path,
                "old_string": old_string,
                "new_string": new_string,
                "replace_all": replace_all,
            },
        )

    def Bash(self, command: str, timeout: int | None = None) -> str:
        """Run a command.

        Args:
            command: The command.
            timeout: Milliseconds.
        """
        return self._run("Bash", {"command": command, "timeout": timeout})

    def Glob(self, pattern: str, path: str | None = None) -> str:
        """Find files.

        Args:
            pattern: The pattern.
            path: The folder.
        """
        return self._run("Glob", {"pattern": pattern, "path": path})

    def Grep(self, pattern: str, path: str | None = None, glob: str | None = None) -> str:
        """Search files.

        Args:
            pattern: The pattern.
            path: The folder.
            glob: Which files.
        """
        return self._run("Grep", {"pattern": pattern, "path": path, "glob": glob})


def reward(completions: list[Any], environments: list[Environment], **_: Any) -> list[float]:
    """The tasks' own rewards."""
    return [
        each._reward(str(said[-1].get("content") or ""), said[-1]["role"] == "assistant")
        for said, each in zip(completions, environments, strict=True)
    ]


class Unforgiving:
    """An engine whose malformed calls are answers: they end an episode, as in TRL."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def chat(self, request: ChatRequest) -> ChatReply:
        """Answer one request."""
        return replace(self._backend.chat(request), malformed="")

    def cancel(self) -> None:
        """Cancel the engine's requests."""
        self._backend.cancel()

    def close(self) -> None:
        """Close the engine."""
        self._backend.close()


def rl(instances: int) -> recipe.RL:
    """Both sides' groups: of the raw prompt, with one update a step, replies alone limited."""
    plan = PLAN.rlvr
    return replace(
        plan, prompts={"raw": 1.0}, think=0.0, temperature=1.0, instances=instances, group=GROUP, updates=1, muon_lr=0.0,
        tokens=plan.turns * plan.reply_tokens,
    )  # fmt: skip


def trl_grpo(parent: str, instances: int, steps: int) -> dict[str, float]:
    """TRL's GRPOTrainer, its environments over our sandbox."""
    model, tokenizer = loaded(parent)
    tokenizer.response_template = qwen3_5_template
    plan, rows = rl(instances), []
    for instance, condition in (each for step in range(steps) for each in rlvr.draws(plan, step)):
        prompt = [message.to_dict() for message in condition.messages(instance.prompt)]
        rows.append({"prompt": prompt, "task": instance.task, "seed": instance.seed})
    table: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            folder, per_device_train_batch_size=GROUP, gradient_accumulation_steps=instances, num_generations=GROUP,
            max_steps=steps, max_completion_length=ROOM, generation_kwargs={"max_new_tokens": plan.reply_tokens},
            max_tool_calling_iterations=plan.turns - 1, learning_rate=1e-4, temperature=1.0, beta=0.0, report_to=[],
            save_strategy="no", logging_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model,
            reward,
            settings,
            Dataset.from_list(rows),
            processing_class=tokenizer,
            environment_factory=Environment,
        )
        with timed(table):
            trainer.train()
    logged = [line for line in trainer.state.log_history if "reward" in line]
    written = sum(line["completions/mean_length"] for line in logged) * instances * GROUP
    return {
        **table,
        "reward": round(sum(line["reward"] for line in logged) / len(logged), 3),
        "tokens_written": round(written),
        "tokens_with_prompts": round(logged[-1]["num_tokens"]),
    }


def ours_grpo(parent: str, instances: int, steps: int) -> dict[str, float]:
    """Our loop with one update a step; it is made to learn from all groups, as TRL's does."""
    model, tokenizer = loaded(parent)
    plan = rl(instances)
    optimizers = fit.optimizers_of(model, 0.0, 1e-4)
    workshop = Workshop(sandbox.select("auto"))
    backend = HFBackend.around(model.eval(), tokenizer)
    engine = Unforgiving(backend)
    rewards, distinct, written, prompts = [], 0, 0, 0
    table: dict[str, float] = {}
    try:
        with timed(table):
            for step in range(steps):
                played = [each for group in rlvr.rollouts(plan, step, engine, workshop) for each in group]
                backend.weights_changed()
                rewards += [episode.reward for episode in played]
                written += sum(episode.completion_tokens for episode in played)
                prompts += sum(len(episode.replies[0].prompt_ids) for episode in played)
                found = [
                    rlvr.Sample(text, episode.reward - 0.5)
                    for episode in played
                    for text in rlvr.sequences(rlvr.turns_of(episode), "raw")
                ]
                distinct += len(rlvr.alike(found))
                rlvr.update(model, None, optimizers, found, plan, str(step))
    finally:
        backend.close()
    return {
        **table,
        "reward": round(sum(rewards) / len(rewards), 3),
        "tokens_written": written,
        "tokens_with_prompts": written + prompts,
        "distinct_texts": distinct,
    }


def rates(samples: dict[str, list[dict[str, float]]], unit: str, count: int) -> dict[str, dict[str, float]]:
    """For each side the medians of its figures, and how many of a unit it did a second."""
    found = {}
    for side, each in samples.items():
        table = {name: round(statistics.median(one[name] for one in each), 3) for name in each[0]}
        table[f"{unit}_per_cpu_second"] = round(count / table["cpu_seconds"], 2)
        table[f"{unit}_per_second"] = round(count / table["wall_seconds"], 2)
        found[side] = table
    return found


def _ratio(table: dict[str, dict[str, float]], unit: str) -> float:
    """Ours against TRL's."""
    return round(table["ours"][unit] / table["trl"][unit], 2)


def main() -> None:
    """Measure, print, and write by option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of SFT")
    parser.add_argument("--rollout-steps", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--instances", type=int, default=8, help="of a step of GRPO, eight attempts each")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    where = setting("trl", "transformers", "torch", torch_threads=1, repeats=options.repeats)
    found = texts(loaded()[1], options.steps)
    tokens = sum(len(text.ids) for text in found)
    batch = (options.instances, options.rollout_steps)
    rollouts = options.rollout_steps * options.instances * GROUP
    stages: dict[str, dict[str, Callable[[], dict[str, float]]]] = {
        "sft": {
            "trl": lambda: trl_sft(found),
            "ours": lambda: ours_sft(found, 0.0),
            "ours_with_muon": lambda: ours_sft(found, 0.002),
        }
    }
    for parent in PARENTS:
        stages[parent] = {
            "trl": functools.partial(trl_grpo, parent, *batch),
            "ours": functools.partial(ours_grpo, parent, *batch),
        }
    samples: dict[str, dict[str, list[dict[str, float]]]] = {
        stage: {side: [] for side in sides} for stage, sides in stages.items()
    }
    order = [(stage, side) for stage, sides in stages.items() for side in sides]
    for _ in range(options.repeats):
        order.append(order.pop(0))  # nobody is always the first
        for stage, side in order:
            samples[stage][side].append(stages[stage][side]())
    sft = rates(samples["sft"], "tokens", tokens)
    grpo = {parent: rates(samples[parent], "rollouts", rollouts) for parent in PARENTS}
    result = {
        "ratios": {
            "sft_tokens_per_cpu_second": _ratio(sft, "tokens_per_cpu_second"),
            "grpo_rollouts_per_second": {
                parent: _ratio(table, "rollouts_per_second") for parent, table in grpo.items()
            },
        },
        "sft": {"steps": options.steps, "traces_a_step": TRACES_A_STEP, "tokens": tokens, **sft},
        "grpo": {"steps": options.rollout_steps, "rollouts": rollouts, **grpo},
        "samples": samples,
        "setting": where,
    }
    print(json.dumps(result, indent=2))
    write(result, options.out)


if __name__ == "__main__":
    main()
