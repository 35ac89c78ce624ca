"""rename_symbol: rename a function in the two Python files that use it.

Skill: change whole names only, everywhere, in the right kind of file.  Traps: a longer name that contains the
old one, and a note that mentions it and must stay.  Each file earns half.
"""

import re

from pytest_pocket import Check, Draw, Final, Instance, Kinds, Problem, Score, Solution, Task, ToolCall, score
from pytest_pocket.words import bystanders, directory, nouns, phrase, sentence, symbol

WORDINGS = Kinds(
    train=[
        "Rename the function `{old}` to `{new}` in all Python files. Leave other files alone.",
        "In the Python code, `{old}` should be called `{new}`. Change its definition and every use; do not touch other files.",
        "Rename `{old}` to `{new}` everywhere in the `.py` files, and only there.",
        "Please rename `{old}` into `{new}` throughout the Python sources. The notes stay as they are.",
        "Change the name `{old}` to `{new}` in every Python file (not in the documentation).",
        "The function `{old}` gets a new name: `{new}`. Update the Python files only.",
        "Replace the name `{old}` by `{new}` in the Python code. Longer names that contain it stay.",
        "Give `{old}` the name `{new}`, in the definition and the calls, in Python files only.",
        "Refactor: `{old}` becomes `{new}` in the Python files. Nothing else changes.",
        "Use the name `{new}` instead of `{old}` in all the Python files; leave the text files.",
    ],
    dev=[
        "Throughout the Python files, `{old}` is now to be named `{new}`. Only there.",
        "Rename function: `{old}` to `{new}`, `.py` files only.",
    ],
    eval=[
        "We no longer like the name `{old}`: make it `{new}` in the Python code, and only in it.",
        "`{new}` shall replace the name `{old}` across the `.py` files, and only those.",
        "Carry out the rename of `{old}` to `{new}` over all Python sources; other files keep it.",
    ],
)

USES = Kinds(
    train=[
        "from {module} import {old}\n\nprint({old}(4))\n",
        "import {module}\n\nresult = {module}.{old}(2)\nprint(result)\n",
        "from {module} import {old}, {longer}\n\nprint({old}(1) + {longer}(2))\n",
    ],
    dev=["from {module} import {old} as run\n\nprint(run(3))\n"],
    eval=["import {module} as m\n\nassert m.{old}(5) == 10\nassert m.{longer}(5) == 15\n"],
)

OTHER = "def {longer}(value):\n    return value * 3\n"
ITSELF = "def {old}(value):\n    return value * 2\n"
DEFINITIONS = Kinds(
    train=[
        f"{OTHER}\n\n{ITSELF}",
        f"{ITSELF}\n\n{OTHER}",
        f"{OTHER}\n\n# {{old}} doubles.\n{ITSELF}",
        f"{ITSELF}\n\nprint({{old}}(1))\n\n\n{OTHER}",
    ],
    dev=[f"{ITSELF}\n\n{OTHER}\n\ndouble = {{old}}\n"],
    eval=[
        f'"""Has {{old}} and {{longer}}."""\n\n\n{ITSELF}\n\n{OTHER}\n\n__all__ = ["{{longer}}", "{{old}}"]\n'
    ],
)


class RenameSymbol(Task):
    name = "rename_symbol"
    group = "write"

    def make(self, draw: Draw) -> Problem:
        module, note, extra, *users = nouns(draw, 5)
        old, new = symbol(draw), symbol(draw)
        while new in old or old in new:
            new = symbol(draw)
        folder = directory(draw)
        fields = {"module": module, "old": old, "longer": f"{old}_{extra}"}
        files = {
            f"{folder}{module}.py": draw.kind("layout", DEFINITIONS).format(**fields),
            **{
                f"{folder}{user}.py": draw.kind("layout", USES).format(**fields)
                for user in users[: draw.number(1, 2)]
            },
        }
        rest = {
            f"{directory(draw)}{note}.{draw.pick(['md', 'txt', 'rst', 'sh'])}": f"{sentence(draw)}\ncall {old} once\n",
            **bystanders(draw, module, *users, note, old, new),
        }
        return Problem(
            prompt=phrase(draw, WORDINGS, old=old, new=new),
            files={**files, **rest},
            expect={
                "old": old,
                "new": new,
                "texts": {path: re.sub(rf"\b{old}\b", new, text) for path, text in files.items()},
            },
        )

    def solve(self, instance: Instance) -> Solution:
        old, new = instance.expect["old"], instance.expect["new"]
        yield ToolCall(
            "Bash", {"command": f"grep -rlw {old} --include='*.py' . | xargs sed -i 's/\\b{old}\\b/{new}/g'"}
        )
        return "Done."

    def reward(self, instance: Instance, final: Final) -> Score:
        texts = instance.expect["texts"]
        checks = [
            Check(f"renamed in {path}", float(final.text(path) == text), repr(final.text(path))[:120])
            for path, text in texts.items()
        ]
        return score(final, *checks, may_change=list(texts))
