"""Small Python functions, by family: what they do, how they are written, how they go wrong, where they stand.

The code tasks draw from these.  A family has at least one spelling of its name, one or more single-line bugs,
and a source of inputs; the expected outputs are computed from the correct code, here, never inside a sandbox.
A project puts a function among others into a module, with a test of it in the same folder or another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pytest_pocket import words
from pytest_pocket.chat import ToolCall
from pytest_pocket.task import Check, Draw, Final, Instance, Kinds, Solution

Args = tuple[Any, ...]


@dataclass(frozen=True)
class Family:
    """A kind of function.  ``body`` is indented by four spaces; a bug is a correct line and a wrong one."""

    names: tuple[str, ...]
    params: str
    doc: str
    body: str
    bugs: tuple[tuple[str, str], ...]
    inputs: Callable[[Draw], Args]


def _int(draw: Draw) -> int:
    return draw.number(-9, 20)


def _positive(draw: Draw) -> int:
    return draw.number(1, 30)


def _ints(draw: Draw) -> list[int]:
    return [_int(draw) for _ in range(draw.number(2, 6))]


def _word(draw: Draw) -> str:
    return draw.pick(words.NOUNS)


def _words(draw: Draw) -> list[str]:
    return words.nouns(draw, draw.number(2, 5))


def _text(draw: Draw) -> str:
    return " ".join(_words(draw))


def _family(
    names: str, params: str, doc: str, body: str, bugs: list[tuple[str, str]], *inputs: Callable[[Draw], Any]
) -> Family:
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    return Family(
        tuple(names.split()),
        params,
        doc,
        indented,
        tuple(bugs),
        lambda draw: tuple(make(draw) for make in inputs),
    )


FAMILIES = Kinds(
    train=[
        _family(
            "add_all total_of",
            "numbers",
            "Return the sum of the numbers.",
            "total = 0\nfor number in numbers:\n    total += number\nreturn total",
            [("        total += number", "        total = number"), ("    total = 0", "    total = 1")],
            _ints,
        ),
        _family(
            "largest find_max",
            "numbers",
            "Return the largest number.",
            "return max(numbers)",
            [("    return max(numbers)", "    return min(numbers)")],
            _ints,
        ),
        _family(
            "smallest find_min",
            "numbers",
            "Return the smallest number.",
            "return min(numbers)",
            [("    return min(numbers)", "    return max(numbers)")],
            _ints,
        ),
        _family(
            "spread value_range",
            "numbers",
            "Return the difference between the largest and the smallest number.",
            "return max(numbers) - min(numbers)",
            [("    return max(numbers) - min(numbers)", "    return max(numbers) + min(numbers)")],
            _ints,
        ),
        _family(
            "count_even how_many_even",
            "numbers",
            "Return how many numbers are even.",
            "return sum(1 for n in numbers if n % 2 == 0)",
            [
                (
                    "    return sum(1 for n in numbers if n % 2 == 0)",
                    "    return sum(1 for n in numbers if n % 2 == 1)",
                )
            ],
            _ints,
        ),
        _family(
            "keep_positive only_positive",
            "numbers",
            "Return a list of the numbers greater than zero.",
            "return [n for n in numbers if n > 0]",
            [("    return [n for n in numbers if n > 0]", "    return [n for n in numbers if n < 0]")],
            _ints,
        ),
        _family(
            "double_all twice_each",
            "numbers",
            "Return a list with every number doubled.",
            "return [n * 2 for n in numbers]",
            [("    return [n * 2 for n in numbers]", "    return [n + 2 for n in numbers]")],
            _ints,
        ),
        _family(
            "square_all squares",
            "numbers",
            "Return a list with the square of every number.",
            "return [n * n for n in numbers]",
            [("    return [n * n for n in numbers]", "    return [n + n for n in numbers]")],
            _ints,
        ),
        _family(
            "clamp limit_to",
            "value, low, high",
            "Return value, but not less than low and not more than high.",
            "return max(low, min(value, high))",
            [("    return max(low, min(value, high))", "    return min(low, max(value, high))")],
            _int,
            lambda draw: draw.number(-5, 2),
            lambda draw: draw.number(3, 12),
        ),
        _family(
            "is_even even",
            "number",
            "Return True if the number is even.",
            "return number % 2 == 0",
            [("    return number % 2 == 0", "    return number % 2 == 1")],
            _int,
        ),
        _family(
            "absolute distance_from_zero",
            "number",
            "Return the number without its sign.",
            "if number < 0:\n    return -number\nreturn number",
            [
                ("    if number < 0:", "    if number > 0:"),
                ("        return -number", "        return number"),
            ],
            _int,
        ),
        _family(
            "factorial product_up_to",
            "n",
            "Return the product of all integers from 1 to n.",
            "result = 1\nfor i in range(1, n + 1):\n    result *= i\nreturn result",
            [
                ("    for i in range(1, n + 1):", "    for i in range(1, n):"),
                ("        result *= i", "        result += i"),
            ],
            lambda draw: draw.number(2, 14),
        ),
        _family(
            "sum_to triangle",
            "n",
            "Return the sum of all integers from 1 to n.",
            "return sum(range(1, n + 1))",
            [("    return sum(range(1, n + 1))", "    return sum(range(1, n))")],
            _positive,
        ),
        _family(
            "gcd common_divisor",
            "a, b",
            "Return the greatest common divisor of a and b.",
            "while b:\n    a, b = b, a % b\nreturn a",
            [("    while b:", "    if b:"), ("    return a", "    return b")],
            _positive,
            _positive,
        ),
        _family(
            "fibonacci fib",
            "n",
            "Return the n-th Fibonacci number, counting 0 and 1 as the first two.",
            "a, b = 0, 1\nfor _ in range(n - 1):\n    a, b = b, a + b\nreturn a",
            [
                ("    for _ in range(n - 1):", "    for _ in range(n):"),
                ("    a, b = 0, 1", "    a, b = 1, 1"),
            ],
            lambda draw: draw.number(3, 15),
        ),
        _family(
            "digit_sum sum_digits",
            "number",
            "Return the sum of the decimal digits of a positive number.",
            "return sum(int(digit) for digit in str(number))",
            [("    return sum(int(digit) for digit in str(number))", "    return len(str(number))")],
            lambda draw: draw.number(10, 9999),
        ),
        _family(
            "reverse_text backwards",
            "text",
            "Return the text in reverse order.",
            "return text[::-1]",
            [("    return text[::-1]", "    return text[::1]")],
            _word,
        ),
        _family(
            "shout upper_case",
            "text",
            "Return the text in upper case with an exclamation mark.",
            'return text.upper() + "!"',
            [
                ('    return text.upper() + "!"', '    return text.lower() + "!"'),
                ('    return text.upper() + "!"', "    return text.upper()"),
            ],
            _word,
        ),
        _family(
            "count_vowels vowels_in",
            "text",
            "Return how many vowels (a, e, i, o, u) the text has.",
            'return sum(1 for letter in text if letter in "aeiou")',
            [
                (
                    '    return sum(1 for letter in text if letter in "aeiou")',
                    '    return sum(1 for letter in text if letter not in "aeiou")',
                )
            ],
            _word,
        ),
        _family(
            "count_words word_count",
            "text",
            "Return the number of words in the text.",
            "return len(text.split())",
            [("    return len(text.split())", "    return len(text)")],
            _text,
        ),
        _family(
            "initials first_letters",
            "text",
            "Return the first letters of the words, in upper case, without spaces.",
            'return "".join(word[0].upper() for word in text.split())',
            [
                (
                    '    return "".join(word[0].upper() for word in text.split())',
                    '    return "".join(word[0] for word in text.split())',
                )
            ],
            _text,
        ),
        _family(
            "longest_word widest",
            "text",
            "Return the longest word of the text (the first of several).",
            "return max(text.split(), key=len)",
            [
                ("    return max(text.split(), key=len)", "    return max(text.split())"),
                ("    return max(text.split(), key=len)", "    return min(text.split(), key=len)"),
            ],
            _text,
        ),
        _family(
            "slugify to_slug",
            "text",
            "Return the text in lower case with a hyphen for every space.",
            'return text.lower().replace(" ", "-")',
            [('    return text.lower().replace(" ", "-")', '    return text.lower().replace(" ", "_")')],
            _text,
        ),
        _family(
            "is_palindrome same_backwards",
            "text",
            "Return True if the text reads the same in both directions.",
            "return text == text[::-1]",
            [("    return text == text[::-1]", "    return text != text[::-1]")],
            lambda draw: draw.pick(["level", "noon", "radar", "civic", _word(draw), _word(draw)]),
        ),
        _family(
            "repeat_text times",
            "text, count",
            "Return the text repeated count times, separated by commas.",
            'return ",".join([text] * count)',
            [('    return ",".join([text] * count)', '    return "".join([text] * count)')],
            _word,
            lambda draw: draw.number(2, 5),
        ),
        _family(
            "join_words with_spaces",
            "items",
            "Return the items joined by single spaces.",
            'return " ".join(items)',
            [('    return " ".join(items)', '    return "".join(items)')],
            _words,
        ),
        _family(
            "last_item final",
            "items",
            "Return the last item.",
            "return items[-1]",
            [("    return items[-1]", "    return items[0]")],
            _words,
        ),
        _family(
            "first_and_last ends_of",
            "items",
            "Return a list of the first and the last item.",
            "return [items[0], items[-1]]",
            [("    return [items[0], items[-1]]", "    return [items[0], items[1]]")],
            lambda draw: words.nouns(draw, draw.number(3, 5)),
        ),
        _family(
            "sort_descending high_to_low",
            "numbers",
            "Return the numbers sorted from high to low.",
            "return sorted(numbers, reverse=True)",
            [("    return sorted(numbers, reverse=True)", "    return sorted(numbers)")],
            _ints,
        ),
        _family(
            "unique_sorted distinct",
            "numbers",
            "Return the different numbers, sorted from low to high.",
            "return sorted(set(numbers))",
            [("    return sorted(set(numbers))", "    return sorted(numbers)")],
            lambda draw: [draw.number(1, 4) for _ in range(6)],
        ),
        _family(
            "every_second alternate",
            "items",
            "Return every second item, starting with the first.",
            "return items[::2]",
            [("    return items[::2]", "    return items[1::2]")],
            lambda draw: words.nouns(draw, draw.number(3, 6)),
        ),
        _family(
            "lengths_of sizes",
            "items",
            "Return a list of the lengths of the items.",
            "return [len(item) for item in items]",
            [("    return [len(item) for item in items]", "    return [item for item in items]")],
            _words,
        ),
        _family(
            "index_of position",
            "items, wanted",
            "Return the position of the wanted item, or -1 if it is not there.",
            "if wanted in items:\n    return items.index(wanted)\nreturn -1",
            [("    return -1", "    return 0"), ("    if wanted in items:", "    if wanted not in items:")],
            lambda draw: ["maple", "cedar", "tulip", *_words(draw)],
            lambda draw: draw.pick(["maple", "cedar", "tulip", "rust"]),
        ),
        _family(
            "swap_pair flip",
            "pair",
            "Return a list of the two items in the opposite order.",
            "first, second = pair\nreturn [second, first]",
            [("    return [second, first]", "    return [first, second]")],
            lambda draw: words.nouns(draw, 2),
        ),
    ],
    dev=[
        _family(
            "product multiply_all",
            "numbers",
            "Return the product of the numbers.",
            "result = 1\nfor number in numbers:\n    result *= number\nreturn result",
            [("        result *= number", "        result += number"), ("    result = 1", "    result = 0")],
            _ints,
        ),
        _family(
            "count_letter occurrences",
            "text, letter",
            "Return how often the letter occurs in the text.",
            "return text.count(letter)",
            [("    return text.count(letter)", "    return text.find(letter)")],
            _word,
            lambda draw: draw.pick(list("aeiort")),
        ),
        _family(
            "drop_first rest_of",
            "items",
            "Return all items but the first.",
            "return items[1:]",
            [("    return items[1:]", "    return items[:1]")],
            _words,
        ),
        _family(
            "is_sorted in_order",
            "numbers",
            "Return True if no number is less than the one before it.",
            "return numbers == sorted(numbers)",
            [("    return numbers == sorted(numbers)", "    return numbers != sorted(numbers)")],
            lambda draw: draw.pick([_ints(draw), sorted(_ints(draw))]),
        ),
    ],
    eval=[
        _family(
            "title_case capitalize_all",
            "text",
            "Return the text with the first letter of every word in upper case.",
            'return " ".join(word.capitalize() for word in text.split())',
            [
                (
                    '    return " ".join(word.capitalize() for word in text.split())',
                    '    return " ".join(word.upper() for word in text.split())',
                )
            ],
            _text,
        ),
        _family(
            "cumulative running_total",
            "numbers",
            "Return a list of the running totals.",
            "totals = []\ntotal = 0\nfor number in numbers:\n    total += number\n    totals.append(total)\nreturn totals",
            [
                ("        totals.append(total)", "        totals.append(number)"),
                ("        total += number", "        total = number"),
            ],
            _ints,
        ),
        _family(
            "remove_item without",
            "items, unwanted",
            "Return the items that are not the unwanted one.",
            "return [item for item in items if item != unwanted]",
            [
                (
                    "    return [item for item in items if item != unwanted]",
                    "    return [item for item in items if item == unwanted]",
                )
            ],
            lambda draw: ["maple", "cedar", "tulip", *_words(draw)],
            lambda draw: draw.pick(["maple", "cedar", "rust"]),
        ),
        _family(
            "power raise_to",
            "base, exponent",
            "Return base to the power of exponent.",
            "result = 1\nfor _ in range(exponent):\n    result *= base\nreturn result",
            [
                ("    for _ in range(exponent):", "    for _ in range(exponent + 1):"),
                ("        result *= base", "        result += base"),
            ],
            lambda draw: draw.number(2, 6),
            lambda draw: draw.number(2, 5),
        ),
        _family(
            "middle_item center",
            "items",
            "Return the item in the middle of a list of odd length.",
            "return items[len(items) // 2]",
            [("    return items[len(items) // 2]", "    return items[len(items) // 3]")],
            lambda draw: words.nouns(draw, draw.pick([3, 5, 7])),
        ),
        _family(
            "pairs_with_sum count_pairs",
            "numbers, target",
            "Return how many pairs of positions add up to the target.",
            "count = 0\nfor i in range(len(numbers)):\n    for j in range(i + 1, len(numbers)):\n        if numbers[i] + numbers[j] == target:\n            count += 1\nreturn count",
            [
                ("        for j in range(i + 1, len(numbers)):", "        for j in range(i, len(numbers)):"),
                ("                count += 1", "                count = 1"),
            ],
            lambda draw: [draw.number(0, 3) for _ in range(6)],
            lambda draw: draw.number(1, 4),
        ),
    ],
)


PARAMETERS = {
    "numbers": Kinds(train=["numbers", "values", "amounts"], dev=["figures"], eval=["series", "quantities"]),
    "text": Kinds(train=["text", "phrase", "content"], dev=["line"], eval=["string", "message"]),
    "items": Kinds(train=["items", "entries", "things"], dev=["parts"], eval=["elements", "rows"]),
}
"""What the parameters may be called that most families have."""

SLIPS = (
    (" + ", " - "),
    (" - ", " + "),
    (" * ", " + "),
    (" += ", " -= "),
    (" *= ", " += "),
    (" = 0", " = 1"),
    (" = 1", " = 0"),
    (" == ", " != "),
    (" != ", " == "),
    (" < ", " > "),
    (" < ", " <= "),
    (" > ", " < "),
    (" > ", " >= "),
    (" in ", " not in "),
    (" % 2", " % 3"),
    (" // 2", " // 3"),
    ("max(", "min("),
    ("min(", "max("),
    ("sorted(", "list("),
    ("range(1,", "range(2,"),
    (" + 1)", ")"),
    ("[0]", "[1]"),
    ("[-1]", "[-2]"),
    ("[::2]", "[::3]"),
    ("[1:]", "[2:]"),
    (".upper()", ".lower()"),
    (".lower()", ".upper()"),
    ('" "', '"-"'),
    ('","', '";"'),
    ("return -1", "return 1"),
)
"""One text in place of another: the bugs that a body may have besides those of its family."""


@dataclass(frozen=True)
class Function:
    """One drawn function under one name, with shown and hidden cases (arguments and the right result)."""

    name: str
    params: str
    body: str
    family: Family
    shown: tuple[tuple[Args, Any], ...] = ()
    hidden: tuple[tuple[Args, Any], ...] = ()

    def source(self, body: str | None = None) -> str:
        """The function's code, with another body if given."""
        return f'def {self.name}({self.params}):\n    """{self.family.doc}"""\n{body or self.body}'

    def spoiled(self, right: str, wrong: str) -> str:
        """The body with a wrong line in place of a right one."""
        return self.body.replace(f"{right}\n", f"{wrong}\n", 1)


def _call(source: str, name: str, args: Args) -> Any:
    scope: dict[str, Any] = {}
    # The source of a family, which is ours.
    exec(source, scope)  # nosec B102
    return scope[name](*json.loads(json.dumps(args)))


def _spelled(family: Family, name: str, parameter: Callable[[Kinds[str]], str]) -> Function:
    """A function of a family, whose first parameter may have another name."""
    params, body = family.params, family.body
    for old, kinds in PARAMETERS.items():
        if re.search(rf"\b{old}\b", params):
            new = parameter(kinds)
            params, body = (re.sub(rf"\b{old}\b", new, each) for each in (params, body))
    return Function(name, params, body, family)


def draw_function(draw: Draw) -> Function:
    """A function whose shown and hidden cases differ, and whose results are not all the same."""
    family = draw.kind("family", FAMILIES)
    blank = _spelled(family, draw.pick(family.names), lambda kinds: draw.kind("layout", kinds))
    cases: dict[str, tuple[Args, Any]] = {}
    for _ in range(200):
        args = family.inputs(draw)
        cases[repr(args)] = (args, _call(blank.source(), blank.name, args))
        if len(cases) >= 8 and len({repr(result) for _, result in cases.values()}) >= 2:
            break
    else:
        raise ValueError(f"the inputs of family {blank.name!r} are too much alike")
    drawn = list(cases.values())
    return replace(blank, shown=tuple(drawn[:3]), hidden=tuple(drawn[3:]))


def _wrong_lines(function: Function) -> Iterator[tuple[str, str]]:
    """A line of a function's body, and what it may be instead: the family's bugs, and slips."""
    lines = function.body.splitlines()
    for right, wrong in function.family.bugs:
        # The bug is written with the family's own names.
        own = function.family.body.splitlines().index(right)
        for old, new in zip(function.family.params.split(", "), function.params.split(", "), strict=True):
            wrong = re.sub(rf"\b{old}\b", new, wrong)
        yield lines[own], wrong
    if "    while " in function.body:
        return  # a slip there may never end
    for line in lines:
        for right, wrong in SLIPS:
            for found in re.finditer(re.escape(right), line):
                yield line, line[: found.start()] + wrong + line[found.end() :]


def draw_bug(draw: Draw, function: Function) -> tuple[str, str] | None:
    """A line of the body and a wrong one that fails a shown and a hidden case; None if no bug of it does."""
    bugs = list(dict.fromkeys(_wrong_lines(function)))
    draw.random.shuffle(bugs)
    for right, wrong in bugs:
        body = function.spoiled(right, wrong)
        if (
            function.body.splitlines().count(right) == 1
            and compiles(function.source(body))
            and _fails(function, body, function.shown)
            and _fails(function, body, function.hidden)
        ):
            return right, wrong
    return None


def compiles(source: str) -> bool:
    """Whether Python can read a source."""
    try:
        compile(source, "function", "exec")
    except SyntaxError:
        return False
    return True


def _fails(function: Function, body: str, cases: tuple[tuple[Args, Any], ...]) -> bool:
    for args, result in cases:
        try:
            if _call(function.source(body), function.name, args) != result:
                return True
        except Exception:
            return True
    return False


PLACES = Kinds(
    train=[
        ("", "", "test_{0}"),
        ("", "", "{0}_test"),
        ("src/", "", "test_{0}"),
        ("{1}/", "{1}/", "test_{0}"),
        ("lib/", "tests/", "test_{0}"),
        ("", "tests/", "check_{0}"),
        ("{1}/", "", "test_{0}"),
    ],
    dev=[("code/", "checks/", "test_{0}")],
    eval=[("{1}/core/", "", "test_{0}"), ("source/", "test/", "try_{0}")],
)
"""Where a module lies, where its test, and what that is called: {0} is the module, {1} another noun."""

TESTS: Kinds[str] = Kinds(train=["asserts", "asserts", "table"], dev=["list"], eval=["messages"])


@dataclass(frozen=True)
class Project:
    """A module with a drawn function in it, and a test that ``python3 {test}`` in the workspace runs.

    ``rest`` is the code of the module's other functions, which are right and must stay.
    """

    path: str
    test: str
    files: dict[str, str]
    rest: tuple[str, ...]

    def expect(self, function: Function) -> dict[str, Any]:
        """What :func:`works_in_project` looks at."""
        return {
            "path": self.path,
            "test": self.test,
            "rest": self.rest,
            "name": function.name,
            "shown": function.shown,
            "cases": function.hidden,
        }


def _test(style: str, function: Function, module: str, folder: str, tests: str) -> str:
    """A script that checks a function's shown cases and prints "ok"."""
    calls = [
        (f"{function.name}({', '.join(map(repr, args))})", repr(args), repr(result))
        for args, result in function.shown
    ]
    if style == "asserts":
        body = "".join(f"assert {call} == {result}\n" for call, _, result in calls)
    elif style == "table":
        rows = "".join(f"    ({args}, {result}),\n" for _, args, result in calls)
        body = f"CASES = [\n{rows}]\n\nfor args, wanted in CASES:\n    assert {function.name}(*args) == wanted, args\n"
    elif style == "list":
        found, wanted = (
            ", ".join(each) for each in zip(*[(call, result) for call, _, result in calls], strict=True)
        )
        body = f"found = [{found}]\nassert found == [{wanted}], found\n"
    else:
        body = "".join(
            f'assert {call} == {result}, "{function.name} is wrong"\n' for call, _, result in calls
        )
    path = "" if folder == tests else f'import sys\n\nsys.path.insert(0, "{folder.rstrip("/") or "."}")\n'
    return f'{path}from {module} import {function.name}\n\n{body}print("ok")\n'


def draw_project(draw: Draw, function: Function, line: str, body: str) -> Project:
    """A project whose module has the function with another body; ``line`` of it stands nowhere else in the module."""
    folder, tests, named = draw.kind("layout", PLACES)
    style = draw.kind("layout", TESTS)
    module, package, second = words.nouns(draw, 3)
    folder, tests = folder.format(module, package), tests.format(module, package)
    path, test = f"{folder}{module}.py", f"{tests}{named.format(module)}.py"
    neighbours: list[str] = []
    for family in draw.sample(FAMILIES.train, draw.pick([0, 1, 1, 2, 2])):
        name = draw.pick(family.names)
        source = _spelled(family, name, lambda kinds: draw.pick(kinds.train)).source()
        if name != function.name and line not in source:
            neighbours.append(source)
    parts = [*neighbours, function.source(body)]
    draw.random.shuffle(parts)
    if draw.chance(0.5):
        parts = [f'"""About the {" and the ".join(words.nouns(draw, 2))}."""\n', *parts]
    files = {
        path: "\n\n".join(parts),
        test: _test(style, function, module, folder, tests),
        **words.bystanders(draw, path, test, second),
    }
    if draw.chance(0.3):
        family = draw.pick(FAMILIES.train)
        other = _spelled(family, draw.pick(family.names), lambda kinds: draw.pick(kinds.train))
        files[f"{folder}{second}.py"] = other.source()
    return Project(path, test, files, tuple(neighbours))


_HARNESS = """\
import json, sys
sys.path.insert(0, ".")
from deliverable import {name} as function
with open("inputs.json") as file:
    inputs = json.load(file)
results = []
for args in inputs:
    try:
        results.append(function(*args))
    except Exception as error:
        results.append(repr(error))
print()
print(json.dumps(results))
"""


def works(final: Final, path: str, name: str, cases: tuple[tuple[Args, Any], ...]) -> bool:
    """Whether the function in a file gives the right results on hidden cases.

    A copy of that file alone runs in a fresh, isolated sandbox.  Only the inputs go in; the results are
    compared here, so nothing in the file can forge a pass by patching, printing or exiting early.
    """
    text = final.text(path)
    if text is None:
        return False
    files = {
        "deliverable.py": text,
        "inputs.json": json.dumps([args for args, _ in cases]),
        "harness.py": _HARNESS.format(name=name),
    }
    result = final.probe(files, "python3 -I harness.py")
    try:
        found = json.loads(result.output.decode().strip().splitlines()[-1])
    except (ValueError, IndexError, RecursionError):
        return False
    expected = json.loads(json.dumps([result for _, result in cases]))
    # JSON keeps True and 1 apart, Python's == does not.
    return json.dumps(found) == json.dumps(expected)


def edit_and_test(instance: Instance, old: str, new: str) -> Solution:
    """What an oracle does in a project: read the module, replace a part of it, run the test."""
    path = instance.expect["path"]
    yield ToolCall("Read", {"file_path": path})
    yield ToolCall("Edit", {"file_path": path, "old_string": old, "new_string": new})
    yield ToolCall("Bash", {"command": f"python3 {instance.expect['test']}"})
    return "Done."


def works_in_project(instance: Instance, final: Final) -> Check:
    """Whether a project's function gives the right results, and the module's other functions are as they were."""
    path, name, cases, rest = (instance.expect[key] for key in ("path", "name", "cases", "rest"))
    text = final.text(path) or ""
    if not all(source in text for source in rest):
        return Check("works", 0.0, "another function of the module has changed")
    return Check("works", float(works(final, path, name, cases)), "hidden inputs")
