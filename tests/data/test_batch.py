from collections import Counter
from itertools import chain

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afina.data.batch import Batch, micro_batches
from afina.data.template import Rendered

PAD = 0


def rendered(lengths: list[int], seed: int) -> list[Rendered]:
    random = np.random.default_rng(seed)
    return [
        Rendered(random.integers(1, 1000, length).astype(np.int32), random.random(length) < 0.5) for length in lengths
    ]


def parts(batch: Batch) -> list[tuple[int, torch.Tensor, torch.Tensor, int]]:
    """Per sample: its index, its ids and positions as the batch has them, and the flat place of its first token."""
    if batch.lengths is None:
        width = batch.input_ids.shape[1]
        sizes = batch.attention_mask.sum(1).tolist()
        rows = [(0, row * width, size) for row, size in enumerate(sizes)]
    else:
        starts = np.cumsum([0, *batch.lengths])[:-1].tolist()
        rows = [(0, start, size) for start, size in zip(starts, batch.lengths, strict=True)]
    ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    return [
        (index, ids[start : start + size], positions[start : start + size], start)
        for index, (_zero, start, size) in zip(batch.samples, rows, strict=True)
    ]


CASES = st.tuples(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(0, 99), st.integers(1, 120))


@settings(deadline=None)
@given(CASES, st.booleans(), st.randoms())
def test_a_bijection_within_the_budget(case, packing, random):
    lengths, seed, budget = case
    rows = rendered(lengths, seed)
    chosen = [random.randrange(len(rows)) for _ in range(len(rows))]  # a step may span two epochs, so some come twice
    batches = micro_batches(rows, chosen, budget=budget, packing=packing, pad_id=PAD)
    assert Counter(chain.from_iterable(batch.samples for batch in batches)) == Counter(chosen)
    for batch in batches:
        assert batch.input_ids.shape == batch.position_ids.shape
        assert batch.input_ids.dtype == batch.position_ids.dtype == batch.targets.dtype == torch.int64
        assert batch.input_ids.numel() <= budget or len(batch.samples) == 1
        assert batch.tokens == sum(rows[index].ids.size for index in batch.samples)
        for index, ids, positions, _start in parts(batch):
            assert ids.tolist() == rows[index].ids.tolist()  # no sample is cut
            assert positions.tolist() == list(range(rows[index].ids.size))
        if packing:
            assert batch.attention_mask is None
            assert batch.input_ids.shape == (1, batch.tokens)
        else:
            assert batch.lengths is None
            assert (batch.input_ids[~batch.attention_mask] == PAD).all()


@settings(deadline=None)
@given(CASES, st.booleans())
def test_targets_are_the_learnt_tokens_but_the_first(case, packing):
    lengths, seed, budget = case
    rows = rendered(lengths, seed)
    for batch in micro_batches(rows, range(len(rows)), budget=budget, packing=packing, pad_id=PAD):
        flat = batch.input_ids.flatten()
        assert batch.targets.tolist() == flat[batch.predicting + 1].tolist()
        for number, (index, _ids, _positions, start) in enumerate(parts(batch)):
            mine = batch.owner == number
            learnt = [place for place in np.flatnonzero(rows[index].learnt).tolist() if place > 0]
            assert (batch.predicting[mine] + 1 - start).tolist() == learnt
        assert sorted(batch.owner.tolist()) == batch.owner.tolist()


@settings(deadline=None)
@given(CASES)
def test_padded_and_packed_learn_the_same(case):
    lengths, seed, budget = case
    rows = rendered(lengths, seed)

    def learnt(packing: bool) -> Counter[tuple[int, int]]:
        batches = micro_batches(rows, range(len(rows)), budget=budget, packing=packing, pad_id=PAD)
        return Counter(
            (batch.samples[owner], target)
            for batch in batches
            for owner, target in zip(batch.owner.tolist(), batch.targets.tolist(), strict=True)
        )

    assert learnt(True) == learnt(False)


@settings(deadline=None)
@given(CASES)
def test_as_few_as_the_plain_best_fit_and_even(case):
    """As many as trying every bin that is open: the same, or of even size."""
    lengths, seed, budget = case
    rows = rendered(lengths, seed)
    bins: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda index: -lengths[index]):
        room = [budget - sum(lengths[one] for one in group) for group in bins]
        fits = [place for place, left in enumerate(room) if left >= lengths[index]]
        if fits:
            bins[min(fits, key=lambda place: room[place])].append(index)
        else:
            bins.append([index])
    batches = micro_batches(rows, range(len(rows)), budget=budget, packing=True, pad_id=PAD)
    tokens = [batch.tokens for batch in batches]
    assert len(batches) == len(bins)
    assert [list(batch.samples) for batch in batches] == bins or max(tokens) - min(tokens) <= max(lengths)


def test_a_small_rest_is_shared():
    batches = micro_batches(rendered([10] * 101, 0), range(101), budget=1000, packing=True, pad_id=PAD)
    assert sorted(batch.tokens for batch in batches) == [500, 510]


def test_twenty_thousand_samples_are_packed_full():
    lengths = (np.random.default_rng(0).lognormal(5, 0.6, 20_000).astype(int).clip(8, 2048)).tolist()
    rows = [Rendered(np.zeros(length, np.int32), np.ones(length, np.bool_)) for length in lengths]
    batches = micro_batches(rows, range(len(rows)), budget=2048, packing=True, pad_id=PAD)
    assert sum(lengths) / (len(batches) * 2048) > 0.98


def test_nothing_gives_nothing():
    for packing in (True, False):
        assert micro_batches([], [], budget=8, packing=packing, pad_id=PAD) == []


def test_a_batch_moves_whole():
    rows = rendered([5, 3], 0)
    for packing in (True, False):
        (batch,) = micro_batches(rows, [0, 1], budget=100, packing=packing, pad_id=PAD)
        moved = batch.to(torch.device("cpu"))
        assert (moved.samples, moved.lengths, moved.tokens) == (batch.samples, batch.lengths, batch.tokens)
        assert torch.equal(moved.targets, batch.targets)
