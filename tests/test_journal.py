"""The journal of a training run: its curve, its bar, its tracker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_pocket.training import journal as journals
from pytest_pocket.training.journal import Journal, TrackerMissing


def test_points_are_kept_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal("mine")
    with journal.open({"curve": [{"step": 1, "minutes": 2.0}], "spent": 120.0}):
        journal.note(2, {"step": 2, "loss": 0.123456})
    assert [point["step"] for point in journal.curve] == [1, 2]
    assert journal.curve[1]["minutes"] == pytest.approx(2.0, abs=0.1)
    told = json.loads(capsys.readouterr().err)
    assert (told["step"], told["loss"]) == (2, 0.1235)


def test_a_bar_is_shown_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for terminal in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        journal = Journal("mine")
        with journal.open({}):
            journal.done(0.5)
        assert ("50%" in capsys.readouterr().err) == terminal


def test_the_curve_goes_to_tensorboard_by_option(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    journal = Journal("mine", "tensorboard", tmp_path)
    with journal.open({}):
        journal.note(1, {"loss": 3.0})
        journal.note(5, {"loss": 1.5})
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 3.0), (5, 1.5)]


def test_a_tracker_that_is_not_installed_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrackerMissing, match=r"--track trackio: .* pip install trackio"):
        Journal("mine", "trackio")
