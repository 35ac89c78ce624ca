"""The lines that docs/records.md shows load real records, as they stand there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import duckdb
import pandas
import pytest

from pytest_pocket import records
from pytest_pocket.task import SUITE_VERSION

TEXT = (Path(__file__).parents[1] / "docs" / "records.md").read_text()
LINES = re.findall(r"^```python\n(.*)\n```$", TEXT, re.MULTILINE)


@pytest.fixture
def run(suite_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records that try a reader: 10 MB without any reward or log-probability, then real ones, then odd ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.copytree(suite_run, "RUN")
    _, found = records.load(suite_run)
    invalid = {**found[0], "outcome": "infra", **records.scored(None), "answer": "2026-01-01", "unseen": []}
    replies = [{**found[0]["replies"][0], "logprob": -0.5, "evidence": '{"seed": 1}', "completion_ids": [1]}]
    odd = {**found[0], "answer": "\x00\ud800\u2028\U0001f600 007", "replies": replies, "unseen": ["wording"]}
    filler = records.to_line(invalid)
    with Path("RUN", records.EPISODES).open("wb") as file:
        file.write(filler * (11 * 2**20 // len(filler)))
        file.writelines(map(records.to_line, [*found, odd]))
    return tmp_path / "RUN"


def loaded(name: str) -> Any:
    """What the document's line for that package gives."""
    (line,) = [line for line in LINES if name in line]
    scope: dict[str, Any] = {"pandas": pandas, "duckdb": duckdb, "datasets": datasets}
    exec(line, scope)
    return scope["episodes"]


def test_the_document_has_a_line_for_each() -> None:
    assert len(LINES) == 3


def test_pandas(run: Path) -> None:
    _, found = records.load(run)
    episodes = loaded("pandas")
    assert episodes["answer"].to_list() == [each["answer"] for each in found]
    assert episodes["reward"].dropna().to_list() == [
        each["reward"] for each in found if each["reward"] is not None
    ]
    assert episodes["messages"].iloc[-1] == found[-1]["messages"]
    assert set(episodes["suite"]) == {SUITE_VERSION}


def test_duckdb(run: Path) -> None:
    _, found = records.load(run)
    episodes = loaded("duckdb")
    frame = episodes.df()
    assert frame["answer"].to_list() == [each["answer"] for each in found]
    assert dict(zip(episodes.columns, map(str, episodes.types), strict=True))["reward"] == "DOUBLE"
    rows = duckdb.query_df(
        frame, "t", "SELECT model, avg(reward) FROM t WHERE passed GROUP BY model"
    ).fetchall()
    assert rows == [("oracle", 1.0)]
    assert frame["replies"].iloc[-1][0]["logprob"] == -0.5


def test_datasets(run: Path) -> None:
    _, found = records.load(run)
    episodes = loaded("datasets")
    assert episodes.num_rows == len(found)
    assert episodes["answer"][-1] == found[-1]["answer"] == "\x00\ufffd\u2028\U0001f600 007"
    # Whatever the types that it found: the records are what they were.
    for index in (0, -40, -1):
        assert json.loads(json.dumps(episodes[index])) == found[index]
