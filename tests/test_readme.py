"""The numbers of the README and of the docs come from the committed runs."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pytest_pocket import records
from pytest_pocket.registry import Registry

ROOT = Path(__file__).parents[1]
DOCUMENTS = "\n".join((ROOT / name).read_text() for name in ("README.md", "docs/tiny-family.md"))
RUNS = sorted(path.parent for path in (ROOT / "reports").glob("*/run.json"))
BENCHES = tomllib.loads((ROOT / "reports/bench/headlines.toml").read_text())
EXPERIMENTS = sorted(path.parent for path in (ROOT / "reports" / "experiments").glob("*/run.json"))


def test_the_tables_of_the_documents_are_what_the_committed_runs_give() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "reports/render.py", "--check"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


PARSE = """
import argparse, runpy, sys
known = argparse.ArgumentParser.parse_args
argparse.ArgumentParser.parse_args = lambda parser, *args: sys.exit(known(parser, *args) is None)
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
sys.exit("it asks for no options")
"""


@pytest.mark.parametrize("bench", BENCHES)
def test_the_command_of_a_bench_is_one_that_it_takes(bench: str) -> None:
    script = shlex.split(BENCHES[bench]["command"].rpartition("&& ")[2])[1:]
    done = subprocess.run([sys.executable, "-c", PARSE, *script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "bench", ["bench_scale.py --repeats 1 --sizes 5 10", "bench_episodes.py --repeats 1 --episodes 20"]
)
def test_a_bench_that_plays_by_itself_runs_with_what_the_suite_is_now(bench: str) -> None:
    command = [sys.executable, *shlex.split(f"tests/bench/{bench}")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["medians"]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_committed_run_is_shown_with_the_command_that_made_it(run: Path) -> None:
    info, _ = records.load(run)
    assert f"<!-- reports: scores {run.name} -->" in DOCUMENTS
    assert " ".join(["pytest", *info["command"][1:]]) in DOCUMENTS


def test_an_experiment_is_played_by_the_script_and_shown() -> None:
    for run in EXPERIMENTS:
        assert (
            f"<!-- reports: scores experiments/{run.name} -->" in (ROOT / "docs/experiments.md").read_text()
        )
        assert f"    play {run.name} " in (ROOT / "reports/experiments.sh").read_text()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_committed_run_was_made_with_the_weights_that_ship(run: Path) -> None:
    info, _ = records.load(run)
    shipped = Registry().models
    for name, model in info["models"].items():
        assert model["digest"] == shipped[name].digest


@pytest.mark.parametrize("run", [*RUNS, *EXPERIMENTS], ids=lambda run: run.name)
def test_a_committed_run_names_no_path_of_the_machine_that_made_it(run: Path) -> None:
    text = (run / "run.json").read_text() + (run / "episodes.jsonl").read_text()
    assert str(Path.home()) + "/" not in text
    assert str(ROOT) not in text
