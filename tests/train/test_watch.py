"""P6: what is rejected, what is not, and that a watch is all in its dump."""

import json
import math
import random

import pytest

from afina.train.watch import PATIENCE, WARM, Diverged, Rejection, Watch


def warm(watch: Watch, steps: int, chance: random.Random) -> None:
    for step in range(1, steps + 1):
        watch.accept(step, *clean(chance, step))


def clean(chance: random.Random, step: int) -> tuple[float, float]:
    """A loss that falls, of uneven batches, and a norm with a long tail."""
    return (0.2 + 3 * math.exp(-step / 500)) * math.exp(chance.gauss(0, 0.15)), math.exp(chance.gauss(0, 0.4))


def test_no_false_alarm_in_100_000_clean_steps():
    watch, chance = Watch(), random.Random(3)
    for step in range(1, 100_001):
        loss, norm = clean(chance, step)
        assert watch.judge(loss, norm) is None, step
        watch.accept(step, loss, norm)


@pytest.mark.parametrize("factor", [20, 1000])
def test_spikes_are_rejected_from_the_64th_step_on(factor):
    for seed in range(100):
        watch, chance = Watch(), random.Random(seed)
        warm(watch, WARM - 1, chance)
        loss, norm = clean(chance, WARM)
        assert watch.judge(loss * factor, norm * factor) is None
        warm(watch, 100, chance)
        assert watch.judge(loss * factor, norm) == "loss spikes"
        assert watch.judge(loss, norm * factor * 3) == "gradient spikes"


def test_one_hard_sample_among_learnt_ones_is_no_spike():
    watch = Watch()
    for step in range(1, 400):
        watch.accept(step, 3.0 if step < 20 else 0.001, 1.0)
    assert watch.judge(0.5, 0.9) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_rejected_at_once(value):
    assert Watch().judge(value, 1.0) == "loss is no number"
    assert Watch().judge(1.0, value) == "gradient is no number"
    assert Watch().judge(1.0, value, may_overflow=True) is None


def test_a_watch_is_all_in_its_dump():
    watch, chance = Watch(), random.Random(1)
    warm(watch, 200, chance)
    watch.reject(Rejection(201, "loss spikes", 9.0, 1.0, (4, 5)))
    again = Watch()
    again.load(json.loads(json.dumps(watch.dump())))
    assert again.dump() == watch.dump() and again.known == watch.known


def test_going_back_is_tried_once_until_a_new_step_is_accepted():
    watch = Watch()
    then = watch.dump()
    for step in range(1, PATIENCE + 1):
        watch.reject(Rejection(step, "loss is no number", None, None, (step,)))
    watch.go_back(then)
    assert watch.in_a_row == 0 and sorted(watch.known) == [1, 2, 3]
    with pytest.raises(Diverged):
        watch.go_back(then)
    watch.accept(4, 1.0, 1.0)
    watch.go_back(then)
