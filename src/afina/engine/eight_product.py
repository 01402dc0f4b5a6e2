"""A product whose frozen weights are held in eight bits: y = x W^T forward and dx = dy W backward, both at 8-bit rate.

x has a scale a token, W one an output. W's scales lie along what dx = dy W sums over, so they are folded into dy before
it is quantised: one set of 8-bit weights serves both directions. Hopper's e4m3 products want both factors with what is
summed over lying side by side, so W is turned over into a scratch buffer going back (1% of a step).

The adapters are exact: x A^T and dy B are products of 16-bit A and B with the 8-bit rows, and their term joins the
base's as more columns of the same product, in two halves of e4m3, which is eight bits of precision:

    y = [x, high, rest, high] [W, B high, B high, B rest]^T         dx = [dy, ...] [W; A ...]

INT8 has no such range: there, and where dropout makes the adapters' input another, the term is added afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from afina.engine import eight
from afina.engine.eight import FP8, Format, Rows
from afina.engine.elementwise import Copy, wide_product
from afina.engine.products import FOUR_BITS, Product, Scratch

ALIGN = 16
"""Bytes at which every row of a factor must begin."""
TILE = 128
"""What is appended fills whole tiles of the sum: rows that end within one took a fifth more time on Hopper."""


@dataclass(kw_only=True, eq=False)
class EightProduct(Product):
    """See Product. weights8: (N, K + appended) in eight bits, or scales alone where they are unpacked for each use
    into `straight`; down: (r, K) every A; up: (N, r) every sB in its place; units: of their columns. first, factors:
    (N,) an output's first column of `up`, and what dB is multiplied by, as dy is folded. own: the weights turned over
    for good.
    """

    form: Format
    weights8: Rows
    straight: Scratch
    turned: Scratch
    down: torch.Tensor
    up: torch.Tensor
    units: torch.Tensor
    inverse: torch.Tensor
    ones: torch.Tensor
    first: torch.Tensor
    factors: torch.Tensor
    own: torch.Tensor | None = None

    @classmethod
    def of(
        cls, exact: Product, form: Format, straight: Scratch, turned: Scratch, *, hold: bool = True
    ) -> "EightProduct":
        """From a product with the weights as they are, or in four bits. Raises ModelError where they are no numbers.

        `exact` is as before. hold: weights of four bits are held in eight from now on, else unpacked for each use.
        """
        device, n, k, r = exact.like.device, exact.n, exact.k, -(-exact.used // 8) * 8
        appended = -(-3 * r // TILE) * TILE if form is FP8 else 0
        weights = Rows.empty(n, k, appended, form, device)
        weights.values[:, k:] = torch.zeros((), dtype=form.dtype, device=device)
        eight.refuse_no_numbers(eight.quantise(exact.weights()[:n, :k], weights, weights=True))
        turned.ask(k * (n + appended), form.dtype)
        packed = [] if hold else exact.packed
        if packed:
            straight.ask(n * (k + appended), form.dtype)
            weights = Rows(weights.values.new_empty(0, k + appended), weights.scales, k, form)
        inverse = 1 / weights.scales
        first, factors = torch.zeros(n, dtype=torch.int32, device=device), inverse.clone()
        for adapter in exact.adapters:
            first[adapter.rows] = adapter.columns.start
            factors[adapter.rows] *= adapter.scale
        made = cls(
            n, k, r, exact.bias, exact.like, straight, adapters=exact.adapters, scales=exact.scales,
            dropout=exact.dropout, form=form, weights8=weights, straight=straight, turned=turned, packed=packed,
            down=torch.zeros(r, k, dtype=exact.like.dtype, device=device),
            up=torch.zeros(n, r, dtype=exact.like.dtype, device=device), units=torch.ones(2, device=device),
            inverse=inverse, ones=torch.ones(k, device=device), first=first, factors=factors, bases=exact.bases,
        )  # fmt: skip
        made.choose_units()
        return made

    def choose_units(self) -> None:
        """In which units an adapter's columns are written, so that neither half of the term saturates.

        Forward x A^T is at most peak |A|_1 for a row; what tokens reach is far below, an eighth of it is left room for.
        Backward A takes a seventh of what can be stored, as dy B may grow.
        """
        if self.adapters:
            downs = [adapter.a.detach().abs() for adapter in self.adapters]
            most = torch.stack([down.sum(1).max().float() for down in downs]).max()
            self.units[0] = (self.form.peak * most / self.form.largest / 8).clamp(min=2**-6)
            largest = torch.stack([down.max().float() for down in downs]).max()
            self.units[1] = self.form.largest / 7 / largest.clamp(min=1e-6)

    def placed(self) -> list[Copy]:
        """See Product."""
        found = []
        for adapter in self.adapters:
            found.append((adapter.a.detach(), self.down[adapter.columns], 1.0))
            found.append((adapter.b.detach(), self.up[adapter.rows, adapter.columns], adapter.scale))
        return found

    @property
    def moved(self) -> int:
        """See Product."""
        if self.packed:
            return round((2 if self.own is None else 1) * (FOUR_BITS + 1) * self.n * self.k)
        return 2 * self.n * self.k if self.own is None else 0

    @property
    def unpacked(self) -> int:
        """See Product: weights that are turned over for good, in elements of what is computed in."""
        return 0 if self.own is not None else self.k * (self.n + self._appended) // self.like.element_size()

    def hold(self) -> None:
        """Keep the weights turned over too, where there is room, rather than turn them over at each use."""
        if self.own is None:
            self.own = self._turn(self.weights8.values.new_empty(self.k, self.n + self._appended))

    def _turn(self, out: torch.Tensor) -> torch.Tensor:
        if self.packed:
            return eight.unpack_turned(self.packed, self.weights8.scales, self.form, out)
        return eight.turn(self.weights8, out)

    def trial(self, tokens: int) -> Callable[[], object]:
        """See Product."""
        x = eight.quantise(
            self.like.new_zeros(tokens, self.k), Rows.empty(tokens, self.k, 0, self.form, self.like.device)
        )
        values, ones = (
            torch.zeros(self.n, self.k, dtype=self.form.dtype, device=self.like.device),
            torch.ones_like(self.fold),
        )
        return lambda: eight.multiply(x, values, ones, self.like)

    def let_go(self) -> None:
        """Free the weights as they were, in the transformers model too, which cannot run any more."""
        for base in [] if self.packed else self.bases:
            base.weight.data = base.weight.data.new_empty(0)

    @property
    def fold(self) -> torch.Tensor:
        """(N,) by which dy's columns are multiplied before it is quantised."""
        return self.weights8.scales

    def inputs(self, tokens: int) -> Rows:
        """Room for x."""
        return Rows.empty(tokens, self.k, self._appended, self.form, self.like.device)

    def slopes(self, tokens: int) -> Rows:
        """Room for dy, folded."""
        return Rows.empty(tokens, self.n, self._appended, self.form, self.like.device)

    @property
    def _appended(self) -> int:
        return self.weights8.values.shape[1] - self.k

    def _weights(self) -> Rows:
        if not self.packed:
            return self.weights8
        values, written = self.straight.get(self, self.n, self.k + self._appended, self.weights8.values)
        rows = Rows(values, self.weights8.scales, self.k, self.form)
        return rows if written else eight.unpack(self.packed, rows)

    def _appends(self, seed: int | None) -> bool:
        return self._appended > 0 and not self._drops(seed)

    def _drops(self, seed: int | None) -> bool:
        return bool(self.dropout) and seed is not None

    def low(self, x: Rows, seed: int | None = None) -> torch.Tensor:
        """x A^T (tokens, r); what x needs for `through` is written behind it."""
        if not self.r:
            return self.like.new_empty(x.values.shape[0], 0)
        if not self._drops(seed):
            return eight.inward(x, self.down, None, self.units[:1] if self._appended else None)
        x.values[:, self.k :].view(torch.uint8).zero_()
        return torch.mm(self.dropped(x.exact(self.like.dtype), seed), self.down.t())

    def through(self, x: Rows, low: torch.Tensor, seed: int | None = None) -> torch.Tensor:
        """y (tokens, N), after `low`."""
        weights = self._weights()
        if self._appended:
            eight.append_up(weights, self.up, self.units[:1])
        y = eight.multiply(x, weights.values, weights.scales, self.like, self.bias)
        return y if self._appends(seed) or not self.r else y.addmm_(low, self.up.t())

    def d_low(self, dy: Rows, seed: int | None = None) -> torch.Tensor:
        """dy sB (tokens, r), dy folded; what dy needs for `back` is written behind it."""
        if not self.r:
            return self.like.new_empty(dy.values.shape[0], 0)
        if self._drops(seed):
            dy.values[:, self.n :].view(torch.uint8).zero_()
        return eight.inward(dy, self.up.t(), self.inverse, self.units[1:] if self._appends(seed) else None)

    def back(self, dy: Rows, d_low: torch.Tensor, seed: int | None = None) -> torch.Tensor:
        """dx (tokens, K), after `d_low`."""
        appends = self._appends(seed)
        turned, written = self.own, False
        if turned is None:
            turned, written = self.turned.get(self, self.k, self.n + self._appended, self.weights8.values)
            if not written:
                self._turn(turned)
        if self._appended and not written:
            eight.append_down(turned, self.n, self.down, self.units[1:], self.form)
        dx = eight.multiply(dy, turned, self.ones, self.like)
        if appends or not self.r:
            return dx
        if self._drops(seed):
            return dx.add_(self.dropped(torch.mm(d_low, self.down), seed))
        return dx.addmm_(d_low, self.down)

    def of_adapters(
        self, dy: Rows, d_low: torch.Tensor, x: Rows | torch.Tensor, low: torch.Tensor, seed: int | None = None
    ) -> list[torch.Tensor]:
        """Gradients of A and B, adapter by adapter; x as rows in eight bits or as it was."""
        if not self.adapters:
            return []
        if self._drops(seed) and isinstance(x, Rows):
            x = x.exact(self.like.dtype)
        dtype, rank = self.adapters[0].a.dtype, max(adapter.b.shape[1] for adapter in self.adapters)
        if isinstance(x, Rows):
            downs = eight.outward(x, d_low, dtype)
        else:
            downs = wide_product(d_low.t(), self.dropped(x, seed)).to(dtype)
        ups = eight.outward_turned(dy, low, self.first, self.factors, rank, dtype)
        found = []
        for adapter in self.adapters:
            found += [downs[adapter.columns], ups[adapter.rows, : adapter.b.shape[1]]]
        return found

    # As Product is used where nothing before it writes eight bits: rows are quantised here, in a pass of their own.

    def forward(
        self,
        wide_x: torch.Tensor,
        residual: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        seed: int | None = None,
    ) -> torch.Tensor:
        """See Product."""
        rows = eight.quantise(wide_x[:, : self.k], self.inputs(wide_x.shape[0]))
        low = self.low(rows, seed)
        wide_x[:, self.k :][:, : self.r] = low
        y = self.through(rows, low, seed)
        if residual is not None:
            y = y.add_(residual)
        return y if out is None else out.copy_(y)

    def widen(self, wide_dy: torch.Tensor) -> None:
        """See Product."""
        torch.mm(wide_dy[:, : self.n], self.up, out=wide_dy[:, self.n :][:, : self.r])

    def backward(self, wide_dy: torch.Tensor, seed: int | None = None) -> torch.Tensor:
        """See Product."""
        rows = eight.quantise(wide_dy[:, : self.n], self.slopes(wide_dy.shape[0]), self.fold)
        return self.back(rows, self.d_low(rows, seed), seed)

    def weights(self) -> torch.Tensor:
        """There are none in the precision that is computed in."""
        raise RuntimeError("these weights are in eight bits")
