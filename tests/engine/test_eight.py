"""Products in eight bits: the formats, both directions against double precision, and whole models' gradients."""

import pytest
import torch
from engine.test_engine import FAMILIES, SHAPE, four_bits, gradients, perturbed, rows
from small import llama, spread

from afina.data.batch import micro_batches
from afina.engine import eight, eight_gate, eight_head
from afina.engine.block import Placement
from afina.engine.eight import FP8, INT8, Rows
from afina.engine.eight_gate import (
    format_of,
    into_eight_bits,
    prove_eight,
    room_for_eight,
    try_eight_bits,
    why_exact,
)
from afina.engine.eight_head import EightEnds, EightHead
from afina.engine.eight_product import EightProduct
from afina.engine.engine import Engine
from afina.engine.plan import choose, ladder
from afina.engine.products import Scratch
from afina.errors import ModelError
from afina.model.attach import attach
from afina.recipe.schema import Full

FORMATS = [FP8, INT8]
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CPU = torch.device("cpu")


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


def joined(parts):
    return torch.cat([part.flatten().double().cpu() for part in parts])


def packed(lengths, seed=0):
    (batch,) = micro_batches(rows(lengths, seed), range(len(lengths)), budget=1000, packing=True, pad_id=0)
    return batch


def written(x, form, peak=None):
    made = Rows.empty(*x.shape, 0, form, CPU)
    made.write(x, peak)
    return made


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("width", [1, 7, 4096])
def test_a_row_is_off_by_half_a_step_at_most(form, width):
    torch.manual_seed(width)
    sizes = torch.tensor([0.0, 1e-44, 1e-38, 1e-20, 1.0, 3e4, 1e30, 3e38])
    x = torch.randn(sizes.numel(), width).clamp(-1, 1) * sizes[:, None]
    x[4, 0] = 1e4  # an outlier
    found = written(x, form)
    assert (found.scales > 0).all() and found.scales.isfinite().all()
    error, scale = (found.exact(torch.float64) - x.double()).abs(), found.scales.double()[:, None]
    allowed = (x.double().abs() / 16).clamp(min=2**-10 * scale) if form is FP8 else scale / 2
    assert (error <= allowed * (1 + 1e-5) + eight.TINY).all()
    assert found.exact()[0].eq(0).all()
    assert written(found.exact(), form).exact().sub(found.exact()).abs().max() <= found.scales.max() * 2**-7 * form.peak


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_visible(form, broken):
    x = torch.randn(3, 32)
    x[1, 5] = broken
    exact = written(x, form).exact()
    assert exact[[0, 2]].isfinite().all() and not exact[1].isfinite().any()


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_beyond_the_largest_is_the_largest_and_halves_hold_eight_bits(form):
    assert form.round(torch.tensor([1e6, -1e6])).float().tolist() == [form.largest, -form.largest]
    values = torch.randn(10_000) * 8
    high, rest = eight.halves(values, FP8)
    assert ((high.float() + rest.float() - values).abs() <= values.abs() * 2**-8 + 2**-10).all()


def product_of(form, targets=("q_proj", "k_proj", "v_proj"), rank=3, **shape):
    """A product of queries, keys and values, exact and in eight bits, in fp32, every B perturbed."""
    model = perturbed(llama(**{"hidden_size": 48, "head_dim": 16, **shape}), rank=rank, targets=list(targets))
    engine = Engine(model)
    exact = engine.blocks[0].qkv
    made = EightProduct.of(exact, form, Scratch(), Scratch())
    engine.refresh()
    for source, target, factor in made.placed():
        target.copy_(source * factor)
    return exact, made


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("tokens", [1, 3, 17, 130])
@pytest.mark.parametrize("rank, targets", [(3, ("q_proj", "k_proj", "v_proj")), (16, ("v_proj",)), (4, ("down_proj",))])
def test_both_products_are_those_of_what_the_eight_bits_mean(form, tokens, rank, targets):
    exact, made = product_of(form, targets, rank)
    torch.manual_seed(tokens)
    x, dy = torch.randn(tokens, made.k), torch.randn(tokens, made.n)
    x8 = eight.quantise(x, made.inputs(tokens))
    d8 = eight.quantise(dy, made.slopes(tokens), made.fold)
    low, d_low = made.low(x8), made.d_low(d8)
    y, dx = made.through(x8, low), made.back(d8, d_low)
    of_adapters = made.of_adapters(d8, d_low, x8, low)
    weight, down, up = made.weights8.exact(torch.float64), made.down.double(), made.up.double()
    meant, d_meant = x8.exact(torch.float64), d8.exact(torch.float64) / made.fold.double()
    term, d_term = meant @ down.t() @ up.t(), d_meant @ up @ down
    assert torch.allclose(low.double(), meant @ down.t(), rtol=1e-5, atol=1e-5)
    for found, base, added in ((y, meant @ weight.t(), term), (dx, d_meant @ weight, d_term)):
        off = (found.double() - base - added).norm()
        assert off <= 2**-6 * added.norm() + 1e-5 * base.norm()
    truth = []
    for adapter in made.adapters:
        truth.append((d_meant @ up)[:, adapter.columns].t() @ meant)
        truth.append(d_meant[:, adapter.rows].t() @ (meant @ down.t())[:, adapter.columns] * adapter.scale)
    assert len(of_adapters) == len(truth) == 2 * len(made.adapters)
    for found, true in zip(of_adapters, truth, strict=True):
        assert (found.double() - true).norm() <= 1e-4 * true.norm()
    whole = exact.weights()[: made.n, : made.k].double()
    assert (y.double() - term - x.double() @ whole.t()).norm() <= 0.06 * (x.double() @ whole.t()).norm()
    assert (dx.double() - d_term - dy.double() @ whole).norm() <= 0.06 * (dy.double() @ whole).norm()


def test_large_adapters_do_not_saturate():
    """B of 0.3 is ten times what fine-tuning makes of it; the term keeps its eight bits."""
    _exact, made = product_of(FP8, rank=8)
    for adapter in made.adapters:
        adapter.b.data.normal_(0, 0.1)
    for source, target, factor in made.placed():
        target.copy_(source * factor)
    x, dy = torch.randn(40, made.k), torch.randn(40, made.n)
    x8, d8 = eight.quantise(x, made.inputs(40)), eight.quantise(dy, made.slopes(40), made.fold)
    low, d_low = made.low(x8), made.d_low(d8)
    base = x8.exact() @ made.weights8.exact().t()
    term = low @ made.up.t()
    assert (made.through(x8, low) - base - term).norm() <= 2**-6 * term.norm()
    base, term = (d8.exact() / made.fold) @ made.weights8.exact(), d_low @ made.down
    assert (made.back(d8, d_low) - base - term).norm() <= 2**-6 * term.norm()


def test_weights_that_are_no_numbers_are_refused():
    engine = Engine(perturbed(llama()))
    engine.blocks[0].down.wide[3, 3] = float("nan")
    with pytest.raises(ModelError, match="not a number"):
        into_eight_bits(engine, FP8)


@pytest.mark.parametrize("tokens, vocabulary", [(1, 97), (33, 512), (5, 16)])
def test_the_heads_gradient_is_that_of_softmax_in_eight_bits(tokens, vocabulary):
    """Rows that are nearly learnt and rows that are not; one of zero weight; the losses are exact."""
    torch.manual_seed(tokens)
    weight = torch.randn(vocabulary, 48, dtype=torch.float64)
    logits = torch.randn(tokens, vocabulary, dtype=torch.float64) * 3
    targets, weights = torch.randint(vocabulary, (tokens,)), torch.rand(tokens)
    weights[-1] = 0 if tokens > 1 else 2
    for row in range(0, tokens, 3):  # 1 - share from a tenth down to 1e-6
        logits[row, targets[row]] = logits[row].logsumexp(0) + 2 + row / 3
    truth = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    slopes = (logits.softmax(1) - torch.nn.functional.one_hot(targets, vocabulary)) * weights[:, None]
    given = logits.float().split(2)  # two rows at a time, whatever they are said to be made from
    rows, given = torch.zeros(tokens, 48), iter(given)
    losses, found = EightHead.of(weight.float()).loss(lambda _rows: next(given), rows, targets, weights, 2)
    torch.testing.assert_close(losses.double(), truth * weights, rtol=1e-5, atol=1e-5)
    for row, true, size in zip(found.double(), slopes @ weight, weight[targets].norm(dim=1), strict=True):
        assert (row - true).norm() <= 0.06 * true.norm() + 1e-6 * size  # fp32 knows the sum of such logits no better


def test_a_large_head_is_turned_over_in_parts(monkeypatch):
    weight = torch.randn(97, 48)
    whole = EightHead.of(weight)
    monkeypatch.setattr(eight_head, "AT_ONCE", 16)
    parts = EightHead.of(weight)
    assert torch.equal(whole.fold, parts.fold) and torch.equal(whole.turned.float(), parts.turned.float())
    assert whole.turned.shape == (48, 112) and whole.turned.float()[:, 97:].eq(0).all()
    weight[96, 3] = float("nan")
    with pytest.raises(ModelError, match="not a number"):
        EightHead.of(weight)


def test_a_loss_that_is_no_number_stays_visible_behind_the_head():
    logits = torch.randn(3, 32)
    logits[1, 4] = float("nan")
    targets = torch.tensor([1, 2, 3])
    losses, found = EightHead.of(torch.randn(32, 16)).loss(lambda _rows: logits, torch.zeros(3, 16), targets, None, 3)
    assert losses[[0, 2]].isfinite().all() and found[[0, 2]].isfinite().all()
    assert not losses[1].isfinite() and not found[1].isfinite().any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_every_family_runs_in_eight_bits(family, form):
    """Layer by layer on the same input; through all layers of these models, whose weights are many times too large,
    e4m3's noise grows."""
    model, batch = perturbed(FAMILIES[family]()).float(), packed([20, 9, 31])
    engine = Engine(model)
    loss, exact = engine.summed_loss(model, batch).item(), gradients(engine, model, batch)
    proof = prove_eight(engine, batch, form)
    assert min(proof.products.values()) > 0.995 and proof.layers > 0.97 and proof.learnt > 0.97
    into_eight_bits(engine, form)
    assert isinstance(engine.ends, EightEnds) == (form is FP8)
    assert engine.summed_loss(model, batch).item() == pytest.approx(loss, rel=2e-2)
    with torch.no_grad():
        assert engine.summed_loss(model, batch).item() == pytest.approx(loss, rel=2e-2)
    found = gradients(engine, model, batch)
    assert [part.shape for part in found] == [part.shape for part in exact]
    assert cosine(joined(found), joined(exact)) > (0.5 if form is FP8 else 0.98)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_what_is_made_again_changes_nothing(family, form):
    model, batch = perturbed(FAMILIES[family]()), packed([20, 9, 31])
    engine = Engine(model)
    into_eight_bits(engine, form)
    kept = gradients(engine, model, batch)
    names = frozenset(engine.blocks[0].saves(1))
    for level in [level for level in ladder(names) if not level.away] + [Placement(again=names - {"x", "out"})]:
        for rows_at_once in (0, 7):
            engine.place([level] * len(engine.blocks), rows_at_once=rows_at_once)
            again = gradients(engine, model, batch)
            for a, b in zip(kept, again, strict=True):
                assert (a - b).norm() <= 1e-5 * a.norm(), level


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_weights_turned_over_for_good_are_those_turned_over_at_each_use(form, hold):
    model, batch = perturbed(four_bits(llama(hidden_size=64, intermediate_size=128))), packed([20, 9, 31])
    engine = Engine(model)
    into_eight_bits(engine, form, hold=hold)
    each = engine.blocks[0].unpacked * engine.dtype.itemsize
    whole = choose(engine, 60, 60, 10**9)
    assert each > 0 and whole.held == len(engine.blocks)
    assert choose(engine, 60, 60, whole.bytes - 1).held == len(engine.blocks) - 1
    for _step in range(2):  # the adapters behind them are written anew
        at_each_use = gradients(engine, model, batch)
        engine.place(whole.placements, held=1)
        found = gradients(engine, model, batch)
        assert all(torch.equal(a, b) for a, b in zip(at_each_use, found, strict=True))
        for product in engine.blocks[-1].products:
            assert product.own is not None
            product.own = None
        with torch.no_grad():
            for parameter in engine.parameters:
                parameter.mul_(1.25)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_dropout_draws_the_masks_of_the_exact_engine(form):
    model, batch = perturbed(llama(), dropout=0.3).train(), packed([20, 9, 31])
    engine = Engine(model)
    torch.manual_seed(3)
    exact = joined(gradients(engine, model, batch))
    torch.manual_seed(4)
    other = joined(gradients(engine, model, batch))
    into_eight_bits(engine, form)
    torch.manual_seed(3)
    found = joined(gradients(engine, model, batch))
    assert cosine(found, exact) > 0.88 > cosine(other, exact)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_four_bits_are_held_in_eight_or_unpacked_for_each_use(form):
    model, batch = perturbed(four_bits(llama(hidden_size=64, intermediate_size=128))), packed([20, 9, 31])
    found = {}
    for hold in (False, True):
        engine = Engine(model)
        exact = gradients(engine, model, batch)
        least = next(
            size for size in range(10**5, 10**9, 1000) if room_for_eight(engine, 60, size, hold=False, head=False)
        )
        assert room_for_eight(engine, 60, 10**9, hold=True, head=True)
        assert not room_for_eight(engine, 60, least, hold=True, head=False)
        assert not room_for_eight(engine, 60, least, hold=False, head=True)
        into_eight_bits(engine, form, hold=hold)
        found[hold] = gradients(engine, model, batch)
        held = sum(
            product.weights8.values.untyped_storage().nbytes() for block in engine.blocks for product in block.products
        )
        assert (held > 0) == hold
    for a, b in zip(found[False], found[True], strict=True):
        assert torch.equal(a, b)
    assert cosine(joined(found[True]), joined(exact)) > 0.97


def test_the_engine_follows_the_optimiser_in_eight_bits_too():
    model, batch = perturbed(llama()), packed([20, 9])
    engine = Engine(model)
    into_eight_bits(engine, INT8)
    before = engine.summed_loss(model, batch).item()
    with torch.no_grad():
        for parameter in engine.parameters:
            parameter.mul_(1.5)
    exact = Engine(perturbed(llama()))
    with torch.no_grad():
        for parameter in exact.parameters:
            parameter.mul_(1.5)
    after = engine.summed_loss(model, batch).item()
    assert after != before and after == pytest.approx(exact.summed_loss(model, batch).item(), rel=1e-2)


def real(**shape):
    """Weights of a size that training leaves, unlike the tests' other models: these must pass the gate."""
    return quiet(perturbed(spread(llama(hidden_size=128, intermediate_size=256, **shape), scale=0.03)))


def quiet(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.1
    return model


@pytest.mark.parametrize("asked", ["fp8", "int8"])
def test_the_gate_lets_through_what_holds(asked):
    model, batch = real(), packed([20, 9, 31])
    engine = Engine(model)
    before = [parameter.detach().clone() for parameter in engine.parameters]
    proof = prove_eight(engine, batch, eight_gate.FORMATS[asked])
    head = {"head"} if asked == "fp8" else set()
    assert set(proof.products) == {"qkv", "o", "gate_up", "down"} | head and 0.999 < min(proof.products.values()) < 1
    assert 0.97 < proof.layers < 1 and 0.97 < proof.learnt < 1
    assert all(torch.equal(a, b) for a, b in zip(before, engine.parameters, strict=True))
    assert all("backward" not in vars(product) for block in engine.blocks for product in block.products)
    assert all(not isinstance(product, EightProduct) for block in engine.blocks for product in block.products)


@pytest.mark.parametrize("asked", ["fp8", "int8"])
def test_the_gate_stops_what_does_not_hold(asked, monkeypatch):
    model, batch = real(), packed([20, 9, 31])
    engine = Engine(model)
    exact = engine.summed_loss(model, batch).item()
    honest = eight.quantise

    def coarse(x, to, fold=None, *, weights=False):
        return honest(x if weights else (x / x.abs().max() * 3).round(), to, fold, weights=weights)

    monkeypatch.setattr(eight, "quantise", coarse)
    said = try_eight_bits(engine, batch, asked)
    assert "exact products" in said and "cosines" in said
    assert engine.summed_loss(model, batch).item() == exact


def test_the_gate_sees_what_is_shorter_too():
    """What is summed in too few bits shrinks; its direction stays."""
    truth = [torch.randn(40), torch.randn(3, 5)]
    assert eight_gate._cosine(truth, truth) == pytest.approx(1)
    assert eight_gate._cosine([0.92 * part for part in truth], truth) < eight_gate.LEAST_OF_PRODUCTS
    assert eight_gate._cosine([part * float("nan") for part in truth], truth) != eight_gate._cosine(truth, truth)


def outliers(model, layer, channels):
    """Some channels of what enters `down` are a hundred times as large; the function stays the same."""
    mlp = model.get_base_model().model.layers[layer].mlp
    up, down = (getattr(part, "base_layer", part) for part in (mlp.up_proj, mlp.down_proj))
    with torch.no_grad():
        up.weight[channels] *= 100
        mlp.up_proj.lora_B["default"].weight[channels] *= 100
        down.weight[:, channels] /= 100
        mlp.down_proj.lora_A["default"].weight[:, channels] /= 100
    return model


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
@pytest.mark.parametrize("asked", ["fp8", "int8"])
def test_outliers_survive(asked, device):
    """e4m3 does not mind; where INT8 would lose the other channels, that product stays exact, and says so."""
    model, batch = outliers(real(), 1, [3, 77, 140]), packed([60, 9, 31]).to(torch.device(device))
    model = model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    engine = Engine(model)
    loss, exact = engine.summed_loss(model, batch).item(), joined(gradients(engine, model, batch))
    said = try_eight_bits(engine, batch, asked)
    assert said.startswith("products in eight bits"), said
    assert said.endswith("outliers: down") == (asked == "int8"), said
    assert engine.summed_loss(model, batch).item() == pytest.approx(loss, rel=1e-2)
    assert cosine(joined(gradients(engine, model, batch)), exact) > 0.97


def test_what_does_not_multiply_so_is_said():
    assert format_of("8bit", CPU, torch.float32) is None and format_of("int8", CPU, torch.float32) is INT8
    batch = packed([20, 9])
    assert "this device" in try_eight_bits(Engine(perturbed(llama())), batch, "8bit")
    assert "multiple of 16" in why_exact(Engine(perturbed(llama(intermediate_size=56))), "int8")
    assert "every weight" in why_exact(Engine(attach(llama(), Full(name="full"), seed=0)), "int8")


@ON_A_GPU
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("tokens", [1, 16, 17, 130])
def test_products_on_a_gpu_are_the_emulated_ones(form, tokens):
    x, w = torch.randn(tokens, 256, device="cuda"), torch.randn(144, 256, device="cuda") * 0.02
    bias = torch.randn(144, device="cuda", dtype=torch.bfloat16)
    x8 = eight.quantise(x.bfloat16(), Rows.empty(tokens, 256, 0, form, x.device))
    w8 = eight.quantise(w.bfloat16(), Rows.empty(144, 256, 0, form, x.device), weights=True)
    found = eight.multiply(x8, w8.values, w8.scales, bias, bias)
    truth = x8.exact(torch.float64) @ w8.exact(torch.float64).t() + bias.double()
    assert (found.double() - truth).norm() <= 5e-3 * truth.norm()


@ON_A_GPU
@pytest.mark.parametrize("tokens, vocabulary", [(1, 97), (130, 4099), (700, 128256)])
def test_the_head_on_a_gpu_is_the_emulated_one(tokens, vocabulary):
    """In chunks, where there are more rows than one holds."""
    rows = torch.randn(tokens, 64).bfloat16()
    weight = (torch.randn(vocabulary, 64) * 0.2).bfloat16()
    targets, weights = torch.randint(vocabulary, (tokens,)), torch.rand(tokens)

    def made(device):
        head = weight.to(device)
        return EightHead.of(head).loss(
            lambda some: some.float() @ head.float().t(), rows.to(device), targets.to(device), weights.to(device), 512
        )

    for found, truth in zip(made("cuda"), made("cpu"), strict=True):
        assert (found.cpu().double() - truth.double()).norm() <= 2e-2 * truth.double().norm()


@ON_A_GPU
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi", "four bits"])
@pytest.mark.parametrize("again", [False, True])
def test_a_gpu_computes_what_the_plain_twins_do(family, form, again, monkeypatch):
    """Both in eight bits: kernels in bf16 on the GPU, the plain code in fp32 on the CPU, from the same weights."""
    monkeypatch.setitem(SHAPE, "intermediate_size", 64)  # a GPU multiplies rows of sixteens, as the gate sees to
    shape = dict(hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=2)

    def make():
        base = llama(**shape) if family in ("llama", "four bits") else FAMILIES[family]()
        base = spread(base, scale=0.03).to(torch.bfloat16).float()
        return quiet(perturbed(four_bits(base) if family == "four bits" else base, rank=8))

    model, batch = make(), packed([200, 90, 31])
    engine = Engine(model)
    exact = joined(gradients(engine, model, batch))
    into_eight_bits(engine, form, hold=again)
    truth = joined(gradients(engine, model, batch))
    model, batch = make().to("cuda", torch.bfloat16), batch.to(torch.device("cuda"))
    engine = Engine(model, torch.bfloat16)
    into_eight_bits(engine, form, hold=again)
    if again:
        names = frozenset(engine.blocks[0].saves(1))
        engine.place([Placement(again=names - {"x", "out"})] * len(engine.blocks), rows_at_once=64)
    found = joined(gradients(engine, model, batch))
    print(family, form.name, again, cosine(found, truth), cosine(found, exact), cosine(truth, exact))
    assert cosine(found, truth) > 0.97 and cosine(found, exact) > 0.97
