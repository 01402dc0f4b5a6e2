"""Products in eight bits: the formats, both directions against double precision, and whole trainings' gradients."""

import numpy as np
import pytest
import torch
from small import llama, perturb_adapters
from test_engine import FAMILIES, both, gradients, perturbed, rows  # noqa: F401

from afina.data.batch import micro_batches
from afina.engine import eight
from afina.engine.block import Placement
from afina.engine.eight import FP8, INT8, Rows  # noqa: F401
from afina.engine.eight_gate import FORMATS as FORMATS_BY_NAME
from afina.engine.eight_gate import enter, prove_eight
from afina.engine.engine import Engine
from afina.model.attach import learning

FORMATS = [FP8, INT8]


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_gradients_point_where_the_exact_ones_do(family, form):
    model = perturbed(FAMILIES[family]()).float()
    lengths = [20, 9, 31]
    (batch,) = micro_batches(rows(lengths), range(3), budget=1000, packing=True, pad_id=0)
    engine = Engine(model)
    loss = engine.summed_loss(model, batch).item()
    exact = gradients(engine, model, batch)
    engine.into_eight_bits(form)
    assert engine.summed_loss(model, batch).item() == pytest.approx(loss, rel=2e-2)
    found = gradients(engine, model, batch)
    names = [name for name, _parameter in learning(model)]
    for name, a, b in zip(names, found, exact, strict=True):
        assert a.shape == b.shape
        assert cosine(a, b) > 0.95, name
    assert cosine(torch.cat([a.flatten() for a in found]), torch.cat([b.flatten() for b in exact])) > 0.99


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi"])
@pytest.mark.parametrize("again", [False, True])
def test_a_gpu_computes_what_the_plain_twins_do(family, form, again):
    """Both in eight bits: the kernels in bf16 on the GPU and the plain code in fp32 on the CPU, from the same weights."""
    make = {"llama": lambda: llama(hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=2)}
    model = perturbed(make.get(family, FAMILIES[family])(), rank=8).to(torch.bfloat16).float()
    (batch,) = micro_batches(rows([200, 90, 31]), range(3), budget=1000, packing=True, pad_id=0)
    engine = Engine(model)
    exact = gradients(engine, model, batch)
    engine.into_eight_bits(form)
    truth = gradients(engine, model, batch)
    model = perturbed(make.get(family, FAMILIES[family])(), rank=8).to("cuda", torch.bfloat16)
    batch, engine = batch.to(torch.device("cuda")), Engine(model)
    engine.into_eight_bits(form)
    if again:
        names = frozenset(engine.blocks[0].saves(1))
        engine.place([Placement(again=names - {"x", "out"})] * len(engine.blocks), rows_at_once=64)
    found = gradients(engine, model, batch)
    one, two, three = (torch.cat([part.flatten().float().cpu() for part in parts]) for parts in (found, truth, exact))
    print(family, form.name, cosine(one, two), cosine(one, three), cosine(two, three))
    assert cosine(one, two) > 0.98 and cosine(one, three) > 0.98


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_four_bits_are_held_in_eight_or_unpacked_for_each_use(form):
    pytest.importorskip("bitsandbytes")
    from test_engine import four_bits

    model = perturbed(four_bits(llama(hidden_size=64, intermediate_size=128)))
    (batch,) = micro_batches(rows([20, 9, 31]), range(3), budget=1000, packing=True, pad_id=0)
    found = {}
    for hold in (False, True):
        engine = Engine(model)
        exact = gradients(engine, model, batch)
        engine.into_eight_bits(form, hold=hold)
        found[hold] = gradients(engine, model, batch)
    for a, b, c in zip(found[False], found[True], exact, strict=True):
        assert torch.equal(a, b)
        assert cosine(a, c) > 0.9


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_the_gate_lets_through_what_holds(form):
    model = perturbed(FAMILIES["llama"]()).float()
    (batch,) = micro_batches(rows([20, 9, 31]), range(3), budget=1000, packing=True, pad_id=0)
    engine = Engine(model)
    before = [parameter.detach().clone() for parameter in engine.parameters]
    print(prove_eight(engine, batch, FORMATS_BY_NAME[form]))
    said = enter(engine, batch, form)
    print(said)
    assert all(torch.equal(a, b) for a, b in zip(before, engine.parameters, strict=True))
