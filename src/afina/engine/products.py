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
there is one copy of each weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

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


@dataclass
class Product:
    """Frozen linear layers over one input, with what PEFT attached to them.

    `wide` (N + r, K + r) is the buffer drawn above; `n`, `k`, `r` its parts; `bias` (N,) or None.
    """

    wide: torch.Tensor
    n: int
    k: int
    r: int
    bias: torch.Tensor | None
    adapters: list[Adapter] = field(default_factory=list)

    def refresh(self) -> None:
        """Copy the adapters, as they are now, into the buffer. Once an optimiser step."""
        if not self.adapters:
            return
        places = [self.wide[self.n :][adapter.columns, : self.k] for adapter in self.adapters]
        places += [self.wide[adapter.rows, self.k :][:, adapter.columns] for adapter in self.adapters]
        values = [adapter.a.detach() for adapter in self.adapters]
        values += torch._foreach_mul(
            [adapter.b.detach() for adapter in self.adapters], [adapter.scale for adapter in self.adapters]
        )
        torch._foreach_copy_(places, values)

    def parameters(self) -> list[nn.Parameter]:
        """What learns, in the order in which `backward` returns gradients."""
        return [parameter for adapter in self.adapters for parameter in (adapter.a, adapter.b)]

    def forward(self, wide_x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """y (+ residual) from wide_x (tokens, K + r), the input in its first K columns; the rest is written here."""
        if self.r:
            torch.mm(wide_x[:, : self.k], self.wide[self.n :, : self.k].t(), out=wide_x[:, self.k :])
        weight = self.wide[: self.n].t()
        if residual is not None:
            y = torch.addmm(residual, wide_x, weight)
            return y if self.bias is None else y.add_(self.bias)
        return torch.mm(wide_x, weight) if self.bias is None else torch.addmm(self.bias, wide_x, weight)

    def forward_narrow(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward` for an input (tokens, K) without the extra room; returns y + residual and x A^T."""
        y = torch.addmm(residual, x, self.wide[: self.n, : self.k].t())
        low = torch.mm(x, self.wide[self.n :, : self.k].t())
        if self.r:
            y.addmm_(low, self.wide[: self.n, self.k :].t())
        return (y if self.bias is None else y.add_(self.bias)), low

    def low(self, wide_x: torch.Tensor) -> torch.Tensor:
        """x A^T (tokens, r) as `forward` left it, in memory of its own."""
        return wide_x[:, self.k :].clone()

    def widen(self, wide_dy: torch.Tensor) -> None:
        """Write dy sB into the last columns of wide_dy (tokens, N + r), whose first N hold dy."""
        used = self.adapters[-1].columns.stop if self.adapters else 0
        wide_dy[:, self.n + used :].zero_()  # padding meets zeros of the buffer, and what was here before may be NaN
        for adapter in self.adapters:
            scaled = self.wide[adapter.rows, self.k :][:, adapter.columns]
            torch.mm(wide_dy[:, adapter.rows], scaled, out=wide_dy[:, self.n :][:, adapter.columns])

    def backward(self, wide_dy: torch.Tensor) -> torch.Tensor:
        """dx (tokens, K) from wide_dy (tokens, N + r), which is widened here."""
        self.widen(wide_dy)
        return torch.mm(wide_dy, self.wide[:, : self.k])

    def gradients(self, wide_dy: torch.Tensor, x: torch.Tensor, low: torch.Tensor) -> list[torch.Tensor]:
        """dA (rank, K) and dB (rows, rank) of each adapter, after `widen`; x: (tokens, K), low: (tokens, r)."""
        found = []
        for adapter in self.adapters:
            up = wide_dy[:, self.n :][:, adapter.columns]
            found.append(torch.mm(up.t(), x).to(adapter.a.dtype))
            db = torch.mm(wide_dy[:, adapter.rows].t(), low[:, adapter.columns])
            found.append(db.to(adapter.b.dtype).mul_(adapter.scale))
        return found


def make_product(linears: Sequence[nn.Module]) -> Product:
    """Concatenate linear layers (plain, or wrapped by PEFT's LoRA) into one product; their weights become its views."""
    plain: list[Any] = [getattr(linear, "base_layer", linear) for linear in linears]
    k = plain[0].in_features
    sizes = [layer.out_features for layer in plain]
    ranks = [_rank(linear) for linear in linears]
    n, used = sum(sizes), sum(ranks)
    r = -(-used // ALIGN) * ALIGN
    sample = plain[0].weight
    wide = torch.zeros(n + r, k + r, dtype=sample.dtype, device=sample.device)
    product = Product(wide, n, k, r, _bias(plain, sample))
    row = column = 0
    for linear, layer, size, rank in zip(linears, plain, sizes, ranks, strict=True):
        rows = slice(row, row + size)
        wide[rows, :k] = layer.weight.detach()
        layer.weight.data = wide[rows, :k]
        if rank:
            adapter: Any = linear
            name = adapter.active_adapters[0]
            product.adapters.append(
                Adapter(
                    adapter.lora_A[name].weight,
                    adapter.lora_B[name].weight,
                    float(adapter.scaling[name]),
                    rows,
                    slice(column, column + rank),
                )
            )
        row, column = row + size, column + rank
    product.refresh()
    return product


def _rank(linear: Any) -> int:
    return int(linear.r[linear.active_adapters[0]]) if hasattr(linear, "lora_A") else 0


def _bias(layers: Sequence[Any], sample: torch.Tensor) -> torch.Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    parts = [
        torch.zeros(layer.out_features, dtype=sample.dtype, device=sample.device) if layer.bias is None else layer.bias
        for layer in layers
    ]
    return torch.cat([part.detach() for part in parts])
