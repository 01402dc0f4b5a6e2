"""M18: real small trainings that go well, overfit, diverge or stand still: what is said of each, and which is ended."""

import json
import random
from pathlib import Path

import pytest
from journey.tiny import lay_out, write_rows
from train.test_run import run

from afina.train.trend import ENOUGH, judge

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
    for name, rows in {"ruled": ruled, "random": random_rows}.items():
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
    assert found["validation_loss"] == min(held_out) < held_out[-1] / 1.1


def test_who_wants_to_may_overfit(place, tmp_path):
    more = ["training.learning_rate=1e-2", "training.early_stop=false", "training.keep=last"]
    found = trained(place, tmp_path / "run", "random", *more)
    assert found["steps"] == found["kept_step"] == 48 and kinds(found)[0] == "overfits"


def test_a_run_that_diverges_is_told_which_knob_to_turn(place, tmp_path):
    more = ["training.learning_rate=0.1", "training.clip_norm=null", "training.warmup=40"]
    found = trained(place, tmp_path / "run", "ruled", *more)
    text = next(finding["text"] for finding in found["findings"] if finding["kind"] == "diverges")
    assert "training.learning_rate" in text and "lower" in text


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
