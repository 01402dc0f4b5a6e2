"""Which token goes to which of a mixture's experts, with what weight, and how that learns.

Pairs of token and expert are sorted by expert, so that each expert's rows lie together. Nothing here has a shape that
depends on where tokens go, and nothing waits for the GPU.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from afina.engine.elementwise import wide_product


@dataclass(frozen=True)
class Routing:
    """Where `tokens` tokens go. A pair is a token and one of its `chosen` experts.

    ids, weights: (tokens, chosen), the weights at least fp32. places: (tokens, chosen), the row of each pair where rows
    are sorted by expert. Of each such row, `tokens`: (pairs,), `experts`: (pairs,) and its `share`: (pairs,), the
    weight. ends: (experts,) int32, where each expert's rows end. shares: (tokens, experts), the softmax over all, where
    the weights are taken from it.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    places: torch.Tensor
    tokens: torch.Tensor
    experts: torch.Tensor
    ends: torch.Tensor
    shares: torch.Tensor | None = None

    @property
    def share(self) -> torch.Tensor:
        """(pairs,) the weight of each sorted row."""
        sorted_weights = torch.empty_like(self.weights).flatten()
        return sorted_weights.scatter_(0, self.places.flatten(), self.weights.flatten())


@dataclass(frozen=True)
class LowRank:
    """PEFT's adapter of a parameter: a (experts * rank, in), b (out, rank * experts), of which `scale` b a is added."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float


@dataclass(eq=False)
class Router:
    """Scores experts by weight (experts, hidden) and bias; each token goes to the `chosen` highest.

    over_all: weights are their shares of the softmax over all experts (Qwen 3 without renormalising); else the softmax
    over the chosen ones, which is the same as renormalising those shares (gpt-oss, Mixtral). told: (tokens, chosen),
    experts to be taken instead of the highest; `missed` is then the share of them that are not.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    chosen: int
    over_all: bool = False
    adapter: LowRank | None = None
    told: torch.Tensor | None = None
    missed: torch.Tensor | None = None

    def route(self, n: torch.Tensor) -> Routing:
        """n: (tokens, hidden)."""
        logits = wide_product(n, self.weight.t())
        if self.bias is not None:
            logits += self.bias
        if self.adapter is not None:
            logits.addmm_(self._low(n, self.adapter), self.adapter.b.detach().to(logits.dtype).t())
        highest, ids = torch.topk(logits, self.chosen, dim=1)
        if self.told is not None:
            self.missed = (self.told[:, :, None] != ids[:, None, :]).all(2).float().mean()
            highest, ids = logits.gather(1, self.told), self.told
        shares = torch.softmax(logits, dim=1) if self.over_all else None
        weights = torch.softmax(highest, dim=1) if shares is None else shares.gather(1, ids)
        narrow = torch.uint8 if self.weight.shape[0] <= 256 else ids.dtype  # a GPU sorts 8 bits at a time
        ordered, order = torch.sort(ids.flatten().to(narrow), stable=True)
        experts = ordered.to(ids.dtype)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=n.device))
        numbers = torch.arange(self.weight.shape[0], device=n.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        return Routing(ids, weights, places.view(ids.shape), order // self.chosen, experts, ends, shares)

    def backward(
        self, routing: Routing, d_weights: torch.Tensor, n: torch.Tensor, d_n: torch.Tensor
    ) -> list[torch.Tensor]:
        """Add the gradient of n to d_n (tokens, hidden), from that of the weights; returns those of what learns."""
        if routing.shares is None:
            slopes = routing.weights * (d_weights - (routing.weights * d_weights).sum(1, keepdim=True))
            d_logits = slopes.new_zeros(n.shape[0], self.weight.shape[0]).scatter_(1, routing.ids, slopes)
        else:
            of_shares = torch.zeros_like(routing.shares).scatter_(1, routing.ids, d_weights)
            d_logits = routing.shares * (of_shares - (routing.shares * of_shares).sum(1, keepdim=True))
        d_n.addmm_(d_logits.to(n.dtype), self.weight)
        if self.adapter is None:
            return []
        b = self.adapter.b.detach().to(d_logits.dtype)
        up = torch.mm(d_logits, b) * self.adapter.scale
        narrow = up.to(n.dtype)
        d_n.addmm_(narrow, self.adapter.a.detach().to(n.dtype))
        of_a, of_b = wide_product(narrow.t(), n), torch.mm(d_logits.t(), self._low(n, self.adapter))
        return [of_a.to(self.adapter.a.dtype), of_b.to(self.adapter.b.dtype)]

    def _low(self, n: torch.Tensor, adapter: LowRank) -> torch.Tensor:
        """s n A^T (tokens, rank), at least fp32."""
        return wide_product(n, adapter.a.detach().to(n.dtype).t()) * adapter.scale


def make_router(module: Any, chosen: int, *, over_all: bool, dtype: torch.dtype) -> Router:
    """Of transformers' router, or of PEFT's wrapper around it; see Router."""
    base, adapters = beneath(module)
    bias = getattr(base, "bias", None)
    bias = None if bias is None else bias.detach()
    return Router(base.weight.detach().to(dtype), bias, chosen, over_all, adapters.get("weight"))


def beneath(module: Any) -> tuple[Any, dict[str, LowRank]]:
    """What lies under PEFT's adapters of single parameters, and these by the parameter's name."""
    found = {}
    while hasattr(module, "lora_A"):
        name = module.active_adapters[0]
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        found[module.parameter_name] = LowRank(a, b, float(module.scaling[name]))
        module = module.base_layer
    return module, found
