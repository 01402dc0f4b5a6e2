"""Which model families the engine runs, and how a block is made of a transformers layer. Only this file names them."""

from typing import Any

import torch
from torch import nn

from afina.engine.block import Attention, Block, norm_of
from afina.engine.elementwise import Norm
from afina.engine.mixture import Mixture, routed_parts, why_not_routed
from afina.engine.nf4 import from_bitsandbytes
from afina.engine.parallel import Parallel
from afina.engine.products import Scratch, make_product
from afina.engine.sequential import Sequential
from afina.language import _

SEQUENTIAL = {"llama", "mistral", "qwen2", "qwen3", "phi3"}
PARALLEL = {"phi"}
MIXTURE = {"gpt_oss", "qwen3_moe", "mixtral"}
GATED = SEQUENTIAL | MIXTURE
ACTIVATIONS = {"silu": GATED, "swish": GATED, "gelu_new": PARALLEL, "gelu_pytorch_tanh": PARALLEL}

ADAPTED_PARAMETERS = {"gate_up_proj", "down_proj", "weight"}


def why_not(model: nn.Module) -> str | None:
    """Why the engine leaves this model to the reference; None when it takes it."""
    config: Any = model.config
    if config.model_type not in SEQUENTIAL | PARALLEL | MIXTURE:
        return _("the {family} family is not fused yet").format(family=config.model_type)
    activation = getattr(config, "hidden_act", "silu")
    if config.model_type not in ACTIVATIONS.get(activation, set()):
        return _("its activation is {name}").format(name=activation)
    head = head_width(config)
    if head % 8 or head > 256:
        return _("its heads are {count} wide").format(count=head)
    if getattr(config, "qk_layernorm", False):
        return _("its queries and keys go through layer norms")
    if drops(model):
        return _("the base itself has dropout")
    if config.model_type in MIXTURE and (reason := why_not_routed(model)):
        return reason
    return _why_not_method(model)


def _why_not_method(model: nn.Module) -> str | None:
    parameters = list(model.named_parameters())
    learning = [name for name, parameter in parameters if parameter.requires_grad]
    if len(learning) == len(parameters):
        if any(parameter.ndim == 3 for _name, parameter in parameters):
            return _("experts themselves learn")
        if any(".q_norm." in name for name in learning):
            return _("norms of heads that learn are not fused")
        return None
    if any(".lora_A." not in name and ".lora_B." not in name for name in learning):
        return _("more than low-rank adapters learns")
    if any(".layers." not in name or not (".self_attn." in name or ".mlp." in name) for name in learning):
        return _("an adapter lies on a layer that is not fused")
    adapted: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    for module in adapted:
        more = [value for kind in ("use_dora", "lora_bias") for value in getattr(module, kind, {}).values()]
        if len(module.active_adapters) != 1 or any(more):
            return _("its adapters are not plain LoRA")
        if hasattr(module, "parameter_name"):  # of experts or a router
            if module.parameter_name not in ADAPTED_PARAMETERS:
                return _("an adapter lies on {name}, which is not fused").format(name=module.parameter_name)
            continue
        if type(module.base_layer) is not nn.Linear and from_bitsandbytes(module.base_layer.weight) is None:
            return _("its base layers are {kind}").format(kind=type(module.base_layer).__name__)
    return None


def drops(model: nn.Module) -> bool:
    """Whether anything but an adapter's input is dropped while training."""
    modules: list[tuple[str, Any]] = list(model.named_modules())
    own = any(isinstance(part, nn.Dropout) and part.p for name, part in modules if "lora_dropout" not in name)
    return own or any(getattr(part, "attention_dropout", 0) for _name, part in modules)


def head_width(config: Any) -> int:
    """Of one head of queries."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def final_norm(model: Any, dtype: torch.dtype) -> Norm:
    """The norm before the head."""
    return norm_of(model.final_layernorm if hasattr(model, "final_layernorm") else model.norm, dtype)


def make_block(layer: Any, config: Any, number: int, scratch: Scratch, dtype: torch.dtype) -> Block:
    """From a transformers decoder layer, whose weights become views of the block's."""
    attention, mlp = layer.self_attn, layer.mlp
    window = getattr(attention, "sliding_window", None)
    if config.model_type in {"mistral", "phi3", "mixtral", "qwen3_moe"}:  # theirs is the model's, not the layer's
        window = getattr(config, "sliding_window", None)
    norms = None
    if hasattr(attention, "q_norm"):
        norms = norm_of(attention.q_norm, dtype), norm_of(attention.k_norm, dtype)
    width = head_width(config)
    heads = config.num_attention_heads, config.num_key_value_heads
    sinks = attention.sinks.detach().float() if hasattr(attention, "sinks") else None
    inside = Attention(heads, width, float(attention.scaling), window, norms, sinks)

    def product(*linears: nn.Module) -> Any:
        return make_product(linears, scratch, dtype)

    if config.model_type in PARALLEL:
        return Parallel(
            attention=inside,
            number=number,
            inner=product(attention.q_proj, attention.k_proj, attention.v_proj, mlp.fc1),
            dense=product(attention.dense),
            fc2=product(mlp.fc2),
            norm=norm_of(layer.input_layernorm, dtype),
        )
    fused = config.model_type == "phi3"
    of_attention: dict[str, Any] = {
        "attention": inside,
        "number": number,
        "qkv": product(attention.qkv_proj) if fused else product(attention.q_proj, attention.k_proj, attention.v_proj),
        "o": product(attention.o_proj),
        "norm_attention": norm_of(layer.input_layernorm, dtype),
        "norm_mlp": norm_of(layer.post_attention_layernorm, dtype),
    }
    if config.model_type in MIXTURE:
        return Mixture(**of_attention, **routed_parts(mlp, config, scratch, dtype))
    gate_up = product(mlp.gate_up_proj) if fused else product(mlp.gate_proj, mlp.up_proj)
    return Sequential(**of_attention, gate_up=gate_up, down=product(mlp.down_proj))


def turned_half(config: Any, cos: torch.Tensor) -> int:
    """Into how many columns of a model's cosines its angles fit: all but gpt-oss have them twice, side by side."""
    return int(cos.shape[-1]) // (1 if config.model_type == "gpt_oss" else 2)
