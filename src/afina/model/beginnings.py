"""How adapters begin that are not to add nothing: PiSSA and LoftQ.

Both begin with a part of the weights. PiSSA takes the largest singular parts out of the base and lets them learn, so
its adapter alone would not fit the base as it was: it is saved as the difference it has made, a plain LoRA of twice the
rank (Meng et al., 2024, arXiv:2404.02948, section 3). LoftQ begins with what quantising the base has lost (Li et al.,
2023, arXiv:2310.08659), in one round: the base stays the quantised one that any tool makes of these weights.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from afina.model.quantize import whole

Start = dict[str, torch.Tensor]
"""Low-rank matrices at the start, by the names of their parameters."""


def adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's low-rank layers by name."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:  # type: ignore[operator]
            yield name, module


@torch.no_grad()
def begin_with_loss(model: nn.Module, plain: Callable[[], nn.Module]) -> None:
    """Let every adapter on a quantised layer begin as the best low-rank form of what quantising has lost.

    `plain` loads the base with weights as they are. The product is divided by the adapter's scale, so that base plus
    adapter is nearest to the plain weight.
    """
    before = plain()
    for name, module in adapted(model):
        layer = module.get_base_layer()
        truth: Any = before.get_submodule(name.removeprefix("base_model.model."))
        lost = truth.weight.to(layer.weight.device).float() - whole(layer).float()
        left, sizes, right = torch.linalg.svd(lost, full_matrices=False)
        rank, scale = module.r["default"], module.scaling["default"]
        roots = (sizes[:rank] / scale).sqrt()
        module.lora_A["default"].weight.copy_(roots[:, None] * right[:rank])
        module.lora_B["default"].weight.copy_(left[:, :rank] * roots)


def start_of(model: nn.Module) -> Start:
    """Copies of every low-rank matrix, in main memory."""
    return {
        f"{name}.lora_{side}.default.weight": getattr(module, f"lora_{side}")["default"].weight.detach().cpu().clone()
        for name, module in adapted(model)
        for side in "AB"
    }


def since(start: Start, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with each low-rank product B A turned into B A - B0 A0 = [B, -B0] [A; A0], of twice the rank."""
    found = dict(state)
    for name, first in start.items():
        now = state[name].detach().cpu()
        found[name] = torch.cat([now, first]) if ".lora_A." in name else torch.cat([now, -first], dim=1)
    return found


def doubled_alpha(alpha: float, rslora: bool) -> float:
    """The alpha that gives twice the rank the same scale."""
    return alpha * (math.sqrt(2) if rslora else 2)
