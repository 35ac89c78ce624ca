"""Records survive hostile text, many writers and a torn end, and keep no secrets."""

from __future__ import annotations

import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pytest_pocket import records
from pytest_pocket.chat import ChatReply, ToolCall
from pytest_pocket.conditions import Condition
from pytest_pocket.episode import Episode
from pytest_pocket.registry import Model
from pytest_pocket.sandbox import FileState
from pytest_pocket.task import Check, Instance, Score, split_of

INFO = {"schema": 1}
ANYTHING = st.text(st.characters(exclude_categories=())) | st.text()


def ended(text: str = "42", content: bytes = b"a\n", arguments: dict[str, Any] | None = None) -> Episode:
    instance = Instance("read_value", 7, text, {}, {}, unseen=("wording",))
    condition = Condition("full", temperature=0.7, best_of=2)
    calling = ChatReply(
        text, calls=(ToolCall("Read", arguments or {"file_path": text}),), completion_tokens=3
    )
    answer = ChatReply(text, prompt_tokens=9, completion_tokens=2, logprob=-1.5, completion_ids=(1, 2))
    score = Score((Check("value", 1.0, text),), 1.0, 1.0, 1.0)
    messages = (*condition.messages(text), calling.message(), answer.message())
    after = {"a.txt": FileState("file", content, executable=True), "l": FileState("link", b"a.txt")}
    return Episode(
        instance, condition, messages, (calling, answer), "passed", "answer", score, text, after, 0.25
    )


def recorded(episode: Episode) -> dict[str, Any]:
    cell = SimpleNamespace(run=1, sample=0)
    return records.record(
        cell=cell, model=Model("tiny", "hf"), episode=episode, split=split_of(7), group="read", candidate=1
    )


def test_a_run_reads_back_as_it_was_written(tmp_path: Path) -> None:
    run = records.start(tmp_path / "new" / "run", INFO)
    record = recorded(ended())
    run.append(record)
    assert records.load(run.directory) == (INFO, [record])
    assert record["files"][0] == {
        "path": "a.txt", "kind": "file", "encoding": "utf-8", "content": "a\n", "cut_from_bytes": 0, "executable": True,
    }  # fmt: skip
    assert [reply["completion_ids"] for reply in record["replies"]] == [[], [1, 2]]
    assert (record["split"], record["unseen"], record["reward"], record["passed"]) == (
        "train",
        ["wording"],
        1.0,
        True,
    )


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3), min_size=1))
    )
)
def test_token_ids_are_kept_whole(turns: list[tuple[int, list[int], list[int]]]) -> None:
    # Most prompts go on from the turn before; some, as when a template rewrites history, share only a beginning.
    replies: list[ChatReply] = []
    for cut, new, completion in turns:
        before = [*replies[-1].prompt_ids, *replies[-1].completion_ids] if replies else []
        prompt = [*before[: len(before) - cut], *new]
        replies.append(ChatReply("", prompt_ids=tuple(prompt), completion_ids=tuple(completion)))
    episode = replace(ended(), replies=tuple(replies))
    expected = [(list(reply.prompt_ids), list(reply.completion_ids)) for reply in replies]
    assert records.token_ids(json.loads(json.dumps(recorded(episode)))) == expected


def test_an_invalid_episode_has_no_reward() -> None:
    episode = ended()
    broken = Episode(
        episode.instance,
        episode.condition,
        episode.messages,
        (),
        "infra",
        "infra",
        None,
        "",
        {},
        0.1,
        "engine died",
    )
    record = recorded(broken)
    assert (record["reward"], record["passed"], record["checks"]) == (None, None, [])
    assert record["detail"] == "engine died"


@given(text=ANYTHING, content=st.binary())
@example(text="\ud800 \ude00 \ud83d\ude00 \U0001f600 \x00 \u2028", content=b"\xff")
def test_any_text_and_any_bytes_survive(text: str, content: bytes) -> None:
    line = records.to_line(recorded(ended(text, content)))
    back = json.loads(line)
    assert line.count(b"\n") == 1
    back["answer"].encode()  # no lone surrogate, which only Python would read
    assert back["answer"] == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert records.files(back)["a.txt"].content == content
    arguments = json.loads(
        json.dumps({"file_path": text})
    )  # two surrogates that make a pair become one character
    assert records.messages(back)[-2].calls[0].arguments == arguments


@given(text=st.text(), content=st.binary())
def test_a_restored_episode_is_the_one_that_was_recorded(text: str, content: bytes) -> None:
    episode = ended(text, content)
    back = records.restore(json.loads(records.to_line(recorded(episode))), episode.instance)
    # Token ids are for training, which asks token_ids.
    assert back == replace(
        episode, replies=tuple(replace(reply, prompt_ids=(), completion_ids=()) for reply in episode.replies)
    )


def test_a_foreign_record_is_one_clear_line() -> None:
    episode = ended()
    for broken in ({}, {**recorded(episode), "messages": [{}]}, {**recorded(episode), "factors": 3}):
        with pytest.raises(records.RecordsError, match="a record is not of this version") as caught:
            records.restore(broken, episode.instance)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), {1, 2}, object(), {("a",): 1}])
def test_what_json_cannot_say_becomes_text(odd: object) -> None:
    line = records.to_line(recorded(ended(arguments={"file_path": odd})))
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_endless_nesting_is_cut() -> None:
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    assert b"nested too deeply" in records.to_line({"arguments": deep})


def test_a_long_file_is_cut_with_a_mark() -> None:
    file = recorded(ended(content=b"x" * (records.FILE_BYTES + 5)))["files"][0]
    assert len(file["content"]) == records.FILE_BYTES
    assert file["cut_from_bytes"] == records.FILE_BYTES + 5


def append_many(directory: Path, writer: int) -> None:
    run = records.join(directory)
    for number in range(100):
        run.append({"writer": writer, "number": number, "text": "x" * 20_000})


def test_processes_and_threads_do_not_tear_each_others_lines(tmp_path: Path) -> None:
    run = records.start(tmp_path, INFO)
    spawn = multiprocessing.get_context("fork")
    processes = [spawn.Process(target=append_many, args=(run.directory, writer)) for writer in (0, 1)]
    for process in processes:
        process.start()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda writer: append_many(run.directory, writer), (2, 3)))
    for process in processes:
        process.join()
    _, found = records.load(run.directory)
    assert len(found) == 400
    for writer in range(4):
        assert [line["number"] for line in found if line["writer"] == writer] == list(range(100))


def test_a_torn_last_line_is_passed_over_and_then_replaced(tmp_path: Path) -> None:
    run = records.start(tmp_path, INFO)
    run.append({"n": 1})
    with (tmp_path / records.EPISODES).open("ab") as file:
        file.write(b'{"n": 2, "te')
    assert records.load(tmp_path)[1] == [{"n": 1}]
    run.append({"n": 3})
    assert records.load(tmp_path)[1] == [{"n": 1}, {"n": 3}]


def test_a_broken_line_within_is_an_error_that_says_where(tmp_path: Path) -> None:
    records.start(tmp_path, INFO)
    (tmp_path / records.EPISODES).write_bytes(b'{"n": 1}\nnonsense\n{"n": 3}\n')
    with pytest.raises(records.RecordsError, match=r"line 2 of .*not JSON"):
        records.load(tmp_path)


def test_a_failed_write_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = records.start(tmp_path, INFO)
    run.append({"n": 1})
    write = os.write

    def full_disk(file: int, data: memoryview) -> int:
        if len(data) < 10:
            raise OSError(28, "No space left on device")
        return write(file, data[: len(data) - 5])

    monkeypatch.setattr(os, "write", full_disk)
    with pytest.raises(records.RecordsError, match="No space left"):
        run.append({"n": 2, "text": "long enough"})
    monkeypatch.undo()
    assert (tmp_path / records.EPISODES).read_bytes() == b'{"n": 1}\n'


def test_a_directory_that_holds_a_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    run = records.start(tmp_path, INFO)
    run.append({"n": 1})
    run.close()
    with pytest.raises(records.RecordsError, match=r"already holds a run: give --pocket-records another"):
        records.start(tmp_path, {"schema": 2})
    assert records.load(tmp_path) == (INFO, [{"n": 1}])


def test_an_unwritable_directory_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        records.RecordsError, match=r"cannot write records to .*file/run: .*--pocket-records"
    ) as caught:
        records.start(tmp_path / "file" / "run", INFO)
    assert "\n" not in str(caught.value)


def test_joining_a_run_that_was_not_started_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(records.RecordsError, match=r"no run\.json"):
        records.join(tmp_path)


def test_the_default_directory_is_new_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = records.start(None, INFO), records.start(None, INFO)
    assert first.directory != second.directory
    assert first.directory.parent == tmp_path / ".pocket" / "runs"


def test_run_json_holds_no_environment_and_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKET_TEST_VARIABLE", "from-the-environment")
    info = records.describe(
        command=["/usr/bin/pytest", "--api-key", "hunter2", "--token=hunter2", "--runs=3"],
        models=[
            Model(
                "m",
                "openai",
                "x@http://me:hunter2@host/v1?api_key=hunter2&a=b",
                options={"api_key": "hunter2"},
            )
        ],
        seed=0,
        options={"runs": 3, "password": "hunter2"},
    )
    text = json.dumps(info)
    assert "hunter2" not in text
    assert "from-the-environment" not in text
    assert info["command"] == ["pytest", "--api-key", "***", "--token=***", "--runs=3"]
    assert info["models"]["m"]["target"] == "x@http://***@host/v1?api_key=***&a=b"
    assert info["options"]["runs"] == 3
    assert info["versions"]["pytest"]
    assert info["hardware"]["cores"] >= 1


def test_max_tokens_is_not_taken_for_a_secret() -> None:
    assert records.without_secrets({"max_tokens": "512", "reply_tokens": 4}) == {
        "max_tokens": "512",
        "reply_tokens": 4,
    }


def test_models_come_in_the_order_in_which_they_were_asked_for() -> None:
    found = [{"model": name, "run": run} for run in (1, 2) for name in ("c", "other", "a")]
    ordered = records.in_order({"options": {"models": ["a", "b", "c"]}}, found)
    assert [(each["model"], each["run"]) for each in ordered] == [
        *(("a", 1), ("a", 2), ("c", 1), ("c", 2), ("other", 1), ("other", 2))
    ]
    assert records.in_order({}, found) == found
