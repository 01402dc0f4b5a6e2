import numpy as np
import pytest
import torch
from small import llama, perturb_adapters, spread
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config

from afina.data.batch import micro_batches
from afina.data.template import Rendered
from afina.engine.engine import Engine, why_not
from afina.engine.nf4 import from_bitsandbytes
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
        if name.endswith("norm.weight"):
            parameter.data += torch.rand(parameter.shape) * 0.3
        if name.endswith("proj.base_layer.bias"):
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


def test_making_gate_up_again_changes_nothing():
    model = perturbed(llama())
    (batch,) = micro_batches(rows([20, 9, 31]), range(3), budget=1000, packing=True, pad_id=0)
    parameters = [parameter for _name, parameter in learning(model)]
    engine = Engine(model)
    kept = torch.autograd.grad(engine.summed_loss(model, batch), parameters)
    assert engine.plan(batch.tokens, batch.tokens, 0).kept == 0
    again = torch.autograd.grad(engine.summed_loss(model, batch), parameters)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6 * a.norm()) for a, b in zip(kept, again, strict=True))


def test_the_plan_halves_tokens_before_it_makes_anything_again():
    engine = Engine(perturbed(llama()))
    whole = engine.plan(4096, 256, 10**12)
    assert (whole.tokens, whole.kept) == (4096, 2)
    assert engine.plan(4096, 256, whole.bytes).tokens == 4096
    half = engine.plan(4096, 256, whole.bytes - 1)
    assert (half.tokens, half.kept) == (2048, 2)
    least = engine.plan(4096, 4096, whole.bytes - 1)
    assert (least.tokens, least.kept, least.bytes < whole.bytes) == (4096, 1, True)
    assert [block.gate_up_waits for block in engine.blocks] == ["not", "here"]


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


def test_the_transformers_model_shares_the_weights_and_answers_as_before():
    model = perturbed(llama())
    ids = torch.randint(3, 97, (2, 11))
    before = model(input_ids=ids).logits
    engine = Engine(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert weight.untyped_storage().data_ptr() == engine.blocks[0].gate_up.weights().untyped_storage().data_ptr()


def test_what_is_not_covered_is_said():
    assert why_not(attach(llama(), Lora(), seed=0), 64) is None
    assert "dropout" in why_not(attach(llama(), Lora(dropout=0.1), seed=0), 64)
    assert "low-rank" in why_not(attach(llama(), Full(name="full"), seed=0), 64)
    window = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, sliding_window=16))
    assert "16" in why_not(attach(window, Lora(), seed=0), 64)


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


def test_a_four_bit_base_gives_the_references_loss_and_gradients():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = llama(hidden_size=64, intermediate_size=128)
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
    (loss, found), (expected, plain), names = both(perturbed(model), [20, 9, 31], torch.float32)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient, truth in zip(names, found, plain, strict=True):
        assert (gradient - truth).norm() <= 1e-4 * truth.norm(), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kept, away", [(1, 1), (0, 2), (1, 0)])
def test_what_waits_away_comes_back_the_same(kept, away):
    model = perturbed(llama(hidden_size=64, head_dim=64, num_hidden_layers=5)).to("cuda", torch.bfloat16)
    (batch,) = micro_batches(rows([200, 90, 31]), range(3), budget=1000, packing=True, pad_id=0)
    batch, parameters = batch.to(torch.device("cuda")), [parameter for _name, parameter in learning(model)]
    engine = Engine(model)
    truth = torch.autograd.grad(engine.summed_loss(model, batch), parameters)
    engine.place(kept, away)
    for _turn in range(3):
        found = torch.autograd.grad(engine.summed_loss(model, batch), parameters)
        for a, b in zip(found, truth, strict=True):
            assert (a - b).norm() <= 1e-3 * b.norm()


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

    def errors(found):
        return [((a.double().cpu() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]

    assert our_loss.item() == pytest.approx(exact_loss.item(), rel=1e-2)
    for name, ours_off, theirs_off in zip(names, errors(ours), errors(theirs), strict=True):
        assert ours_off <= 1.5 * theirs_off + 2e-3, (name, ours_off, theirs_off)
