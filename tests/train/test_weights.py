"""Per-message weights: the loss is the weighted mean over the step, on the reference and on the engine, cut any way."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import CPU, llama, perturb_adapters
from train.test_loop import CUTS, rows

from afina.data.batch import micro_batches
from afina.data.template import Rendered
from afina.engine.engine import Engine
from afina.engine.proof import prove
from afina.model.attach import attach, learning
from afina.model.loss import summed_loss
from afina.model.packed import packed_attention
from afina.recipe.schema import Lora
from afina.train.loop import accumulate, measure


def weighted(count: int = 8) -> list[Rendered]:
    """Rows of which two in three carry weights, 0.1 to 3."""
    random = np.random.default_rng(1)
    made = []
    for number, row in enumerate(rows(count)):
        weights = np.where(row.learnt, random.choice([0.1, 0.5, 1.0, 3.0], row.ids.size), 0).astype(np.float32)
        made.append(row if number % 3 == 0 else replace(row, weights=weights))
    return made


def plain_loss(model, samples: list[Rendered]) -> float:
    """Sum of weight times loss over sum of weights, token by token from the whole logits."""
    total = count = 0.0
    for row in samples:
        logits = model(input_ids=torch.from_numpy(row.ids.astype(np.int64))[None]).logits[0].double()
        for place in range(1, len(row.ids)):
            if row.learnt[place]:
                weight = 1.0 if row.weights is None else float(row.weights[place])
                total -= weight * torch.log_softmax(logits[place - 1], -1)[row.ids[place]].item()
                count += weight
    return total / count


def made(dtype=torch.float64):
    return perturb_adapters(attach(llama().to(dtype), Lora(rank=4), seed=3).to(dtype))


def gradients(cut, engine: bool):
    model, samples = made(), weighted()
    batches = micro_batches(samples, range(8), pad_id=0, **cut)
    model.train()
    with packed_attention(model, engine):
        loss_fn = Engine(model).summed_loss if engine else summed_loss
        loss = accumulate(model, batches, sum(batch.weight for batch in batches), 0, 0, CPU, loss_fn)
    return loss.item(), [parameter.grad.clone() for _name, parameter in learning(model)]


@pytest.mark.parametrize("cut", CUTS)
def test_weights_count_however_a_step_is_cut(cut):
    expected, plain = gradients(CUTS["1 at a time"], engine=False)
    assert expected == pytest.approx(plain_loss(made(), weighted()), rel=1e-6)
    for engine in (False, True) if CUTS[cut]["packing"] else (False,):
        loss, found = gradients(CUTS[cut], engine)
        assert loss == pytest.approx(expected, rel=1e-6)
        for gradient, truth in zip(found, plain, strict=True):
            assert truth.norm() > 0
            assert (gradient - truth).norm() <= (2e-5 if engine else 1e-12) * truth.norm()


def test_the_engine_proves_itself_on_a_weighted_batch():
    model = made(torch.float32).train()
    (batch,) = micro_batches(weighted(), range(8), budget=10_000, packing=True, pad_id=0)
    engine = Engine(model)
    with packed_attention(model, True):
        assert prove(engine, model, batch, CPU.autocast(), engine.parameters).holds


def test_a_head_that_waits_in_the_computers_memory_weighs_the_same():
    model = made(torch.float32)
    (batch,) = micro_batches(weighted(), range(8), budget=10_000, packing=True, pad_id=0)
    ends = Engine(model).ends
    hidden = torch.randn(batch.input_ids.numel(), 32)
    found = []
    for ends.passes_by in (False, True):
        loss, (d_hidden, _of_ends) = ends.loss(hidden, batch, 0)
        found.append((loss, d_hidden))
    (loss, d_hidden), (other, d_other) = found
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-5)
    assert d_hidden.any()
    torch.testing.assert_close(d_hidden, d_other, rtol=1e-4, atol=1e-5)


def test_validation_is_weighted_too():
    model = made(torch.float32).eval()
    batches = micro_batches(weighted(), range(8), budget=100, packing=False, pad_id=0)
    assert measure(model, [batches], CPU, summed_loss).loss == pytest.approx(plain_loss(model, weighted()), rel=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0.015625, 100, width=32), min_size=1, max_size=1), st.booleans())
def test_equal_weights_are_no_weights(weights, packing):
    """All weights times any number: the same mean."""
    samples = rows(4)
    once = [replace(row, weights=(row.learnt * np.float32(weights[0]))) for row in samples]
    model = made()
    loss = []
    for chosen in (samples, once):
        batches = micro_batches(chosen, range(4), budget=100, packing=packing, pad_id=0)
        loss.append(measure(model, [batches], CPU, summed_loss).loss)
    assert loss[0] == pytest.approx(loss[1], rel=1e-5)
