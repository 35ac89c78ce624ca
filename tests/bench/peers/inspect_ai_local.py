"""Inspect AI: ``eval`` with the solver ``generate``, which is its own loop of calls, and the tool ``bash``.

Chosen for speed: the leanest solver (``react`` adds a prompt and a submit tool), no display, no real-time
log, no control server, logs of warnings alone, as many samples, sandboxes and subprocesses as asked.  The scripted model gives its
own token counts, because Inspect otherwise fetches a tokenizer from the internet.  Without Docker the sandbox is ``local``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import toy
from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessage, ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import exact
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import bash


def reply(messages: list[ChatMessage], *_: Any) -> ModelOutput:
    """The scripted model."""
    (prompt,) = (message.text for message in messages if message.role == "user")
    command, answer = toy.step(
        toy.asked(prompt), [message.text for message in messages if message.role == "tool"]
    )
    if command:
        output = ModelOutput.for_tool_call("scripted", "bash", {"command": command})
    else:
        output = ModelOutput.from_content("scripted", answer)
    output.usage = ModelUsage(input_tokens=toy.TOKENS, output_tokens=toy.TOKENS, total_tokens=2 * toy.TOKENS)
    return output


MODEL = get_model("mockllm/model", custom_outputs=reply)


def play(numbers: Sequence[int], in_flight: int) -> list[str]:
    """One ``eval`` over all of them."""
    samples = [
        Sample(each.prompt, target=each.answer, id=number, files=each.files, setup=each.setup or None)
        for number in numbers
        for each in (toy.script(number),)
    ]
    with tempfile.TemporaryDirectory() as folder:
        task = Task(
            MemoryDataset(samples), solver=[use_tools(bash()), generate()], scorer=exact(), sandbox="local"
        )
        (log,) = eval(
            task,
            MODEL,
            display="none",
            log_dir=folder,
            log_level="warning",
            log_realtime=False,
            ctl_server=False,
            max_samples=in_flight,
            max_sandboxes=in_flight,
            max_subprocesses=in_flight,
            max_connections=in_flight,
        )
        assert log.status == "success", log.error
        return [
            sample.output.completion
            for sample in sorted(log.samples or [], key=lambda sample: int(sample.id))
        ]


if __name__ == "__main__":
    toy.report(version("inspect-ai"), "none: the local sandbox is a folder of the host", play)
