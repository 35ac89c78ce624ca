"""The page: its numbers are the report's, it needs no network, and nothing that a model wrote can run in it."""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from typer.testing import CliRunner

from pytest_pocket import page, records, report
from pytest_pocket.chat import ChatReply, Message, ToolCall
from pytest_pocket.cli import app
from pytest_pocket.conditions import Condition
from pytest_pocket.episode import Episode
from pytest_pocket.records import Recorded
from pytest_pocket.registry import Model
from pytest_pocket.task import Check, Instance, Score

REPORTS = Path(__file__).parents[1] / "reports"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
ATTACK = (
    '<script>window.ran=1</script><img src=x onerror="window.ran=1">\'"`${window.ran=1}</pre></script><!--'
)


@functools.cache
def family() -> Path:
    """What the committed run has of two of its models."""
    directory = Path(tempfile.mkdtemp(), "tiny-family-3-runs")
    atexit.register(shutil.rmtree, directory.parent)
    info, found = records.load(REPORTS / "tiny-family-3-runs")
    kept = {name: info["models"][name] for name in ("base", "sft-run6")}
    records.write(directory, {**info, "models": kept}, [each for each in found if each["model"] in kept])
    return directory


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    path = next(filter(None, map(shutil.which, BROWSERS)))
    expect.set_options(timeout=30_000)  # a machine that runs other tests beside this one is slow
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*QUIET, *sandbox])
        yield browser
        browser.close()


Opener = Callable[..., Page]


@pytest.fixture
def view(browser: Browser, tmp_path: Path) -> Iterator[Opener]:
    """Opens a page of runs from disk, offline; fails on any message in the console and on any request.

    Wait with `expect`: `wait_for_function` evaluates text whenever its first look came too early, and the
    page's content security policy forbids that.
    """
    heard: list[str] = []
    contexts = []

    def opened(*runs: Path | Recorded, fragment: str = "", **options: Any) -> Page:
        file = tmp_path / "page.html"
        read = [run if isinstance(run, Recorded) else Recorded(run.name, *records.load(run)) for run in runs]
        page.write(file, page.build(read))
        options = {"viewport": {"width": 1280, "height": 900}, **options}
        context = browser.new_context(offline=True, reduced_motion="reduce", **options)
        contexts.append(context)
        shown = context.new_page()
        shown.on("console", lambda message: heard.append(message.text))
        shown.on("pageerror", lambda error: heard.append(str(error)))
        shown.on("dialog", lambda dialog: heard.append(dialog.message))
        shown.on(
            "request", lambda request: heard.append(request.url) if request.url != file.as_uri() else None
        )
        shown.goto(file.as_uri() + fragment, timeout=60_000)
        shown.wait_for_selector("html[data-ready=yes]", timeout=60_000)
        return shown

    yield opened
    for context in contexts:
        context.close()
    assert heard == []


def recorded(text: str, **changes: Any) -> dict[str, Any]:
    """The record of a failed episode in which a model says a text wherever it can."""
    call = ChatReply(
        text, thinking=text, calls=(ToolCall(text, {text: text}),), prompt_tokens=10, completion_tokens=4
    )
    score = Score((Check(text, 0.5, text),), 0.5, 1.0, 1.0)
    episode = Episode(
        Instance("read_value", 2_000_000_000 + changes.get("run", 1), text, {}, {}),
        Condition(changes.get("prompt", "raw"), False, 0.5, changes.get("best_of", 1)),
        (Message("user", text), call.message(), Message("tool", text, name=text)),
        (call,), "wrong", "answer", score, text, {}, 0.5, text,
    )  # fmt: skip
    cell = SimpleNamespace(run=changes.get("run", 1), sample=0)
    made = records.record(cell=cell, model=Model("tiny", "hf"), episode=episode, split="eval", group="read")
    return {**made, **changes}


def run_of(*found: dict[str, Any], name: str = "run", **info: Any) -> Recorded:
    return Recorded(name, {"schema": 1, **info}, found)


def leaders(shown: Page) -> list[str]:
    return shown.locator("#board table.sortable tbody tr th").all_inner_texts()


def test_the_leaderboard_has_the_numbers_of_the_report(view: Opener) -> None:
    shown = view(family())
    table = report.markdown(report.rows(records.load(family())[1]))
    for model in ("base", "sft-run6"):
        line = next(line for line in table.splitlines() if line.startswith(f"| {model}<br>"))
        numbers = re.findall(r"\d\.\d{3} ± \d\.\d{3}", line)
        cells = shown.locator(f"#board tr:has(th:text-is('{model}')) td").all_inner_texts()
        assert cells[2:4] == numbers[::2][:2]
    assert "Means over 19 tasks" in shown.inner_text("#board")


def test_published_figures_are_marked_and_not_in_the_ranking(view: Opener) -> None:
    shown = view(family())
    assert leaders(shown) == ["sft-run6", "base"]
    assert shown.locator("#board .published").count() == 6
    assert all("published" in text for text in shown.locator("#board .published").all_text_contents())


def test_a_heading_sorts_by_mouse_and_by_keyboard(view: Opener) -> None:
    shown = view(family())
    shown.click("#board th button:text-is('raw')")
    assert leaders(shown) == ["sft-run6", "base"]
    shown.keyboard.press("Enter")
    assert leaders(shown) == ["base", "sft-run6"]
    heading = shown.locator("#board th:has(button:text-is('raw'))")
    assert heading.get_attribute("aria-sort") == "ascending"
    shown.focus("#board th button:text-is('full - raw')")
    shown.keyboard.press("Space")
    assert heading.get_attribute("aria-sort") == "none"
    assert leaders(shown) == ["sft-run6", "base"]


def test_a_failure_is_read_to_its_cause_within_three_clicks(view: Opener) -> None:
    shown = view(family())
    shown.click("#board tr:has(th:text-is('sft-run6')) .failures")
    wrong = [
        record
        for record in records.load(family())[1]
        if record["model"] == "sft-run6" and record["outcome"] != "passed"
    ]
    expect(shown.locator("#count")).to_have_text(f"{len(wrong)} of 228 episodes")
    shown.click("#list tbody a >> nth=0")
    cause = shown.inner_text("dialog[open] .cause")
    assert any(
        check["value"] < 1 and check["name"] in cause and record["task"] in shown.inner_text("#episode-h")
        for record in wrong
        for check in record["checks"]
    )
    shown.keyboard.press("Escape")
    assert shown.locator("dialog[open]").count() == 0


def test_every_number_leads_to_the_episodes_that_it_counts(view: Opener) -> None:
    shown = view(family())
    found = records.load(family())[1]
    shown.click("#tasks tr:has(th a:text-is('git_history')) td a >> nth=0")
    head = shown.locator("#tasks thead th >> nth=2").inner_text()
    count = len([r for r in found if r["task"] == "git_history" and head.startswith(f"{r['model']} ")])
    prompts = len({r["prompt"] for r in found})
    # The address changes first, and the list follows it: expect waits for it.
    expect(shown.locator("#count")).to_have_text(f"{count // prompts} of {len(found)} episodes")
    link = shown.locator("#ledger tbody td a >> nth=0")
    number = link.inner_text()
    link.click()
    expect(shown.locator("#count")).to_have_text(f"{number} of {len(found)} episodes")
    other = view(family(), fragment=shown.evaluate("location.hash"))
    expect(other.locator("#count")).to_have_text(f"{number} of {len(found)} episodes")


def test_candidates_that_lost_are_listed_only_when_asked_for(view: Opener) -> None:
    won, lost = (recorded("a", best_of=2, candidate=n, chosen=n == 0) for n in (0, 1))
    shown = view(run_of(won, lost))
    expect(shown.locator("#count")).to_have_text("1 of 2 episodes")
    assert shown.inner_text("#board .failures") == "1"
    shown.click("#board .failures")
    expect(shown.locator("#count")).to_have_text("1 of 2 episodes")
    shown.check("#filters [name=every]")
    expect(shown.locator("#count")).to_have_text("2 of 2 episodes")


def test_whole_episodes_are_searched_when_asked_for(view: Opener) -> None:
    late = recorded("a" * 500 + " needle")
    shown = view(run_of(late, recorded("b", run=2)))
    shown.fill("#filters [name=words]", "needle")
    expect(shown.locator("#count")).to_have_text("0 of 2 episodes")
    shown.check("#filters [name=whole]")
    expect(shown.locator("#count")).to_have_text("1 of 2 episodes")


def test_back_closes_an_episode_and_the_list_is_as_it_was(view: Opener) -> None:
    shown = view(family())
    shown.select_option("#filters [name=task]", "=git_history")
    # Three runs of two models, raw and full.
    expect(shown.locator("#count")).to_have_text("12 of 228 episodes")
    shown.click("#list tbody a >> nth=0")
    shown.wait_for_selector("dialog[open]")
    shown.go_back()
    shown.wait_for_selector("dialog[open]", state="detached")
    expect(shown.locator("#count")).to_have_text("12 of 228 episodes")


def test_what_has_no_number_is_sorted_last_both_ways(view: Opener) -> None:
    infra = {**recorded("a"), "model": "broken", "outcome": "infra", "reward": None}
    found = [{**recorded("a"), "model": name, "reward": reward} for name, reward in (("b", 0.2), ("c", 0.7))]
    shown = view(run_of(infra, *found))
    shown.click("#board th button:text-is('raw')")
    assert leaders(shown) == ["c", "b", "broken"]
    shown.click("#board th button:text-is('raw')")
    assert leaders(shown) == ["b", "c", "broken"]


def test_an_address_opens_its_episode(view: Opener) -> None:
    shown = view(family())
    shown.select_option("#filters [name=task]", "=git_history")
    shown.select_option("#filters [name=prompt]", "=full")
    address = str(shown.locator("#list tbody a >> nth=1").get_attribute("href"))
    other = view(family(), fragment=address)
    other.wait_for_selector("dialog[open]")
    assert other.inner_text("#episode-h").startswith("git_history")
    assert "full no-think t0" in other.inner_text("#episode-h")
    assert "git" in other.inner_text("#turns")
    lost = view(family(), fragment="#episode=%E0%A4%A")
    expect(lost.locator("#count")).to_have_text("the address names no episode of this page")


def test_words_find_episodes_and_arrows_walk_through_them(view: Opener) -> None:
    shown = view(family())
    shown.fill("#filters [name=words]", "rename_symbol")
    expect(shown.locator("#count")).to_have_text("12 of 228 episodes")
    shown.click("#list tbody a >> nth=0")
    shown.wait_for_selector("dialog[open]")
    first = shown.url
    shown.click("#after")
    expect(shown).not_to_have_url(first)
    assert shown.inner_text("#episode-h").startswith("rename_symbol")


def test_thinking_is_folded_and_a_check_that_failed_is_marked(view: Opener) -> None:
    shown = view(run_of(recorded("hm")), fragment="#episode=1%2Fread_value%2Ftiny%2Fraw-no-think-t0.5%2Fr01")
    shown.wait_for_selector("dialog[open]")
    assert "hm" not in shown.inner_text(".turn.assistant details")
    shown.click(".turn.assistant summary")
    assert "hm" in shown.inner_text(".turn.assistant details")
    assert "✗ hm 0.50: hm" in shown.inner_text(".cause")


@pytest.mark.parametrize(
    "text", [ATTACK, "\x1b]0;title\x07\x1b[2J\x00\x9b\u202eevil\u2028\u2066", "\ufffd\ud800"]
)
def test_nothing_that_a_model_wrote_runs_or_hides(view: Opener, text: str) -> None:
    record = json.loads(records.to_line(recorded(text)))
    hostile = {**record, "model": text, "task": text, "group": text, "outcome": text}
    shown = view(run_of(json.loads(records.to_line(hostile)), name=text.replace("\ud800", "")))
    shown.click("#list tbody a >> nth=0")
    shown.wait_for_selector("dialog[open]")
    shown.click(".turn.assistant summary")
    said = shown.inner_text("#turns")
    assert shown.evaluate("window.ran") is None
    assert not re.search(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", said)
    if text == ATTACK:
        assert said.count(ATTACK) >= 5
        assert shown.locator("#turns img, #turns script").count() == 0
    elif "\x1b" in text:
        assert "␛]0;title␇" in said
        assert "[U+202E]evil" in said


def test_a_megabyte_in_one_line_is_cut_and_can_be_read_on(view: Opener) -> None:
    shown = view(run_of(recorded("x" * 2**20)))
    shown.click("#list tbody a >> nth=0")
    shown.wait_for_selector("dialog[open]")
    more = shown.locator(".turn.user button")
    assert more.inner_text() == "show more (1,044,576 characters left)"
    more.click()
    assert more.inner_text() == "show more (944,576 characters left)"
    assert shown.evaluate("document.documentElement.scrollWidth") <= 1280


def test_best_of_n_has_a_front_and_other_pages_say_that_there_is_none(view: Opener) -> None:
    found = [
        {**recorded("a", best_of=n, task=task), "reward": reward, "chosen": True}
        for task in ("read_value", "list_files")
        for n, reward in ((1, 0.5), (2, 0.4), (4, 0.8))
    ]
    for record in found:
        record["replies"] = record["replies"] * record["best_of"]
    shown = view(run_of(*found))
    lines = shown.locator("#bestof tbody th").all_inner_texts()
    assert [line.startswith("◆") for line in lines] == [True, False, True]
    assert shown.locator("#pareto-chart svg").count() == 1
    assert "No best-of-N in these runs" in view(family()).inner_text("#bestof")


def test_stages_and_costs_come_from_the_manifests(view: Opener, tmp_path: Path) -> None:
    shown = view(family())
    assert shown.locator("#stages tbody th").all_inner_texts() == ["base", "sft-run6"]
    assert shown.locator("#arc-chart svg").count() == 1
    assert "not known here" in shown.inner_text("#cost")  # no models were given
    made = CliRunner().invoke(app, ["report", str(family()), "-o", str(tmp_path / "page.html")])
    assert made.exit_code == 0, made.output
    manifest = json.loads((REPORTS.parent / "training/checkpoints/sft-run6/pocket.json").read_text())
    text = (tmp_path / "page.html").read_text()
    assert f">{manifest['minutes']}</td>" in text
    assert f">{manifest['tokens']:,}</td>" in text


def test_the_wall_names_what_nothing_passed(view: Opener) -> None:
    passed = {**recorded("a", run=2), "task": "list_files", "outcome": "passed", "reward": 1.0}
    assert view(run_of(recorded("a"), passed)).locator("#tasks code").all_inner_texts() == ["read_value"]


def test_the_same_model_in_two_runs_is_told_apart(view: Opener) -> None:
    shown = view(run_of(recorded("a"), name="one"), run_of(recorded("b"), name="two"))
    assert sorted(leaders(shown)) == ["tiny (one)", "tiny (two)"]
    shown.click("#board tr:has(th:text-is('tiny (two)')) .failures")
    expect(shown.locator("#count")).to_have_text("1 of 2 episodes")


def test_dark_by_preference_and_by_switch(view: Opener) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    dark = view(family(), color_scheme="dark")
    assert dark.evaluate(background) == "rgb(20, 23, 27)"
    dark.click("#theme")
    assert dark.evaluate(background) == "rgb(255, 255, 255)"
    assert view(family(), color_scheme="light").evaluate(background) == "rgb(255, 255, 255)"


def test_a_phone_scrolls_down_only(view: Opener) -> None:
    shown = view(family(), viewport={"width": 360, "height": 780})
    assert shown.evaluate("document.documentElement.scrollWidth") <= 360
    shown.click("#list tbody a >> nth=0")
    shown.wait_for_selector("dialog[open]")
    assert shown.evaluate("document.documentElement.scrollWidth") <= 360


def test_ten_thousand_episodes_are_a_page_of_few_megabytes_that_opens_at_once(
    view: Opener, tmp_path: Path
) -> None:
    info, found = records.load(family())
    many = [
        {**record, "run": 3 * round_ + record["run"], "answer": f"{record['answer']} {round_ * 7919}"}
        for round_ in range(44)
        for record in json.loads(json.dumps(found).replace("the", f"the {round_:02}"))
    ]
    start = time.monotonic()
    shown = view(Recorded("many", info, many), color_scheme="light")
    assert len(many) > 10_000
    assert (tmp_path / "page.html").stat().st_size < 15 * 2**20
    timing = shown.evaluate(
        "performance.timing.domContentLoadedEventEnd - performance.timing.navigationStart"
    )
    assert timing < 8000  # 2 seconds are meant; a machine that runs other tests beside this one is slower
    print(f"page of {len(many)}: {(tmp_path / 'page.html').stat().st_size} bytes, ready after {timing} ms")
    assert time.monotonic() - start < 60
    shown.select_option("#filters [name=outcome]", "not passed")
    shown.click("#list tbody a >> nth=49")
    shown.wait_for_selector("dialog[open]")


@pytest.mark.parametrize("content", ["{torn", '{"schema": 99}', '{"schema": 1, "task": "a"}', ""])
def test_what_is_no_run_is_one_line_and_no_page(tmp_path: Path, content: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"schema": 1}')
    (run / "episodes.jsonl").write_text(content and content + "\n")
    result = CliRunner().invoke(app, ["report", str(run), "-o", str(tmp_path / "page.html")])
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(family()), "-o", str(tmp_path / "no" / "page.html")])
    assert result.exit_code == 2
    assert "No such file or directory; give another --output" in result.output
    twice = CliRunner().invoke(
        app, ["report", str(family()), str(family()), "-o", str(tmp_path / "page.html")]
    )
    assert (twice.exit_code, twice.output) == (2, "pocket: a run is given twice\n")
