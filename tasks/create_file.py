"""create_file: create a file with exactly the content that was asked for.

Skill: copy exactly, to the right place.  Cheats: say it was done; put it elsewhere; change what was there.
A missing or an additional newline at the very end is forgiven.
"""

from pytest_pocket import Check, Draw, Final, Instance, Kinds, Problem, Score, Solution, Task, ToolCall, score
from pytest_pocket.words import bystanders, directory, nouns, phrase, sentence, values

WORDINGS = Kinds(
    train=[
        "Create the file `{path}` with exactly this content:\n\n{content}",
        "Write a file `{path}` that contains exactly:\n\n{content}",
        "Please make `{path}`. Its content should be:\n\n{content}",
        "Add a new file `{path}` with these lines and nothing else:\n\n{content}",
        "Put the following into a new file `{path}`:\n\n{content}",
        "Save this as `{path}`:\n\n{content}",
        "I need a file `{path}` with this text:\n\n{content}",
        "The file `{path}` is missing. It should say:\n\n{content}",
        "Store the text below in `{path}`, unchanged:\n\n{content}",
        "Here is the content of `{path}`; create it:\n\n{content}",
    ],
    dev=["Produce `{path}` from this text:\n\n{content}", "New file `{path}`, content:\n\n{content}"],
    eval=[
        "Set up `{path}` so that it reads:\n\n{content}",
        "Write down the following in `{path}`, letter by letter:\n\n{content}",
        "Make a new file, `{path}`, holding:\n\n{content}",
    ],
)

LINES = Kinds(
    train=["text", "setting", "item"],
    dev=["comment"],
    eval=["call", "table"],
)


def line(draw: Draw, shape: str) -> str:
    """One line of the content."""
    noun, (value,) = nouns(draw, 1)[0], values(draw, 1)
    shapes = {
        "text": sentence(draw),
        "setting": f"{noun} = {value}",
        "item": f"- {noun}: {value}",
        "comment": f"# {noun} {value}",
        "call": f'print("{noun}", {draw.number(1, 99)})',
        "table": f"{noun},{value}",
    }
    return shapes[shape]


class CreateFile(Task):
    name = "create_file"
    group = "write"

    def make(self, draw: Draw) -> Problem:
        shape = draw.kind("layout", LINES)
        (stem,) = nouns(draw, 1)
        content = "\n".join(line(draw, shape) for _ in range(draw.number(1, 3)))
        path = f"{directory(draw)}{stem}.{draw.pick(['txt', 'md', 'cfg', 'log', 'list'])}"
        return Problem(
            prompt=phrase(draw, WORDINGS, path=path, content=content),
            files=bystanders(draw, path),
            expect={"path": path, "content": content},
        )

    def solve(self, instance: Instance) -> Solution:
        yield ToolCall(
            "Write", {"file_path": instance.expect["path"], "content": instance.expect["content"] + "\n"}
        )
        return "Done."

    def reward(self, instance: Instance, final: Final) -> Score:
        path, content = instance.expect["path"], instance.expect["content"]
        text = final.text(path)
        right = text is not None and text.removesuffix("\n") == content
        return score(final, Check("content", float(right), repr(text)[:120]), may_change=[path])
