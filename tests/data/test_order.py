import time
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from train.test_loop import rows

from afina.data.batch import micro_batches
from afina.data.order import Order, _permutation, derived_seed, order_of
from afina.recipe.schema import Training

SEEDS = st.integers(0, 2**63 - 1)
ORDERS = st.builds(Order, st.integers(1, 50), st.integers(1, 70), st.integers(1, 5), SEEDS)


@given(ORDERS)
def test_steps_partition_epochs_that_are_permutations(order):
    seen = list(chain.from_iterable(order.step(number) for number in range(order.steps)))
    assert len(seen) == order.samples * order.epochs
    for epoch in range(order.epochs):
        assert sorted(seen[epoch * order.samples :][: order.samples]) == list(range(order.samples))
    assert all(len(order.step(number)) == order.batch_size for number in range(order.steps - 1))
    assert 1 <= len(order.step(order.steps - 1)) <= order.batch_size
    assert order.step(order.steps) == []


@given(ORDERS, st.data())
def test_any_step_is_found_without_those_before(order, data):
    places = data.draw(st.lists(st.integers(0, order.steps - 1), max_size=20))
    sequential = [order.step(number) for number in range(order.steps)]
    fresh = Order(order.samples, order.batch_size, order.epochs, order.seed)
    assert [fresh.step(place) for place in places] == [sequential[place] for place in places]


@given(st.integers(1, 1000), st.floats(0.01, 9), st.integers(1, 64), SEEDS)
def test_parts_of_an_epoch(samples, epochs, batch_size, seed):
    order = Order(samples, batch_size, epochs, seed)
    seen = sum(len(order.step(number)) for number in range(order.steps))
    assert seen == max(1, round(samples * epochs))
    assert order.epoch(order.steps - 1) < max(epochs, 1 / samples) + 1 / samples


def test_epochs_and_seeds_differ():
    one, other = Order(100, 100, 2, 1), Order(100, 100, 2, 2)
    assert one.step(0) != one.step(1)
    assert one.step(0) != other.step(0)


def test_what_is_handed_out_can_be_changed_without_harm():
    order = Order(10, 10, 1, 3)
    order.step(0).reverse()
    assert order.step(0) == Order(10, 10, 1, 3).step(0)


def test_the_order_of_today_is_the_order_of_tomorrow():
    """Were numpy to shuffle in another way, runs could not be continued: then the shuffle must become our own."""
    assert Order(12, 5, 2, 42).step(2) == [3, 6, 9, 4, 1]


@given(st.lists(st.one_of(st.integers(0, 2**70), st.text(max_size=4)), max_size=4), st.data())
def test_seeds_of_different_purposes_differ(parts, data):
    other = data.draw(st.lists(st.one_of(st.integers(0, 2**70), st.text(max_size=4)), max_size=4))
    seed = derived_seed(*parts)
    assert 0 <= seed < 2**63
    assert seed == derived_seed(*parts)
    assert (seed == derived_seed(*other)) == (parts == other)


@pytest.mark.parametrize("other", [(5, 0), (5, ""), (5, 0, 0), ("5",), (2**32 + 5,)])
def test_seeds_that_numpy_would_take_for_one(other):
    assert derived_seed(5) != derived_seed(*other)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    tokens=st.integers(1, 200),
    epochs=st.floats(0.1, 3),
    seed=st.integers(0, 2**40),
)
def test_steps_of_tokens_deal_out_every_sample_as_often_as_asked(lengths, tokens, epochs, seed):
    order = order_of(lengths, Training(batch_tokens=tokens, epochs=epochs), seed)
    steps = [order.step(number) for number in range(order.steps)]
    dealt = [sample for step in steps for sample in step]
    seen = max(1, round(len(lengths) * epochs))
    assert dealt == [sample for number in range(seen) for sample in Order(len(lengths), 1, epochs, seed).step(number)]
    for step, following in pairwise(steps):
        filled = sum(lengths[sample] for sample in step)
        assert len(step) == 1 or filled <= tokens
        assert filled + lengths[following[0]] > tokens  # as full as can be
    assert order.epoch(order.steps) == pytest.approx(seen / len(lengths))
    asked = order_of(lengths, Training(batch_tokens=tokens, steps=7), seed)
    assert asked.steps == 7 and [asked.step(number) for number in range(min(7, order.steps - 1))] == steps[:-1][:7]


def test_steps_of_samples_are_the_order_itself():
    assert order_of([3] * 10, Training(batch_size=4, epochs=2), 1) == Order(10, 4, 2.0, 1)
    assert order_of([3] * 10, Training(batch_size=4, steps=5), 1).steps == 5


def test_a_resume_at_any_step_of_three_epochs_finds_the_same_samples():
    """Nothing is remembered between steps: an order made anew at step s goes on as the one that began at 0."""
    whole = [Order(50, 8, 3.0, 5).step(step) for step in range(Order(50, 8, 3.0, 5).steps)]
    for start in range(len(whole)):
        again = Order(50, 8, 3.0, 5)
        assert [again.step(step) for step in range(start, again.steps)] == whole[start:]
    assert sorted(sample for step in whole for sample in step) == sorted(list(range(50)) * 3)


@pytest.mark.parametrize("budget", [8, 32, 64, 100, 4096])
def test_how_a_step_is_cut_changes_no_sample_and_no_target(budget):
    """Micro-batch times accumulation: any cut of a step holds the same samples and learns the same tokens."""
    samples, order = rows(50, seed=3), Order(50, 8, 3.0, 5)
    for step in range(order.steps):
        cut = micro_batches(samples, order.step(step), budget=budget, packing=step % 2 == 0, pad_id=0)
        assert sorted(sample for batch in cut for sample in batch.samples) == sorted(order.step(step))
        learnt = sorted(token for batch in cut for token in batch.targets.tolist())
        assert learnt == sorted(
            token for index in order.step(step) for token in samples[index].ids[1:][samples[index].learnt[1:]].tolist()
        )


def test_step_a_million_is_found_by_shuffling_one_epoch_or_two():
    """Constant time: what is computed for a step does not grow with its number."""
    for number in (0, 1_000, 1_000_000):
        _permutation.cache_clear()
        began = time.perf_counter()
        found = Order(10_000, 16, 1_700.0, 1).step(number)
        print(f"step {number:,} found in {1000 * (time.perf_counter() - began):.1f} ms")
        assert len(found) == 16 and _permutation.cache_info().misses <= 2
