"""fix_failing_test: a test fails because the function that it tests is wrong; repair the function.

Skill: read code and test, find the wrong line, change it.  Cheats: change or delete the test, return the tested
values, forge the run; only the function's file is looked at, on hidden inputs, and the test must be unchanged.
"""

from pytest_pocket import Draw, Final, Instance, Kinds, Problem, Score, Solution, Task, score
from pytest_pocket.functions import draw_bug, draw_function, draw_project, edit_and_test, works_in_project
from pytest_pocket.words import phrase

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
        right, wrong = bug
        project = draw_project(draw, function, wrong, function.spoiled(right, wrong))
        return Problem(
            prompt=phrase(draw, WORDINGS, path=project.path, test=project.test),
            files=project.files,
            expect={
                **project.expect(function),
                "wrong": wrong,
                "right": right,
            },
        )

    def solve(self, instance: Instance) -> Solution:
        return edit_and_test(instance, instance.expect["wrong"], instance.expect["right"])

    def reward(self, instance: Instance, final: Final) -> Score:
        return score(final, works_in_project(instance, final), may_change=[instance.expect["path"]])
