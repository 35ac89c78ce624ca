"""fix_failing_test: a test fails because the function that it tests is wrong; repair the function.

Skill: read code and test, find the wrong line, change it.  Cheats: change or delete the test, return the tested
values, forge the run; only the function's file is looked at, on hidden inputs, and the test must be unchanged.
"""

from pytest_pocket import Check, Draw, Final, Instance, Kinds, Problem, Score, Solution, Task, ToolCall, score
from pytest_pocket.functions import draw_bug, draw_function, works
from pytest_pocket.words import nouns, phrase, sentence

WORDINGS = Kinds(
    train=[
        "`python3 {test}` fails. Fix `{path}` so that it passes.",
        "The test `{test}` fails. Repair the function in `{path}`; do not change the test.",
        "Make `python3 {test}` pass by correcting `{path}`.",
        "There is a bug in `{path}`, as `{test}` shows. Please fix it.",
        "Fix the bug in `{path}`. `python3 {test}` must print ok.",
        "The function in `{path}` gives wrong results (see `{test}`). Correct it.",
        "Run `python3 {test}`: it fails. Find the mistake in `{path}` and repair it.",
        "`{test}` is right and `{path}` is wrong. Mend the code.",
        "Please get `{test}` to pass. Only `{path}` may change.",
        "Something in `{path}` is wrong; its docstring says what it should do. Fix it so that `python3 {test}` succeeds.",
    ],
    dev=[
        "Debug `{path}` until `python3 {test}` prints ok.",
        "`{test}` is red. Turn it green by fixing `{path}`.",
    ],
    eval=[
        "Find out why `python3 {test}` fails, and correct `{path}` accordingly.",
        "The code in `{path}` does not do what it says; `{test}` proves it. Put it right.",
        "Bring `{path}` in line with `{test}`, without touching the test.",
    ],
)


class FixFailingTest(Task):
    name = "fix_failing_test"
    group = "react"

    def make(self, draw: Draw) -> Problem:
        function = draw_function(draw)
        while (bug := draw_bug(draw, function)) is None:
            function = draw_function(draw)
        module, other = nouns(draw, 2)
        wrong, right = next(
            (old, new)
            for old, new in zip(bug.splitlines(), function.family.body.splitlines(), strict=True)
            if old != new
        )
        return Problem(
            prompt=phrase(draw, WORDINGS, path=f"{module}.py", test=f"test_{module}.py"),
            files={
                f"{module}.py": function.source(bug),
                f"test_{module}.py": function.test(module),
                f"{other}.md": sentence(draw) + "\n",
            },
            expect={
                "module": module,
                "name": function.name,
                "cases": function.hidden,
                "wrong": wrong,
                "right": right,
            },
        )

    def solve(self, instance: Instance) -> Solution:
        module, wrong, right = (instance.expect[key] for key in ("module", "wrong", "right"))
        yield ToolCall("Read", {"file_path": f"{module}.py"})
        yield ToolCall("Edit", {"file_path": f"{module}.py", "old_string": wrong, "new_string": right})
        yield ToolCall("Bash", {"command": f"python3 test_{module}.py"})
        return "Done."

    def reward(self, instance: Instance, final: Final) -> Score:
        path = f"{instance.expect['module']}.py"
        right = works(final, path, instance.expect["name"], instance.expect["cases"])
        return score(final, Check("works", float(right), "hidden inputs"), may_change=[path])
