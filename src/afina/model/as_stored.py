"""A model computed in fp32 while its weights stay as they are stored: what an exported file is compared with.

Sixteen bits become fp32 without rounding, and so do the numbers that quantised weights stand for. So one matrix at a
time is turned into fp32 where it is multiplied, and what comes out is what the whole model in fp32 would say, to the
order of its sums. What safetensors hold in the type they are loaded in is not even copied on a CPU: those weights are
pages of the file, which the system may drop and read again. Knows nothing of adapters.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from afina.model.quantize import layer_kind, whole

WEIGHTS, GPU_WEIGHTS = 2**19, 2**26
"""Turned into fp32 at once, in whole rows, by each core: 2 MB stay in its caches, so that memory is read for the 16
bits alone, half of what weights in fp32 would take. A GPU wants more. A head of 128,256 x 4,096 would be 2.1 GB."""


@torch.no_grad()
def compute_in_fp32(model: nn.Module) -> nn.Module:
    """Let the linear layers and the embeddings of `model` compute in fp32; all other weights become fp32 themselves."""
    held, others = set(), set()
    modules: list[Any] = list(model.modules())
    for module in modules:
        kind: Any = type(module)
        if layer_kind(module) is not None:
            module.forward = MethodType(_quantised_product, module)
            held.add(id(module.weight))
        elif kind is nn.Linear:
            module.forward = MethodType(_product, module)
            held.add(id(module.weight))
        elif kind is nn.Embedding:
            module.register_forward_hook(_in_fp32)
            held.add(id(module.weight))
        elif issubclass(kind, nn.Embedding):  # as Gemma's, which multiplies its rows in the type they are held in
            others.add(id(module.weight))
            if (scale := getattr(module, "scalar_embed_scale", None)) is not None:
                module.embed_scale = torch.tensor(scale, device=module.weight.device)
    held -= others
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in held and tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return model


def _product(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """(..., columns) to (..., rows)."""
    if layer.weight.dtype == x.dtype:
        return F.linear(x, layer.weight, layer.bias)
    most = GPU_WEIGHTS if x.is_cuda else WEIGHTS * torch.get_num_threads()
    parts = [F.linear(x, rows.to(x.dtype)) for rows in layer.weight.split(max(1, most // layer.weight.shape[1]))]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return whole if layer.bias is None else whole + layer.bias


def _quantised_product(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, whole(layer).to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def _in_fp32(_module: nn.Module, _inputs: Any, rows: torch.Tensor) -> torch.Tensor:
    return rows.float()
