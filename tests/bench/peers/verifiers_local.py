"""verifiers: its single-agent environment with its own loop, the harness ``bash``, in the subprocess runtime.

Without Docker or a remote sandbox that runtime is all that it offers: a folder of the host.  The harness is a Python program that it
starts for each rollout, and that reaches the model through verifiers' interception server; so the scripted model is an
OpenAI-compatible server here, in this process.  Compaction and the edit tool are off.  Each episode is appended to a trace file.
With VERIFIERS_HARNESS=in_process the loop runs in this process instead, which the harness interface allows and
verifiers ships nothing for: it is the least that any harness can cost, not what a user gets.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Its programs are installed by uv, from this environment.
os.environ["PATH"] += f":{Path(sys.executable).parent}"

import httpx
import toy
import verifiers.v1 as vf
from aiohttp import web
from openai import AsyncOpenAI
from verifiers.v1.envs.single_agent import SingleAgentEnv, SingleAgentEnvConfig
from verifiers.v1.harnesses.bash import BashHarnessConfig
from verifiers.v1.utils.trace_store import append_episode

__all__ = ["InProcess", "Tasks"]
IN_PROCESS = os.environ.get("VERIFIERS_HARNESS") == "in_process"
BASH = {
    "type": "function",
    "function": {
        "name": "bash",
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "string"}},
            "required": ["command"],
        },
    },
}


class Data(vf.TaskData):
    files: dict[str, str]
    script: str
    answer: str


class Task(vf.Task[Data]):
    async def setup(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        for path, text in self.data.files.items():
            await runtime.write(path, text.encode())
        if self.data.script:
            await runtime.run(["bash", "-c", self.data.script], {})

    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(toy.normal(trace.last_reply) == toy.normal(self.data.answer))


class Tasks(vf.Taskset[Task, vf.TasksetConfig]):
    INFINITE = True

    def load(self) -> Iterable[Task]:
        for number in itertools.count():
            each = toy.script(number)
            data = Data(prompt=each.prompt, files=each.files, script=each.setup, answer=each.answer)
            yield Task(data, self.config.task)


@functools.cache
def shared(loop: asyncio.AbstractEventLoop) -> httpx.AsyncClient:
    """One connection pool for all rollouts: a client for each would cost more than its calls."""
    return httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None))


class InProcess(vf.Harness[vf.HarnessConfig]):
    """The same loop as the harness ``bash``, without a program of its own."""

    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        messages: list[Any] = [{"role": "user", "content": data.prompt}]
        client = AsyncOpenAI(
            base_url=endpoint, api_key=secret, http_client=shared(asyncio.get_running_loop())
        )
        while True:
            completion = await client.chat.completions.create(
                model=ctx.model, messages=messages, tools=[BASH]
            )
            said = completion.choices[0].message
            messages.append(said.model_dump(exclude_none=True))
            if not said.tool_calls:
                return vf.ProgramResult(0, "", "")
            for call in said.tool_calls:
                wanted = json.loads(call.function.arguments)["command"]
                result = await runtime.run(["bash", "-c", wanted], {})
                messages.append(
                    {"role": "tool", "tool_call_id": call.id, "content": result.stdout + result.stderr}
                )


def reply(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The scripted model's message."""
    (prompt,) = (message["content"] for message in messages if message["role"] == "user")
    results = [message["content"] for message in messages if message["role"] == "tool"]
    command, answer = toy.step(toy.asked(prompt), results)
    if not command:
        return {"role": "assistant", "content": answer}
    function = {"name": "bash", "arguments": json.dumps({"command": command})}
    call = {"index": 0, "id": f"call_{len(results)}", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


async def chat(request: web.Request) -> web.Response:
    """The scripted model as an OpenAI-compatible server: whole, or as the two events that are the least of a stream."""
    body = await request.json()
    message = reply(body["messages"])
    finish = "tool_calls" if "tool_calls" in message else "stop"
    usage = {"prompt_tokens": toy.TOKENS, "completion_tokens": toy.TOKENS, "total_tokens": 2 * toy.TOKENS}
    common = {"id": "scripted", "created": 0, "model": body["model"]}
    if not body.get("stream"):
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return web.json_response({**common, "object": "chat.completion", "choices": [choice], "usage": usage})
    choice = {"index": 0, "delta": message, "finish_reason": finish}
    events = [
        {**common, "object": "chat.completion.chunk", "choices": [choice]},
        {**common, "object": "chat.completion.chunk", "choices": [], "usage": usage},
    ]
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    return web.Response(text=text, content_type="text/event-stream")


async def run(numbers: Sequence[int], in_flight: int, folder: Path) -> list[str]:
    """All rollouts, as verifiers' own runner plays them: slots under one semaphore."""
    application = web.Application()
    application.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    address = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    harness = (
        vf.HarnessConfig(id="verifiers_local")
        if IN_PROCESS
        else BashHarnessConfig(id="bash", edit=False, compaction=None)
    )
    env = SingleAgentEnv(
        SingleAgentEnvConfig(
            taskset=vf.TasksetConfig(id="verifiers_local"),
            agent=vf.AgentConfig(harness=harness, runtime=vf.SubprocessConfig()),
        )
    )
    context = vf.ModelContext("scripted", vf.EvalClientConfig(base_url=address, api_key_var="NO_KEY"))
    tasks = list(env.taskset.skip(numbers[0]).take(len(numbers)))
    semaphore, lock = asyncio.Semaphore(in_flight), asyncio.Lock()
    async with env.serving():
        episodes = await asyncio.gather(
            *(
                env.run_slot(slot, context, semaphore, lambda episode: append_episode(folder, episode, lock))
                for task in tasks
                for slot in env.slots(task)
            )
        )
    await runner.cleanup()
    for episode in episodes:
        assert episode.ok, [error.message for error in (*episode.errors, *episode.traces[0].errors)]
        assert episode.traces[0].reward == 1
    return [episode.traces[0].last_reply for episode in episodes]


def play(numbers: Sequence[int], in_flight: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(run(numbers, in_flight, Path(folder)))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    toy.report(version("verifiers"), "none: a process of the host in a folder", play)
