"""The half that layers share whose MLP, or mixture of experts, stands on top of their attention.

h = x + o(attention(turn(qkv(norm(x)))))          y = h + what stands above(norm(h))
"""

from dataclasses import dataclass

import torch

from afina.engine.block import Block, Positions, Saved, room, widened
from afina.engine.elementwise import Norm
from afina.engine.products import Product
from afina.model.packed import Attended


@dataclass(kw_only=True, eq=False)
class Stacked(Block):
    """Products and norms of attention, shared with the transformers layer it was made from, and the norm above."""

    qkv: Product
    o: Product
    norm_attention: Norm
    norm_mlp: Norm

    def through_attention(
        self, x: torch.Tensor, at: Positions
    ) -> tuple[torch.Tensor, torch.Tensor, Attended, dict[str, torch.Tensor]]:
        """h, and what its backward needs: qkv turned, attention's own results and the products' `low_of`."""
        qkv, low_qkv = self._qkv(x, at)
        attended = self.attention.attend(self.attention.turned(qkv[:, : self.qkv.n], at), at)
        h, low_o = self._h(attended.out.flatten(1), x, at)
        return h, qkv, attended, {"qkv": low_qkv, "o": low_o}

    def back_through_above(
        self, wide_dy: torch.Tensor, h: torch.Tensor, saved: Saved, at: Positions, wide_dh: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Gradients of the products above, of the norm before them, and of what else learns there; that of h goes into
        wide_dh's first columns."""
        raise NotImplementedError

    def backward(
        self, wide_dy: torch.Tensor, saved: Saved, at: Positions, below: int | None
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """See Block."""
        x, out = self.bring_ends(saved)
        h, hidden = self.take(saved, "h"), x.shape[1]
        if h is None:
            h = self._h(out, x, at)[0]
        wide_dh = room(x, self.o)
        of_above, of_norm_mlp, of_rest = self.back_through_above(wide_dy, h, saved, at, wide_dh)
        del h

        self.o.widen(wide_dh)
        of_o = self.o.gradients(wide_dh, out, saved.lows["o"], at.seed)
        d_out = self.o.backward(wide_dh, at.seed)
        qkv = self.bring_qkv(saved, x, at)
        self.attention.backward(saved.attended, d_out, qkv[:, : self.qkv.n], at)
        del d_out, out
        dx, of_qkv, of_norm = self.back_through_input(qkv, x, wide_dh[:, :hidden], saved.lows["qkv"], at, below)
        return dx, [*of_qkv, *of_o, *of_above, *of_norm, *of_norm_mlp, *of_rest]

    def bring_qkv(self, saved: Saved, x: torch.Tensor, at: Positions) -> torch.Tensor:
        """Queries, keys and values as `through_attention` left them, in rows of at least their columns: as they were
        saved, or made again."""
        qkv = self.take(saved, "qkv")
        if qkv is None:
            qkv = self._qkv(x, at)[0]
            if self.attention.norms is None:
                self.attention.turned(qkv[:, : self.qkv.n], at)
        return qkv

    def _qkv(self, x: torch.Tensor, at: Positions) -> tuple[torch.Tensor, torch.Tensor]:
        return self.product_of_norm(x, self.norm_attention, self.qkv, at)

    def _h(self, out: torch.Tensor, x: torch.Tensor, at: Positions) -> tuple[torch.Tensor, torch.Tensor]:
        wide = widened(out, self.o)
        return self.o.forward(wide, residual=x, seed=at.seed), self.o.low_of(wide)
