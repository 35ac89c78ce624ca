"""Merging: shards make the whole run, duplicates count once, and what does not belong together is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from suite_run import play_suite
from toy_project import Project, table
from typer.testing import CliRunner

from pytest_pocket import merge, records, report, schemas
from pytest_pocket.cli import app


def pocket(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.output


def part(run: Path, name: str = "") -> merge.Part:
    return merge.Part(run.with_name(name or run.name), *records.load(run))


def numbers(found: Any) -> list[tuple[Any, ...]]:
    """What records say, but for when and how fast."""
    return sorted(
        (*key, each["seed"], each["reward"], each["outcome"], each["answer"])
        for key, (each,) in records.by_cell(found).items()
    )


def test_shards_make_the_whole_run(suite_run: Path, tmp_path: Path) -> None:
    shards = []
    for index in (1, 2, 3):
        (folder := tmp_path / f"job{index}").mkdir()
        workers = ("-n2",) if index == 2 else ()
        shards.append(play_suite(folder, "--pocket-split=train", f"--pocket-shard={index}/3", *workers))
        shards[-1] = shards[-1].rename(tmp_path / f"shard{index}")
    status, text = pocket("merge", *shards, "-o", tmp_path / "whole")
    assert (status, text) == (0, f"76 episodes in {tmp_path / 'whole'}\n")
    info, found = records.load(tmp_path / "whole")
    assert numbers(found) == numbers(records.load(suite_run)[1])
    assert [each["run"] for each in info["merged"]] == ["shard1", "shard2", "shard3"]
    assert [each["shard"] for each in info["merged"]] == [{"index": index, "count": 3} for index in (1, 2, 3)]
    assert all(each["episodes"] > 0 for each in info["merged"])
    _, text = pocket("merge", shards[1], "-o", tmp_path / "part")
    assert text.endswith("not given: shard 1/3, 3/3\n")
    Draft202012Validator(schemas.load("run")).validate(info)


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["serial", "xdist"])
def test_merged_shards_show_the_table_of_the_whole_and_can_be_resumed(
    project: Project, workers: tuple[str, ...]
) -> None:
    options = ("--pocket-model=half-right,oracle", "--runs=5", "--tb=no")
    whole = project.start(*options)
    for index in (1, 2):
        shard = (f"--pocket-shard={index}/2", f"--pocket-records=part{index}", "-p", "randomly")
        played = project.start(*options, *workers, *shard, plugins=("xdist",) if workers else ())
        played.stdout.fnmatch_lines(["Using --randomly-seed=*"])
    merged = project.path / "merged"
    assert pocket("merge", project.path / "part1", project.path / "part2", "-o", merged)[0] == 0
    assert numbers(records.load(merged)[1]) == numbers(project.records())
    again = project.start(*options, "--pocket-resume", "--pocket-records=merged")
    assert table(again) == table(whole)
    assert len(records.load(merged)[1]) == 20


def test_exact_duplicates_count_once(suite_run: Path, tmp_path: Path) -> None:
    status, text = pocket("merge", suite_run, suite_run, "-o", tmp_path / "new", "--json")
    assert status == 0
    said = json.loads(text)
    assert (said["episodes"], said["left_out"]) == (76, {"duplicate": 76, "invalid": 0})
    assert [each["episodes"] for each in said["merged"]] == [76, 0]
    assert records.load(tmp_path / "new")[1] == records.load(suite_run)[1]


def test_invalid_episodes_give_way_in_either_order(suite_run: Path) -> None:
    good = part(suite_run)
    bad = merge.Part(
        suite_run.with_name("bad"),
        good.info,
        [{**each, "outcome": "infra", **records.scored(None)} for each in good.found],
    )
    for parts in ((good, bad), (bad, good)):
        merged = merge.merge(parts)
        assert merged.found == good.found
        assert merged.left_out == {"duplicate": 0, "invalid": 76}
    assert merge.merge((bad, bad)).found == bad.found


def test_the_same_cell_with_another_episode_is_refused(suite_run: Path, tmp_path: Path) -> None:
    info, found = records.load(suite_run)
    records.write(tmp_path / "other", info, [{**each, "answer": "another"} for each in found])
    status, text = pocket("merge", suite_run, tmp_path / "other", "-o", tmp_path / "new")
    assert status == 2
    first = found[0]
    assert (
        f"hold different episodes of {first['task']} run 1 sample 1, {first['model']} {first['prompt']}"
        in text
    )
    assert text.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("suite",), "0", "the suite's version was"),
        (("seed",), 7, "the seed was 0 and is 7"),
        (("options", "split"), "eval", 'the split was "train" and is "eval"'),
        (("options", "budget", "turns"), 3, "the budget was"),
        (("tools_sha256",), "0", "the tool set was"),
        (("git", "commit"), "0" * 40, "the commit was"),
        (("models", "oracle", "digest"), "0", "the digest of model oracle was"),
    ],
)
def test_runs_with_other_determinants_are_refused(
    suite_run: Path, tmp_path: Path, keys: tuple[str, ...], value: Any, said: str
) -> None:
    info, found = records.load(suite_run)
    place = info
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    records.write(tmp_path / "other", info, found)
    status, text = pocket("merge", suite_run, tmp_path / "other", "-o", tmp_path / "new")
    assert status == 2
    assert said in text
    assert not (tmp_path / "new").exists()


def test_what_a_refusal_quotes_is_harmless_to_a_terminal(suite_run: Path, tmp_path: Path) -> None:
    info, found = records.load(suite_run)
    for name in ("one", "other"):
        records.write(
            tmp_path / name, info, [{**each, "model": "\x1b[31m\n", "answer": name} for each in found]
        )
    status, text = pocket("merge", tmp_path / "one", tmp_path / "other", "-o", tmp_path / "new")
    assert status == 2
    assert "\x1b" not in text
    assert text.count("\n") == 1


def test_determinants_of_models_that_only_later_runs_share_are_compared_too(suite_run: Path) -> None:
    whole = part(suite_run)
    infos = [copy.deepcopy(dict(whole.info)) for _ in range(3)]
    del infos[0]["models"]["noop"]
    infos[2]["models"]["noop"]["digest"] = "changed"
    with pytest.raises(merge.MergeError, match="the digest of model noop"):
        merge.merge([merge.Part(suite_run, info, whole.found) for info in infos])


@settings(max_examples=20)
@given(st.randoms(use_true_random=False), st.integers(1, 4))
def test_any_division_of_the_cells_merges_to_the_same_rows(suite_run: Path, random: Any, count: int) -> None:
    whole = part(suite_run)
    parts: list[list[Any]] = [[] for _ in range(count)]
    for each in whole.found:
        for index in random.sample(range(count), random.randint(1, count)):
            parts[index].append(each)
    merged = merge.merge([merge.Part(suite_run, whole.info, found) for found in parts])
    key = json.dumps
    assert sorted(map(key, merged.found)) == sorted(map(key, whole.found))
    assert sum(each["episodes"] for each in merged.info["merged"]) == 76


def test_reruns_and_their_cost_are_kept(suite_run: Path) -> None:
    whole = part(suite_run)
    first = whole.found[0]
    failed = {**first, "outcome": "infra", **records.scored(None), "seconds": 5.0}
    history = [failed, {**first, "rerun": 1}, *whole.found[1:]]
    merged = merge.merge(
        [merge.Part(suite_run, whole.info, history), merge.Part(suite_run, whole.info, [failed])]
    )
    assert report.rows(merged.found) == report.rows(history)


def test_an_existing_output_is_refused_and_left_alone(suite_run: Path, tmp_path: Path) -> None:
    for output in (suite_run, tmp_path):
        before = sorted(output.iterdir())
        status, text = pocket("merge", suite_run, suite_run, "-o", output)
        assert (status, text) == (2, f"pocket: {output} exists: give another --output\n")
        assert sorted(output.iterdir()) == before


def test_a_foreign_run_json_is_one_line(suite_run: Path, tmp_path: Path) -> None:
    info, found = records.load(suite_run)
    del info["options"]
    records.write(tmp_path / "foreign", info, found)
    status, text = pocket("merge", suite_run, tmp_path / "foreign", "-o", tmp_path / "new")
    assert status == 2
    assert text.count("\n") == 1
    assert not (tmp_path / "new").exists()
