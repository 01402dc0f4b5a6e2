"""The layer of Llama, Mistral, Qwen 2, Qwen 3, SmolLM and Phi-3: attention, then a gated MLP on top of it.

    h = x + o(attention(turn(qkv(norm(x)))))          y = h + down(swiglu(gate_up(norm(h))))

Saved by name: x, qkv, out (attention's), h, gate_up. In a Llama-3 layer gate_up is 61% of it, and the first to wait
away or to be made again. gate_up and qkv lie in rows with room for their products' extra columns: their gradients take
their places.
"""

from dataclasses import dataclass

import torch

from afina.engine.block import Positions, Saved, added
from afina.engine.elementwise import norm_backward, swiglu, swiglu_backward
from afina.engine.products import Product
from afina.engine.stacked import Stacked


@dataclass(kw_only=True, eq=False)
class Sequential(Stacked):
    """With the MLP's products, shared with the transformers layer it was made from."""

    gate_up: Product
    down: Product

    def saves(self, tokens: int) -> dict[str, int]:
        """See Block."""
        hidden = self.qkv.k
        wide = {"gate_up": self.gate_up.n + self.gate_up.r, "qkv": self.qkv.n + self.qkv.r}
        widths = wide | {"h": hidden, "out": self.o.k, "x": hidden}
        return {name: tokens * width for name, width in widths.items()}

    def forward(self, x: torch.Tensor, at: Positions, *, save: bool) -> tuple[torch.Tensor, Saved | None]:
        """See Block."""
        h, qkv, attended, of = self.through_attention(x, at)
        keeps_gate_up = save and "gate_up" not in self.placement.again
        y, gate_up, lows = torch.empty_like(x), None, []
        for rows in self.chunks(x.shape[0], whole=keeps_gate_up):
            gate_up, low_gate_up = self.product_of_norm(h[rows], self.norm_mlp, self.gate_up, at)
            wide = x.new_empty(gate_up.shape[0], self.down.k + self.down.r)
            swiglu(gate_up[:, : self.gate_up.n], wide[:, : self.down.k])
            self.down.forward(wide, residual=h[rows], out=y[rows], seed=at.seed)
            lows.append((low_gate_up, self.down.low_of(wide)))
        if not save:
            return y, None
        low_gate_up, low_down = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*lows, strict=True))
        of |= {"gate_up": low_gate_up, "down": low_down}
        return y, self.keep(attended, of, x=x, qkv=qkv, h=h, gate_up=gate_up if keeps_gate_up else None)

    def back_through_above(
        self, wide_dy: torch.Tensor, h: torch.Tensor, saved: Saved, at: Positions, wide_dh: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """See Stacked."""
        hidden, of_gate_up, of_down, of_norm = h.shape[1], [], [], []  # type: ignore[var-annotated]
        gate_up = self.take(saved, "gate_up")
        for rows in self.chunks(h.shape[0], whole=gate_up is not None):
            dy = wide_dy[rows]
            wide_d = self.product_of_norm(h[rows], self.norm_mlp, self.gate_up, at)[0] if gate_up is None else gate_up
            self.down.widen(dy)
            d_act = self.down.backward(dy, at.seed)
            act = swiglu_backward(d_act, wide_d[:, : self.gate_up.n])
            of_down = added(of_down, self.down.gradients(dy, act, saved.lows["down"][rows], at.seed))
            del d_act, act
            self.gate_up.widen(wide_d)
            d_n = self.gate_up.backward(wide_d, at.seed)
            n = torch.empty_like(d_n)
            dh = wide_dh[rows, :hidden]
            of_norm = added(of_norm, norm_backward(d_n, h[rows], self.norm_mlp, dh, residual=dy[:, :hidden], y=n))
            low = saved.lows["gate_up"][rows]
            of_gate_up = added(of_gate_up, self.gate_up.gradients(wide_d, n, low, at.seed))
        return [*of_gate_up, *of_down], of_norm, []
