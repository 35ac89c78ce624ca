"""The six tools that a model is given, named and shaped as in Claude Code.

Every tool is a bash script run inside the sandbox: nothing that a model names is opened by this process.
What a model does wrong comes back as text that says what to do; only the sandbox's own faults are raised.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pytest_pocket.chat import ToolCall
from pytest_pocket.sandbox import CommandResult, Limits, Sandbox

MAX_CHARACTERS = 8_000
DEFAULT_SECONDS = Limits().call_seconds
MAX_SECONDS = 60.0
MAX_SCRIPT = 100_000
"""Bytes.  The kernel takes no argument of more than 128 KiB."""
MAX_FILE = Limits().workspace_bytes
MODES = ("content", "files_with_matches", "count")


@dataclass(frozen=True)
class ToolResult:
    """What the model reads back.  ``ok`` is False when the call was wrong, not when a command failed."""

    text: str
    ok: bool = True


def _schema(
    name: str, description: str, required: Mapping[str, Any], optional: Mapping[str, Any] = {}
) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {**required, **optional}, "required": list(required)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def _property(kind: str, description: str) -> dict[str, Any]:
    return {"type": kind, "description": description}


_PATH = _property("string", "Path of the file")
SCHEMAS: tuple[dict[str, Any], ...] = (
    _schema(
        "Read",
        "Read a text file.",
        {"file_path": _PATH},
        {
            "offset": _property("integer", "First line to read, from 1"),
            "limit": _property("integer", "Number of lines to read"),
        },
    ),
    _schema(
        "Write",
        "Write a file, replacing it if it exists.",
        {"file_path": _PATH, "content": _property("string", "The whole new content")},
    ),
    _schema(
        "Edit",
        "Replace an exact string in a file.",
        {
            "file_path": _PATH,
            "old_string": _property("string", "Text to replace; must occur once"),
            "new_string": _property("string", "Text to put in its place"),
        },
        {"replace_all": _property("boolean", "Replace every occurrence")},
    ),
    _schema(
        "Bash",
        "Run a bash command in the workspace.",
        {"command": _property("string", "The command")},
        {"timeout": _property("integer", "Milliseconds until it is killed")},
    ),
    _schema(
        "Glob",
        "List files whose path matches a pattern such as **/*.py.",
        {"pattern": _property("string", "The pattern")},
        {"path": _property("string", "Directory to look in")},
    ),
    _schema(
        "Grep",
        "Search files for a regular expression.",
        {"pattern": _property("string", "Extended regular expression")},
        {
            "path": _property("string", "File or directory to search"),
            "glob": _property("string", "Only files whose name matches, such as *.py"),
            "output_mode": {"type": "string", "enum": list(MODES), "description": "Default: content"},
            "-i": _property("boolean", "Ignore case"),
            "-n": _property("boolean", "Show line numbers (default true)"),
        },
    ),
)
_PARAMETERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {schema["function"]["name"]: schema["function"]["parameters"] for schema in SCHEMAS}
)


class _Wrong(Exception):
    """The model's mistake, in words meant for it."""


def run(call: ToolCall, sandbox: Sandbox) -> ToolResult:
    """Run one call.  Raises SandboxError only; a model's mistake is a result that is not ``ok``."""
    try:
        if call.name not in _TOOLS:
            raise _Wrong(f"there is no tool {_shown(call.name)}; use one of {', '.join(_TOOLS)}")
        return _TOOLS[call.name](sandbox, **_checked(call))
    except _Wrong as mistake:
        return ToolResult(f"Error: {mistake}", ok=False)


def _checked(call: ToolCall) -> dict[str, Any]:
    """The arguments, coerced to the schema's types, by Python parameter name.  Raises _Wrong."""
    parameters = _PARAMETERS[call.name]
    known = parameters["properties"]
    for name in call.arguments:
        if name not in known:
            raise _Wrong(f"{call.name} has no argument {_shown(name)}; it takes {', '.join(known)}")
    for name in parameters["required"]:
        if call.arguments.get(name) is None:
            raise _Wrong(f"{call.name} needs the argument {name}")
    given = {name: value for name, value in call.arguments.items() if value is not None}
    return {name.lstrip("-"): _coerced(call.name, name, value, known[name]) for name, value in given.items()}


def _coerced(tool: str, name: str, value: object, schema: Mapping[str, Any]) -> str | int | bool:
    """The value in its schema's type: XML formats give every argument as a string."""
    kind = schema["type"]
    wrong = _Wrong(f"{name} of {tool} must be of type {kind}, not {_shown(value)}")
    if kind == "integer":
        if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,15}(\.0+)?\s*", value):
            value = float(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10**15:
            raise wrong
        return value
    if kind == "boolean":
        value = {"true": True, "false": False}.get(value.strip().lower()) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise wrong
        return value
    if not isinstance(value, str):
        raise wrong
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise _Wrong(f"{name} of {tool} contains a character that is not text (NUL or a surrogate)")
    if "enum" in schema and value not in schema["enum"]:
        raise _Wrong(f"{name} of {tool} must be one of {', '.join(schema['enum'])}, not {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """A value as an error shows it: short, and free of what cannot be encoded."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _script(
    sandbox: Sandbox, script: str, *, stdin: bytes = b"", seconds: float | None = None
) -> CommandResult:
    if len(script.encode()) > MAX_SCRIPT:
        raise _Wrong(f"the arguments are longer than {MAX_SCRIPT} bytes; use Write for long texts")
    return sandbox.run(script, stdin=stdin, seconds=seconds)


def _text(result: CommandResult) -> str:
    return result.output.decode(errors="replace")


def _lines(result: CommandResult) -> list[str]:
    return [line for line in _text(result).split("\n") if line]


def _capped(text: str) -> str:
    """Head and tail of a text that is too long, with a mark between."""
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters cut ...]\n{text[-half:]}"


def _path(path: str) -> str:
    """A shell word for a path, which can never be an option."""
    if not path:
        raise _Wrong("the path is empty; give the path of a file")
    return shlex.quote(path if path.startswith("/") else f"./{path}")


# A script ends with `exec` where it can: a process that is not forked costs nothing.
# Statuses that the scripts below end with, out of the way of those of cat, mkdir and the like.
_MISSING, _DIRECTORY, _NOT_A_FILE = 91, 92, 93
_EXISTING_FILE = 'f={path}; [ -d "$f" ] && exit 92; [ -e "$f" ] || exit 91; [ -f "$f" ] || exit 93; '


def _file_error(result: CommandResult, path: str) -> None:
    """Raise what a file's script reports."""
    if result.timed_out:
        raise _Wrong(f"timed out: {_shown(path)}")
    known = {
        _MISSING: f"File does not exist: {path}",
        _DIRECTORY: f"{path} is a directory, not a file; use Glob or Bash ls to list it",
        _NOT_A_FILE: f"{path} is not a regular file",
    }
    if result.status in known:
        raise _Wrong(known[result.status])
    if result.status:
        raise _Wrong(_capped(_text(result).strip()) or f"exit status {result.status}: {path}")


def _read(sandbox: Sandbox, file_path: str, offset: int = 1, limit: int | None = None) -> ToolResult:
    script = _EXISTING_FILE.format(path=_path(file_path))
    first = max(offset, 1)
    if limit is not None:
        script += f'exec sed -n {first},{first + max(limit, 1) - 1}p -- "$f"'
    else:
        script += f'exec tail -n +{first} -- "$f"' if first > 1 else 'exec cat -- "$f"'
    result = _script(sandbox, script)
    # Output beyond the sandbox's limit ends the call; what came before is worth showing.
    if not result.cut:
        _file_error(result, file_path)
    text = _text(result)
    if not text:
        return ToolResult("(empty file)" if first == 1 else f"(no line {first})")
    return ToolResult(_capped(text))


def _write(sandbox: Sandbox, file_path: str, content: str) -> ToolResult:
    _put(sandbox, file_path, content)
    return ToolResult(f"Wrote {file_path}")


def _put(sandbox: Sandbox, path: str, content: str) -> None:
    script = f'f={_path(path)}; [ -d "$f" ] && exit 92; [ -e "$f" ] && [ ! -f "$f" ] && exit 93; '
    if "/" in path:
        script += 'mkdir -p -- "${f%/*}/" && '
    _file_error(_script(sandbox, script + 'exec cat >"$f"', stdin=content.encode()), path)


def _edit(
    sandbox: Sandbox, file_path: str, old_string: str, new_string: str, replace_all: bool = False
) -> ToolResult:
    if not old_string:
        raise _Wrong("old_string is empty; give the text to replace, or use Write")
    if old_string == new_string:
        raise _Wrong("old_string and new_string are the same")
    result = _script(sandbox, _EXISTING_FILE.format(path=_path(file_path)) + 'exec cat -- "$f"')
    if result.cut:
        raise _Wrong(f"{file_path} is too large to edit; use Bash with sed")
    _file_error(result, file_path)
    try:
        text = result.output.decode()
    except UnicodeDecodeError:
        raise _Wrong(f"{file_path} is not UTF-8 text; use Bash") from None
    count = text.count(old_string)
    if count == 0:
        raise _Wrong(f"old_string not found in {file_path}")
    if count > 1 and not replace_all:
        raise _Wrong(f"old_string occurs {count} times in {file_path}; give more context or set replace_all")
    # Before it is made, in this process: a short text in place of each letter of a large file is gigabytes.
    if len(text) + count * (len(new_string) - len(old_string)) > MAX_FILE:
        raise _Wrong(f"{file_path} would be longer than {MAX_FILE} characters; give a shorter new_string")
    _put(sandbox, file_path, text.replace(old_string, new_string))
    return ToolResult(f"Edited {file_path}")


def _bash(sandbox: Sandbox, command: str, timeout: int | None = None) -> ToolResult:
    seconds = DEFAULT_SECONDS if timeout is None else min(max(timeout / 1000, 0.1), MAX_SECONDS)
    result = _script(sandbox, command, seconds=seconds)
    lines = [_capped(_text(result).rstrip("\n"))] if result.output.strip(b"\n") else []
    if result.cut:
        lines.append("[killed: too much output]")
    elif result.timed_out:
        lines.append(f"[timed out after {seconds:g} s]")
    elif result.status:
        lines.append(f"[exit status {result.status}]")
    return ToolResult("\n".join(lines) or "(no output)")


def _glob(sandbox: Sandbox, pattern: str, path: str = ".") -> ToolResult:
    # With an empty IFS an unquoted variable is only expanded as a pattern: no splitting, no substitution.
    script = (
        f"cd -- {_path(path)} 2>/dev/null || exit 91; shopt -s globstar nullglob; export LC_ALL=C; IFS=; "
        f'p={shlex.quote(pattern)}; for f in $p; do [ -f "$f" ] && printf \'%s\\n\' "$f"; done; :'
    )
    result = _script(sandbox, script)
    if result.status == _MISSING:
        raise _Wrong(f"Directory does not exist: {path}")
    if result.timed_out:
        raise _Wrong("the pattern takes too long; give a narrower one")
    prefix = "" if path in (".", "./") or pattern.startswith("/") else path.rstrip("/") + "/"
    found = sorted(prefix + line for line in _lines(result) if not re.match(r"(.*/)?\.git/", line))
    return ToolResult(_capped("\n".join(found)) if found else "No files found")


def _grep(
    sandbox: Sandbox,
    pattern: str,
    path: str = ".",
    glob: str | None = None,
    output_mode: str = "content",
    i: bool = False,
    n: bool = True,
) -> ToolResult:
    words = ["grep", "-rHIE", "--exclude-dir=.git", *(["-i"] if i else [])]
    words += {"files_with_matches": ["-l"], "count": ["-c"]}.get(output_mode, ["-n"] if n else [])
    if glob is not None:
        words.append(shlex.quote(f"--include={glob.removeprefix('**/')}"))
    # From "." so that lines read "path:line:text"; a lone "--" keeps the pattern from being an option.
    where = _path(path) if path not in (".", "./") else "."
    script = f"[ -e {where} ] || exit 91; exec {' '.join(words)} -e {shlex.quote(pattern)} -- {where}"
    result = _script(sandbox, script)
    if result.status == _MISSING:
        raise _Wrong(f"Path does not exist: {path}")
    if result.timed_out:
        raise _Wrong("the search takes too long; give a narrower path")
    lines = [line.removeprefix("./") for line in _lines(result)]
    if result.status > 1 and not result.cut and any(line.startswith("grep: ") for line in lines):
        raise _Wrong(_capped("\n".join(lines)))
    if output_mode == "count":
        lines = [line for line in lines if not line.endswith(":0")]
    return ToolResult(_capped("\n".join(sorted(lines, key=_by_place))) if lines else "No matches found")


def _by_place(line: str) -> tuple[str, int, str]:
    """Sort lines of "path:line:text" by path, then by number."""
    path, _, rest = line.partition(":")
    number = rest.partition(":")[0]
    return path, int(number) if number.isdecimal() and number.isascii() else 0, rest


_TOOLS: Mapping[str, Callable[..., ToolResult]] = MappingProxyType(
    {"Read": _read, "Write": _write, "Edit": _edit, "Bash": _bash, "Glob": _glob, "Grep": _grep}
)
