"""implement_function: write a function's body until the given test passes.

Skill: turn a docstring into code.  Cheats: hard-code the tested values, change the test, forge the run; only the
function's file is looked at, on hidden inputs, and the test must be unchanged.
"""

from pytest_pocket import Draw, Final, Instance, Kinds, Problem, Score, Solution, Task, score
from pytest_pocket.functions import draw_function, draw_project, edit_and_test, works_in_project
from pytest_pocket.words import phrase

WORDINGS = Kinds(
    train=[
        "Implement `{name}` in `{path}` so that `python3 {test}` passes.",
        "Write the body of `{name}` in `{path}`. The test is `{test}`.",
        "The function `{name}` in `{path}` is not written yet. Implement it; `python3 {test}` must pass.",
        "Complete `{path}`: `{name}` should do what its docstring says. Check with `python3 {test}`.",
        "Please implement `{name}` (see `{path}`), then run `python3 {test}`.",
        "Fill in the function `{name}` in `{path}` until `{test}` passes.",
        "`{name}` in `{path}` only raises an error. Make it do its work, and leave `{test}` alone.",
        "Replace the placeholder in `{path}` by a real `{name}`. `python3 {test}` should print ok.",
        "`{path}` lacks the code of `{name}`. Add it and check it by `python3 {test}`.",
        "Make `python3 {test}` pass by implementing `{name}` in `{path}`.",
    ],
    dev=[
        "Supply the missing code for `{name}` in `{path}`; `{test}` tells when it is right.",
        "Finish `{name}` in `{path}` and test it with `python3 {test}`.",
    ],
    eval=[
        "`{name}` is still a stub in `{path}`. Turn it into working code that `python3 {test}` accepts.",
        "Do what the docstring of `{name}` in `{path}` promises. `{test}` has examples.",
        "Code up `{name}` within `{path}`, to the satisfaction of `python3 {test}`.",
    ],
)

STUBS = Kinds(
    train=["    raise NotImplementedError", "    raise NotImplementedError", "    pass  # to do"],
    dev=["    raise NotImplementedError()"],
    eval=["    ...", '    raise NotImplementedError("to do")'],
)


class ImplementFunction(Task):
    name = "implement_function"
    group = "react"

    def make(self, draw: Draw) -> Problem:
        function = draw_function(draw)
        stub = draw.kind("layout", STUBS)
        project = draw_project(draw, function, stub, stub + "\n")
        return Problem(
            prompt=phrase(draw, WORDINGS, name=function.name, path=project.path, test=project.test),
            files=project.files,
            expect={
                **project.expect(function),
                "stub": stub,
                "body": function.body.removesuffix("\n"),
            },
        )

    def solve(self, instance: Instance) -> Solution:
        return edit_and_test(instance, instance.expect["stub"], instance.expect["body"])

    def reward(self, instance: Instance, final: Final) -> Score:
        return score(final, works_in_project(instance, final), may_change=[instance.expect["path"]])
