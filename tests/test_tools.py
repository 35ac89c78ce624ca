"""The tools, run in a real sandbox: what a model reads back, and that nothing it sends can break the loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pytest_pocket import tools
from pytest_pocket.chat import ToolCall
from pytest_pocket.sandbox import Sandbox, SandboxError, SandboxUnavailable, select
from pytest_pocket.tools import ToolResult

try:
    PROVIDER = select("auto")
except SandboxUnavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)

FILES = {
    "app.py": "import os\n\n\ndef start():\n    return 1\n",
    "lib/b.py": "def stop():\n    return 2\n",
    "lib/a.py": "def stop():\n    return 3\n",
    "notes.txt": "one\ntwo\nthree\ntwo\n",
    "empty.txt": "",
    ".git/config": "return\n",
}
SLOW = settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=200)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with closing(PROVIDER.open(FILES)) as opened:
        yield opened


def use(sandbox: Sandbox, tool: str, arguments: dict[str, Any] | None = None, **more: Any) -> str:
    return tools.run(ToolCall(tool, {**(arguments or {}), **more}), sandbox).text


def test_schemas_have_the_names_and_arguments_of_claude_code() -> None:
    shapes = {
        schema["function"]["name"]: (
            schema["function"]["parameters"]["required"],
            list(schema["function"]["parameters"]["properties"]),
        )
        for schema in tools.SCHEMAS
    }
    assert shapes == {
        "Read": (["file_path"], ["file_path", "offset", "limit"]),
        "Write": (["file_path", "content"], ["file_path", "content"]),
        "Edit": (
            ["file_path", "old_string", "new_string"],
            ["file_path", "old_string", "new_string", "replace_all"],
        ),
        "Bash": (["command"], ["command", "timeout"]),
        "Glob": (["pattern"], ["pattern", "path"]),
        "Grep": (["pattern"], ["pattern", "path", "glob", "output_mode", "-i", "-n"]),
    }


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"file_path": "notes.txt"}, "one\ntwo\nthree\ntwo\n"),
        ({"file_path": "/workspace/notes.txt", "offset": 2, "limit": 2}, "two\nthree\n"),
        ({"file_path": "notes.txt", "offset": "4"}, "two\n"),
        ({"file_path": "notes.txt", "offset": 9}, "(no line 9)"),
        ({"file_path": "empty.txt"}, "(empty file)"),
        ({"file_path": "no.txt"}, "Error: File does not exist: no.txt"),
        ({"file_path": "lib"}, "Error: lib is a directory, not a file; use Glob or Bash ls to list it"),
        ({"file_path": "/dev/zero"}, "Error: /dev/zero is not a regular file"),
        ({"file_path": ""}, "Error: the path is empty; give the path of a file"),
    ],
)
def test_read(sandbox: Sandbox, arguments: dict[str, Any], text: str) -> None:
    assert use(sandbox, "Read", arguments) == text


def test_write_creates_parents_and_replaces(sandbox: Sandbox) -> None:
    assert use(sandbox, "Write", file_path="new/deep/file.txt", content="x") == "Wrote new/deep/file.txt"
    assert use(sandbox, "Write", file_path="/workspace/notes.txt", content="") == "Wrote /workspace/notes.txt"
    states = sandbox.snapshot()
    assert (states["new/deep/file.txt"].content, states["notes.txt"].content) == (b"x", b"")


@pytest.mark.parametrize("path", ["lib", "/usr/bin/x", "notes.txt/x", "/dev/full/x", "x/"])
def test_a_write_that_cannot_be_is_an_error(sandbox: Sandbox, path: str) -> None:
    result = tools.run(ToolCall("Write", {"file_path": path, "content": "x"}), sandbox)
    assert result.text.startswith("Error: ")
    assert not result.ok


def test_write_keeps_the_mode_of_a_script(sandbox: Sandbox) -> None:
    sandbox.run("chmod +x notes.txt")
    use(sandbox, "Edit", file_path="notes.txt", old_string="one", new_string="1")
    assert sandbox.snapshot()["notes.txt"].executable


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"old_string": "one\n", "new_string": ""}, "Edited notes.txt"),
        ({"old_string": "two", "new_string": "2", "replace_all": "true"}, "Edited notes.txt"),
        ({"old_string": "ten", "new_string": "10"}, "Error: old_string not found in notes.txt"),
        (
            {"old_string": "two", "new_string": "2"},
            "Error: old_string occurs 2 times in notes.txt; give more context or set replace_all",
        ),
        ({"old_string": "one", "new_string": "one"}, "Error: old_string and new_string are the same"),
        (
            {"old_string": "", "new_string": "x"},
            "Error: old_string is empty; give the text to replace, or use Write",
        ),
    ],
)
def test_edit(sandbox: Sandbox, arguments: dict[str, Any], text: str) -> None:
    assert use(sandbox, "Edit", arguments, file_path="notes.txt") == text


def test_edit_refuses_what_is_not_text(sandbox: Sandbox) -> None:
    sandbox.run("printf 'a\\xff' >binary")
    text = use(sandbox, "Edit", file_path="binary", old_string="a", new_string="b")
    assert text == "Error: binary is not UTF-8 text; use Bash"


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("echo hi; echo err >&2", "hi\nerr"),
        ("true", "(no output)"),
        ("false", "[exit status 1]"),
        ("cat no", "cat: no: No such file or directory\n[exit status 1]"),
        ("nosuch", "bash: line 1: nosuch: command not found\n[exit status 127]"),
        ("echo a\nnosuch", "a\nbash: line 2: nosuch: command not found\n[exit status 127]"),
        ("printf '\\xff'", "\ufffd"),
        ("cat", "(no output)"),
    ],
)
def test_bash(sandbox: Sandbox, command: str, text: str) -> None:
    assert use(sandbox, "Bash", command=command) == text


def test_bash_says_when_it_timed_out(sandbox: Sandbox) -> None:
    assert use(sandbox, "Bash", command="echo a; sleep 9", timeout="300") == "a\n[timed out after 0.3 s]"
    assert use(sandbox, "Bash", command="echo b") == "b"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"pattern": "**/*.py"}, "app.py\nlib/a.py\nlib/b.py"),
        ({"pattern": "*.py"}, "app.py"),
        ({"pattern": "*.py", "path": "lib"}, "lib/a.py\nlib/b.py"),
        ({"pattern": "/workspace/lib/*"}, "/workspace/lib/a.py\n/workspace/lib/b.py"),
        ({"pattern": "lib/[b-z].py"}, "lib/b.py"),
        ({"pattern": "$(touch pwned)*"}, "No files found"),
        ({"pattern": "*.py; touch pwned"}, "No files found"),
        ({"pattern": ".git/*"}, "No files found"),
        ({"pattern": "*", "path": "nowhere"}, "Error: Directory does not exist: nowhere"),
    ],
)
def test_glob(sandbox: Sandbox, arguments: dict[str, Any], text: str) -> None:
    assert use(sandbox, "Glob", arguments) == text
    assert "pwned" not in sandbox.snapshot()


def test_glob_lists_names_with_spaces_whole(sandbox: Sandbox) -> None:
    sandbox.run("touch -- 'a b.md' '-n.md' '*.md'")
    assert use(sandbox, "Glob", pattern="*.md") == "*.md\n-n.md\na b.md"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"pattern": "return"}, "app.py:5:    return 1\nlib/a.py:2:    return 3\nlib/b.py:2:    return 2"),
        ({"pattern": "t(w|h)", "path": "notes.txt"}, "notes.txt:2:two\nnotes.txt:3:three\nnotes.txt:4:two"),
        (
            {"pattern": "STOP", "-i": "true", "path": "lib", "-n": False},
            "lib/a.py:def stop():\nlib/b.py:def stop():",
        ),
        ({"pattern": "return", "output_mode": "files_with_matches", "glob": "a*.py"}, "app.py\nlib/a.py"),
        ({"pattern": "two", "output_mode": "count"}, "notes.txt:2"),
        ({"pattern": "nothing"}, "No matches found"),
        ({"pattern": "-e"}, "No matches found"),
        ({"pattern": "(", "path": "lib"}, "Error: grep: Unmatched ( or \\("),
        ({"pattern": "a", "path": "nowhere"}, "Error: Path does not exist: nowhere"),
        (
            {"pattern": "a", "output_mode": "all"},
            "Error: output_mode of Grep must be one of content, files_with_matches, count, not 'all'",
        ),
    ],
)
def test_grep(sandbox: Sandbox, arguments: dict[str, Any], text: str) -> None:
    assert use(sandbox, "Grep", arguments) == text


def test_grep_sorts_lines_by_number(sandbox: Sandbox) -> None:
    sandbox.run("for i in {1..12}; do echo x; done >many")
    lines = use(sandbox, "Grep", pattern="x", path="many").splitlines()
    assert lines == [f"many:{number}:x" for number in range(1, 13)]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (ToolCall("Rm", {}), "Error: there is no tool 'Rm'; use one of Read, Write, Edit, Bash, Glob, Grep"),
        (ToolCall("Bash", {}), "Error: Bash needs the argument command"),
        (ToolCall("Bash", {"command": None}), "Error: Bash needs the argument command"),
        (ToolCall("Bash", {"cmd": "ls"}), "Error: Bash has no argument 'cmd'; it takes command, timeout"),
        (ToolCall("Bash", {"command": 3}), "Error: command of Bash must be of type string, not 3"),
        (
            ToolCall("Bash", {"command": "ls", "timeout": "soon"}),
            "Error: timeout of Bash must be of type integer, not 'soon'",
        ),
        (
            ToolCall("Bash", {"command": "a\0"}),
            "Error: command of Bash contains a character that is not text (NUL or a surrogate)",
        ),
        (
            ToolCall("Read", {"file_path": "\ud800"}),
            "Error: file_path of Read contains a character that is not text (NUL or a surrogate)",
        ),
    ],
)
def test_a_wrong_call_says_what_to_do(sandbox: Sandbox, call: ToolCall, text: str) -> None:
    assert tools.run(call, sandbox) == ToolResult(text, ok=False)


def test_a_long_command_is_refused(sandbox: Sandbox) -> None:
    assert use(sandbox, "Bash", command="# " + "x" * 200_000).startswith(
        "Error: the arguments are longer than"
    )


def test_long_output_keeps_head_and_tail_and_says_what_was_cut(sandbox: Sandbox) -> None:
    text = use(sandbox, "Bash", command="seq 100000")
    assert text.startswith("1\n2\n")
    assert text.endswith("99999\n100000")
    assert "characters cut ...]" in text
    assert len(text) < tools.MAX_CHARACTERS + 100


def test_endless_output_is_ended(sandbox: Sandbox) -> None:
    assert use(sandbox, "Bash", command="yes").endswith("y\n[killed: too much output]")


def test_a_broken_sandbox_is_not_the_models_mistake(sandbox: Sandbox) -> None:
    sandbox.close()
    with pytest.raises(SandboxError):
        use(sandbox, "Bash", command="true")


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=40),
    st.lists(st.text(max_size=3), max_size=2),
)
NAMES = [
    "file_path",
    "content",
    "old_string",
    "new_string",
    "replace_all",
    "pattern",
    "path",
    "glob",
    "output_mode",
    "-i",
    "offset",
    "limit",
]


@SLOW
@given(
    name=st.sampled_from(["Read", "Write", "Edit", "Glob", "Grep", "read", "", "\ud800"]),
    arguments=st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(max_size=5)), JUNK, max_size=4),
)
def test_arbitrary_arguments_never_raise(sandbox: Sandbox, name: str, arguments: dict[str, Any]) -> None:
    result = tools.run(ToolCall(name, arguments), sandbox)
    result.text.encode()
    assert result.ok or result.text.startswith("Error: ")


@SLOW
@given(
    name=st.sampled_from(["Read", "Write", "Edit", "Glob", "Grep", "Bash"]),
    texts=st.tuples(TEXT, TEXT, TEXT),
)
def test_arbitrary_texts_never_raise(sandbox: Sandbox, name: str, texts: tuple[str, str, str]) -> None:
    required = next(
        s["function"]["parameters"]["required"] for s in tools.SCHEMAS if s["function"]["name"] == name
    )
    result = tools.run(
        ToolCall(
            name, dict(zip(required, texts, strict=False)) | ({"timeout": 500} if name == "Bash" else {})
        ),
        sandbox,
    )
    result.text.encode()


@SLOW
@given(text=TEXT)
@example("\n\n")
@example("no end of line")
@example("\r\n\u2028\x1c")
def test_what_was_written_is_read_back(sandbox: Sandbox, text: str) -> None:
    use(sandbox, "Write", file_path="f", content=text)
    assert use(sandbox, "Read", file_path="f") == (text or "(empty file)")


@SLOW
@given(text=TEXT.filter(bool), data=st.data())
def test_edit_is_str_replace(sandbox: Sandbox, text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    old = text[start : data.draw(st.integers(start + 1, len(text)))]
    new = data.draw(TEXT.filter(lambda candidate: candidate != old))
    use(sandbox, "Write", file_path="f", content=text)
    use(sandbox, "Edit", file_path="f", old_string=old, new_string=new, replace_all=True)
    assert use(sandbox, "Read", file_path="f") == (text.replace(old, new) or "(empty file)")
