"""The best weights of a run are what it holds at the end, wherever it was stopped and whatever the disk did."""

import math

import pytest
from train.sitting import Killed, sit

from afina.errors import OutputError
from afina.train import keeper as keepers
from afina.train import session as sessions
from afina.train.best import Criterion

MEASURED = {3: 2.0, 6: 1.0, 9: 1.0, 11: math.nan, 12: 1.5}
"""Best after step 6: a later equal one is none better, and what is no number never is."""


@pytest.fixture(scope="module")
def until_six(tmp_path_factory):
    return sit(tmp_path_factory.mktemp("six"), steps=6, measured={3: 2.0, 6: 1.0})


def best_of(place, **more):
    return sit(place, measured=MEASURED, criterion=Criterion(), **more)


def test_the_best_weights_are_held_at_the_end(tmp_path, until_six):
    found = best_of(tmp_path, save_after=(0, 5, 8))
    assert found["kept"] == {"step": 6, "validation_loss": 1.0} and found["held"] == until_six["held"]
    assert found["tally"]["best"] == {"step": 6, "figure": "validation_loss", "value": 1.0, "validation_loss": 1.0}
    assert [path.name for path in (tmp_path / "c" / "best").iterdir()] == ["000002-step-6"]


def test_without_a_criterion_the_last_weights_are_held(tmp_path, until_six):
    found = sit(tmp_path, measured=MEASURED)
    assert found["kept"]["step"] == 12 and found["held"] != until_six["held"]
    assert not (tmp_path / "c" / "best").exists()


def test_another_figure_may_decide_and_larger_may_be_better(tmp_path, monkeypatch):
    real = sessions.Session.on_validation
    scores = {3: 0.9, 6: 0.2, 9: 0.9, 11: 0.1, 12: 0.3}

    def also_score(self, state):
        real(self, state)
        self.offer("accuracy", scores[state.step], state)

    monkeypatch.setattr(sessions.Session, "on_validation", also_score)
    found = sit(tmp_path, measured=MEASURED, criterion=Criterion("accuracy", larger=True))
    assert found["kept"] == {"step": 3, "validation_loss": 2.0} and found["tally"]["best"]["value"] == 0.9


@pytest.mark.parametrize("at", range(3, 12, 2))
@pytest.mark.parametrize("saves", [(0,), (0, 4, 6), (5, 7, 8)])
def test_a_killed_run_holds_the_same(tmp_path, until_six, at, saves):
    with pytest.raises(Killed):
        best_of(tmp_path, kill_at=at, save_after=saves)
    assert best_of(tmp_path, save_after=saves)["held"] == until_six["held"]


def test_a_forgotten_best_shows(tmp_path, until_six, monkeypatch):
    """The mutant: best left out of the checkpoint."""
    with pytest.raises(Killed):
        best_of(tmp_path, kill_at=9, save_after=(0, 7))
    real = sessions.Session._restore

    def forgetful(self, state, checkpoint):
        real(self, state, checkpoint)
        self.tally.best = None

    monkeypatch.setattr(sessions.Session, "_restore", forgetful)
    assert best_of(tmp_path)["held"] != until_six["held"]


def test_a_disk_that_refuses_the_best_loses_nothing(tmp_path, until_six, monkeypatch):
    """They wait in memory for the next save, and are taken from there when none is."""
    real, refused = keepers.write, []

    def full(folder, run, step, *rest):
        if folder.name == "best" or step == 12:
            refused.append(step)
            raise OutputError("full")
        return real(folder, run, step, *rest)

    monkeypatch.setattr(keepers, "write", full)
    found = best_of(tmp_path, save_after=(0, 4, 8))
    assert found["held"] == until_six["held"] and not found["saved"] and refused == [3, 6, 6]
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["000001-step-0"]


def test_a_best_that_was_damaged_is_told_and_the_last_weights_are_held(tmp_path):
    with pytest.raises(Killed):
        best_of(tmp_path, kill_at=9, save_after=(0, 7))
    (place,) = (tmp_path / "c" / "best").iterdir()
    (place / "state.safetensors").write_bytes(b"torn")
    said: list[str] = []
    found = best_of(tmp_path, said=said)
    assert found["kept"]["step"] == 12 and found["held"] == sit_last(tmp_path)["held"]
    assert any("step 6" in line and "last ones are kept" in line for line in said)


def sit_last(place):
    (place / "again").mkdir()
    return sit(place / "again", measured=MEASURED)
