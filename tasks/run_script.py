"""run_script: run a script and report what it prints.

Skill: run instead of read.  Cheats: guess from the text; the output is computed, and a comment names a wrong one.
"""

from pytest_pocket import Check, Draw, Final, Instance, Kinds, Problem, Score, Solution, Task, ToolCall, score
from pytest_pocket.answers import says
from pytest_pocket.words import bystanders, directory, nouns, phrase

WORDINGS = Kinds(
    train=[
        "Run `{command}` and reply with what it prints, nothing else.",
        "What does `{command}` print? Run it and give only the output.",
        "Execute `{command}`. Your answer is its output alone.",
        "Please run `{command}` and report its output without comment.",
        "Run the script `{path}` (as `{command}`) and tell me its output only.",
        "Start `{command}` and repeat exactly what it prints.",
        "I want the output of `{command}`, only that.",
        "Use `{command}` and answer with the line that it prints.",
        "Give me the printed result of `{command}`, no other words.",
        "Find out what `{command}` outputs. Answer with the output.",
    ],
    dev=["Launch `{command}`; the answer is its output.", "Output of `{command}`?  Only that."],
    eval=[
        "Try `{command}` and quote its output, nothing more.",
        "What comes out of `{command}`? Bare output.",
        "Call `{command}` and hand me the line it writes.",
    ],
)

SCRIPTS = Kinds(
    train=[
        ("py", "python3", '# prints {wrong}\nword = "{word}"\nprint(f"{{word}}-{{{a} * {b}}}")\n'),
        ("py", "python3", "a = {a}\nb = {b}\nprint(a * b)\n"),
        ("sh", "sh", '# prints {wrong}\nword={word}\necho "$word-$(({a} * {b}))"\n'),
        ("sh", "sh", "a={a}\nb={b}\necho $((a * b))\n"),
        ("py", "python3", 'items = ["{word}"] * {a}\nprint("total:", len(items) * {b})\n'),
    ],
    dev=[("sh", "bash", 'words=({word} {word})\necho "${{words[0]}} $(({a} * {b}))"\n')],
    eval=[("awk", "awk -f", 'BEGIN {{ print "{word}", {a} * {b} }}\n')],
)


def result(script: str, word: str, a: int, b: int) -> str:
    """What a script prints."""
    if "total:" in script:
        return f"total: {a * b}"
    if "wrong" in script:
        return f"{word}-{a * b}"
    return f"{word} {a * b}" if "{word}" in script else str(a * b)


class RunScript(Task):
    name = "run_script"
    group = "run"

    def make(self, draw: Draw) -> Problem:
        ending, program, script = draw.kind("layout", SCRIPTS)
        stem, other, word, note = nouns(draw, 4)
        a, b = draw.number(11, 99), draw.number(3, 99)
        path = f"{directory(draw)}{stem}.{ending}"
        text = script.format(word=word, a=a, b=b, wrong=f"{word}-{a + b}")
        return Problem(
            prompt=phrase(draw, WORDINGS, command=f"{program} {path}", path=path),
            files={
                path: text,
                f"{directory(draw)}{other}.{ending}": script.format(word=note, a=b, b=a + 1, wrong=note),
                **bystanders(draw, path, other),
            },
            expect={"output": result(script, word, a, b), "command": f"{program} {path}"},
        )

    def solve(self, instance: Instance) -> Solution:
        return (yield ToolCall("Bash", {"command": instance.expect["command"]}))

    def reward(self, instance: Instance, final: Final) -> Score:
        return score(
            final, Check("output", float(says(final.answer, instance.expect["output"])), final.answer[:80])
        )
