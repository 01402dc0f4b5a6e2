"""The layer of sequential.py with products in eight bits: what writes a product's input writes it in eight bits.

No copy of it in 16 bits is made: the low-rank products read the 8-bit rows too. Saved is what the exact layer saves.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, fields

import torch

from afina.engine import eight
from afina.engine.block import Block, Positions, Saved, added
from afina.engine.eight import Format
from afina.engine.eight_product import EightProduct
from afina.engine.experts import Experts
from afina.engine.products import Product, Scratch
from afina.engine.sequential import Sequential
from afina.model.packed import Attended


@dataclass(kw_only=True, eq=False)
class EightSequential(Sequential):
    """See Sequential."""

    qkv: EightProduct
    o: EightProduct
    gate_up: EightProduct
    down: EightProduct

    def saves(self, tokens: int) -> dict[str, int]:
        """See Block."""
        return super().saves(tokens) | {"gate_up": tokens * self.gate_up.n, "qkv": tokens * self.qkv.n}

    def at_work(self, rows: int) -> int:
        """See Block: d of the activation, and in eight bits the gradient of gate and up and the activation again; or
        what INT8 adds up for gate and up, in 32 bits."""
        sums = 4 * self.gate_up.n // self.gate_up.like.element_size() if self.gate_up.form.dtype == torch.int8 else 0
        return rows * max(self.down.k + (self.gate_up.n + self.down.k) // 2, sums)

    def forward(self, x: torch.Tensor, at: Positions, *, save: bool) -> tuple[torch.Tensor, Saved | None]:
        """See Block."""
        qkv, low_qkv = self._qkv(x, at)
        turned = self.attention.turned(qkv, at)
        attended = self.attention.attend(turned, at)
        of_o, low_o = self._of_o(attended.out.flatten(1), at)
        h, y = torch.empty_like(x), torch.empty_like(x)
        keeps_gate_up, gate_up, lows = save and "gate_up" not in self.placement.again, None, []
        for rows in self.chunks(x.shape[0], whole=keeps_gate_up):
            n = self.gate_up.inputs(of_o[rows].shape[0])
            eight.norm_rows(x[rows], self.norm_mlp, n, of_o[rows], h[rows])
            low_gate_up = self.gate_up.low(n, at.seed)
            gate_up = self.gate_up.through(n, low_gate_up, at.seed)
            act = self.down.inputs(gate_up.shape[0])
            known = eight.swiglu_rows(gate_up, act)
            low_down = self.down.low(act, at.seed)
            torch.add(h[rows], self.down.through(act, low_down, at.seed), out=y[rows])
            lows.append((low_gate_up, low_down, known.t()))
        if not save:
            return y, None
        low_gate_up, low_down, known = (
            torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*lows, strict=True)
        )
        of = {"qkv": low_qkv, "o": low_o, "gate_up": low_gate_up, "down": low_down, "swiglu": known}
        return y, self.keep(attended, of, x=x, qkv=qkv, h=h, gate_up=gate_up if keeps_gate_up else None)

    def backward(
        self, wide_dy: torch.Tensor, saved: Saved, at: Positions, below: int | None
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """See Block."""
        x, out = self.bring_ends(saved)
        h, hidden = self.take(saved, "h"), x.shape[1]
        if h is None:
            h = torch.add(x, self._of_o(out, at)[0])
        dh, dh8 = torch.empty_like(x), self.o.slopes(x.shape[0])
        of_mlp = self._back_through_mlp(wide_dy[:, :hidden], h, self.take(saved, "gate_up"), saved, at, dh, dh8)
        del h

        d_low = self.o.d_low(dh8, at.seed)
        of_o = self.o.of_adapters(dh8, d_low, out, saved.lows["o"], at.seed)
        d_out = self.o.back(dh8, d_low, at.seed)
        qkv = self.bring_qkv(saved, x, at)
        d8 = self._back_through_attention(saved.attended, d_out, qkv, at)
        del d_out, qkv, out, dh8

        d_low, n = self.qkv.d_low(d8, at.seed), self.qkv.inputs(x.shape[0])
        dx = None
        if below is None:
            eight.norm_rows(x, self.norm_attention, n)
        else:
            d_n = self.qkv.back(d8, d_low, at.seed)
            dx = x.new_empty(x.shape[0], hidden + below)
            eight.norm_backward_rows(d_n, x, self.norm_attention, dx[:, :hidden], dh, n)
        return dx, [*self.qkv.of_adapters(d8, d_low, n, saved.lows["qkv"], at.seed), *of_o, *of_mlp]

    def _back_through_mlp(
        self,
        dy: torch.Tensor,
        h: torch.Tensor,
        gate_up: torch.Tensor | None,
        saved: Saved,
        at: Positions,
        dh: torch.Tensor,
        dh8: eight.Rows,
    ) -> list[torch.Tensor]:
        """Gradients of the MLP's adapters; that of h goes into dh, and in eight bits, as `o` wants it, into dh8."""
        of_gate_up: list[torch.Tensor] = []
        of_down: list[torch.Tensor] = []
        for rows in self.chunks(h.shape[0], whole=gate_up is not None):
            made, tokens = gate_up, dy[rows].shape[0]
            gate_up = None
            if made is None:
                n = eight.norm_rows(h[rows], self.norm_mlp, self.gate_up.inputs(tokens))
                made = self.gate_up.through(n, self.gate_up.low(n, at.seed), at.seed)
            d8 = eight.quantise(dy[rows], self.down.slopes(tokens), self.down.fold)
            d_low = self.down.d_low(d8, at.seed)
            d_act = self.down.back(d8, d_low, at.seed)
            slopes, act = self.gate_up.slopes(tokens), self.down.inputs(tokens)
            known = saved.lows["swiglu"][rows].t().contiguous()
            eight.swiglu_backward_rows(d_act, made, self.gate_up.fold, known, slopes, act)
            del d_act, made
            of_down = added(of_down, self.down.of_adapters(d8, d_low, act, saved.lows["down"][rows], at.seed))
            del d8, act
            d_low, n = self.gate_up.d_low(slopes, at.seed), self.gate_up.inputs(tokens)
            d_n = self.gate_up.back(slopes, d_low, at.seed)
            eight.norm_backward_rows(d_n, h[rows], self.norm_mlp, dh[rows], dy[rows], n, dh8.part(rows), self.o.fold)
            low = saved.lows["gate_up"][rows]
            of_gate_up = added(of_gate_up, self.gate_up.of_adapters(slopes, d_low, n, low, at.seed))
        return [*of_gate_up, *of_down]

    def _back_through_attention(
        self, attended: Attended, d_out: torch.Tensor, raw: torch.Tensor, at: Positions
    ) -> eight.Rows:
        """The gradient of qkv in eight bits, folded."""
        to = self.qkv.slopes(raw.shape[0])
        if self.attention.norms is not None:
            self.attention.backward(attended, d_out, raw, at)
            return eight.quantise(raw, to, self.qkv.fold)
        d_heads = self.attention.d_heads(attended, d_out, raw, at)
        return eight.gather_rotated_rows(d_heads, at.cos, at.sin, self.qkv.fold, to)

    def _qkv(self, x: torch.Tensor, at: Positions) -> tuple[torch.Tensor, torch.Tensor]:
        n = eight.norm_rows(x, self.norm_attention, self.qkv.inputs(x.shape[0]))
        low = self.qkv.low(n, at.seed)
        return self.qkv.through(n, low, at.seed), low

    def _of_o(self, out: torch.Tensor, at: Positions) -> tuple[torch.Tensor, torch.Tensor]:
        rows = eight.quantise(out, self.o.inputs(out.shape[0]))
        low = self.o.low(rows, at.seed)
        return self.o.through(rows, low, at.seed), low


@dataclass(frozen=True)
class Scratches:
    """Buffers that layers fill in turn: weights of four bits as eight, weights turned over, experts' opened again."""

    straight: Scratch = field(default_factory=Scratch)
    turned: Scratch = field(default_factory=Scratch)
    opened: Scratch = field(default_factory=Scratch)


def in_eight_bits(
    block: Block,
    form: Format,
    scratches: Scratches,
    *,
    exact: Collection[str] = (),
    hold: bool = True,
    keep: bool = False,
) -> Block:
    """The same layer with its products, or the experts' weights, in eight bits, but those named in `exact`.

    keep: the other is still needed.
    """
    parts = {part.name: getattr(block, part.name) for part in fields(block)}
    for name, part in parts.items():
        if isinstance(part, Product) and name not in exact:
            parts[name] = made = EightProduct.of(part, form, scratches.straight, scratches.turned, hold=hold)
            if not keep:
                part.wide = None
                made.let_go()
        elif isinstance(part, Experts) and name not in exact:
            parts[name] = part.in_eight_bits(form, scratches.opened)
            if not keep:
                part.let_go()
    fused = isinstance(block, Sequential) and not exact
    return EightSequential(**parts) if fused else type(block)(**parts)
