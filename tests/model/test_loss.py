"""The loss of a batch is that of each sample alone, padded or packed, and only learnt tokens count."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import llama

from afina.data.batch import micro_batches
from afina.data.template import Rendered
from afina.model.loss import summed_loss, target_logits, token_losses
from afina.model.packed import packed_attention


def rows(seed: int = 0) -> list[Rendered]:
    random = np.random.default_rng(seed)
    made = []
    for length in (17, 2, 40, 9, 31):
        learnt = random.random(length) < 0.4
        learnt[-1] = True
        made.append(Rendered(random.integers(3, 97, length).astype(np.int32), learnt))
    return made


def alone(model, row: Rendered) -> torch.Tensor:
    """Minus log-probability of each learnt token, from the whole logits in float64."""
    ids = torch.from_numpy(row.ids).long()
    shares = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), -1)
    return torch.stack([-shares[at - 1, ids[at]] for at in range(1, len(ids)) if row.learnt[at]])


LAYOUTS = {
    "padded": dict(budget=1000, packing=False),
    "padded in pairs": dict(budget=64, packing=False),
    "packed": dict(budget=1000, packing=True),
    "packed in two": dict(budget=60, packing=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fast", [True, False])
def test_losses_are_those_of_each_sample_alone(layout, fast):
    if fast and not LAYOUTS[layout]["packing"]:
        pytest.skip("padded rows always run on the reference")
    model, samples = llama().double(), rows()
    seen = set()
    with packed_attention(model, fast):
        found = [
            (batch, token_losses(model, batch))
            for batch in micro_batches(samples, range(5), pad_id=0, **LAYOUTS[layout])
        ]
    for batch, losses in found:
        wanted = torch.cat([alone(model, samples[index]) for index in batch.samples])
        torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-5)
        owners = torch.cat([torch.full((len(alone(model, samples[i])),), at) for at, i in enumerate(batch.samples)])
        assert torch.equal(batch.owner, owners)
        seen |= set(batch.samples)
    assert seen == set(range(5))


CASES = st.lists(st.integers(2, 24), min_size=1, max_size=6)


@torch.no_grad()
@settings(deadline=None, max_examples=30)
@given(lengths=CASES, seed=st.integers(0, 99), budget=st.integers(1, 80), pad=st.integers(0, 96), fast=st.booleans())
def test_however_a_step_is_laid_out_logits_and_losses_are_those_of_each_sample_alone(lengths, seed, budget, pad, fast):
    """Packed or padded, with any token, into micro-batches of any size; their losses add up to one sum."""
    random = np.random.default_rng(seed)
    samples = []
    for length in lengths:
        learnt = random.random(length) < 0.5
        learnt[-1] = True
        samples.append(Rendered(random.integers(3, 97, length).astype(np.int32), learnt))
    model = llama().double()
    wanted = [alone(model, row) for row in samples]
    total = float(sum(losses.sum() for losses in wanted))
    for packing in (True, False):
        batches = micro_batches(samples, range(len(samples)), budget=budget, packing=packing, pad_id=pad)
        with packed_attention(model, fast and packing):
            logits = [target_logits(model, batch) for batch in batches]
            summed = sum(summed_loss(model, batch).item() for batch in batches)
        assert summed == pytest.approx(total, rel=1e-9)
        for batch, found in zip(batches, logits, strict=True):
            of_each = []
            for index in batch.samples:
                ids = torch.from_numpy(samples[index].ids).long()
                of_each.append(model(input_ids=ids[None]).logits[0, np.flatnonzero(samples[index].learnt[1:])])
            torch.testing.assert_close(found.double(), torch.cat(of_each), rtol=1e-9, atol=1e-9)


def test_padding_is_never_seen():
    model, samples = llama().double(), rows()
    losses = [
        summed_loss(model, micro_batches(samples, range(5), budget=1000, packing=False, pad_id=pad)[0]).item()
        for pad in (0, 50)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_logits_are_taken_where_a_target_is_predicted_and_at_least_in_fp32():
    samples = rows()
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        for layout in LAYOUTS.values():
            for batch in micro_batches(samples, range(5), pad_id=0, **layout):
                logits = target_logits(llama().to(dtype), batch)
                assert logits.shape == (batch.targets.numel(), 97) and logits.dtype == wanted


def test_the_loss_flows_back_to_every_weight():
    model, samples = llama(), rows()
    summed_loss(model, micro_batches(samples, range(5), budget=1000, packing=False, pad_id=0)[0]).backward()
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in model.parameters())


def test_logits_in_pieces_are_the_same_loss_and_gradient(monkeypatch):
    from afina.model import loss

    found = []
    for at_once in (loss.LOGITS_AT_ONCE, 3 * 97):
        monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once)
        model = llama()
        for packing in (True, False):
            for batch in micro_batches(rows(), range(5), budget=200, packing=packing, pad_id=0):
                summed_loss(model, batch).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)
