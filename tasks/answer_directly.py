"""answer_directly: the request holds everything that the answer needs; no tool is called for.

Skill: not to reach for a tool.  Cheats: repeat the request; one value is accepted.  With a tool call the right
answer earns half.
"""

from pytest_pocket import Check, Draw, Final, Instance, Kinds, Problem, Score, Solution, Task, score
from pytest_pocket.answers import says
from pytest_pocket.words import NOUNS, bystanders, nouns, question, symbol

WORDINGS = Kinds(
    train=[
        "{what}",
        "Without using any tool: {what}",
        "No files are needed for this. {what}",
        "{what} You do not have to look anything up.",
        "Answer at once: {what}",
        "This needs no tool. {what}",
        "Just from this message: {what}",
        "{what} The answer is in this message.",
    ],
    dev=["Right away: {what}", "{what} Do not search."],
    eval=[
        "Off the top of your head: {what}",
        "You need not look at any file. {what}",
        "{what} All you need is here.",
    ],
)

QUESTIONS = Kinds(
    train=[
        ("What is the file ending of `{name}.{ending}`, without the dot?", "ending"),
        ("Which folder is the file `{folder}/{name}.{ending}` in?", "folder"),
        ("What is the file name, without its folder, of `{folder}/{name}.{ending}`?", "file"),
        ("Which port does `http://localhost:{port}/{name}` use?", "port"),
        ("What is the last item of this list: {items}?", "last"),
        ("What is the first item of this list: {items}?", "first"),
        ("Which function does `{function}({port})` call?", "function"),
        ("Which argument is given in `{function}({port})`?", "port"),
        ("The log says `error {port} in {name}`. What is the number of the error?", "port"),
        ("After `{name} = {port}`, what is the value of {name}?", "port"),
    ],
    dev=[("Which module does `import {name}` import?", "name")],
    eval=[
        ("In `cp {name}.{ending} {folder}`, where is the file copied to?", "folder"),
        ("What is assigned to the variable in `{function} = {port}`?", "port"),
    ],
)


class AnswerDirectly(Task):
    name = "answer_directly"
    group = "stop"
    acts = False

    def make(self, draw: Draw) -> Problem:
        ask, wanted = draw.kind("layout", QUESTIONS)
        items = nouns(draw, draw.number(3, 5))
        name, folder = draw.sample([noun for noun in NOUNS if noun not in items], 2)
        ending = draw.pick(["txt", "md", "py", "csv", "json", "toml", "sh", "log"])
        facts = {
            "name": name,
            "folder": folder,
            "ending": ending,
            "file": f"{name}.{ending}",
            "port": str(draw.number(100, 9999)),
            "function": symbol(draw),
            "items": ", ".join(items),
            "first": items[0],
            "last": items[-1],
        }
        prompt = question(draw, WORDINGS, what=ask.format(**facts))
        return Problem(
            prompt=prompt,
            files={f"{items[1]}.txt": items[2] + "\n", **bystanders(draw, *items, name)},
            expect={"value": facts[wanted]},
        )

    def solve(self, instance: Instance) -> Solution:
        return str(instance.expect["value"])
        yield  # a solution is a generator, also when it calls nothing

    def reward(self, instance: Instance, final: Final) -> Score:
        right = says(final.answer, instance.expect["value"])
        value = (0.5 if final.calls else 1.0) if right else 0.0
        return score(final, Check("value", value, f"{final.calls} calls, {final.answer[:80]}"))
