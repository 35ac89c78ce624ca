"""Pushing a checkpoint: the folder is a model of the suite, its card is true, and nothing is half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from suite_run import play_one_task
from typer.testing import CliRunner

from pytest_pocket import records, report
from pytest_pocket.cli import app
from pytest_pocket.registry import read_manifest, shipped

REPORTS = Path(__file__).parents[1] / "reports"


def pocket(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["push", *map(str, arguments)])
    return result.exit_code, result.output


def measured() -> Path:
    """The newest committed run of the shipped sft-run6."""
    digest = read_manifest(shipped() / "sft-run6").digest
    runs = [path.parent for path in REPORTS.glob("*/run.json") if digest in path.read_text()]
    return max(runs, key=lambda run: json.loads((run / "run.json").read_text())["started"])


def test_a_pushed_checkpoint_is_the_same_model_with_a_card(tmp_path: Path) -> None:
    run, folder = measured(), tmp_path / "pushed"
    status, said = pocket("sft-run6", "--to", folder, "--run", run)
    assert status == 0, said
    assert read_manifest(folder).digest == read_manifest(shipped() / "sft-run6").digest
    text = (folder / "README.md").read_text()
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    rows = [row for row in report.rows(records.load(run)[1]) if row["model"] == "sft-run6"]
    assert report.markdown(rows) in body
    manifest = json.loads((shipped() / "sft-run6" / "pocket.json").read_text())
    for key in ("data_sha256", "recipe_sha256", "parent"):
        value = manifest[key]
        assert report.quoted(value if isinstance(value, str) else json.dumps(value)) in body
    done = play_one_task(tmp_path, "pushed")
    assert done.returncode in (0, 1), done.stderr
    assert "1 passed" in done.stdout or "2 passed" in done.stdout


def test_without_a_run_the_card_says_that_nothing_was_measured(tmp_path: Path) -> None:
    status, _ = pocket("base", "--to", tmp_path / "pushed", "--json")
    assert status == 0
    assert "Not measured" in (tmp_path / "pushed" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("oracle", "--to", "new"), "is no checkpoint"),
        (("nobody", "--to", "new"), "unknown model 'nobody'"),
        (("base", "--to", "taken"), "taken exists"),
        (("base", "--to", "file/inside"), "cannot write file/inside"),
    ],
)
def test_what_cannot_be_pushed_is_one_line(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").touch()
    if "file/inside" in arguments:
        arguments = (*arguments[:-1], "./file/inside")
    status, output = pocket(*arguments)
    assert status == 2
    assert said in output
    assert len(output.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


def test_a_run_of_other_weights_is_not_put_on_the_card(tmp_path: Path) -> None:
    info, found = records.load(measured())
    other = {**info, "models": {"sft-run6": {**info["models"]["sft-run6"], "digest": "0" * 64}}}
    records.write(tmp_path / "run", other, found[:5])
    status, said = pocket("sft-run6", "--to", tmp_path / "pushed", "--run", tmp_path / "run")
    assert status == 2
    assert "other weights of that name" in said
    assert not (tmp_path / "pushed").exists()


def test_a_hostile_manifest_stays_text_on_the_card(tmp_path: Path) -> None:
    source = tmp_path / "evil"
    shutil.copytree(shipped() / "base", source)
    manifest = json.loads((source / "pocket.json").read_text())
    evil = "<script>x()</script>\n---\n# owned | [a](javascript:b) \x1b[2J"
    manifest |= {"name": evil, "description": evil, "recipe": evil, "hardware": evil, "stage": evil}
    (source / "pocket.json").write_text(json.dumps(manifest))
    status, said = pocket(source, "--to", tmp_path / "pushed")
    assert status == 0, said
    text = (tmp_path / "pushed" / "README.md").read_text()
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["tags"][-1] == evil
    assert "<script>" not in body
    assert "\x1b" not in body
    assert "\n# owned" not in body
    assert "[a](javascript" not in body


def test_the_hub_out_of_reach_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, said = pocket("base", "--to", "nobody/nothing")
    assert status == 2
    assert "cannot push to the hub as nobody/nothing" in said
    assert len(said.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
