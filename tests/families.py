"""Every family by name: a tiny model of its true architecture, what makes it differ from Llama switched on.

`FAMILIES[name]()` is a configuration; `build(name)` a model with spread-out weights.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small import spread
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)

from afina.model.mxfp4 import MATRICES, quantise

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    **IDS,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0, 1.5, 2.0, 4.0],
    "short_factor": [1.0, 1.0, 1.1, 1.2],
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
WINDOWS = ["sliding_attention", "full_attention"]

NAMED: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama2": lambda: LlamaConfig(**SIZES),
    "llama3": lambda: LlamaConfig(**GROUPED, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "llama3.2": lambda: LlamaConfig(**GROUPED, rope_parameters=dict(LLAMA3), tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**GROUPED, head_dim=12, sliding_window=16),
    "qwen2": lambda: Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=16),
    "phi2": lambda: PhiConfig(**SIZES, partial_rotary_factor=0.5),
    "phi3": lambda: Phi3Config(**GROUPED, rope_parameters=dict(LONG), original_max_position_embeddings=64),
    "gemma2": lambda: Gemma2Config(
        **GROUPED, head_dim=12, query_pre_attn_scalar=12, sliding_window=8, layer_types=list(WINDOWS)
    ),
    "smollm": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "smollm3": lambda: SmolLM3Config(**GROUPED, no_rope_layers=[1, 0], tie_word_embeddings=True),
    "gpt-oss": lambda: GptOssConfig(
        **GROUPED | {"hidden_size": 64, "intermediate_size": 32},
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        rope_parameters=dict(YARN),
    ),
}
"""The families that the house names."""
OTHERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, **IDS
    ),
    "gpt-neox": lambda: GPTNeoXConfig(**SIZES),
    "falcon": lambda: FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2),
    "olmo2": lambda: Olmo2Config(**GROUPED),
    "stablelm": lambda: StableLmConfig(**GROUPED),
}
"""Some that it does not: they run by the default rules."""
FAMILIES = NAMED | OTHERS

LLAMA_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LINEAR: dict[str, set[str]] = {
    **dict.fromkeys(NAMED, LLAMA_LAYERS),
    "phi2": {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt-oss": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "gpt-neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "falcon": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "olmo2": LLAMA_LAYERS,
    "stablelm": LLAMA_LAYERS,
}
"""What `all-linear` is in each."""


def build(name: str, seed: int = 0, **changes: int) -> nn.Module:
    """The tiny model, in fp32; `changes` of its configuration."""
    torch.manual_seed(seed)
    config = FAMILIES[name]()
    config.update(changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_of(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:  # sinks, biases and norms that are not all alike
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key))) * 0.1)
    return spread(model, seed)


def attention_of(name: str) -> str:
    """Soft-capped scores and sinks are beyond sdpa."""
    return "eager" if name in ("gemma2", "gpt-oss") else "sdpa"


def pack_folder(folder: Path) -> Path:
    """Store a saved gpt-oss as its makers publish it: experts in blocks and scales of MXFP4."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(MATRICES)]:
        blocks, scales = quantise(tensors.pop(name).transpose(1, 2))
        tensors |= {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales.contiguous()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
