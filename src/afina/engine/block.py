"""What layers of every family share: where tokens stand, what is saved and where it waits, and attention's half.

A layer is a forward and a backward with its saved tensors named. What the backward needs is saved, or made again from
what is: the norms' outputs and the activation's product are never kept, as one pass over memory makes them again.
Of the rest, a `Placement` says by name what stays on the GPU, what waits in the computer's memory, and what is let go.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from afina.engine.elementwise import Norm, gather_rotated, head_norms, head_norms_backward, norm, norm_backward, rotate
from afina.engine.offload import Offload, Parked
from afina.engine.products import Product
from afina.model.packed import Attended, attend, attend_backward


@dataclass(frozen=True)
class Positions:
    """Where each token stands: the samples' lengths and the angles' cosines and sines, (tokens, half) fp32.

    seed: of the adapters' dropout in this micro-batch; None where nothing is dropped.
    """

    lengths: tuple[int, ...]
    cos: torch.Tensor
    sin: torch.Tensor
    seed: int | None = None


@dataclass(frozen=True)
class Placement:
    """By name, what of a layer's saved tensors waits `away`, in the computer's memory, and what is made `again`."""

    away: frozenset[str] = frozenset()
    again: frozenset[str] = frozenset()


HERE = Placement()
"""Everything stays on the GPU."""


@dataclass
class Saved:
    """What a layer's forward leaves for its backward: by name, here, away, or None when it is to be made again.

    lows: by the product's name, its `low_of`.
    """

    tensors: dict[str, torch.Tensor | Parked | None]
    attended: Attended
    lows: dict[str, torch.Tensor]


@dataclass
class Attention:
    """What a layer's attention is made of, beside its products. heads: of queries, and of keys (and values).

    sinks: (heads,), which do not learn here."""

    heads: tuple[int, int]
    width: int
    scaling: float
    window: int | None = None
    norms: tuple[Norm, Norm] | None = None
    sinks: torch.Tensor | None = None

    @property
    def columns(self) -> int:
        """Of queries, keys and values together."""
        return (self.heads[0] + 2 * self.heads[1]) * self.width

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views (tokens, heads, width) of queries, keys and values; qkv: (tokens, columns), any rows."""
        parts = qkv.unflatten(1, (self.heads[0] + 2 * self.heads[1], self.width))
        query, key, value = parts.split([self.heads[0], self.heads[1], self.heads[1]], dim=1)
        return query, key, value

    def turned(self, qkv: torch.Tensor, at: Positions) -> torch.Tensor:
        """Queries and keys normed where the family does so, and positions turned in; in place where it can be."""
        if self.norms is not None:
            qkv = head_norms(qkv, self.norms, self.heads, torch.empty_like(qkv))
        return rotate(qkv, at.cos, at.sin, sum(self.heads), self.width)

    def attend(self, turned: torch.Tensor, at: Positions) -> Attended:
        """Causal attention inside each sample, over what `turned` made."""
        return attend(*self.split(turned), at.lengths, self.scaling, self.window, self.sinks)

    def d_heads(
        self, attended: Attended, d_out: torch.Tensor, turned: torch.Tensor, at: Positions
    ) -> tuple[torch.Tensor, ...]:
        """Gradients of what `turned` made: of queries, keys and values, as attend_backward returns them."""
        d_out = d_out.view(attended.out.shape)
        return attend_backward(attended, d_out, *self.split(turned), at.lengths, self.scaling, self.window)

    def backward(self, attended: Attended, d_out: torch.Tensor, qkv: torch.Tensor, at: Positions) -> None:
        """Turn qkv (tokens, columns), as saved, before its norms if it has any, into its gradient in place."""
        turned = self.turned(qkv, at) if self.norms is not None else qkv
        gather_rotated(turned, self.d_heads(attended, d_out, turned, at), at.cos, at.sin)
        if self.norms is not None:
            head_norms_backward(turned, qkv, self.norms, self.heads)


@dataclass(kw_only=True, eq=False)
class Block:
    """A decoder layer. `number` counts them; `rows_at_once` cuts what the widest products make, 0 for no cuts.

    products, norms: in the order of the fields, which is that of `backward`'s gradients.
    """

    attention: Attention
    number: int = 0
    placement: Placement = HERE
    offload: Offload | None = None
    rows_at_once: int = 0

    def __post_init__(self) -> None:
        parts = [getattr(self, part.name) for part in fields(self)]
        self.products: tuple[Product, ...] = tuple(part for part in parts if isinstance(part, Product))
        self.norms: tuple[Norm, ...] = tuple(part for part in parts if isinstance(part, Norm))
        for place, product in enumerate(self.products):
            product.number = 8 * self.number + place

    def forward(self, x: torch.Tensor, at: Positions, *, save: bool) -> tuple[torch.Tensor, Saved | None]:
        """x: (tokens, hidden). Returns the layer's output, and what the backward needs when `save`."""
        raise NotImplementedError

    def backward(
        self, wide_dy: torch.Tensor, saved: Saved, at: Positions, below: int | None
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """wide_dy: (tokens, hidden + extra), the output's gradient in its first columns.

        Returns dx in rows with `below` extra columns (None: nobody needs it), and the gradients of what learns, product
        by product, then norm by norm.
        """
        raise NotImplementedError

    @property
    def extra(self) -> int:
        """Columns of its last product's low-rank terms, which the output's gradient must have room for."""
        return self.products[-1].r

    @property
    def ups(self) -> list[nn.Parameter]:
        """Every adapter's B, which begins as zero: that hides mistakes in the gradient of its A."""
        return [adapter.b for product in self.products for adapter in product.adapters]

    def hold(self) -> None:
        """Keep weights of four bits in the precision that is computed in too."""
        for product in self.products:
            product.hold()

    @property
    def unpacked(self) -> int:
        """Elements that `hold` would add, where there is room for it."""
        return sum(product.unpacked for product in self.products)

    @property
    def passing(self) -> int:
        """Elements that a token's products read and write."""
        return sum(product.n + product.k for product in self.products)

    @property
    def moved(self) -> int:
        """Bytes of weights that pass through memory, forward and backward, before products read them."""
        return sum(product.moved for product in self.products)

    def multiply_adds(self, made: str | None = None) -> int:
        """For a token: of all its products, or of the one that makes a saved tensor."""
        if made is not None:
            product = self.products[{"gate_up": -2, "z": 0, "qkv": 0, "h": 1}[made]]
            return product.n * product.k
        return sum(product.n * product.k for product in self.products)

    def at_work(self, rows: int) -> int:
        """Elements that the backward of so many rows of the MLP has at once, beside what was saved or made again."""
        return rows * max(self.products[-1].k, 2 * self.products[0].k)

    def parameters(self) -> list[nn.Parameter]:
        """What learns, in the order of `backward`'s gradients."""
        found = [parameter for product in self.products for parameter in product.parameters()]
        return found + [parameter for by in self.norms for parameter in by.learnt]

    def saves(self, tokens: int) -> dict[str, int]:
        """Elements of each tensor that is saved by name."""
        raise NotImplementedError

    def keep(self, attended: Attended, lows: dict[str, torch.Tensor], **tensors: torch.Tensor | None) -> Saved:
        """What is saved, each where the placement says; `attended.out` goes with `out`."""
        kept: dict[str, torch.Tensor | Parked | None] = {}
        if self.placement.away and self.offload is not None:
            self.offload.begin()
        for name, tensor in {**tensors, "out": attended.out}.items():
            if tensor is None or name in self.placement.again:
                kept[name] = None
            elif name in self.placement.away and self.offload is not None:
                kept[name] = self.offload.send(tensor)
            else:
                kept[name] = tensor
        if "out" in self.placement.away and self.offload is not None:
            attended.out = attended.out.new_empty(0)
        return Saved(kept, attended, lows)

    def expect(self, saved: Saved) -> None:
        """This layer's backward comes soon: what waits away may begin its way back."""
        for tensor in saved.tensors.values():
            if isinstance(tensor, Parked):
                tensor.begin()

    def take(self, saved: Saved, name: str) -> torch.Tensor | None:
        """A saved tensor, and no longer saved; None when it is to be made again."""
        tensor = saved.tensors.pop(name)
        return tensor.fetch() if isinstance(tensor, Parked) else tensor

    def bring_ends(self, saved: Saved) -> tuple[torch.Tensor, torch.Tensor]:
        """What entered the layer (tokens, hidden), and attention's output (tokens, columns), back in its place."""
        x, out = self.take(saved, "x"), self.take(saved, "out")
        if x is None or out is None:
            raise RuntimeError("neither a layer's input nor its attention is made again")
        saved.attended.out = out
        return x, out.flatten(1)

    def back_through_input(
        self, d: torch.Tensor, x: torch.Tensor, past: torch.Tensor, low: torch.Tensor, at: Positions, below: int | None
    ) -> tuple[torch.Tensor | None, list[torch.Tensor], list[torch.Tensor]]:
        """From the gradient of the first product's output past the first norm: dx, as `backward` returns it, and those
        of product and norm. d: in rows as `product_of_norm` makes them; past: (tokens, hidden), what x's gradient is
        besides; low: the product's `low_of`."""
        product, by = self.products[0], self.norms[0]
        product.widen(d)
        dx, n, of_norm = None, torch.empty_like(x), []
        if below is not None:
            d_n = product.backward(d, at.seed)
            dx = x.new_empty(x.shape[0], x.shape[1] + below)
            of_norm = norm_backward(d_n, x, by, dx[:, : x.shape[1]], residual=past, y=n)
        else:
            norm(x, by, n)
        return dx, product.gradients(d, n, low, at.seed), of_norm

    def product_of_norm(
        self, x: torch.Tensor, by: Norm, product: Product, at: Positions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The product of x's norm, in rows with room for the extra columns of its gradient, and its `low_of`."""
        wide = x.new_empty(x.shape[0], product.k + product.r)
        norm(x, by, wide[:, : product.k])
        y = room(x, product)
        product.forward(wide, out=y[:, : product.n], seed=at.seed)
        return y, product.low_of(wide)

    def chunks(self, tokens: int, whole: bool = False) -> list[slice]:
        """The rows that go through the widest products together; `whole`: all, as what they make is kept."""
        step = tokens if whole else self.rows_at_once or tokens
        return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def room(x: torch.Tensor, product: Product) -> torch.Tensor:
    """Rows for a gradient of the product's output, and the extra columns."""
    return x.new_empty(x.shape[0], product.n + product.r)


def widened(x: torch.Tensor, product: Product) -> torch.Tensor:
    """x (tokens, K) in rows with the product's extra columns, if it has any."""
    if not product.r:
        return x
    return torch.cat([x, x.new_empty(x.shape[0], product.r)], dim=1)  # by far the fastest copy into wider rows


def added(sums: list[torch.Tensor], more: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Sums over chunks; the first chunk's are taken as they are."""
    return [total.add_(part) for total, part in zip(sums, more, strict=True)] if sums else list(more)


def norm_of(layer_norm: Any, dtype: torch.dtype) -> Norm:
    """From a layer norm, or an RMS norm of transformers, which keeps its own weights."""
    eps = float(layer_norm.eps if isinstance(layer_norm, nn.LayerNorm) else layer_norm.variance_epsilon)
    weight, bias = layer_norm.weight, getattr(layer_norm, "bias", None)
    learnt = tuple(part for part in (weight, bias) if part is not None and part.requires_grad)
    bias = None if bias is None else bias.detach().to(dtype)
    return Norm(weight.detach().to(dtype), eps, bias, learnt)
