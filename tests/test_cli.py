"""The pocket command: quick help, lists, tables, trajectories, one clear line for what is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from pytest_pocket import __version__, records
from pytest_pocket.chat import ChatReply, Message, ToolCall
from pytest_pocket.cli import app
from pytest_pocket.conditions import Condition
from pytest_pocket.episode import Episode
from pytest_pocket.registry import Model
from pytest_pocket.sandbox import FileState
from pytest_pocket.task import SUITE_VERSION, Check, Instance, Score

HOSTILE = "line one\x1b[31m\nline two\u202e[red]"


def pocket(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two tasks."""
    directory = tmp_path / "run"
    started = records.start(directory, {"schema": 1})
    for task, reward in (("read_value", 1.0), ("list_files", 0.5)):
        call = ChatReply(
            HOSTILE, thinking="hm", calls=(ToolCall("Bash", {"command": "ls\nls"}),), completion_tokens=4
        )
        messages = (Message("user", "Do it."), call.message(), Message("tool", "x\n" * 99, name="Bash"))
        score = Score((Check("value", reward, "seen"),), reward, 1.0, 1.0)
        episode = Episode(
            Instance(task, 7, "Do it.", {}, {}), Condition(), messages, (call,),
            "passed" if reward == 1 else "wrong", "answer", score, "42", {"a": FileState("file", b"1")}, 0.5,
        )  # fmt: skip
        cell = SimpleNamespace(run=1, sample=0)
        started.append(
            records.record(cell=cell, model=Model("tiny", "hf"), episode=episode, split="train", group="read")
        )
    return directory


def test_help_is_quick_and_loads_no_engine() -> None:
    code = (
        "import sys\nfrom pytest_pocket.cli import app\n"
        "try: app(['--help'])\n"
        "finally: print(sorted({'torch', 'transformers', 'scipy', 'numpy', 'pytest'} & sys.modules.keys()))"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")
    assert time.monotonic() - start < 5


def test_list_shows_models_tasks_and_conditions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[tool.pocket.models.mine]\nbackend = 'hf'\ntarget = 'x'\n")
    status, text = pocket("list")
    assert status == 0
    for word in ("oracle", "mine", "read_value", "verbose"):
        assert word in text
    assert text.startswith(f"pytest-pocket {__version__}, suite {SUITE_VERSION} ")
    data = json.loads(pocket("list", "--json")[1])
    assert (data["version"], data["suite"]) == (__version__, SUITE_VERSION)
    assert {"name", "backend", "stage", "parent", "description"} == data["models"][0].keys()
    assert sum(map(len, data["tasks"].values())) == 19


def test_list_with_a_broken_pyproject_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[tool")
    status, text = pocket("list")
    assert status == 2
    assert text.startswith("pocket: pyproject.toml is not TOML")
    assert text.count("\n") == 1


def test_show_prints_the_table(run: Path) -> None:
    for argument in (run, run / records.EPISODES):
        status, text = pocket("show", str(argument))
        assert status == 0
        assert "0.750" in text
        assert "list_files" in text


def test_show_as_json_gives_a_row_an_episode(run: Path) -> None:
    rows = json.loads(pocket("show", str(run), "--json")[1])
    assert [(row["task"], row["reward"]) for row in rows] == [("read_value", 1.0), ("list_files", 0.5)]


def test_a_trace_is_readable_and_harmless(run: Path) -> None:
    status, text = pocket("show", str(run), "--task", "read_value", "--trace")
    assert status == 0
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "=== read_value run 1 · tiny raw no-think t 0 · passed, reward 1.000" in text
    assert "> Bash command= ls" in text
    assert "more lines]" in text
    assert "list_files" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "nowhere"), "pocket: nowhere holds no run.json"),
        (("train", "fly"), "unknown training stage 'fly': choose from data, pretrain, sft, dpo, rlvr"),
        (("train",), "unknown training stage ''"),
        (("lisst",), "No such command"),
        (("schema", "table"), "unknown schema 'table': choose from run, episode"),
        (("show",), "Missing argument"),
    ],
)
def test_a_usage_error_ends_with_2_and_says_what(arguments: tuple[str, ...], said: str) -> None:
    status, text = pocket(*arguments)
    assert status == 2
    assert said in text


def test_a_task_that_the_run_lacks_names_those_it_has(run: Path) -> None:
    status, text = pocket("show", str(run), "--task", "git_history")
    assert status == 2
    assert "it holds list_files, read_value" in text


@pytest.mark.parametrize(
    "command",
    [
        ("show", "RUN"),
        ("show", "RUN", "--trace"),
        ("compare", "RUN"),
        ("rescore", "RUN", "-o", "OUT"),
        ("merge", "RUN", "RUN", "-o", "OUT"),
        *(("export", "RUN", "--as", kind, "-o", "OUT") for kind in ("sft", "dpo", "jsonl", "parquet")),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"task": "x"}\n', "not of this version"),
        ('{"schema": 99}\n', "is of schema 99, and this version reads up to"),
        ("", "holds no episodes"),
        ("[]\n", "holds a list, no record"),
        ("{\n", "is not JSON"),
    ],
)
def test_records_that_cannot_be_read_are_one_line(
    command: tuple[str, ...], line: str, said: str, run: Path
) -> None:
    (run / records.EPISODES).write_text(line)
    places = {"RUN": str(run), "OUT": str(run.with_name("out"))}
    status, text = pocket(*(places.get(word, word) for word in command))
    assert status == 2
    assert said in text
    assert text.count("\n") == 1
    assert not run.with_name("out").exists()
    assert (run / records.EPISODES).read_text() == line


@pytest.mark.parametrize("name", ["run", "episode"])
def test_schema_prints_a_json_schema(name: str) -> None:
    status, text = pocket("schema", name)
    assert status == 0
    assert json.loads(text)["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_the_shell_completes_commands() -> None:
    pocket_script = Path(sys.executable).with_name("pocket")
    asked = {"COMP_WORDS": "pocket me", "COMP_CWORD": "1", "_POCKET_COMPLETE": "complete_bash"}
    done = subprocess.run([pocket_script], env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.stdout.split() == ["merge"]
    source = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(
        [pocket_script, "--show-completion", "bash"], env=source, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "complete" in done.stdout
    assert "_POCKET_COMPLETE=complete_bash" in done.stdout


@pytest.mark.parametrize("command", ["list", "show", "compare", "rescore", "export", "merge", "verify"])
def test_every_command_that_shows_something_does_so_in_json_too(command: str) -> None:
    assert "--json" in re.sub(r"\x1b\[[0-9;]*m", "", pocket(command, "--help")[1])


def changed(run: Path, name: str, **changes: Any) -> Path:
    """A copy of a run whose records have other values."""
    info, found = records.load(run)
    copy = records.start(run.parent / name, info)
    for record in found:
        copy.append({**record, **changes})
    return copy.directory


def test_compare_two_runs_by_model(run: Path) -> None:
    other = changed(run, "other", model="big", reward=1.0)
    status, text = pocket("compare", str(run), str(other))
    assert status == 0
    assert re.search(r"model\s+tiny\s+big\s+raw", text)
    assert "+0.250" in text
    assert "no difference found" in text
    (pair,) = json.loads(pocket("compare", str(run), str(other), "--json")[1])
    assert pair["result"]["difference"]["value"] == 0.25
    assert pair["result"]["pairs"] == 2


def test_compare_refuses_what_has_nothing_in_common(run: Path) -> None:
    other = changed(run, "other", model="big", seed=8)
    status, text = pocket("compare", str(run), str(other))
    assert status == 2
    assert "compare runs of the same split, seed and tasks" in text
    status, text = pocket("compare", str(run))
    assert status == 2
    assert "nothing to compare" in text


def test_train_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    stage = SimpleNamespace(main=lambda argv: seen.append(argv))
    monkeypatch.setitem(sys.modules, "pytest_pocket.training.sft", stage)
    assert pocket("train", "sft", "--recipe", "smoke", "--help")[0] == 0
    assert seen == [["--recipe", "smoke", "--help"]]


@pytest.mark.parametrize("command", ["data", "train data", "train sft --name x"])
def test_training_without_its_packages_names_the_extra(tmp_path: Path, command: str) -> None:
    code = "import sys; sys.modules['safetensors'] = None; from pytest_pocket.cli import app; app()"
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), "--recipe", "smoke"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    said = "pocket: the package 'safetensors' is missing: pip install 'pytest-pocket[train]'\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_python_m_runs_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest_pocket", "train", "fly"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("pocket: unknown training stage 'fly'")
