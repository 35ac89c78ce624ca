"""find_definition: say which file defines a function.

Skill: search for a definition among calls, imports and functions with similar names.  Cheats: name any file,
name all files; exactly one path is accepted.
"""

from pytest_pocket import Check, Draw, Final, Instance, Kinds, Problem, Score, Solution, Task, ToolCall, score
from pytest_pocket.answers import says_path
from pytest_pocket.words import VERBS, directory, nouns, phrase, sentence, symbol

WORDINGS = Kinds(
    train=[
        "Which file defines the function `{name}`? Reply with its path alone.",
        "Find the file in which `{name}` is defined and give only its path.",
        "Where is the function `{name}` defined? Answer with the path of the file.",
        "I am looking for the definition of `{name}`. Reply with the file's path only.",
        "Give the path of the file that defines `{name}`, nothing else.",
        "Search the project for the definition of `{name}` and answer with the file path.",
        "In which file does the definition of `{name}` stand? Just the path.",
        "Tell me the path of the file where `{name}` is defined. Only the path.",
        "The function `{name}` is defined in one of the files here. Which one? Path only.",
        "Locate `{name}`: which file defines it? Answer with a path.",
    ],
    dev=[
        "Point me to the file that has the definition of `{name}`: the path, no more.",
        "`{name}` is defined where? Path only.",
    ],
    eval=[
        "What is the path of the source file defining `{name}`? Say only that.",
        "Find out where `{name}` comes from: reply with the defining file's path.",
        "Path of the file with the definition of `{name}`, please.",
    ],
)

LANGUAGES = Kinds(
    train=[
        ("py", "def {0}(value):\n    return value\n", "from {1} import {0}\n\n{0}(3)\n"),
        (
            "js",
            "function {0}(value) {{\n  return value;\n}}\n",
            "import {{ {0} }} from './{1}';\n\n{0}(3);\n",
        ),
        ("go", "func {0}(value int) int {{\n\treturn value\n}}\n", "package main\n\nvar x = {0}(3)\n"),
    ],
    dev=[("kt", "fun {0}(value: Int): Int {{\n    return value\n}}\n", "val x = {0}(3)\n")],
    eval=[("rs", "fn {0}(value: u8) -> u8 {{\n    value\n}}\n", "use {1}::{0};\n\nlet x = {0}(3);\n")],
)


class FindDefinition(Task):
    name = "find_definition"
    group = "read"

    def make(self, draw: Draw) -> Problem:
        ending, define, use = draw.kind("layout", LANGUAGES)
        name = symbol(draw)
        stems = nouns(draw, 7)
        paths = [f"{directory(draw)}{stem}.{ending}" for stem in stems[:4]]
        others = [f"{verb}_{noun}" for verb, noun in zip(draw.sample(VERBS, 3), nouns(draw, 3), strict=True)]
        defined = define.format(others[0]) + "\n" + define.format(name)
        if draw.chance(0.5):
            defined = define.format(name) + "\n" + define.format(others[0])
        files = {
            paths[0]: defined,
            paths[1]: use.format(name, stems[0]),
            paths[2]: define.format(f"{name}_{stems[4]}") + "\n" + define.format(others[1]),
            paths[3]: define.format(others[2]),
            f"{directory(draw)}{stems[5]}.{draw.pick(['md', 'txt', 'rst', 'log'])}": f"{sentence(draw)}\ncall {name} first\n",
        }
        paths_shuffled = draw.sample(list(files), len(files))
        return Problem(
            prompt=phrase(draw, WORDINGS, name=name),
            files={path: files[path] for path in paths_shuffled},
            expect={"path": paths[0], "name": name},
        )

    def solve(self, instance: Instance) -> Solution:
        yield ToolCall(
            "Bash", {"command": f'grep -rlwE "(def|function|func|fun|fn) {instance.expect["name"]}" *'}
        )
        return str(instance.expect["path"])

    def reward(self, instance: Instance, final: Final) -> Score:
        return score(
            final, Check("path", float(says_path(final.answer, instance.expect["path"])), final.answer[:80])
        )
