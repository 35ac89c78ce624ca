"""follow_reference: a file names the file that holds the answer.

Skill: read, take a path out of the text, read again.  Cheats: answer with something from the first file; only
the second holds the value, and other files hold values of the same kind.
"""

from pytest_pocket import Check, Draw, Final, Instance, Kinds, Problem, Score, Solution, Task, ToolCall, score
from pytest_pocket.answers import says
from pytest_pocket.words import bystanders, directory, nouns, question

WORDINGS = Kinds(
    train=[
        "`{start}` says which file holds the {topic} code. What is the {topic} code?",
        "Find the {topic} code: `{start}` names the file that has it.",
        "Start at `{start}`. It points to the file with the {topic} code. What is the code?",
        "What is the {topic} code? The file that holds it is named in `{start}`.",
        "The {topic} code is in a file that `{start}` mentions. Tell me the code.",
        "Follow the note about {topic} in `{start}` to the right file and report the code there.",
        "Look up {topic} in `{start}`, open the file it names, and report the code.",
        "Read `{start}` to learn which file has the {topic} code, then give me the code.",
        "I need the {topic} code. `{start}` tells where it is kept.",
        "`{start}` is an index of files. Get the code for {topic}.",
    ],
    dev=["By way of `{start}`, find the code for {topic}.", "Consult `{start}` and fetch the {topic} code."],
    eval=[
        "The index `{start}` leads to the {topic} code: what is it?",
        "Which code belongs to {topic}? `{start}` knows the file.",
        "Get the {topic} code by following `{start}`.",
    ],
)

INDEXES = Kinds(
    train=[
        "{topic}: {path}",
        "{topic} -> {path}",
        "{topic} = {path}",
        "the {topic} code is in {path}",
        "- {topic}: see {path}",
        "for {topic} open {path}",
    ],
    dev=["{topic} | {path}"],
    eval=["* {topic} lives in {path}", "[{topic}]({path})"],
)

CONTENTS = Kinds(
    train=["{value}\n", "code: {value}\n", "code = {value}\n", "# private\n{value}\n"],
    dev=["the code is {value}\n"],
    eval=["CODE={value}\n", "code -> {value}\n"],
)


class FollowReference(Task):
    name = "follow_reference"
    group = "read"

    def make(self, draw: Draw) -> Problem:
        start, *names = nouns(draw, 10)
        topics, stems = names[:3], names[3:6]
        found = [f"{draw.pick(names[6:])}-{code}" for code in draw.sample(range(100, 999), 3)]
        shape, content = draw.kind("layout", INDEXES), draw.kind("layout", CONTENTS)
        paths = [f"{directory(draw)}{stem}.{draw.pick(['txt', 'md', 'cfg', 'log'])}" for stem in stems]
        rows = [shape.format(topic=topic, path=path) for topic, path in zip(topics, paths, strict=True)]
        index = f"{directory(draw)}{start}.{draw.pick(['md', 'txt', 'list', 'rst'])}"
        body = "\n".join(draw.sample(rows, 3)) + "\n"
        if draw.chance(0.4):
            body = f"{draw.pick(['Index', 'Where things are', 'Files'])}\n\n{body}"
        files = {path: content.format(value=value) for path, value in zip(paths, found, strict=True)}
        return Problem(
            prompt=question(draw, WORDINGS, start=index, topic=topics[0]),
            files={**files, index: body, **bystanders(draw, start, *stems, *topics)},
            expect={"value": found[0], "index": index, "topic": topics[0], "path": paths[0]},
        )

    def solve(self, instance: Instance) -> Solution:
        yield ToolCall("Bash", {"command": f"grep {instance.expect['topic']} {instance.expect['index']}"})
        yield ToolCall("Read", {"file_path": instance.expect["path"]})
        return str(instance.expect["value"])

    def reward(self, instance: Instance, final: Final) -> Score:
        return score(
            final, Check("value", float(says(final.answer, instance.expect["value"])), final.answer[:80])
        )
