"""The layer of Llama, Mistral, Qwen 2, Qwen 3, SmolLM and Phi-3: attention, then a gated MLP on top of it.

    h = x + o(attention(turn(qkv(norm(x)))))          y = h + down(swiglu(gate_up(norm(h))))

Saved by name: x, qkv, out (attention's), h, gate_up. In a Llama-3 layer gate_up is 61% of it, and the first to wait
away or to be made again. gate_up and qkv lie in rows with room for their products' extra columns: their gradients take
their places.
"""

from dataclasses import dataclass

import torch

from afina.engine.block import Block, Positions, Saved, added, room
from afina.engine.elementwise import Norm, norm_backward, swiglu, swiglu_backward
from afina.engine.products import Product


@dataclass(kw_only=True, eq=False)
class Sequential(Block):
    """Its products and norms, shared with the transformers layer it was made from."""

    qkv: Product
    o: Product
    gate_up: Product
    down: Product
    norm_attention: Norm
    norm_mlp: Norm

    @property
    def products(self) -> tuple[Product, ...]:
        """See Block."""
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def norms(self) -> tuple[Norm, ...]:
        """See Block."""
        return self.norm_attention, self.norm_mlp

    def saves(self, tokens: int) -> dict[str, int]:
        """See Block."""
        hidden = self.qkv.k
        wide = {"gate_up": self.gate_up.n + self.gate_up.r, "qkv": self.qkv.n + self.qkv.r}
        widths = wide | {"h": hidden, "out": self.o.k, "x": hidden}
        return {name: tokens * width for name, width in widths.items()}

    def forward(self, x: torch.Tensor, at: Positions, *, save: bool) -> tuple[torch.Tensor, Saved | None]:
        """See Block."""
        qkv, low_qkv = self._qkv(x, at)
        turned = self.attention.turned(qkv[:, : self.qkv.n], at)
        attended = self.attention.attend(turned, at)
        h, low_o = self._h(attended.out.flatten(1), x, at)
        keeps_gate_up = save and "gate_up" not in self.placement.again
        y, gate_up, lows = torch.empty_like(x), None, []
        chunks = [slice(0, x.shape[0])] if keeps_gate_up else self.chunks(x.shape[0])
        for rows in chunks:
            gate_up, low_gate_up = self._gate_up(h[rows], at)
            wide = x.new_empty(gate_up.shape[0], self.down.k + self.down.r)
            swiglu(gate_up[:, : self.gate_up.n], wide[:, : self.down.k])
            self.down.forward(wide, residual=h[rows], out=y[rows], seed=self.seed(at, self.down))
            lows.append((low_gate_up, self.down.low_of(wide)))
        if not save:
            return y, None
        low_gate_up, low_down = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*lows, strict=True))
        of = {"qkv": low_qkv, "o": low_o, "gate_up": low_gate_up, "down": low_down}
        return y, self.keep(attended, of, x=x, qkv=qkv, h=h, gate_up=gate_up if keeps_gate_up else None)

    def backward(
        self, wide_dy: torch.Tensor, saved: Saved, at: Positions, below: int | None
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """See Block."""
        x, out = self.take(saved, "x"), self.bring_out(saved)
        if x is None:
            raise RuntimeError("a layer's input is not made again")
        h, hidden = self.take(saved, "h"), x.shape[1]
        if h is None:
            h = self._h(out, x, at)[0]
        wide_dh = room(x, self.o)
        of_mlp, of_norm_mlp = self._mlp_backward(wide_dy, h, self.take(saved, "gate_up"), saved, at, wide_dh)
        del h

        self.o.widen(wide_dh)
        of_o = self.o.gradients(wide_dh, out, saved.lows["o"], self.seed(at, self.o))
        d_out = self.o.backward(wide_dh, self.seed(at, self.o))
        qkv = self.take(saved, "qkv")
        if qkv is None:
            qkv = self._qkv(x, at)[0]
            if self.attention.norms is None:
                self.attention.turned(qkv[:, : self.qkv.n], at)
        self.attention.backward(saved.attended, d_out, qkv[:, : self.qkv.n], at)
        del d_out, out
        dx, of_qkv, of_norm = self.through_input(
            qkv, self.qkv, self.norm_attention, x, wide_dh[:, :hidden], saved.lows["qkv"], at, below
        )
        return dx, [*of_qkv, *of_o, *of_mlp, *of_norm, *of_norm_mlp]

    def _mlp_backward(
        self,
        wide_dy: torch.Tensor,
        h: torch.Tensor,
        gate_up: torch.Tensor | None,
        saved: Saved,
        at: Positions,
        wide_dh: torch.Tensor,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Gradients of the MLP's products and of its norm; that of h goes into wide_dh's first columns."""
        hidden, of_gate_up, of_down, of_norm = h.shape[1], [], [], []  # type: ignore[var-annotated]
        seeds = self.seed(at, self.gate_up), self.seed(at, self.down)
        for rows in self.chunks(h.shape[0]) if gate_up is None else [slice(0, h.shape[0])]:
            dy = wide_dy[rows]
            wide_d = self._gate_up(h[rows], at)[0] if gate_up is None else gate_up
            self.down.widen(dy)
            d_act = self.down.backward(dy, seeds[1])
            act = swiglu_backward(d_act, wide_d[:, : self.gate_up.n])
            of_down = added(of_down, self.down.gradients(dy, act, saved.lows["down"][rows], seeds[1]))
            del d_act, act
            self.gate_up.widen(wide_d)
            d_n = self.gate_up.backward(wide_d, seeds[0])
            n = torch.empty_like(d_n)
            dh = wide_dh[rows, :hidden]
            of_norm = added(of_norm, norm_backward(d_n, h[rows], self.norm_mlp, dh, residual=dy[:, :hidden], y=n))
            low = saved.lows["gate_up"][rows]
            of_gate_up = added(of_gate_up, self.gate_up.gradients(wide_d, n, low, seeds[0]))
        return [*of_gate_up, *of_down], of_norm

    def _qkv(self, x: torch.Tensor, at: Positions) -> tuple[torch.Tensor, torch.Tensor]:
        return self.widely(x, self.norm_attention, self.qkv, at)

    def _h(self, out: torch.Tensor, x: torch.Tensor, at: Positions) -> tuple[torch.Tensor, torch.Tensor]:
        return self.o.forward_narrow(out, x, self.seed(at, self.o))

    def _gate_up(self, h: torch.Tensor, at: Positions) -> tuple[torch.Tensor, torch.Tensor]:
        return self.widely(h, self.norm_mlp, self.gate_up, at)
