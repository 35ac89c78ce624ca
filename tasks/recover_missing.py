"""recover_missing: the path that was given is wrong: look around, then read the right file.

Skill: react to an error by searching instead of giving up or inventing.  Cheats: read the similarly named file
nearby; its value is another one.
"""

from pytest_pocket import Check, Draw, Final, Instance, Kinds, Problem, Score, Solution, Task, ToolCall, score
from pytest_pocket.answers import says
from pytest_pocket.words import DIRECTORIES, nouns, question, sentence

WORDINGS = Kinds(
    train=[
        "What is the code in `{path}`?",
        "Read `{path}` and tell me the code in it.",
        "The code is in `{path}`. What is it?",
        "Give me the code that `{path}` holds.",
        "Look in `{path}` and report the code.",
        "I need the code from `{path}`.",
        "Which code is stored in `{path}`?",
        "Open `{path}` and reply with the code there.",
        "Find the code in the file `{path}`.",
        "Report the code that stands in `{path}`.",
    ],
    dev=["Fetch the code out of `{path}`.", "`{path}` has a code: which?"],
    eval=[
        "Tell me what code you find in `{path}`.",
        "The file `{path}` contains a code; I want it.",
        "Retrieve the code kept in `{path}`.",
    ],
)

HINTS = Kinds(
    train=[
        "",
        " The file may have been moved.",
        " If it is not there, look for a file of that name elsewhere.",
        " I am not sure about the path.",
    ],
    dev=[" The path may be out of date."],
    eval=[" Somebody may have renamed a folder.", " Perhaps the folder is wrong."],
)

CONTENTS = Kinds(
    train=["{0}\n", "code: {0}\n", "code = {0}\n"], dev=["the code is {0}\n"], eval=["CODE={0}\n"]
)


class RecoverMissing(Task):
    name = "recover_missing"
    group = "react"

    def make(self, draw: Draw) -> Problem:
        stem, other, one, two, third = nouns(draw, 5)
        wrong, *folders = draw.sample(list(DIRECTORIES.train), 4)
        ending = draw.pick(["txt", "md", "cfg"])
        right = draw.pick(
            [
                f"{folders[0]}/{stem}.{ending}",
                f"{folders[0]}/{folders[1]}/{stem}.{ending}",
                f"{wrong}/{folders[0]}/{stem}.{ending}",
            ]
        )
        content = draw.kind("layout", CONTENTS)
        values = [
            f"{word}-{code}" for word, code in zip((one, two), draw.sample(range(100, 999), 2), strict=True)
        ]
        files = {
            right: content.format(values[0]),
            f"{wrong}/{other}.{ending}": content.format(values[1]),
            f"{folders[2]}/{third}.{ending}": sentence(draw) + "\n",
        }
        prompt = question(draw, WORDINGS, path=f"{wrong}/{stem}.{ending}") + draw.kind("wording", HINTS)
        return Problem(
            prompt=prompt,
            files={path: files[path] for path in draw.sample(list(files), len(files))},
            expect={
                "value": values[0],
                "wrong": f"{wrong}/{stem}.{ending}",
                "name": f"{stem}.{ending}",
                "right": right,
            },
        )

    def solve(self, instance: Instance) -> Solution:
        yield ToolCall("Read", {"file_path": instance.expect["wrong"]})
        yield ToolCall("Glob", {"pattern": f"**/{instance.expect['name']}"})
        yield ToolCall("Read", {"file_path": instance.expect["right"]})
        return str(instance.expect["value"])

    def reward(self, instance: Instance, final: Final) -> Score:
        return score(
            final, Check("value", float(says(final.answer, instance.expect["value"])), final.answer[:80])
        )
