"""Mixtures of experts in the engine against transformers' own loops, and their parts against plain ones in fp64."""

import pytest
import torch
from families import YARN
from small import CPU, perturb_adapters, spread
from test_engine import RATES, both, gradients, rows
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
