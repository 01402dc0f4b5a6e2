"""The best weights of a run are what it holds at the end, wherever it was stopped and whatever the disk did."""

import math
import random
import statistics

import pytest
from train.sitting import Killed, sit

from afina.errors import OutputError
from afina.train import keeper as keepers
from afina.train import session as sessions
from afina.train.best import Criterion, Measured

MEASURED = {3: 2.0, 6: 1.0, 9: 1.25, 11: math.nan, 12: 1.5}
"""Best after step 6: a later one is worse, and what is no number is never better."""
SCATTERED = {3: [2.0] * 4, 6: [1.0, 1.0, 1.0, 1.0], 9: [0.9, 1.3, 1.3, 0.8], 12: [1.5, 1.5, 1.4, 1.6]}
"""After step 9 worse by chance, for some are better; after step 12 worse beyond it, for none is."""


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


def test_what_is_worse_by_chance_is_as_good_and_the_later_is_held(tmp_path):
    found = sit(tmp_path, measured=SCATTERED, criterion=Criterion(), save_after=(0, 8))
    assert found["kept"]["step"] == 9 and found["tally"]["lowest"]["step"] == 6
    folder = tmp_path / "nine"
    folder.mkdir()
    last = sit(folder, steps=9, measured=SCATTERED, criterion=Criterion())
    assert last["kept"]["step"] == 9 and last["held"] == found["held"]


def test_a_forgotten_lowest_shows(tmp_path, monkeypatch):
    """The mutant: against what a later loss is compared, left out of the checkpoint."""
    for name in ("right", "mutant"):
        (tmp_path / name).mkdir()
        with pytest.raises(Killed):
            sit(tmp_path / name, measured=SCATTERED, criterion=Criterion(), kill_at=11, save_after=(0, 10))
    assert sit(tmp_path / "right", measured=SCATTERED, criterion=Criterion())["kept"]["step"] == 9
    real = sessions.Session._restore

    def forgetful(self, state, checkpoint):
        real(self, state, checkpoint)
        self.tally.lowest = None

    monkeypatch.setattr(sessions.Session, "_restore", forgetful)
    assert sit(tmp_path / "mutant", measured=SCATTERED, criterion=Criterion())["kept"]["step"] == 12


def test_chance_is_the_scatter_of_a_difference_on_the_same_samples():
    """Of groups of unequal size, against what drawing samples anew gives; large common differences are no scatter."""
    chance, groups, drawn, told = random.Random(1), 24, [], []
    for _turn in range(2000):
        counts = tuple(float(chance.randint(5, 60)) for _group in range(groups))
        hard = [chance.uniform(1, 5) for _group in range(groups)]
        before = [count * level for count, level in zip(counts, hard, strict=True)]
        after = [count * (level + 0.3 + chance.gauss(0, 0.2)) for count, level in zip(counts, hard, strict=True)]
        measured = Measured(tuple(after), counts)
        drawn.append(measured.loss - Measured(tuple(before), counts).loss)
        told.append(measured.chance(before))
    assert statistics.mean(drawn) == pytest.approx(0.3, abs=0.01)
    assert statistics.stdev(drawn) == pytest.approx(statistics.mean(told), rel=0.1)
    assert Measured((1.0,), (2.0,)).chance([3.0]) == math.inf


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


def test_where_every_checkpoint_is_damaged_it_is_said_that_the_run_begins_anew(tmp_path, until_six):
    with pytest.raises(Killed):
        best_of(tmp_path, kill_at=9, save_after=(0, 7))
    for place in (tmp_path / "c").glob("0*"):
        (place / "state.safetensors").write_bytes(b"torn")
    said: list[str] = []
    assert best_of(tmp_path, said=said)["held"] == until_six["held"]
    assert any("None of the checkpoints can be used: the run begins anew." in line for line in said)


def sit_last(place):
    (place / "again").mkdir()
    return sit(place / "again", measured=MEASURED)
