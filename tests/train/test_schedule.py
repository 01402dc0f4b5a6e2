import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afina.recipe.schema import Training
from afina.train.schedule import learning_rate, warmup_steps

PEAK = 1e-3


def rates(steps: int, **changes) -> list[float]:
    training = Training(**{"learning_rate": PEAK, **changes})
    return [learning_rate(training, step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@settings(deadline=None)
@given(steps=st.integers(1, 400), warmup=st.one_of(st.floats(0, 0.99), st.integers(1, 50).map(float)))
def test_the_rate_rises_to_the_peak_and_never_above(schedule, steps, warmup):
    found = rates(steps, schedule=schedule, warmup=warmup)
    warm = min(steps, warmup_steps(Training(warmup=warmup), steps))
    assert all(0 < rate <= PEAK for rate in found)
    assert all(before < after for before, after in pairwise(found[:warm]))
    assert all(before >= after for before, after in pairwise(found[warm:]))
    if warm < steps:
        assert found[warm] == PEAK


@pytest.mark.parametrize("schedule, halfway", [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_halfway_and_the_end(schedule, halfway):
    found = rates(1000, schedule=schedule, warmup=0)
    assert found[0] == PEAK
    assert found[500] == pytest.approx(halfway * PEAK)
    assert found[-1] <= (PEAK if schedule == "constant" else 2e-3 * PEAK)


def test_cosine_is_a_cosine():
    found = rates(100, schedule="cosine", warmup=20.0)
    assert found[:3] == pytest.approx([PEAK / 21, 2 * PEAK / 21, 3 * PEAK / 21])
    assert found[40] == pytest.approx(PEAK * 0.5 * (1 + math.cos(math.pi * 20 / 80)))


def test_warm_up_is_a_share_below_1_and_steps_from_1():
    assert warmup_steps(Training(warmup=0.03), 1000) == 30
    assert warmup_steps(Training(warmup=30.0), 1000) == 30
    assert warmup_steps(Training(warmup=0.0), 1000) == 0
    assert warmup_steps(Training(warmup=0.03), 10) == 0


def test_a_run_of_one_step_learns():
    assert rates(1, warmup=0.5) == [PEAK]
