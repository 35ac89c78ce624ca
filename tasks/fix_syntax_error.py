"""fix_syntax_error: a Python file does not compile; repair it.

Skill: react to what the interpreter says.  Cheats: delete the line, stub the function, print the expected
output; the function's results are checked on hidden inputs.
"""

from collections.abc import Callable

from pytest_pocket import Check, Draw, Final, Instance, Kinds, Problem, Score, Solution, Task, ToolCall, score
from pytest_pocket.functions import compiles, draw_function, works
from pytest_pocket.words import bystanders, directory, nouns, phrase

WORDINGS = Kinds(
    train=[
        "`python3 {path}` stops with a syntax error. Fix it.",
        "Fix the syntax error in `{path}`.",
        "The script `{path}` does not run: it has a syntax error. Please repair it.",
        "There is a syntax error in `{path}`. Correct it and change nothing else.",
        "Running `python3 {path}` gives a SyntaxError. Make it run.",
        "Please make `{path}` valid Python again.",
        "Somebody broke the syntax of `{path}`. Repair the line.",
        "`{path}` cannot be compiled. Find the mistake and fix it.",
        "Python refuses `{path}`. Mend the syntax.",
        "Find and fix the syntax mistake in `{path}`.",
    ],
    dev=["Get `python3 {path}` to work; its syntax is broken.", "Syntax error in `{path}`: please fix."],
    eval=[
        "A typing slip keeps `{path}` from compiling. Put it right.",
        "Python cannot parse `{path}`; correct the slip.",
        "Repair `{path}` so that Python accepts it again.",
    ],
)


def _without(text: str) -> Callable[[str], str]:
    return lambda line: line.replace(text, "", 1)


BREAKS: Kinds[tuple[str, str, Callable[[str], str]]] = Kinds(
    train=[
        ("def ", ":", lambda line: line.removesuffix(":")),
        ("def ", ")", _without(")")),
        ("def ", "(", _without("(")),
        ("def ", "def ", lambda line: line.replace("def ", "define ", 1)),
        ("print(", ")", lambda line: line.removesuffix(")")),
        ("    return ", "return", lambda line: line.replace("return", "retrun", 1)),
        ("    return ", ")", lambda line: line.removesuffix(")")),
        ("    return ", "]", lambda line: line.removesuffix("]")),
        ("    for ", ":", lambda line: line.removesuffix(":")),
    ],
    dev=[("def ", "def ", lambda line: line.replace("def ", "function ", 1))],
    eval=[
        ("print(", "print(", lambda line: line.replace("print(", "print((", 1)),
        ("def ", "def ", lambda line: line.replace("def ", "fed ", 1)),
    ],
)


class FixSyntaxError(Task):
    name = "fix_syntax_error"
    group = "react"

    def make(self, draw: Draw) -> Problem:
        function = draw_function(draw)
        args = ", ".join(map(repr, function.shown[0][0]))
        lines = [*function.source().splitlines(), "", "", f"print({function.name}({args}))"]
        while True:
            start, has, spoil = draw.kind("layout", BREAKS)
            spots = [i for i, line in enumerate(lines) if line.startswith(start) and has in line]
            if not spots:
                continue
            spot = draw.pick(spots)
            broken = spoil(lines[spot])
            text = "\n".join([*lines[:spot], broken, *lines[spot + 1 :]]) + "\n"
            if broken and lines.count(lines[spot]) == 1 and not compiles(text):
                break
        (stem,) = nouns(draw, 1)
        path = f"{directory(draw)}{stem}.py"
        return Problem(
            prompt=phrase(draw, WORDINGS, path=path),
            files={path: text, **bystanders(draw, path)},
            expect={
                "path": path,
                "name": function.name,
                "cases": function.hidden,
                "old": broken,
                "new": lines[spot],
            },
        )

    def solve(self, instance: Instance) -> Solution:
        path = instance.expect["path"]
        yield ToolCall("Bash", {"command": f"python3 {path}"})
        yield ToolCall(
            "Edit",
            {"file_path": path, "old_string": instance.expect["old"], "new_string": instance.expect["new"]},
        )
        yield ToolCall("Bash", {"command": f"python3 {path}"})
        return "Done."

    def reward(self, instance: Instance, final: Final) -> Score:
        path = instance.expect["path"]
        right = works(final, path, instance.expect["name"], instance.expect["cases"])
        return score(final, Check("works", float(right), "hidden inputs"), may_change=[path])
