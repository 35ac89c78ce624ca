"""list_files: name the one file below a folder that has a given ending.

Skill: look into a tree instead of guessing.  Cheats: list every file; exactly one path is accepted, and other
folders hold files with the same ending.
"""

from pytest_pocket import Check, Draw, Final, Instance, Kinds, Problem, Score, Solution, Task, ToolCall, score
from pytest_pocket.answers import says_path
from pytest_pocket.words import nouns, phrase, sentence

ENDINGS = ["txt", "md", "csv", "log", "json", "toml", "py", "sh", "html", "xml", "sql", "cfg"]

WORDINGS = Kinds(
    train=[
        "Which file under `{folder}` ends in `.{ending}`? Reply with its path alone.",
        "Find the `.{ending}` file below `{folder}` and give only its path.",
        "There is one `.{ending}` file somewhere in `{folder}`. What is its path? Only the path.",
        "Look through `{folder}` for a file with the ending `.{ending}`; answer with its path.",
        "List the `.{ending}` files in `{folder}` and its folders. There is just one: reply with the path.",
        "What is the path of the `.{ending}` file inside `{folder}`? Nothing but the path.",
        "Search `{folder}` for `*.{ending}` and tell me the path you find, nothing else.",
        "Name the file below `{folder}` whose ending is `.{ending}`. Path only.",
        "I lost a `.{ending}` file in `{folder}`. Where is it? Give the path.",
        "Give me the path of the only `.{ending}` file under `{folder}`.",
    ],
    dev=[
        "In the tree `{folder}`, one file ends with `.{ending}`: its path?",
        "Look for `.{ending}` under `{folder}`. Path only.",
    ],
    eval=[
        "Path of the `.{ending}` file somewhere below `{folder}`, please.",
        "`{folder}` contains a single file of type `.{ending}`. State its path.",
        "Which `.{ending}` file is there in `{folder}` or deeper? Answer with the path.",
    ],
)

LAYOUTS = Kinds(
    train=["{0}/{1}.{2}", "{0}/{3}/{1}.{2}", "{0}/{3}/{4}/{1}.{2}"],
    dev=["{0}/{3}-{4}/{1}.{2}"],
    eval=["{0}/{3}/{4}/old/{1}.{2}", "{0}/v2/{1}.{2}"],
)


class ListFiles(Task):
    name = "list_files"
    group = "read"

    def make(self, draw: Draw) -> Problem:
        folder, elsewhere, *stems = nouns(draw, 11)
        ending, *others = draw.sample(ENDINGS, 5)
        path = draw.kind("layout", LAYOUTS).format(folder, stems[0], ending, stems[1], stems[2])
        paths = [
            path,
            f"{elsewhere}/{stems[3]}.{ending}",
            f"{stems[4]}.{ending}",
            f"{folder}/{stems[5]}.{others[0]}",
            f"{folder}/{stems[1]}/{stems[6]}.{others[1]}",
            f"{folder}/{stems[7]}.{ending}.bak",
            f"{elsewhere}/{stems[8]}.{others[2]}",
        ]
        draw.random.shuffle(paths)
        return Problem(
            prompt=phrase(draw, WORDINGS, folder=folder, ending=ending),
            files={each: sentence(draw) + "\n" for each in paths},
            expect={"path": path, "folder": folder, "ending": ending},
        )

    def solve(self, instance: Instance) -> Solution:
        yield ToolCall("Glob", {"pattern": f"{instance.expect['folder']}/**/*.{instance.expect['ending']}"})
        return str(instance.expect["path"])

    def reward(self, instance: Instance, final: Final) -> Score:
        return score(
            final, Check("path", float(says_path(final.answer, instance.expect["path"])), final.answer[:80])
        )
