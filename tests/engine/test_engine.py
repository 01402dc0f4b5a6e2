from dataclasses import replace

import numpy as np
import pytest
import torch
from small import CPU, llama, perturb_adapters, spread
from transformers import AutoModelForCausalLM, MistralConfig, Phi3Config, PhiConfig, Qwen2Config, Qwen3Config

from afina.data.batch import micro_batches
from afina.data.template import Rendered
from afina.engine.block import HERE, Placement
from afina.engine.engine import Engine
from afina.engine.families import why_not
from afina.engine.nf4 import from_bitsandbytes
from afina.engine.plan import ATTENTION, PASSES, Plan, Rates, choose, count_up, ladder
from afina.engine.products import keep_mask
from afina.engine.proof import prove
from afina.model.attach import attach, learning
from afina.model.loss import summed_loss
from afina.recipe.schema import Full, Lora

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": lambda: llama(),
    "llama, tied, one kv head": lambda: llama(tie_word_embeddings=True, num_key_value_heads=1),
    "llama, wide heads": lambda: llama(head_dim=16),
    "llama 3 rope": lambda: llama(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "mistral": lambda: spread(AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, sliding_window=None))),
    "mistral, a short window": lambda: spread(
        AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, sliding_window=6))
    ),
    "qwen3": lambda: spread(AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE, head_dim=16)), scale=0.1),
    "phi3": lambda: spread(AutoModelForCausalLM.from_config(Phi3Config(**SHAPE, sliding_window=9))),
    "phi3, half turned": lambda: spread(
        AutoModelForCausalLM.from_config(
            Phi3Config(
                **{**SHAPE, "hidden_size": 64},
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            )
        )
    ),
    "phi": lambda: spread(AutoModelForCausalLM.from_config(PhiConfig(**{**SHAPE, "hidden_size": 64}))),
    "qwen2": lambda: spread(AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE)), scale=0.1),
}


def rows(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [
        Rendered(random.integers(3, 97, length).astype(np.int32), np.append(random.random(length - 1) < 0.4, True))
        for length in lengths
    ]


def both(model, lengths, dtype):
    """Loss and gradients of engine and reference on the same packed batch."""
    model = model.to(dtype)
    (batch,) = micro_batches(rows(lengths), range(len(lengths)), budget=100_000, packing=True, pad_id=0)
    parameters = [parameter for _name, parameter in learning(model)]
    expected = summed_loss(model, batch)
    plain = torch.autograd.grad(expected, parameters)
    loss = Engine(model).summed_loss(model, batch)
    found = torch.autograd.grad(loss, parameters)
    return (loss.item(), found), (expected.item(), plain), [name for name, _parameter in learning(model)]


def perturbed(model, **method):
    model = attach(model, Lora(**{"rank": 4, **method}), seed=0)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += torch.rand(parameter.shape) * 0.3
        if name.endswith("base_layer.bias") or name.endswith("lm_head.bias"):
            parameter.data = torch.randn(parameter.shape) * 0.3
    return perturb_adapters(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[7], [2, 2, 33, 5], [129, 64, 3, 3, 3]], ids=str)
def test_loss_and_gradients_are_the_references(family, lengths):
    (loss, found), (expected, plain), names = both(perturbed(FAMILIES[family]()), lengths, torch.float64)
    assert loss == pytest.approx(expected, rel=1e-6)  # transformers' norms and angles are fp32 even here
    for name, gradient, truth in zip(names, found, plain, strict=True):
        assert truth.norm() > 0, name
        assert (gradient - truth).norm() <= 2e-5 * truth.norm(), name
    (loss, found), _again, _names = both(perturbed(FAMILIES[family]()), lengths, torch.float32)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient, truth in zip(names, found, plain, strict=True):
        assert (gradient - truth).norm() <= 1e-4 * truth.norm(), name


@pytest.mark.parametrize(
    "method",
    [dict(rank=3), dict(targets=["q_proj", "v_proj"]), dict(targets=["down_proj"]), dict(rslora=True, alpha=5.0)],
    ids=str,
)
def test_any_plain_lora_is_the_references(method):
    (loss, found), (expected, plain), names = both(perturbed(llama(), **method), [20, 9, 31], torch.float64)
    assert loss == pytest.approx(expected, rel=1e-6)  # transformers' norms and angles are fp32 even here
    for name, gradient, truth in zip(names, found, plain, strict=True):
        assert (gradient - truth).norm() <= 2e-5 * truth.norm(), name


def gradients(engine, model, batch):
    parameters = [parameter for _name, parameter in learning(model)]
    return torch.autograd.grad(engine.summed_loss(model, batch), parameters)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3, half turned", "phi"])
@pytest.mark.parametrize("rows_at_once", [0, 7])
def test_what_is_made_again_changes_nothing(family, rows_at_once):
    model = perturbed(FAMILIES[family]())
    (batch,) = micro_batches(rows([20, 9, 31]), range(3), budget=1000, packing=True, pad_id=0)
    engine = Engine(model)
    kept = gradients(engine, model, batch)
    names = frozenset(engine.blocks[0].saves(1))
    for level in [level for level in ladder(names) if not level.away] + [Placement(again=names - {"x", "out"})]:
        engine.place([level] * len(engine.blocks), rows_at_once=rows_at_once)
        again = gradients(engine, model, batch)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-5 * a.norm()) for a, b in zip(kept, again, strict=True)), level


@pytest.mark.parametrize("family", ["llama", "llama, tied, one kv head", "phi"])
def test_ends_that_pass_by_in_parts_change_nothing(family, monkeypatch):
    from afina.engine import head

    model = perturbed(FAMILIES[family]())
    (batch,) = micro_batches(rows([20, 9, 31]), range(3), budget=1000, packing=True, pad_id=0)
    engine = Engine(model)
    loss, kept = engine.summed_loss(model, batch).item(), gradients(engine, model, batch)
    monkeypatch.setattr(head, "VOCABULARY_AT_ONCE", 10)
    engine.place([HERE] * len(engine.blocks), host="both")
    assert engine.summed_loss(model, batch).item() == pytest.approx(loss, rel=1e-6)
    with torch.no_grad():
        assert engine.summed_loss(model, batch).item() == pytest.approx(loss, rel=1e-6)
    for a, b in zip(kept, gradients(engine, model, batch), strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


RATES = Rates(products=1e2, copies=1e4, exact=1e2)


def test_the_plan_keeps_everything_where_it_fits_and_lets_go_of_no_more_than_it_must():
    engine = Engine(perturbed(llama()))
    whole = choose(engine, 4096, 256, 10**12, RATES)
    assert whole.tokens == 4096 and whole.placements == [HERE, HERE]
    assert choose(engine, 4096, 256, whole.bytes, RATES) == whole
    tight = choose(engine, 4096, 4096, whole.bytes - 1, RATES)
    assert tight.tokens == 4096 and tight.bytes < whole.bytes and tight.microseconds >= whole.microseconds
    assert tight.placements == [HERE, Placement(again=frozenset({"gate_up"}))] or tight.placements[1] == HERE
    leanest = choose(engine, 4096, 256, 0, RATES)
    # the last layer's backward comes first: made again, its tensors would take as much
    assert leanest.tokens == 256 and leanest.placements[0].again and leanest.bytes < whole.bytes
    assert engine.plan(4096, 256, 0).bytes == leanest.bytes
    assert [block.placement for block in engine.blocks] == leanest.placements


def test_the_plan_of_an_earlier_sitting_is_taken_again_where_it_fits():
    """However much is free now, or how fast copies are: with another plan other last bits would come."""
    engine = Engine(perturbed(llama()))
    known = replace(choose(engine, 4096, 4096, 0, RATES), rows_at_once=7)
    for free in (10**12, known.bytes, known.bytes - known.bytes // 50):
        assert engine.plan(4096, 256, free, known) is known
        assert [block.placement for block in engine.blocks] == known.placements
        assert {block.rows_at_once for block in engine.blocks} == {7}
    assert engine.plan(4096, 4096, known.bytes // 2, known) is not known
    assert engine.plan(4096, 256, 10**12, replace(known, placements=known.placements[:1])) is not known
    assert known.arithmetic == "7 rows at once, head whole"


def test_the_plan_counts_attention_the_head_and_what_passes_between_products():
    """8-bit products are faster, what lies around them is not: each term by itself, off by nothing."""
    engine = Engine(perturbed(four_bits(llama(hidden_size=64, intermediate_size=128))))
    block, plan = engine.blocks[0], Plan(4096, [HERE] * len(engine.blocks))

    def spent(longest=4096, **rates):
        return count_up(engine, plan, replace(RATES, **rates), longest).microseconds

    assert block.moved == sum(round(2 * 4.53 * product.n * product.k) for product in block.products)
    passing = 2 * (block.moved + 4096 * PASSES * 4 * sum(product.n + product.k for product in block.products))
    assert spent(memory=1e3) - spent() == pytest.approx(passing / 1e3)
    scores = 2 * 4096 * 4096 * block.attention.heads[0] * block.attention.width * ATTENTION
    assert spent() - spent(longest=1024) == pytest.approx(scores * 0.75 / 1e2)
    head = 2 * 4096 * engine.ends.weight.numel()
    assert spent(exact=5e1) - spent() == pytest.approx((scores + head) / 1e2)
    products = 2 * 4096 * 2 * sum(product.n * product.k for product in block.products)
    assert spent() - spent(products=2e2, exact=1e2) == pytest.approx(products / 2e2)


@pytest.mark.parametrize(
    "family", ["llama", "llama, tied, one kv head", "mistral, a short window", "phi3", "phi", "qwen2"]
)
def test_every_weight_learns_as_in_the_reference(family):
    model = attach(FAMILIES[family](), Full(name="full"), seed=0)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data += torch.rand(parameter.shape) * 0.3
    (loss, found), (expected, plain), names = both(model, [20, 9, 31], torch.float64)
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, gradient, truth in zip(names, found, plain, strict=True):
        assert gradient.shape == truth.shape, name
        if truth.norm() > 1e-8:  # a key's bias moves every score of a query alike: its gradient is zero
            assert (gradient - truth).norm() <= 2e-5 * truth.norm(), name


class Masked(torch.nn.Module):
    """A dropout whose mask is given."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("again", [False, True])
def test_dropout_is_the_references_with_the_same_masks(family, again):
    model = perturbed(FAMILIES[family](), dropout=0.3).double().train()
    (batch,) = micro_batches(rows([20, 9, 31]), range(3), budget=1000, packing=True, pad_id=0)
    engine = Engine(model)
    if again:
        names = frozenset(engine.blocks[0].saves(1))
        engine.place([Placement(again=names - {"x", "out"})] * len(engine.blocks))
    torch.manual_seed(3)
    found = gradients(engine, model, batch)
    torch.manual_seed(3)
    loss = engine.summed_loss(model, batch).item()
    assert loss != engine.summed_loss(model, batch).item()
    torch.manual_seed(3)
    seed = int(torch.randint(2**48, ()))
    for block, layer in zip(engine.blocks, model.get_base_model().model.layers, strict=True):
        for number, product in enumerate(block.products):
            x = torch.empty(batch.tokens, product.k, dtype=torch.float64)
            mask = keep_mask(x, 0.3, seed + 8 * block.number + number)
            assert 0 < (mask == 0).double().mean() < 0.5 and mask.max() == pytest.approx(1 / 0.7)
            for module in layer.modules():
                if any(getattr(module, "lora_A", {"default": None})["default"] is a for a in owners(product, layer)):
                    module.lora_dropout["default"] = Masked(mask[None])
    expected = summed_loss(model, batch)
    plain = torch.autograd.grad(expected, [parameter for _name, parameter in learning(model)])
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for gradient, truth in zip(found, plain, strict=True):
        assert (gradient - truth).norm() <= 2e-5 * truth.norm()
    model.eval()
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Identity()
    assert engine.summed_loss(model, batch).item() == pytest.approx(summed_loss(model, batch).item(), rel=1e-6)


def owners(product, layer):
    weights = {adapter.a.data_ptr() for adapter in product.adapters}
    parts = [module.lora_A["default"] for module in layer.modules() if hasattr(module, "lora_A")]
    return [part for part in parts if part.weight.data_ptr() in weights]


def test_the_engine_follows_the_optimiser():
    model = perturbed(llama())
    (batch,) = micro_batches(rows([20, 9]), range(2), budget=1000, packing=True, pad_id=0)
    engine = Engine(model)
    before = engine.summed_loss(model, batch).item()
    with torch.no_grad():
        for _name, parameter in learning(model):
            parameter.mul_(1.5)
    assert engine.summed_loss(model, batch).item() != before
    changed = engine.summed_loss(model, batch)
    changed.backward()
    torch.optim.AdamW([parameter for _name, parameter in learning(model)], lr=0.1, fused=True).step()
    assert engine.summed_loss(model, batch).item() != changed.item()
    assert engine.summed_loss(model, batch).item() == pytest.approx(summed_loss(model, batch).item(), rel=1e-6)


@pytest.mark.parametrize("family", ["qwen2", "phi", "llama, tied, one kv head"])
def test_all_that_learns_in_another_precision_is_taken_over(family):
    model = attach(FAMILIES[family](), Full(name="full"), seed=0)
    (batch,) = micro_batches(rows([20, 9]), range(2), budget=1000, packing=True, pad_id=0)
    engine = Engine(model, torch.float64)
    for name in [name for name, _parameter in learning(model)]:
        before = engine.summed_loss(model, batch).item()
        with torch.no_grad():
            parameter = model.get_parameter(name)
            parameter.add_(torch.rand_like(parameter) * 0.2)
        found = engine.summed_loss(model, batch).item()
        assert found == Engine(model, torch.float64).summed_loss(model, batch).item(), name
        assert found != before or name.endswith("k_proj.bias"), name  # moves every score of a query alike


def test_the_transformers_model_shares_the_weights_and_answers_as_before():
    model = perturbed(llama())
    ids = torch.randint(3, 97, (2, 11))
    before = model(input_ids=ids).logits
    engine = Engine(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert weight.untyped_storage().data_ptr() == engine.blocks[0].gate_up.weights().untyped_storage().data_ptr()


def test_what_is_not_covered_is_said():
    assert why_not(attach(llama(), Lora(), seed=0)) is None
    assert why_not(attach(llama(), Full(name="full"), seed=0)) is None
    assert "low-rank" in why_not(attach(llama(attention_bias=True), Lora(bias="all"), seed=0))
    dropping = AutoModelForCausalLM.from_config(PhiConfig(**{**SHAPE, "hidden_size": 64, "resid_pdrop": 0.1}))
    dropping = attach(dropping, Lora(dropout=0.1), seed=0)
    assert "dropout" in why_not(dropping)
    qwen = attach(FAMILIES["qwen3"](), Full(name="full"), seed=0)
    assert "norms" in why_not(qwen)


@pytest.mark.parametrize("broken", [False, True])
def test_the_proof_holds_where_it_should_and_fails_where_it_should(broken):
    model = perturbed(llama(), dropout=0.2).train()
    (batch,) = micro_batches(rows([20, 9]), range(2), budget=1000, packing=True, pad_id=0)
    engine = Engine(model)
    before = [parameter.detach().clone() for parameter in engine.parameters]
    if broken:
        engine.blocks[1].attention.scaling *= 1.01
    proof = prove(engine, model, batch, CPU.autocast(), engine.parameters)
    assert proof.holds != broken
    assert model.training and all(torch.equal(a, b) for a, b in zip(before, engine.parameters, strict=True))


@pytest.mark.parametrize("nested", [False, True], ids=["fp32 scales", "double quantisation"])
def test_four_bit_weights_are_bitsandbytes_own(nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 128)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
    packed.quant_state = state
    out = torch.full((96, 136), float("nan"))
    from_bitsandbytes(packed).fill(out[:, :128])
    assert torch.equal(out[:, :128], functional.dequantize_4bit(packed, state))
    assert out[:, 128:].isnan().all()


def four_bits(model):
    """Its linear layers but the head as bitsandbytes' NF4."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    four = bitsandbytes.nn.Linear4bit(
                        linear.in_features,
                        linear.out_features,
                        bias=False,
                        compute_dtype=torch.float32,
                        quant_type="nf4",
                    )
                    four.load_state_dict(linear.state_dict())
                    setattr(part, name, four.to("cpu"))
    return model


def test_a_four_bit_base_gives_the_references_loss_and_gradients():
    model = four_bits(llama(hidden_size=64, intermediate_size=128))
    (loss, found), (expected, plain), names = both(perturbed(model), [20, 9, 31], torch.float32)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient, truth in zip(names, found, plain, strict=True):
        assert (gradient - truth).norm() <= 1e-4 * truth.norm(), name


def test_four_bit_weights_are_kept_unpacked_where_there_is_room_and_the_numbers_are_the_same():
    model = perturbed(four_bits(llama(hidden_size=64, intermediate_size=128)))
    (batch,) = micro_batches(rows([20, 9, 31]), range(3), budget=1000, packing=True, pad_id=0)
    engine = Engine(model)
    truth = gradients(engine, model, batch)
    one = engine.blocks[0].unpacked * engine.dtype.itemsize
    none = choose(engine, 60, 60, choose(engine, 60, 60, 10**9, RATES).bytes - 2 * one, RATES)
    assert (none.held, choose(engine, 60, 60, none.bytes + one, RATES).held) == (0, 1)
    assert engine.plan(60, 60, 10**9).held == 2
    assert all(product.wide is not None for block in engine.blocks for product in block.products)
    assert engine.blocks[0].unpacked == 0
    for a, b in zip(gradients(engine, model, batch), truth, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("held", [0, 2])
def test_what_waits_away_comes_back_the_same(family, held):
    base = llama(hidden_size=64, head_dim=64, num_hidden_layers=5) if family == "llama" else FAMILIES[family]()
    model = perturbed(base).to("cuda", torch.bfloat16)
    (batch,) = micro_batches(rows([200, 90, 31]), range(3), budget=1000, packing=True, pad_id=0)
    batch, engine = batch.to(torch.device("cuda")), Engine(model)
    truth = gradients(engine, model, batch)
    levels = ladder(frozenset(engine.blocks[0].saves(1)))
    mixed = [levels[number % 5] for number in range(len(engine.blocks))]
    for placements in [[level] * len(engine.blocks) for level in levels] + [mixed]:
        engine.place(placements, rows_at_once=64, host="both" if len(set(placements)) > 1 else "neither", held=held)
        for _turn in range(2):
            for a, b in zip(gradients(engine, model, batch), truth, strict=True):
                assert (a - b).norm() <= 5e-3 * b.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("lengths", [[23], [1000, 3, 517, 64], [256, 256, 256], [4097]], ids=str)
def test_bf16_on_a_gpu_stays_within_bf16_of_the_exact_answer(lengths):
    """The engine's error against fp64 is no larger than the reference's own error in bf16, give or take a half."""
    model = perturbed(
        llama(hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=3, max_position_embeddings=8192)
    )
    (batch,) = micro_batches(rows(lengths), range(len(lengths)), budget=10**6, packing=True, pad_id=0)
    names = [name for name, _parameter in learning(model)]
    exact_loss = summed_loss(model.double(), batch)
    exact = torch.autograd.grad(exact_loss, [parameter for _name, parameter in learning(model)])
    model, batch = model.to("cuda", torch.bfloat16), batch.to(torch.device("cuda"))
    parameters = [parameter for _name, parameter in learning(model)]
    loss = summed_loss(model, batch)
    theirs = torch.autograd.grad(loss, parameters)
    our_loss = Engine(model).summed_loss(model, batch)
    ours = torch.autograd.grad(our_loss, parameters)

    def error(found):
        return sum((a.double().cpu() - b).square().sum() for a, b in zip(found, exact, strict=True)) ** 0.5

    assert our_loss.item() == pytest.approx(exact_loss.item(), rel=1e-2)
    assert 0 < error(ours) <= 1.5 * error(theirs)
    for name, a, b, truth in zip(names, ours, theirs, exact, strict=True):
        off = [(found.double().cpu() - truth).norm() for found in (a, b)]
        assert off[0] <= 2 * off[1] + 0.05 * truth.norm(), name
