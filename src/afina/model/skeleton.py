"""A model without weights made to look like the one that trains: layers held in four or eight bits, tensors that
count as a device's. Nothing here computes a number, and no package for quantising is needed."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

BLOCK, OUTER = 64, 256
"""Weights that share a scale in bitsandbytes' four bits, and scales that share one of their own."""


class Linear4bit(nn.Linear):
    """Takes as much as bitsandbytes' layer of this name: its weight is unpacked for each product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., out) of x (..., in)."""
        y: torch.Tensor = _Unpacked.apply(x, self.out_features)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class Linear8bitLt(Linear4bit):
    """The same of eight bits."""


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: int) -> torch.Tensor:
        ctx.shape = rows, x.shape[-1]
        kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return x.to(kind) @ x.new_empty(ctx.shape, dtype=kind).t()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dy @ dy.new_empty(ctx.shape), None


def hold(model: nn.Module, kind: str, double: bool) -> nn.Module:
    """Hold every linear layer but the head in `kind` (nf4, fp4 or int8), adapters' own left alone. double: the scales
    of four bits in eight bits too."""
    whole: Any = model
    head = whole.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer is not head and "lora_" not in name:
            layer.__class__ = Linear8bitLt if kind == "int8" else Linear4bit
            layer.weight = _eight(layer) if kind == "int8" else _four(layer, double)
    return model


def _parameter(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _eight(layer: nn.Linear) -> nn.Parameter:
    rows, columns = layer.weight.shape
    layer.register_buffer("SCB", layer.weight.new_empty(rows, dtype=torch.float32))
    return _parameter(layer.weight.new_empty(rows, columns, dtype=torch.int8))


def _four(layer: nn.Linear, double: bool) -> nn.Parameter:
    """With what bitsandbytes keeps beside it, by its names."""
    weight, blocks = layer.weight, -(-layer.weight.numel() // BLOCK)
    wide: dict[str, Any] = {"dtype": torch.float32, "device": weight.device}
    outer = SimpleNamespace(
        code=torch.empty(256, **wide), absmax=torch.empty(-(-blocks // OUTER), **wide), blocksize=OUTER
    )
    packed = _parameter(weight.new_empty(-(-weight.numel() // 2), 1, dtype=torch.uint8))
    packed.quant_state = SimpleNamespace(  # type: ignore[attr-defined]
        blocksize=BLOCK,
        shape=weight.shape,
        nested=double,
        code=torch.empty(16, **wide),
        absmax=weight.new_empty(blocks, dtype=torch.uint8 if double else torch.float32),
        state2=outer if double else None,
        offset=torch.zeros((), **wide) if double else None,
    )
    return packed


def on_cpu(model: nn.Module) -> nn.Module:
    """Put the computer's tensors in the place of those of `meta`, shared where they were. Inside torch's FakeTensorMode
    these take no memory either, but know how they are computed with."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        tables: list[dict[str, Any]] = [module._parameters, module._buffers, vars(module)]
        for table in tables:
            for name, old in table.items():
                if not isinstance(old, torch.Tensor):
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                table[name] = made[id(old)]
    return model
