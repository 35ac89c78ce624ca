"""delete_file: delete the file that was named, and no other.

Skill: remove exactly one thing among near-namesakes.  Cheats: delete too much, empty it instead, say it is done.
"""

from pytest_pocket import Check, Draw, Final, Instance, Kinds, Problem, Score, Solution, Task, ToolCall, score
from pytest_pocket.words import directory, nouns, phrase, sentence

WORDINGS = Kinds(
    train=[
        "Delete the file {what}.",
        "Please remove {what}, and only that.",
        "The file {what} is no longer needed. Delete it.",
        "Get rid of the file {what}; keep everything else.",
        "Remove the file {what} from the project.",
        "Clean up: delete {what} and nothing else.",
        "I do not need {what} any more. Remove it.",
        "Erase the file {what}.",
        "Take the file {what} away, leave all others.",
        "One file has to go: {what}. Delete it.",
    ],
    dev=["Discard the file {what}.", "Drop {what} from this folder tree."],
    eval=[
        "Throw the file {what} out.",
        "Make sure that {what} does not exist any more.",
        "The project should be without {what}: remove that file.",
    ],
)

KINDS = Kinds(
    train=["path", "path", "name"],
    dev=["path"],
    eval=["ending"],
)


class DeleteFile(Task):
    name = "delete_file"
    group = "write"

    def make(self, draw: Draw) -> Problem:
        kind = draw.kind("layout", KINDS)
        stem, other, third = nouns(draw, 3)
        folder, elsewhere = directory(draw), directory(draw)
        ending, *endings = draw.sample(["txt", "log", "md", "tmp", "csv", "old", "cfg"], 4)
        path = f"{folder}{stem}.{ending}"
        what, command = {
            "path": (f"`{path}`", f"rm {path}"),
            "name": (
                f"named `{stem}.{ending}`, in whatever folder it is",
                f"find . -name {stem}.{ending} -delete",
            ),
            "ending": (f"that ends in `.{ending}`", f"find . -name '*.{ending}' -delete"),
        }[kind]
        paths = [
            path,
            f"{folder}{stem}.{endings[0]}",
            f"{folder}{stem}_2.{endings[1]}",
            f"{elsewhere}{other}.{endings[2]}",
            f"{folder}{third}.{endings[1]}",
        ]
        if kind == "path" and elsewhere != folder:
            paths.append(f"{elsewhere}{stem}.{ending}")
        return Problem(
            prompt=phrase(draw, WORDINGS, what=what),
            files={each: sentence(draw) + "\n" for each in draw.sample(paths, len(paths))},
            expect={"path": path, "command": command},
        )

    def solve(self, instance: Instance) -> Solution:
        yield ToolCall("Bash", {"command": instance.expect["command"]})
        return "Done."

    def reward(self, instance: Instance, final: Final) -> Score:
        path = instance.expect["path"]
        gone = path not in final.after
        return score(
            final, Check("deleted", float(gone), "" if gone else f"{path} is still there"), may_change=[path]
        )
