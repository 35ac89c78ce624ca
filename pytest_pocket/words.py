"""The raw material of instances: words, names, paths and the closing phrases that prompts share.

No word of ``NOUNS`` contains another, so a search for a name finds that name alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from pytest_pocket.task import Draw, Kinds

NOUNS = """
acorn album amber anchor apple arrow badge bagel banjo barrel basil beacon beetle bishop blanket bottle branch
bridge bronze bucket buffer button cabin cactus camel candle canyon carbon cargo castle cedar chapel cherry
circle citrus clover cobalt comet copper coral cotton cradle crater cricket crystal dagger daisy desert diamond
dolphin donkey dragon eagle echo elbow ember engine falcon feather fennel ferry fiddle filter flame forest fossil
fountain galaxy garden garlic geyser ginger glacier goblet gravel guitar hammer harbor hazel helmet heron hornet
icicle island ivory jacket jaguar jasper jungle kennel kernel kettle ladder lagoon lantern laurel lemon lentil
lizard locket lotus magnet mango maple marble meadow mirror mitten monsoon mosaic muffin mustard napkin nectar
needle nickel nutmeg oasis olive onion orchid otter oyster paddle panda papaya pebble pelican pepper pewter
pickle pigeon pillow pirate planet plaster pocket pollen prairie puzzle pyramid quarry quartz rabbit radish
raven ribbon rocket saddle saffron sailor salmon sandal satin scarf shadow shovel silver sketch spider spruce
squash statue stream sunset tablet tango teapot temple thistle thunder timber tomato topaz trumpet tulip tundra
tunnel turtle umbrella valley velvet violet walnut whistle willow window winter yogurt zebra zipper
""".split()

PEOPLE = Kinds(
    train="""Ada Amir Anna Bruno Carla Chen Dana Diego Elena Emil Farah Felix Grace Hana Hugo Igor Ines Ivan Jonas
    Kenji Lara Leon Lucia Marco Maya Milan Nadia Nina Omar Paula Pedro Rosa Samir Selma Tomas Vera Yara Zoe""".split(),
    dev=["Astrid", "Boris", "Celia", "Dario"],
    eval=["Edith", "Flora", "Gustav", "Heidi", "Irina", "Jorge"],
)

SURNAMES = """Abbott Becker Castro Doyle Eriksen Fischer Garcia Hansen Ibarra Jansen Kovacs Larsen Moreno Novak
Olsen Petrov Quinn Rossi Sato Tanaka Urban Vargas Weber Young Zhang""".split()

VERBS = """add adjust archive attach build cache check clean close collect compare copy count create detach export
fetch fix format import index inspect load merge move normalize open parse patch prepare print publish read reload
remove render repair replace report reset resize restore retry scan send sort split store sync tidy trim update
upload validate verify wrap write""".split()

DIRECTORIES = Kinds(
    train=[
        "app",
        "src",
        "lib",
        "core",
        "data",
        "docs",
        "etc",
        "config",
        "tools",
        "scripts",
        "notes",
        "project",
        "service",
    ],
    dev=["modules", "shared"],
    eval=["internal", "workspace", "resources"],
)

VALUE_ALONE = Kinds(
    train=[
        "Reply with the value alone.",
        "Answer with the value only.",
        "Give just the value.",
        "Reply with nothing but the answer.",
        "Only the answer, please, no explanation.",
        "Your answer should be the value and nothing else.",
        "State the bare value.",
        "Keep the answer to the value itself.",
    ],
    dev=["No other words in the answer.", "Respond with the plain value."],
    eval=["Output the value by itself.", "The final answer must be the value alone."],
)

GREETINGS = Kinds(
    train=[
        "",
        "",
        "",
        "Please help me. ",
        "Hi. ",
        "A small job: ",
        "Quick question. ",
        "Next task. ",
        "In this project: ",
    ],
    dev=["Hello there. ", "One thing to do. "],
    eval=["Hey. ", "I need your help. ", "To do: "],
)


def phrase(draw: Draw, wordings: Kinds[str], **fields: object) -> str:
    """A task's request: a drawn wording with its fields filled in, sometimes after a greeting."""
    wording = draw.kind("wording", wordings)
    return draw.kind("wording", GREETINGS) + wording.format(**fields)


def question(draw: Draw, wordings: Kinds[str], **fields: object) -> str:
    """Like :func:`phrase`, for a request whose answer is a bare value."""
    return f"{phrase(draw, wordings, **fields)} {draw.kind('wording', VALUE_ALONE)}"


def nouns(draw: Draw, count: int) -> list[str]:
    """Different nouns."""
    return draw.sample(NOUNS, count)


def symbol(draw: Draw) -> str:
    """A function's name, such as ``merge_ribbon``."""
    return f"{draw.pick(VERBS)}_{draw.pick(NOUNS)}"


def directory(draw: Draw) -> str:
    """A folder of one or two parts, or the root (""), ending in "/" unless it is the root."""
    depth = draw.pick([0, 1, 1, 2])
    parts = [draw.kind("layout", DIRECTORIES) for _ in range(depth)]
    return "".join(f"{part}/" for part in dict.fromkeys(parts))


def value(draw: Draw) -> str:
    """A setting's value: a number, a word, a version, a code or a duration."""
    shape = draw.pick(["number", "number", "word", "version", "code", "duration"])
    if shape == "number":
        return str(draw.number(2, 9999))
    if shape == "word":
        return draw.pick(NOUNS)
    if shape == "version":
        return f"{draw.number(0, 9)}.{draw.number(0, 30)}.{draw.number(0, 9)}"
    if shape == "code":
        return f"{draw.pick(NOUNS)}-{draw.number(10, 99)}"
    return f"{draw.number(2, 90)}{draw.pick(['s', 'ms', 'm'])}"


def values(draw: Draw, count: int, avoid: Sequence[str] = ()) -> list[str]:
    """Different values, none of which is part of another or holds a word to avoid."""
    found: list[str] = []
    while len(found) < count:
        new = value(draw)
        if not any(new in old or old in new for old in found) and not any(word in new for word in avoid):
            found.append(new)
    return found


ENDINGS = ("txt", "md", "log", "cfg", "ini", "json", "toml", "yaml", "csv", "env", "sh")
"""Of files whose content a task draws for no other reason than to have it."""


def content(draw: Draw, ending: str) -> str:
    """What a file with that ending could hold: plain text, or a few settings."""
    rows = {
        "cfg": "{0} = {1}",
        "ini": "{0} = {1}",
        "toml": '{0} = "{1}"',
        "yaml": "{0}: {1}",
        "csv": "{0},{1}",
        "env": "{0}={1}",
        "sh": "{0}={1}",
        "json": '  "{0}": "{1}"',
    }
    count = draw.number(1, 3)
    if ending not in rows:
        return "".join(f"{sentence(draw)}\n" for _ in range(count))
    settings = zip(nouns(draw, count), values(draw, count), strict=True)
    lines = [rows[ending].format(*setting) for setting in settings]
    if ending == "json":
        return "{\n" + ",\n".join(lines) + "\n}\n"
    heading = f"[{draw.pick(NOUNS)}]\n" if ending == "ini" else ""
    return heading + "\n".join(lines) + "\n"


def bystanders(draw: Draw, *paths: str) -> dict[str, str]:
    """One to three files that a task has nothing to do with, by path.  No name has a noun that is in ``paths``."""
    free = [noun for noun in NOUNS if not any(noun in path for path in paths)]
    folders = ["", "", "", *(f"{folder}/" for folder in DIRECTORIES.train)]
    named = [
        (f"{draw.pick(folders)}{stem}.{ending}", ending)
        for stem in draw.sample(free, draw.number(1, 3))
        for ending in [draw.pick(ENDINGS)]
    ]
    return {path: content(draw, ending) for path, ending in named}


def sentence(draw: Draw) -> str:
    """A line of plain text."""
    one, two, three = nouns(draw, 3)
    shape = draw.pick(
        [
            "the {0} is near the {1}",
            "{0} and {1} before {2}",
            "keep the {0} by the {1}",
            "a {0} for every {1}",
            "no {0} without {1}",
            "{0} over {1} and {2}",
            "move the {0} to the {1}",
        ]
    )
    return shape.format(one, two, three)
