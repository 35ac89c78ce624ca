"""exit_status: say whether, and with which status, a command failed.

Skill: trust the exit status, not the text.  The script may print "done" and fail, or print "error" and succeed.
Cheats: answer from the output or the name; one of many statuses is accepted.
"""

from pytest_pocket import Check, Draw, Final, Instance, Kinds, Problem, Score, Solution, Task, ToolCall, score
from pytest_pocket.answers import says
from pytest_pocket.words import bystanders, directory, nouns, phrase

WORDINGS = Kinds(
    train=[
        "Run `{command}`. Reply with `ok` if it succeeds, else with its exit status alone.",
        "Does `{command}` succeed? Answer `ok`, or its exit status if it fails.",
        "Execute `{command}` and tell me `ok` or the exit status that it failed with.",
        "Check `{command}`: answer `ok` on success, otherwise only the exit status.",
        "What is the exit status of `{command}`? Say `ok` instead of 0.",
        "Try `{command}`. If it fails, reply with the exit status; if not, with `ok`.",
        "Run `{command}` and report how it ended: `ok` or the number of its exit status.",
        "I need to know if `{command}` fails. Reply `ok` or the exit status.",
        "Start `{command}` and give me its exit status, or `ok` if that is zero.",
        "Please run `{command}`. Answer with `ok` or the failing exit status, nothing else.",
    ],
    dev=["Launch `{command}`: `ok` or which exit status?", "How does `{command}` end? `ok`, or the status."],
    eval=[
        "See whether `{command}` works. Reply `ok`, or the exit status if not.",
        "`{command}` may fail. Tell me `ok` or the status it exits with.",
        "Give the exit status of `{command}`, writing `ok` for success.",
    ],
)

MESSAGES = Kinds(
    train=[
        "done",
        "all is well",
        "error: no {0}",
        "warning: {0} is old",
        "checking the {0}",
        "finished with {0}",
        "failed to find {0}",
    ],
    dev=["{0}: passed"],
    eval=["{0}: status 9", "ready: {0}"],
)


class ExitStatus(Task):
    name = "exit_status"
    group = "run"

    def make(self, draw: Draw) -> Problem:
        stem, one, two = nouns(draw, 3)
        status = 0 if draw.chance(0.2) else draw.number(1, 99)
        lines = [draw.kind("layout", MESSAGES).format(word) for word in (one, two)][: draw.number(1, 2)]
        if draw.chance(0.5):
            program, ending = "sh", "sh"
            half = status // 2
            text = "".join(f"echo '{line}'\n" for line in lines) + f"exit $(({half} + {status - half}))\n"
        else:
            program, ending = "python3", "py"
            half = status // 2
            text = (
                "import sys\n\n"
                + "".join(f"print('{line}')\n" for line in lines)
                + f"sys.exit({half} + {status - half})\n"
            )
        path = f"{directory(draw)}{stem}.{ending}"
        return Problem(
            prompt=phrase(draw, WORDINGS, command=f"{program} {path}"),
            files={path: text, **bystanders(draw, path)},
            expect={"answer": str(status) if status else "ok", "command": f"{program} {path}"},
        )

    def solve(self, instance: Instance) -> Solution:
        yield ToolCall("Bash", {"command": instance.expect["command"]})
        return str(instance.expect["answer"])

    def reward(self, instance: Instance, final: Final) -> Score:
        # "ok" cannot be had by answering without running: it counts only after a call.
        right = says(final.answer, instance.expect["answer"]) and final.calls > 0
        return score(final, Check("status", float(right), final.answer[:80]))
