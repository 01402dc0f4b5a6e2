"""A base product and its low-rank terms: y = x W^T + s (x A^T) B^T forward; dx, dA and dB, or dW, backward.

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
there is one copy of each weight. Weights of four bits are turned into such a buffer for each use, or kept as one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from afina.engine.elementwise import Copy, wide_product
from afina.engine.nf4 import Nf4, from_bitsandbytes

ALIGN = {"cuda": 64, "meta": 64}
"""Elements to which the extra columns are rounded up: every row of a 16-bit buffer begins at 128 bytes, the GPU's line.
Products are made 64 columns at a time there, so fewer would save nothing; with 8 they are 2% slower on an H100."""

FOUR_BITS = 0.53
"""Bytes of a weight in four bits, its share of the scales included."""


@dataclass(frozen=True)
class Adapter:
    """One low-rank term: `a` (rank, K) and `b` (rows, rank) learn; it owns `rows` of y and `columns` of the extra r."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    rows: slice
    columns: slice


@dataclass(frozen=True)
class Learnt:
    """A linear layer that learns itself: `weight` (rows, K) and `bias` (rows,) or None."""

    rows: slice
    weight: nn.Parameter
    bias: nn.Parameter | None


class Scratch:
    """The one buffer that products with four-bit weights fill and use in turn. Its place never changes."""

    def __init__(self) -> None:
        self._needed = 0
        self._flat: torch.Tensor | None = None
        self._holder: object = None

    def ask(self, elements: int, dtype: torch.dtype) -> None:
        """Say, before the first use, how much will be needed."""
        self._needed = max(self._needed, elements * dtype.itemsize)

    @property
    def to_come(self) -> int:
        """Bytes that the first use will take."""
        return self._needed if self._flat is None else 0

    def get(self, holder: object, rows: int, columns: int, like: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """A buffer (rows, columns), and whether it still has what `holder` wrote there."""
        if self._flat is None:
            self._flat = torch.empty(self._needed, dtype=torch.uint8, device=like.device)
        written, self._holder = self._holder is holder, holder
        return self._flat[: rows * columns * like.element_size()].view(like.dtype).view(rows, columns), written

    def forget(self) -> None:
        """What learns has changed."""
        self._holder = None


@dataclass(eq=False)
class Product:
    """Linear layers over one input, with what PEFT attached to them.

    `n`, `k`, `r` are the parts of the buffer drawn above. It is `wide` for weights as they are; weights of four bits
    (`packed`, one a layer, with its rows) are turned into that of `scratch`, or `hold` one of their own. like: an empty
    tensor of the device and dtype that is computed in. scales: (r,) s of each extra column. bases: the linear layers,
    whose weights these are. bias: (N,) or None. dropout: of the adapters' input, while training; `number` tells its
    masks from other products'.
    """

    n: int
    k: int
    r: int
    bias: torch.Tensor | None
    like: torch.Tensor
    scratch: Scratch
    wide: torch.Tensor | None = None
    packed: list[tuple[slice, Nf4]] = field(default_factory=list)
    adapters: list[Adapter] = field(default_factory=list)
    learnt: list[Learnt] = field(default_factory=list)
    scales: torch.Tensor = field(default_factory=lambda: torch.ones(()))
    dropout: float = 0.0
    bases: list[Any] = field(default_factory=list)
    number: int = 0
    _fill: "Replayed | None" = None

    def copies(self, wide: torch.Tensor) -> list[Copy]:
        """What puts the adapters, and what else learns in another precision or lies elsewhere, into a buffer."""
        found = []
        for adapter in self.adapters:
            found.append((adapter.a.detach(), wide[self.n :, : self.k][adapter.columns], 1.0))
            found.append((adapter.b.detach(), wide[adapter.rows, self.k :][:, adapter.columns], adapter.scale))
        for learnt in self.learnt:
            if learnt.weight.data_ptr() != wide[learnt.rows].data_ptr():
                found.append((learnt.weight.detach(), wide[learnt.rows, : self.k], 1.0))
            if learnt.bias is not None and self.bias is not None:
                found.append((learnt.bias.detach()[None], self.bias[None, learnt.rows], 1.0))
        return found

    def placed(self) -> list[Copy]:
        """What must be copied whenever what learns has changed."""
        return [] if self.wide is None else self.copies(self.wide)

    @property
    def moved(self) -> int:
        """Bytes of weights that pass through memory for a forward and a backward before the products read them."""
        return 0 if self.wide is not None else round(2 * (FOUR_BITS + self.like.element_size()) * self.n * self.k)

    @property
    def unpacked(self) -> int:
        """Elements that `hold` would add."""
        return (self.n + self.r) * (self.k + self.r) if self.packed and self.wide is None else 0

    def hold(self) -> None:
        """Turn four-bit weights into a buffer of their own, once: more memory, the same numbers."""
        if self.wide is None:
            self.wide = torch.zeros(self.n + self.r, self.k + self.r, dtype=self.like.dtype, device=self.like.device)
            for rows, weight in self.packed:
                weight.fill(self.wide[rows, : self.k])

    def trial(self, tokens: int) -> Callable[[], object]:
        """A product as wide as this one, to be timed."""
        x, weight = self.like.new_zeros(tokens, self.k), self.like.new_zeros(self.n, self.k)
        return lambda: torch.mm(x, weight.t())

    def parameters(self) -> list[nn.Parameter]:
        """What learns, in the order in which `gradients` returns gradients."""
        found = [parameter for adapter in self.adapters for parameter in (adapter.a, adapter.b)]
        for learnt in self.learnt:
            found += [learnt.weight] if learnt.bias is None else [learnt.weight, learnt.bias]
        return found

    def weights(self) -> torch.Tensor:
        """The buffer (N + r, K + r), holding weights and adapters."""
        if self.wide is not None:
            return self.wide
        wide, written = self.scratch.get(self, self.n + self.r, self.k + self.r, self.like)
        if not written:
            if self._fill is None:
                self._fill = Replayed(wide.device, self._filling(wide))
            self._fill()
        return wide

    def _filling(self, wide: torch.Tensor) -> Callable[[], None]:
        """What writes weights and adapters into a buffer whose place does not change."""
        copy = copying(self.copies(wide))

        def fill() -> None:
            for rows, weight in self.packed:
                weight.fill(wide[rows, : self.k])
            if self.r:
                wide[:, self.k :].zero_()
                copy()
            wide[self.n + self.used :].zero_()

        return fill

    def forward(
        self,
        wide_x: torch.Tensor,
        residual: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        seed: int | None = None,
    ) -> torch.Tensor:
        """y (+ residual) from wide_x (tokens, K + r), the input in its first K columns; the rest is written here.

        out: y's place, which may be part of wider rows. seed: of the dropout, None for none.
        """
        wide = self.weights()
        if self.r:
            torch.mm(self.dropped(wide_x[:, : self.k], seed), wide[self.n :, : self.k].t(), out=wide_x[:, self.k :])
        weight, beside = wide[: self.n].t(), self.bias if residual is None else residual
        y = torch.mm(wide_x, weight, out=out) if beside is None else torch.addmm(beside, wide_x, weight, out=out)
        return y if residual is None or self.bias is None else y.add_(self.bias)

    def low_of(self, wide_x: torch.Tensor) -> torch.Tensor:
        """s x A^T (tokens, used) after `forward`, which dB needs, in memory of its own."""
        return wide_x[:, self.k :][:, : self.used] * self.scales[: self.used]

    def dropped(self, x: torch.Tensor, seed: int | None) -> torch.Tensor:
        """x (tokens, K) as the adapters see it: a share of it zero, the rest larger, the same for the same seed."""
        if not self.dropout or seed is None:
            return x
        return x * keep_mask(x, self.dropout, seed + self.number)

    @property
    def used(self) -> int:
        """How many of the r extra columns are adapters'; the others are zero."""
        return self.adapters[-1].columns.stop if self.adapters else 0

    def widen(self, wide_dy: torch.Tensor) -> None:
        """Write dy sB into the last columns of wide_dy (tokens, N + r), whose first N hold dy."""
        if self.r:  # the zeros beside B too: what was in these columns before may be no number
            torch.mm(wide_dy[:, : self.n], self.weights()[: self.n, self.k :], out=wide_dy[:, self.n :])

    def backward(self, wide_dy: torch.Tensor, seed: int | None = None) -> torch.Tensor:
        """dx (tokens, K) from wide_dy (tokens, N + r), after `widen`."""
        wide = self.weights()
        if not self.dropout or seed is None or not self.r:
            return torch.mm(wide_dy, wide[:, : self.k])
        dx = torch.mm(wide_dy[:, : self.n], wide[: self.n, : self.k])
        return dx.add_(self.dropped(torch.mm(wide_dy[:, self.n :], wide[self.n :, : self.k]), seed))

    def gradients(
        self, wide_dy: torch.Tensor, x: torch.Tensor, low: torch.Tensor, seed: int | None = None
    ) -> list[torch.Tensor]:
        """Of what learns, after `widen`; x: (tokens, K), low: `low_of` of it. dA: (rank, K), dB: (rows, rank)."""
        found = []
        if self.adapters:
            downs = wide_product(wide_dy[:, self.n :][:, : self.used].t(), self.dropped(x, seed))
            ups = wide_product(wide_dy[:, : self.n].t(), low)
            for adapter in self.adapters:
                up = ups[adapter.rows, adapter.columns].contiguous()
                found += [downs[adapter.columns].to(adapter.a.dtype), up.to(adapter.b.dtype)]
        if self.learnt:  # one product for all of them: small ones alone leave most of a GPU idle
            exact = self.learnt[0].weight.element_size() > 2
            dy = wide_dy[:, : self.n]
            of_weights = (wide_product if exact else torch.mm)(dy.t(), x)
            sums = None
            if self.bias is not None:
                sums = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
            for learnt in self.learnt:
                found.append(of_weights[learnt.rows].to(learnt.weight.dtype))
                if learnt.bias is not None and sums is not None:
                    found.append(sums[learnt.rows].to(learnt.bias.dtype))
        return found


def keep_mask(x: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """0 or 1 / (1 - dropout) for each element of x, a function of seed, shape and device alone."""
    generator = torch.Generator(x.device).manual_seed(seed)
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout, generator=generator)
    return kept.to(x.dtype) / (1 - dropout)


def copying(copies: Sequence[Copy]) -> Callable[[], None]:
    """What copies many matrices as they are then, each times a factor: one launch on a GPU. Their places stay."""
    if not copies:
        return lambda: None
    if copies[0][0].is_cuda and len({(a.dtype, b.dtype) for a, b, _factor in copies}) == 1:
        from afina.engine import movers

        return movers.copying(copies)
    sources, targets, factors = (list(parts) for parts in zip(*copies, strict=True))
    return lambda: torch._foreach_copy_(targets, torch._foreach_mul(sources, factors))


class Replayed:
    """A few kernels over places that do not change, launched as one: on a GPU they are recorded at the second call."""

    def __init__(self, device: torch.device, work: Callable[[], None]) -> None:
        self._work, self._calls = work, 0
        self._graph = torch.cuda.CUDAGraph() if device.type == "cuda" else None

    def __call__(self) -> None:
        """Do the work."""
        self._calls += 1
        if self._graph is None or self._calls == 1:  # the first call compiles what is to be recorded
            self._work()
            return
        if self._calls == 2:
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._work()
        self._graph.replay()


def make_product(linears: Sequence[Any], scratch: Scratch, dtype: torch.dtype) -> Product:
    """Concatenate linear layers (plain or NF4, alone or wrapped by PEFT's LoRA) into one product.

    Plain weights become views of its buffer, unless they learn in another precision. `dtype` is what is computed in.
    """
    layers: list[Any] = [getattr(linear, "base_layer", linear) for linear in linears]
    k = layers[0].in_features
    sizes = [layer.out_features for layer in layers]
    ranks = [int(linear.r[name]) if (name := _adapter_of(linear)) else 0 for linear in linears]
    device = layers[0].weight.device
    align = ALIGN.get(device.type, 8)
    n, r = sum(sizes), -(-sum(ranks) // align) * align
    rows = [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
    columns = [slice(end - rank, end) for rank, end in zip(ranks, accumulate(ranks), strict=True)]
    packed = [from_bitsandbytes(layer.weight) for layer in layers]
    product = Product(n, k, r, _bias(layers, dtype), torch.empty(0, dtype=dtype, device=device), scratch)
    if all(weight is None for weight in packed):
        product.wide = torch.zeros(n + r, k + r, dtype=dtype, device=device)
        for layer, place in zip(layers, rows, strict=True):
            product.wide[place, :k] = layer.weight.detach()
            if layer.weight.dtype == dtype or not layer.weight.requires_grad:
                layer.weight.data = product.wide[place, :k]
            if layer.weight.requires_grad:
                product.learnt.append(Learnt(place, layer.weight, layer.bias))
    else:
        product.packed = [(place, weight) for place, weight in zip(rows, packed, strict=True) if weight is not None]
        scratch.ask((n + r) * (k + r), dtype)
    product.scales, product.bases = torch.ones(r, dtype=dtype, device=device), layers
    for linear, place, column in zip(linears, rows, columns, strict=True):
        if name := _adapter_of(linear):
            scale = float(linear.scaling[name])
            product.adapters.append(
                Adapter(linear.lora_A[name].weight, linear.lora_B[name].weight, scale, place, column)
            )
            product.scales[column] = scale
            product.dropout = float(getattr(linear.lora_dropout[name], "p", 0.0))
    return product


def _adapter_of(linear: Any) -> str | None:
    return str(linear.active_adapters[0]) if hasattr(linear, "lora_A") else None


def _bias(layers: Sequence[Any], dtype: torch.dtype) -> torch.Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    zeros = [torch.zeros(layer.out_features, dtype=dtype, device=layer.weight.device) for layer in layers]
    parts = zip(layers, zeros, strict=True)
    return torch.cat([zero if layer.bias is None else layer.bias.detach().to(dtype) for layer, zero in parts])
