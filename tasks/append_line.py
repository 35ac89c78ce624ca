"""append_line: add one line to the end of a file.

Skill: change a file without rewriting it; some files do not end in a newline, and a careless append joins two
lines.  Cheats: replace the file, append twice, append elsewhere.
"""

from pytest_pocket import Check, Draw, Final, Instance, Kinds, Problem, Score, Solution, Task, ToolCall, score
from pytest_pocket.words import bystanders, directory, nouns, phrase, sentence

WORDINGS = Kinds(
    train=[
        "Append the line `{line}` to `{path}`.",
        "Add `{line}` as a new last line of `{path}`.",
        "Put the line `{line}` at the end of the file `{path}`.",
        "`{path}` needs one more line at its end: `{line}`.",
        "At the bottom of `{path}`, add this line: `{line}`",
        "Please extend `{path}` by the line `{line}`.",
        "Write `{line}` on a new line at the end of `{path}`, and keep the rest.",
        "The last line of `{path}` should become `{line}`; keep all that is there now.",
        "Attach the line `{line}` to the end of `{path}`.",
        "Make `{line}` the new last line of `{path}`.",
    ],
    dev=[
        "Let `{path}` end with the additional line `{line}`.",
        "Tack `{line}` onto `{path}` as its own line.",
    ],
    eval=[
        "After everything else in `{path}`, there should be a line `{line}`: add it.",
        "Grow `{path}` by one line at its end, namely `{line}`.",
        "Insert `{line}` below the last line of `{path}`.",
    ],
)

ENDS = Kinds(train=["\n", "\n", ""], dev=["\n"], eval=["\n"])
LINES = Kinds(
    train=["{0}", "- {0}", "# {0}", "{1} = {2}", "{1}: {2}"], dev=["* {0}"], eval=["{1},{2}", "[ ] {0}"]
)


class AppendLine(Task):
    name = "append_line"
    group = "write"

    def make(self, draw: Draw) -> Problem:
        shape = draw.kind("layout", LINES)
        stem, *keys = nouns(draw, 7)
        lines = [shape.format(sentence(draw), key, draw.number(2, 999)) for key in keys[: draw.number(3, 6)]]
        *old, new = lines
        text = "\n".join(old) + draw.kind("layout", ENDS)
        path = f"{directory(draw)}{stem}.{draw.pick(['txt', 'md', 'log', 'cfg', 'csv', 'list'])}"
        return Problem(
            prompt=phrase(draw, WORDINGS, line=new, path=path),
            files={path: text, **bystanders(draw, path)},
            expect={"path": path, "old": text, "line": new},
        )

    def solve(self, instance: Instance) -> Solution:
        yield ToolCall(
            "Bash", {"command": f"sed -i '$a {instance.expect['line']}' {instance.expect['path']}"}
        )
        return "Done."

    def reward(self, instance: Instance, final: Final) -> Score:
        path, old, line = (instance.expect[key] for key in ("path", "old", "line"))
        text = final.text(path)
        wanted = old.removesuffix("\n") + "\n" + line
        right = text is not None and text.removesuffix("\n") == wanted
        return score(final, Check("appended", float(right), repr(text)[-120:]), may_change=[path])
