"""Mixtures of experts in the engine against transformers' own loops, and their parts against plain ones in fp64."""

import pytest
import torch
from families import YARN
from small import CPU, perturb_adapters, spread
from test_engine import RATES, gradients, rows
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from afina.data.batch import micro_batches
from afina.engine.block import HERE, Placement
from afina.engine.engine import Engine
from afina.engine.experts import Matrix, grouped, grouped_outer
from afina.engine.families import why_not
from afina.engine.plan import choose, ladder
from afina.engine.products import Scratch
from afina.engine.proof import prove
from afina.model.attach import attach, learning
from afina.model.load import unpack
from afina.model.loss import summed_loss
from afina.model.mxfp4 import MATRICES, pack_experts, packed_experts, quantise
from afina.recipe.schema import Full, Lora

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = {**SHAPE, "moe_intermediate_size": 40, "num_experts": 9, "num_experts_per_tok": 3}
FAMILIES = {
    "gpt-oss": lambda: GptOssConfig(
        **SHAPE, num_local_experts=6, num_experts_per_tok=3, sliding_window=8, rope_parameters=dict(YARN)
    ),
    "qwen3-moe": lambda: Qwen3MoeConfig(**QWEN, norm_topk_prob=True),
    "qwen3-moe, shares of all": lambda: Qwen3MoeConfig(**QWEN, norm_topk_prob=False),
    "mixtral, all experts": lambda: MixtralConfig(
        **SHAPE, num_local_experts=2, num_experts_per_tok=2, sliding_window=11
    ),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=5, num_experts_per_tok=2),
}
METHODS = {"attention": {}, "experts and router": {"experts": True, "router": True, "rank": 3}}


def built(family, packed=False):
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config._experts_implementation = "eager"
    eager = "eager" if config.model_type == "gpt_oss" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=eager)
    model = spread(model, scale=0.2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("_bias"):
                parameter.add_(torch.randn(parameter.shape) * 0.3)
            if "experts" in name and name.rpartition(".")[2] in MATRICES and config.model_type == "gpt_oss":
                parameter.mul_(4)  # so that gates and ups reach the limit of 7
    if packed:
        plain = {name: module for name, module in model.named_modules() if name.endswith(".experts")}
        pack_experts(model)
        for name, module in packed_experts(model):
            for matrix in MATRICES:
                blocks, scales = quantise(getattr(plain[name], matrix).detach().transpose(1, 2))
                getattr(module, f"{matrix}_blocks").copy_(blocks)
                getattr(module, f"{matrix}_scales").copy_(scales)
    return model


def learning_model(family, packed=False, **method):
    return perturb_adapters(attach(built(family, packed), Lora(**{"rank": 4, **method}), seed=0))


def both(model, lengths, dtype):
    """Loss and gradients of the engine on a packed batch, and of transformers on each sample by itself."""
    model, samples = model.to(dtype), rows(lengths)
    parameters = [parameter for _name, parameter in learning(model)]
    expected, plain = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
    for number in range(len(lengths)):
        (alone,) = micro_batches(samples, [number], budget=1, packing=False, pad_id=0)
        loss = summed_loss(model, alone)
        expected += loss.item()
        for total, part in zip(plain, torch.autograd.grad(loss, parameters), strict=True):
            total += part
    (batch,) = micro_batches(samples, range(len(lengths)), budget=100_000, packing=True, pad_id=0)
    loss = Engine(model).summed_loss(model, batch)
    found = torch.autograd.grad(loss, parameters)
    return (loss.item(), found), (expected, plain), [name for name, _parameter in learning(model)]


def agree(found, truths, names, limit):
    for name, gradient, truth in zip(names, found, truths, strict=True):
        assert gradient.shape == truth.shape, name
        assert truth.norm() > 0, name
        assert (gradient - truth).norm() <= limit * truth.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lengths", [[7], [2, 2, 33, 5], [129, 64, 3, 3, 3]], ids=str)
def test_loss_and_gradients_are_the_references(family, method, lengths):
    (loss, found), (expected, plain), names = both(learning_model(family, **METHODS[method]), lengths, torch.float64)
    assert loss == pytest.approx(expected, rel=1e-6)  # transformers' norms and angles are fp32 even here
    agree(found, plain, names, 2e-5)
    (loss, found), _again, _names = both(learning_model(family, **METHODS[method]), lengths, torch.float32)
    assert loss == pytest.approx(expected, rel=1e-5)
    agree(found, plain, names, 1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("family", ["gpt-oss", "gpt-oss, packed", "qwen3-moe", "mixtral"])
@pytest.mark.parametrize("method", METHODS)
def test_bf16_on_a_gpu_is_bf16_of_the_same_numbers(family, method):
    """The engine's own kernels and grouped products against its plain twins in fp64, at bf16's distance."""
    name, packed = family.partition(",")[0], "packed" in family
    model = learning_model(name, packed, **METHODS[method])
    names = [name for name, _parameter in learning(model)]
    (batch,) = micro_batches(rows([300, 2, 77, 130]), range(4), budget=10**6, packing=True, pad_id=0)
    exact = gradients(Engine(model.double()), model, batch)
    expected = Engine(model).summed_loss(model, batch).item()
    model, batch = model.to("cuda", torch.bfloat16), batch.to(torch.device("cuda"))
    engine = Engine(model)
    assert engine.summed_loss(model, batch).item() == pytest.approx(expected, rel=2e-2)
    pairs = [(a.double().cpu(), b) for a, b in zip(gradients(engine, model, batch), exact, strict=True)]
    error = sum((a - b).square().sum() for a, b in pairs) ** 0.5 / sum(b.square().sum() for _a, b in pairs) ** 0.5
    print(family, method, "error", error.item(), {n: ((a - b).norm() / b.norm()).item() for n, (a, b) in zip(names, pairs, strict=True)})
    assert error <= 0.15
