"""The layer of gpt-oss, Qwen 3 MoE and Mixtral: attention, then a mixture of gated experts on top of it.

    h = x + o(attention(turn(qkv(norm(x)))))          y = h + sum over chosen e of w_e down_e(gated(gate_up_e(norm(h))))

Saved by name: x, qkv, out (attention's), h, gate_up, of which gate_up has a row for each of a token's experts and is
most. The routing is saved as it is, so that nothing made again can be routed another way.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from afina.engine.block import Block, Positions, Saved, added
from afina.engine.elementwise import norm, norm_backward
from afina.engine.experts import Experts, make_experts
from afina.engine.products import Scratch
from afina.engine.router import Router, make_router
from afina.engine.stacked import Stacked
from afina.language import _


@dataclass
class SavedRouted(Saved):
    """See Saved; and which rows went where: (rows, Routing, Seen) for each chunk."""

    routed: list[Any] = field(default_factory=list)


@dataclass(kw_only=True, eq=False)
class Mixture(Stacked):
    """With router and experts, shared with the transformers layer it was made from."""

    router: Router
    experts: Experts

    @property
    def extra(self) -> int:
        """See Block."""
        return 0

    @property
    def ups(self) -> list[nn.Parameter]:
        """See Block."""
        inner = [part.adapter for part in (self.experts.gate_up, self.experts.down, self.router)]
        return [*super().ups, *(adapter.b for adapter in inner if adapter is not None)]

    def parameters(self) -> list[nn.Parameter]:
        """See Block."""
        of_router = [] if self.router.adapter is None else [self.router.adapter.a, self.router.adapter.b]
        return [*super().parameters(), *self.experts.parameters(), *of_router]

    def hold(self) -> None:
        """See Block."""
        super().hold()
        self.experts.gate_up.hold()
        self.experts.down.hold()

    @property
    def unpacked(self) -> int:
        """See Block."""
        packed = [part for part in (self.experts.gate_up, self.experts.down) if part.plain is None]
        return super().unpacked + sum(part.experts * part.n * part.k for part in packed)

    @property
    def passing(self) -> int:
        """See Block."""
        gate_up, down = self.experts.gate_up, self.experts.down
        return super().passing + self.router.chosen * (gate_up.n + gate_up.k + down.n + down.k)

    @property
    def moved(self) -> int:
        """See Block."""
        return super().moved + self.experts.gate_up.moved + self.experts.down.moved

    def saves(self, tokens: int) -> dict[str, int]:
        """See Block."""
        hidden, pairs = self.qkv.k, self.router.chosen
        widths = {"gate_up": pairs * self.experts.gate_up.n, "qkv": self.qkv.n + self.qkv.r, "h": hidden}
        return {name: tokens * width for name, width in (widths | {"out": self.o.k, "x": hidden}).items()}

    def multiply_adds(self, made: str | None = None) -> int:
        """See Block."""
        gate_up, down, chosen = self.experts.gate_up, self.experts.down, self.router.chosen
        if made == "gate_up":
            return chosen * gate_up.n * gate_up.k
        base = super().multiply_adds(made)
        return base if made else base + chosen * (gate_up.n * gate_up.k + down.n * down.k)

    def at_work(self, rows: int) -> int:
        """See Block."""
        rows_of_hidden = 2 if self.experts.down.adapter is not None else 1
        return rows * self.router.chosen * (self.experts.down.k + rows_of_hidden * self.experts.down.n)

    def forward(self, x: torch.Tensor, at: Positions, *, save: bool) -> tuple[torch.Tensor, Saved | None]:
        """See Block."""
        h, qkv, attended, lows = self.through_attention(x, at)
        keeps_gate_up = save and "gate_up" not in self.placement.again
        y, gate_up, routed = torch.empty_like(x), None, []
        for rows in self.chunks(x.shape[0], whole=keeps_gate_up):
            n = norm(h[rows], self.norm_mlp, torch.empty_like(h[rows]))
            routing = self.router.route(n)
            gate_up, low = self.experts.open(n, routing)
            del n
            seen = self.experts.close(gate_up, routing, h[rows], y[rows])
            seen.low_gate_up = low
            routed.append((rows, routing, seen))
        if not save:
            return y, None
        kept = gate_up if keeps_gate_up else None
        saved = self.keep(attended, lows, x=x, qkv=qkv, h=h, gate_up=kept)
        return y, SavedRouted(saved.tensors, saved.attended, saved.lows, routed)

    def back_through_above(
        self, wide_dy: torch.Tensor, h: torch.Tensor, saved: Saved, at: Positions, wide_dh: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """See Stacked."""
        if not isinstance(saved, SavedRouted):
            raise RuntimeError("where rows went is not saved")
        gate_up = self.take(saved, "gate_up")
        dy, dh = wide_dy[:, : h.shape[1]], wide_dh[:, : h.shape[1]]
        of_experts, of_router, of_norm = [], [], []  # type: ignore[var-annotated]
        for rows, routing, seen in saved.routed:
            n = norm(h[rows], self.norm_mlp, torch.empty_like(h[rows]))
            d_n, d_weights, found = self.experts.backward(dy[rows], n, gate_up, routing, seen)
            of_experts = added(of_experts, found)
            of_router = added(of_router, self.router.backward(routing, d_weights, n, d_n))
            of_norm = added(of_norm, norm_backward(d_n, h[rows], self.norm_mlp, dh[rows], residual=dy[rows]))
        return [], of_norm, [*of_experts, *of_router]


def why_not_routed(model: nn.Module) -> str | None:
    """Why a mixture's layers are left to the reference; None when they are taken."""
    if any(not hasattr(module, "experts") for name, module in model.named_modules() if name.endswith(".mlp")):
        return _("some of its layers have no experts")
    if getattr(model.config, "router_jitter_noise", 0):
        return _("noise is added before its router")
    return None


def routed_parts(mlp: Any, config: Any, scratch: Scratch, dtype: torch.dtype) -> dict[str, Any]:
    """Router and experts of a transformers layer. Where it does not say otherwise, the chosen experts' shares are
    renormalised."""
    router, chosen = mlp.router if hasattr(mlp, "router") else mlp.gate, int(config.num_experts_per_tok)
    over_all = not getattr(config, "norm_topk_prob", True)
    return {
        "router": make_router(router, chosen, over_all=over_all, dtype=dtype),
        "experts": make_experts(mlp.experts, scratch, dtype),
    }


@contextmanager
def routed_alike(blocks: Sequence[Block], model: nn.Module) -> Iterator[list[Router]]:
    """Within, what each router sends goes to the experts to which its twin in the transformers model sent last."""
    told = [block.router for block in blocks if isinstance(block, Mixture)]
    twins = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")] if told else []
    hooks = [twin.register_forward_hook(partial(_tell, router)) for twin, router in zip(twins, told, strict=True)]
    try:
        yield told
    finally:
        for hook in hooks:
            hook.remove()
        for router in told:
            router.told = router.missed = None


def _tell(router: Router, _module: nn.Module, _given: Any, output: Any) -> None:
    router.told = output[2].detach()
