"""The layer of Phi-1.5 and Phi-2: attention and MLP side by side over one norm.

    z = inner(norm(x)) = [qkv, m]          y = x + dense(attention(turn(qkv))) + fc2(gelu(m))

Queries, keys, values and the MLP's first layer read the same input, so they are one product. gelu is the one by tanh
(Hendrycks & Gimpel, 2016, arXiv:1606.08415), PyTorch's own. Saved by name: x, z, out; z in rows with room for the
product's extra columns: its gradient takes its place.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import gelu

from afina.engine.block import Block, Positions, Saved, room, widened
from afina.engine.elementwise import Norm
from afina.engine.products import Product


@dataclass(kw_only=True, eq=False)
class Parallel(Block):
    """Its products and norm, shared with the transformers layer it was made from."""

    inner: Product
    dense: Product
    fc2: Product
    norm: Norm

    def saves(self, tokens: int) -> dict[str, int]:
        """See Block."""
        widths = {"z": self.inner.n + self.inner.r, "out": self.dense.k, "x": self.inner.k}
        return {name: tokens * width for name, width in widths.items()}

    def forward(self, x: torch.Tensor, at: Positions, *, save: bool) -> tuple[torch.Tensor, Saved | None]:
        """See Block."""
        z, low = self.product_of_norm(x, self.norm, self.inner, at)
        columns = self.attention.columns
        attended = self.attention.attend(self.attention.turned(z[:, :columns], at), at)
        wide = widened(attended.out.flatten(1), self.dense)
        h, low_dense = self.dense.forward(wide, residual=x, seed=at.seed), self.dense.low_of(wide)
        wide = x.new_empty(x.shape[0], self.fc2.k + self.fc2.r)
        torch.ops.aten.gelu.out(z[:, columns : self.inner.n], approximate="tanh", out=wide[:, : self.fc2.k])
        y = self.fc2.forward(wide, residual=h, out=h, seed=at.seed)
        if not save:
            return y, None
        return y, self.keep(attended, {"inner": low, "dense": low_dense, "fc2": self.fc2.low_of(wide)}, x=x, z=z)

    def backward(
        self, wide_dy: torch.Tensor, saved: Saved, at: Positions, below: int | None
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """See Block."""
        x, out = self.bring_ends(saved)
        z, hidden, columns = self.take(saved, "z"), x.shape[1], self.attention.columns
        if z is None:
            z = self.product_of_norm(x, self.norm, self.inner, at)[0]
            self.attention.turned(z[:, :columns], at)
        inside = z[:, columns : self.inner.n]
        self.fc2.widen(wide_dy)
        of_fc2 = self.fc2.gradients(wide_dy, gelu(inside, approximate="tanh"), saved.lows["fc2"], at.seed)
        torch.ops.aten.gelu_backward.grad_input(
            self.fc2.backward(wide_dy, at.seed), inside, approximate="tanh", grad_input=inside
        )

        wide_dense = room(x, self.dense)
        wide_dense[:, :hidden] = wide_dy[:, :hidden]
        self.dense.widen(wide_dense)
        d_out = self.dense.backward(wide_dense, at.seed)
        of_dense = self.dense.gradients(wide_dense, out, saved.lows["dense"], at.seed)
        self.attention.backward(saved.attended, d_out, z[:, :columns], at)
        del d_out, out, wide_dense
        dx, of_inner, of_norm = self.back_through_input(z, x, wide_dy[:, :hidden], saved.lows["inner"], at, below)
        return dx, [*of_inner, *of_dense, *of_fc2, *of_norm]
