"""read_value: report one setting of a configuration file.

Skill: find the right line when the same key stands in several sections.  Cheats: guess, print every value,
answer with the whole line; the answer is checked as one value, and the file must stay as it is.
"""

from pytest_pocket import Check, Draw, Final, Instance, Kinds, Problem, Score, Solution, Task, ToolCall, score
from pytest_pocket.answers import says
from pytest_pocket.configs import decoy, draw_config
from pytest_pocket.words import question

WORDINGS = Kinds(
    train=[
        "What is the value of {setting} in `{path}`?",
        "Look in `{path}`: what is {setting} set to?",
        "Read `{path}` and report {setting}.",
        "I want to know {setting} from the file `{path}`.",
        "In `{path}`, find {setting}.",
        "Which value does `{path}` give to {setting}?",
        "The file `{path}` holds the configuration. Tell me {setting}.",
        "Please look up {setting} in `{path}`.",
        "Check `{path}` and tell me what {setting} is.",
        "`{path}` has several settings. What is the one for {setting}?",
    ],
    dev=["Find out what `{path}` says about {setting}.", "Open `{path}` and give me {setting}."],
    eval=[
        "{setting}: what does `{path}` set it to?",
        "What did somebody configure for {setting} in `{path}`?",
        "From `{path}`, extract {setting}.",
    ],
)


class ReadValue(Task):
    name = "read_value"
    group = "read"

    def make(self, draw: Draw) -> Problem:
        config = draw_config(draw)
        return Problem(
            prompt=question(draw, WORDINGS, setting=config.setting, path=config.path),
            files={**decoy(draw, config), config.path: config.text()},
            expect={"value": config.value, "find": config.find()},
        )

    def solve(self, instance: Instance) -> Solution:
        yield ToolCall("Bash", {"command": instance.expect["find"]})
        return str(instance.expect["value"])

    def reward(self, instance: Instance, final: Final) -> Score:
        return score(
            final, Check("value", float(says(final.answer, instance.expect["value"])), final.answer[:80])
        )
