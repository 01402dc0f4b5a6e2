"""M18: real small trainings that go well, overfit, diverge or stand still: what is said of each, and which is ended."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from journey.tiny import lay_out, write_rows
from train.test_run import run

from afina.data.template import Rendered
from afina.train.best import Measured
from afina.train.repeats import Repeated, notice, repeated
from afina.train.trend import ENOUGH, judge, memorised, stands_still

COLOURS = ("red", "blue", "old", "new", "big", "odd", "wet", "dry")
THINGS = [f"{colour} {thing}" for colour in COLOURS for thing in ("cup", "hat", "car", "door", "soup", "film", "lamp")]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Rows with a rule to be learnt, and rows of pure chance, each with a validation file of its own."""
    folder, chance = tmp_path_factory.mktemp("place"), random.Random(1)
    lay_out(folder)
    ruled = [
        (f"The {thing} is {word}.", verdict)
        for thing in THINGS
        for verdict, words in {"good": ["great", "fine"], "bad": ["awful", "dull"]}.items()
        for word in words
    ]
    chance.shuffle(ruled)
    random_rows = [(question, chance.choice(["good", "bad"])) for question, _answer in ruled]
    for name, rows in {"ruled": ruled[:192], "random": random_rows[:32]}.items():
        write_rows(folder / f"{name}.jsonl", rows)
    tale = [("Tell me a tale.", "old blue cup and wet red door, odd car")]
    write_rows(folder / "again.jsonl", [*random_rows[:192], *tale * 60])
    for name, rows in {"ruled": ruled, "random": random_rows, "again": random_rows}.items():
        write_rows(folder / f"{name}-held-out.jsonl", rows[192:])
    return folder


def trained(place: Path, out: Path, rows: str, *overrides: str) -> dict:
    common = ["data.train=" + rows + ".jsonl", "data.validation=" + rows + "-held-out.jsonl", "training.validations=8"]
    return run(place, out, *common, "training.steps=48", "training.schedule=constant", *overrides)["training"]


def kinds(training: dict) -> list[str]:
    return [finding["kind"] for finding in training["findings"]]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_healthy_run_is_left_alone(place, tmp_path, seed):
    found = trained(place, tmp_path / "run", "ruled", "training.learning_rate=3e-3", f"seed={seed}")
    assert found["steps"] == 48 and found["validation_loss"] < 0.3
    assert not {"overfits", "diverges", "flat"} & set(kinds(found))


def test_a_run_that_overfits_is_told_and_ended_and_its_best_weights_are_kept(place, tmp_path):
    found = trained(place, tmp_path / "run", "random", "training.learning_rate=1e-2")
    (end,) = [finding for finding in found["findings"] if finding["ended"]]
    assert end["kind"] == "overfits" and "by heart" in end["text"] and "training.epochs" in end["text"]
    assert found["steps"] == end["step"] < found["planned_steps"] == 48
    assert found["kept_step"] == found["best"]["step"] < end["step"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    held_out = [line["loss"] for line in lines if line["kind"] == "validation"]
    assert min(held_out) <= found["validation_loss"] < held_out[-1] / 1.1


def test_who_wants_to_may_overfit(place, tmp_path):
    more = ["training.learning_rate=1e-2", "training.early_stop=false", "training.keep=last"]
    found = trained(place, tmp_path / "run", "random", *more)
    assert found["steps"] == found["kept_step"] == 48 and kinds(found)[0] == "overfits"


def test_a_run_that_diverges_is_told_which_knob_to_turn(place, tmp_path):
    more = ["training.learning_rate=0.1", "training.clip_norm=null", "training.warmup=40"]
    found = trained(place, tmp_path / "run", "ruled", *more)
    text = next(finding["text"] for finding in found["findings"] if finding["kind"] == "diverges")
    assert "training.learning_rate" in text and "lower" in text


def test_a_sample_that_repeats_and_is_learnt_by_heart_is_named(place, tmp_path):
    found = trained(place, tmp_path / "run", "again", "training.learning_rate=5e-3")
    text = next(finding["text"] for finding in found["findings"] if finding["kind"] == "memorised")
    assert "again.jsonl:" in text and "60 times" in text and "training.epochs" in text
    assert not any(finding["ended"] for finding in found["findings"] if finding["kind"] == "memorised")


def test_samples_that_repeat_are_counted():
    def row(*ids: int) -> Rendered:
        return Rendered(np.array(ids, np.int32), np.array([False] + [True] * (len(ids) - 1)))

    rows = [row(1, 2), row(3, 4), row(1, 2), row(5, 6), row(3, 4), row(1, 2)]
    assert repeated(rows) == [Repeated(0, 3), Repeated(1, 2)]
    other = Rendered(rows[0].ids, np.array([True, True]))
    assert repeated([rows[0], other, row(7, 8)]) == []  # the same tokens, but not the same learnt
    assert notice([], 6, 100, str) is None and notice([Repeated(0, 2)], 1000, 3, str) is None
    assert notice(repeated(rows), 6, 2, str).startswith("3 of 6 training samples repeat others; 0 stands there 3 times")
    assert "seen 10 times" in notice([Repeated(0, 2)], 1000, 5, str)


def test_what_repeats_and_is_known_while_the_validation_still_falls_is_no_finding():
    losses = Measured((0.02, 9.0), (2.0, 3.0))
    again = [Repeated(4, 7), Repeated(2, 2)]
    assert memorised(again, losses, [1.0, 0.99], 2.0, str).text.startswith("4, which stands 7 times")
    assert memorised(again, losses, [1.0, 0.05], 2.0, str) is None
    assert memorised(again, losses, [1.0, None], 2.0, str) is None
    assert stands_still([1.0, 0.99]) and not stands_still([1.0, 0.9]) and not stands_still([1.0, None])
    assert not stands_still([1.0])


def test_a_run_that_hardly_moves_is_told_and_never_ended(place, tmp_path):
    found = trained(place, tmp_path / "run", "ruled", "training.learning_rate=1e-7")
    assert kinds(found) == ["flat"] and "raise training.learning_rate" in found["findings"][0]["text"]
    assert found["steps"] == 48


def test_nothing_is_ended_for_one_rise_or_few_samples_or_while_it_gets_better():
    falls, rises = [2.0, 1.0, 0.5, 0.2], [1.0, 1.1, 1.3, 1.6]
    assert judge(falls, rises, ENOUGH).sure
    assert not judge(falls, rises, ENOUGH - 1).sure
    assert judge([2.0, 1.9], [1.0, 1.5], ENOUGH) is None
    assert not judge(falls, [1.0, 2.0, 1.9, 1.8], ENOUGH).sure
    assert judge(falls, [2.0, 2.1, 1.9, 1.8], ENOUGH) is None
    assert judge(falls, [2.0, 1.8, 1.7, 1.69], ENOUGH).kind == "by heart"
    assert judge([2.0, 1.9, 1.8], [2.0, 2.1, 1.9], ENOUGH) is None
    assert judge([1.0, None, 1.0][:1], [None], ENOUGH) is None
