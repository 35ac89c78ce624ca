"""edit_value: change one setting of a configuration file and leave the rest as it is.

Skill: change the right one of several equal keys.  Cheats: change all of them, rewrite the file from memory;
the text must be equal to the original but for the one value.
"""

from pytest_pocket import Check, Draw, Final, Instance, Kinds, Problem, Score, Solution, Task, ToolCall, score
from pytest_pocket.configs import decoy, draw_config
from pytest_pocket.words import phrase, values

WORDINGS = Kinds(
    train=[
        "In `{path}`, change {setting} from {old} to {new}.",
        "Set {setting} in `{path}` to {new} (now it is {old}).",
        "Change the value of {setting} in `{path}` from {old} to {new}, and nothing else.",
        "Please update `{path}`: {setting} should be {new} instead of {old}.",
        "`{path}` has {old} for {setting}. Make it {new}.",
        "Edit `{path}` so that {setting} is {new} and no longer {old}.",
        "Replace {old} by {new} for {setting} in `{path}`.",
        "The file `{path}` gives {old} for {setting}; it should give {new}.",
        "Correct {setting} in `{path}`: not {old} but {new}.",
        "I want {new} rather than {old} for {setting} in `{path}`.",
    ],
    dev=[
        "Switch {setting} in `{path}` over from {old} to {new}.",
        "{setting} in `{path}`: {old} becomes {new}.",
    ],
    eval=[
        "Turn {setting} in `{path}` from {old} into {new}.",
        "Adjust `{path}`; for {setting} we now use {new}, before it was {old}.",
        "Where `{path}` sets {setting} to {old}, write {new}.",
    ],
)


class EditValue(Task):
    name = "edit_value"
    group = "write"

    def make(self, draw: Draw) -> Problem:
        config = draw_config(draw)
        new = config.value
        while new == config.value or new.isdigit() != config.value.isdigit():
            (new,) = values(draw, 1)
        return Problem(
            prompt=phrase(
                draw, WORDINGS, path=config.path, setting=config.setting, old=config.value, new=new
            ),
            files={**decoy(draw, config), config.path: config.text()},
            expect={
                "path": config.path,
                "text": config.text(new),
                "change": config.change(config.value, new),
            },
        )

    def solve(self, instance: Instance) -> Solution:
        yield ToolCall("Bash", {"command": instance.expect["change"]})
        return "Done."

    def reward(self, instance: Instance, final: Final) -> Score:
        path = instance.expect["path"]
        text = final.text(path)
        right = text is not None and text.removesuffix("\n") == instance.expect["text"].removesuffix("\n")
        return score(
            final, Check("value", float(right), "" if right else repr(text)[:160]), may_change=[path]
        )
