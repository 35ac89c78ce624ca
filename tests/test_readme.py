"""The README's numbers come from the committed runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_pocket import records, report
from pytest_pocket.registry import Registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RUNS = sorted(path.parent for path in (ROOT / "reports").glob("*/run.json"))


def test_there_are_committed_runs() -> None:
    assert [run.name for run in RUNS] == ["tiny-family-3-runs"]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_table_in_the_readme_is_rendered_from_its_run(run: Path) -> None:
    _, episodes = records.load(run)
    assert report.markdown(report.rows(episodes)).strip() in README


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_committed_run_was_made_with_the_weights_that_ship(run: Path) -> None:
    info, _ = records.load(run)
    shipped = Registry().models
    for name, model in info["models"].items():
        assert model["digest"] == shipped[name].digest


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_committed_run_names_no_path_of_the_machine_that_made_it(run: Path) -> None:
    text = (run / "run.json").read_text() + (run / "episodes.jsonl").read_text()
    assert str(Path.home()) + "/" not in text
    assert str(ROOT) not in text
