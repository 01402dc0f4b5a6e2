"""A base product with its low-rank terms: y = x W^T + s (x A^T) B^T forward, dx, dA and dB backward.

Linear layers that read the same input (query, key, value; gate, up) are one product. Adding a low-rank term to y would
read and write all of y again, about 10% of a step. So each product has one buffer

        K     r
      ┌─────┬────┐
    N │  W  │ sB │     forward:  y  = [x, xA^T]  · (first N rows)^T
      ├─────┼────┤
    r │  A  │    │     backward: dx = [dy, dy sB] · (first K columns)
      └─────┴────┘

and inputs come in rows wide enough to hold the r extra columns: the term costs r more columns in a product that is
made anyway (16 of 4096: 0.4% of its arithmetic). The transformers model's parameters become views of the buffer, so
there is one copy of each weight. Weights of four bits are turned into such a buffer for each use.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from afina.engine.elementwise import wide_product
from afina.engine.nf4 import Nf4, from_bitsandbytes

ALIGN = 8
"""Elements to which the extra columns are rounded up, so that every row of a 16-bit buffer begins at 16 bytes."""


@dataclass(frozen=True)
class Adapter:
    """One low-rank term: `a` (rank, K) and `b` (rows, rank) learn; it owns `rows` of y and `columns` of the extra r."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    rows: slice
    columns: slice


class Scratch:
    """Buffers that products with four-bit weights fill and use in turn, one for each shape."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, int], torch.Tensor] = {}

    def get(self, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
        """A buffer (rows, columns), in which the last r columns of the last r rows are zero."""
        if (rows, columns) not in self._buffers:
            self._buffers[rows, columns] = torch.zeros(rows, columns, dtype=like.dtype, device=like.device)
        return self._buffers[rows, columns]


@dataclass
class Product:
    """Frozen linear layers over one input, with what PEFT attached to them.

    `n`, `k`, `r` are the parts of the buffer drawn above. It is `wide` for weights as they are; weights of four bits
    (`packed`, one a layer, with its rows) are turned into a shared one of `scratch` for each use. low: (r, K) A. ups:
    sB of each adapter, (rows, rank). scales: (r,) s of each extra column. bias: (N,) or None.
    """

    n: int
    k: int
    r: int
    bias: torch.Tensor | None
    low: torch.Tensor
    wide: torch.Tensor | None = None
    packed: list[tuple[slice, Nf4]] = field(default_factory=list)
    scratch: Scratch | None = None
    adapters: list[Adapter] = field(default_factory=list)
    ups: list[torch.Tensor] = field(default_factory=list)
    scales: torch.Tensor = field(default_factory=lambda: torch.ones(()))

    def refresh(self) -> None:
        """Take over the adapters as they are now. Once an optimiser step."""
        if not self.adapters:
            return
        places = [self.low[adapter.columns] for adapter in self.adapters] + self.ups
        values = [adapter.a.detach() for adapter in self.adapters]
        values += torch._foreach_mul(
            [adapter.b.detach() for adapter in self.adapters], [adapter.scale for adapter in self.adapters]
        )
        torch._foreach_copy_(places, values)

    def parameters(self) -> list[nn.Parameter]:
        """What learns, in the order in which `gradients` returns gradients."""
        return [parameter for adapter in self.adapters for parameter in (adapter.a, adapter.b)]

    def weights(self) -> torch.Tensor:
        """The buffer (N + r, K + r), holding weights and adapters."""
        if self.wide is not None:
            return self.wide
        if self.scratch is None:
            raise RuntimeError("four-bit weights need a scratch buffer")
        wide = self.scratch.get(self.n + self.r, self.k + self.r, self.low)
        for rows, weight in self.packed:
            weight.fill(wide[rows, : self.k])
        if self.r:
            wide[: self.n, self.k :].zero_()
            torch._foreach_copy_([wide[self.n :, : self.k], *self._up_places(wide)], [self.low, *self.ups])
        return wide

    def _up_places(self, wide: torch.Tensor) -> list[torch.Tensor]:
        return [wide[adapter.rows, self.k :][:, adapter.columns] for adapter in self.adapters]

    def forward(self, wide_x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """y (+ residual) from wide_x (tokens, K + r), the input in its first K columns; the rest is written here."""
        if self.r:
            torch.mm(wide_x[:, : self.k], self.low.t(), out=wide_x[:, self.k :])
        weight = self.weights()[: self.n].t()
        if residual is not None:
            y = torch.addmm(residual, wide_x, weight)
            return y if self.bias is None else y.add_(self.bias)
        return torch.mm(wide_x, weight) if self.bias is None else torch.addmm(self.bias, wide_x, weight)

    def forward_narrow(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward` for an input (tokens, K) without the extra room; returns y + residual and s x A^T."""
        wide = self.weights()
        y = torch.addmm(residual, x, wide[: self.n, : self.k].t())
        low = torch.mm(x, self.low.t())
        if self.r:
            y.addmm_(low, wide[: self.n, self.k :].t())
        return (y if self.bias is None else y.add_(self.bias)), self.scaled(low)

    def low_of(self, wide_x: torch.Tensor) -> torch.Tensor:
        """s x A^T (tokens, r) after `forward`, which dB needs, in memory of its own."""
        return self.scaled(wide_x[:, self.k :])

    def scaled(self, low: torch.Tensor) -> torch.Tensor:
        """Each adapter's columns times its scale."""
        return low * self.scales

    def widen(self, wide_dy: torch.Tensor) -> None:
        """Write dy sB into the last columns of wide_dy (tokens, N + r), whose first N hold dy."""
        used = self.adapters[-1].columns.stop if self.adapters else 0
        wide_dy[:, self.n + used :].zero_()  # padding meets zeros of the buffer, and what was here before may be NaN
        for adapter, up in zip(self.adapters, self.ups, strict=True):
            torch.mm(wide_dy[:, adapter.rows], up, out=wide_dy[:, self.n :][:, adapter.columns])

    def backward(self, wide_dy: torch.Tensor) -> torch.Tensor:
        """dx (tokens, K) from wide_dy (tokens, N + r), after `widen`."""
        return torch.mm(wide_dy, self.weights()[:, : self.k])

    def gradients(self, wide_dy: torch.Tensor, x: torch.Tensor, low: torch.Tensor) -> list[torch.Tensor]:
        """dA (rank, K) and dB (rows, rank) of each adapter, after `widen`; x: (tokens, K), low: `low_of` of it."""
        if not self.adapters:
            return []
        lows, found = wide_product(wide_dy[:, self.n :].t(), x), []
        for adapter in self.adapters:
            up = wide_product(wide_dy[:, adapter.rows].t(), low[:, adapter.columns])
            found += [lows[adapter.columns].to(adapter.a.dtype), up.to(adapter.b.dtype)]
        return found


def make_product(linears: Sequence[nn.Module], scratch: Scratch, dtype: torch.dtype) -> Product:
    """Concatenate linear layers (plain or NF4, alone or wrapped by PEFT's LoRA) into one product.

    Plain weights become views of its buffer. `dtype` is what is computed in.
    """
    layers: list[Any] = [getattr(linear, "base_layer", linear) for linear in linears]
    k = layers[0].in_features
    sizes = [layer.out_features for layer in layers]
    ranks = [_rank(linear) for linear in linears]
    n, r = sum(sizes), -(-sum(ranks) // ALIGN) * ALIGN
    device = layers[0].weight.device
    rows = [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
    columns = [slice(end - rank, end) for rank, end in zip(ranks, accumulate(ranks), strict=True)]
    packed = [from_bitsandbytes(layer.weight) for layer in layers]
    wide = None
    if all(weight is None for weight in packed):
        wide = torch.zeros(n + r, k + r, dtype=dtype, device=device)
        for layer, place in zip(layers, rows, strict=True):
            wide[place, :k] = layer.weight.detach()
            layer.weight.data = wide[place, :k]
    low = torch.zeros(r, k, dtype=dtype, device=device) if wide is None else wide[n:, :k]
    product = Product(n, k, r, _bias(layers, dtype), low, wide, scratch=scratch)
    if wide is None:
        product.packed = [(place, weight) for place, weight in zip(rows, packed, strict=True) if weight is not None]
    for linear, place, column, rank in zip(linears, rows, columns, ranks, strict=True):
        if rank:
            product.adapters.append(_adapter(linear, place, column))
    if wide is None:
        product.ups = [
            torch.empty(a.rows.stop - a.rows.start, a.b.shape[1], dtype=dtype, device=device) for a in product.adapters
        ]
    else:
        product.ups = product._up_places(wide)
    product.scales = torch.ones(r, dtype=dtype, device=device)
    for adapter in product.adapters:
        product.scales[adapter.columns] = adapter.scale
    product.refresh()
    return product


def _adapter(linear: Any, rows: slice, columns: slice) -> Adapter:
    name = linear.active_adapters[0]
    return Adapter(linear.lora_A[name].weight, linear.lora_B[name].weight, float(linear.scaling[name]), rows, columns)


def _rank(linear: Any) -> int:
    return int(linear.r[linear.active_adapters[0]]) if hasattr(linear, "lora_A") else 0


def _bias(layers: Sequence[Any], dtype: torch.dtype) -> torch.Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    device = layers[0].weight.device
    zeros = [torch.zeros(layer.out_features, dtype=dtype, device=device) for layer in layers]
    return torch.cat(
        [zero if layer.bias is None else layer.bias.detach() for layer, zero in zip(layers, zeros, strict=True)]
    )
