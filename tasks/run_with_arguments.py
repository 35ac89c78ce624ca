"""run_with_arguments: run a script with the arguments that were asked for, and report what it prints.

Skill: turn words into a command line.  Cheats: run it without arguments (its defaults print something else).
"""

from pytest_pocket import Check, Draw, Final, Instance, Kinds, Problem, Score, Solution, Task, ToolCall, score
from pytest_pocket.answers import says
from pytest_pocket.words import bystanders, directory, nouns, phrase

WORDINGS = Kinds(
    train=[
        "Run `{program} {path}` with {how} and reply with what it prints, nothing else.",
        "With {how}, what does `{program} {path}` print? Only the output.",
        "Execute `{program} {path}` with {how}. Your answer is its output alone.",
        "Call `{program} {path}`, giving it {how}, and report only the output.",
        "Start `{program} {path}` with {how} and repeat exactly what it prints.",
        "I want the output of `{program} {path}` with {how}, only that.",
        "Give `{program} {path}` {how}. Answer with the line that it prints.",
        "What is printed by `{program} {path}` when run with {how}? Just that.",
        "Use `{program} {path}` with {how} and tell me its output only.",
        "Please run `{program} {path}` with {how}; I only need its output.",
    ],
    dev=[
        "Launch `{program} {path}` with {how}; the answer is its output.",
        "Output of `{program} {path}` with {how}? Only that.",
    ],
    eval=[
        "Try `{program} {path}` with {how} and quote the output, nothing more.",
        "Pass {how} to `{program} {path}`; what comes out? Bare output.",
        "Hand me the line that `{program} {path}` writes with {how}.",
    ],
)

FORMS = Kinds(
    train=[
        ("the arguments {b} and {c}", "{b} {c}", False),
        ("the arguments `{b} {c}`", "{b} {c}", False),
        ("{b} as the first and {c} as the second argument", "{b} {c}", False),
        ("`--size {c} --name {b}`", "--size {c} --name {b}", True),
        ("the options size {c} and name {b}", "--size {c} --name {b}", True),
        ("the size option at {c} and the name option at {b}", "--size {c} --name {b}", True),
    ],
    dev=[
        ("first {b}, then {c}, as arguments", "{b} {c}", False),
        ("size {c} and name {b} as options", "--size {c} --name {b}", True),
    ],
    eval=[
        ("two arguments, {b} followed by {c}", "{b} {c}", False),
        ("a size of {c} and a name of {b} (both are options)", "--size {c} --name {b}", True),
    ],
)

POSITIONAL = """\
import sys

# usage: NAME SIZE
name, size = (sys.argv[1:] + ["{word}", "{factor}"])[:2]
print(f"{{name}}-{{int(size) * {factor}}}")
"""
SHELL = """\
# usage: NAME SIZE
name=${{1:-{word}}}
size=${{2:-{factor}}}
echo "$name-$((size * {factor}))"
"""
OPTIONS = """\
import sys

# options: --name NAME, --size SIZE
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name = given.get("--name", "{word}")
size = given.get("--size", "{factor}")
print(f"{{name}}-{{int(size) * {factor}}}")
"""


class RunWithArguments(Task):
    name = "run_with_arguments"
    group = "run"

    def make(self, draw: Draw) -> Problem:
        how, arguments, options = draw.kind("layout", FORMS)
        stem, word, name = nouns(draw, 3)
        size, factor = draw.number(2, 99), draw.number(3, 19)
        program, ending, text = ("python3", "py", OPTIONS if options else POSITIONAL)
        if not options and draw.chance(0.5):
            program, ending, text = "sh", "sh", SHELL
        path = f"{directory(draw)}{stem}.{ending}"
        return Problem(
            prompt=phrase(draw, WORDINGS, program=program, path=path, how=how.format(b=name, c=size)),
            files={path: text.format(word=word, factor=factor), **bystanders(draw, path)},
            expect={
                "output": f"{name}-{size * factor}",
                "command": f"{program} {path} {arguments.format(b=name, c=size)}",
            },
        )

    def solve(self, instance: Instance) -> Solution:
        return (yield ToolCall("Bash", {"command": instance.expect["command"]}))

    def reward(self, instance: Instance, final: Final) -> Score:
        return score(
            final, Check("output", float(says(final.answer, instance.expect["output"])), final.answer[:80])
        )
