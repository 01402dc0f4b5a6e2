"""Small honest models, built in code: real architectures, few parameters, spread-out weights so that outputs differ."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from afina.model.load import Hardware
from afina.model.mxfp4 import MATRICES, pack_experts, packed_experts, quantise

CPU = Hardware(torch.device("cpu"), torch.float32)
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Of two layers with grouped queries, as most families' configurations call it."""


def llama(seed: int = 0, **changes: object) -> nn.Module:
    """A Llama of two layers with grouped queries."""
    config = LlamaConfig(**{**SHAPE, **changes})
    return spread(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), seed)


def loud_llama() -> nn.Module:
    """A Llama that chats with 400 tokens. Large weights, so that no answer repeats a single token."""
    model = llama(vocab_size=400, max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def spread(model: nn.Module, seed: int = 0, scale: float = 0.1) -> nn.Module:
    """Give every matrix random weights large enough that no output is nearly constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def pack_like_a_checkpoint(model: nn.Module) -> nn.Module:
    """gpt-oss with the experts that it has in MXFP4, as load_model leaves a checkpoint's."""
    plain = {name: module for name, module in model.named_modules() if name.endswith(".experts")}
    pack_experts(model)
    for name, module in packed_experts(model):
        for matrix in MATRICES:
            blocks, scales = quantise(getattr(plain[name], matrix).detach().transpose(1, 2))
            getattr(module, f"{matrix}_blocks").copy_(blocks)
            getattr(module, f"{matrix}_scales").copy_(scales)
    return model


def perturb_adapters(model: nn.Module, seed: int = 1) -> nn.Module:
    """Make every adapter's B nonzero: with B = 0 the gradient of A is zero and hides its mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model
