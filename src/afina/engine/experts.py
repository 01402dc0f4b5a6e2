"""A mixture's experts: the products of the rows that each one sees, and what stands between and around them.

Experts are frozen: their products go forward and to dx. Their weights lie as transformers has them, in eight bits, or
packed in MXFP4, unpacked matrix by matrix into a scratch that all layers share. Low-rank terms are grouped products
too. The plain twins here define what the Triton kernels (expert_kernels.py) do.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from afina.engine.eight import FP8, Format, Rows, refuse_no_numbers, spread, wide_of
from afina.engine.elementwise import twin_of, wide_product
from afina.engine.grouped import grouped, grouped_add, grouped_outer
from afina.engine.products import FOUR_BITS, Scratch
from afina.engine.router import LowRank, Routing, beneath
from afina.model.mxfp4 import dequantise

on_gpu = twin_of("expert_kernels")
ALIGN = 8
"""To a multiple of which ranks are filled up: a row of 16-bit numbers then begins at 16 bytes."""


@dataclass(eq=False)
class Matrix:
    """One matrix of all experts, frozen. plain: (experts, out, in), any strides; or `blocks` and `scales`, see
    model/mxfp4.py; or `eight`, rows (experts * out, in). bias: (experts, out), which is added by whoever reads the
    product next. like: an empty tensor of the device and dtype that is computed in. base: whose weights these are.
    """

    experts: int
    n: int
    k: int
    like: torch.Tensor
    scratch: Scratch
    plain: torch.Tensor | None = None
    blocks: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    adapter: LowRank | None = None
    eight: Rows | None = None
    base: nn.Parameter | None = None

    def __post_init__(self) -> None:
        if self.plain is None:
            self.scratch.ask(self.experts * self.n * self.k, self.like.dtype)

    @property
    def r(self) -> int:
        """Rank of the low-rank term as it is computed, 0 for none."""
        return 0 if self.adapter is None else -(-self.adapter.a.shape[0] // self.experts // ALIGN) * ALIGN

    @property
    def moved(self) -> int:
        """Bytes that unpacking it forward and backward moves."""
        if self.plain is not None:
            return 0
        packed = FOUR_BITS if self.eight is None else 1
        return round(2 * (packed + self.like.element_size()) * self.experts * self.n * self.k)

    def hold(self) -> None:
        """Unpack for good: more memory, the same numbers."""
        if self.plain is None:
            self.plain = self.like.new_empty(self.experts, self.n, self.k)
            self._fill(self.plain)

    def weights(self) -> torch.Tensor:
        """(experts, out, in); of packed ones until another matrix is asked for."""
        if self.plain is not None:
            return self.plain
        flat, written = self.scratch.get(self, self.experts * self.n, self.k, self.like)
        place = flat.view(self.experts, self.n, self.k)
        if not written:
            self._fill(place)
        return place

    def in_eight_bits(self, form: Format, scratch: Scratch) -> "Matrix":
        """The same with its weights in eight bits, a scale for each expert's output, unpacked into `scratch`; those
        packed in four are smaller as they are. e4m3's scales are powers of two, so that what was unpacked from MXFP4
        stays exact. Raises ModelError where a weight is no number."""
        if self.plain is None or self.eight is not None:
            return self
        rows = Rows.empty(self.experts * self.n, self.k, 0, form, self.like.device)
        for number, weight in enumerate(self.plain):
            part, wide = rows.part(slice(number * self.n, (number + 1) * self.n)), wide_of(weight)
            largest = wide.abs().amax(1)
            if form is FP8:
                power = torch.frexp(largest / form.largest)[1]
                largest = torch.ldexp(torch.full_like(largest, form.largest), power) + largest * 0
            part.write(wide, form.largest, largest)
        return replace(self, plain=None, scratch=scratch, eight=refuse_no_numbers(rows))

    def let_go(self) -> None:
        """Free the weights as they were, in the transformers model too, which cannot run any more."""
        if self.base is not None and self.plain is not None:
            self.base.data, self.plain = self.base.data.new_empty(0), None

    def _fill(self, out: torch.Tensor) -> None:
        if self.eight is not None:
            spread(self.eight, out.view(-1, self.k))
            return
        if self.blocks is None or self.scales is None:
            raise RuntimeError("neither plain nor packed")
        fill_mxfp4(self.blocks, self.scales, out)

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y (pairs, out) without bias from x (pairs, in), and s x A^T (pairs, r)."""
        y = grouped(x, self.weights().transpose(1, 2), ends)
        if self.adapter is None:
            return y, None
        low = self._low(x, ends)
        return grouped_add(y, low, self._b().transpose(1, 2), ends), low

    def _low(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        scale = 1.0 if self.adapter is None else self.adapter.scale
        return grouped(x, self._a().transpose(1, 2), ends) * scale

    def backward(self, dy: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """dx (pairs, in) from dy (pairs, out), and s dy B (pairs, r)."""
        dx = grouped(dy, self.weights(), ends)
        if self.adapter is None:
            return dx, None
        up = grouped(dy, self._b(), ends) * self.adapter.scale
        return grouped_add(dx, up, self._a(), ends), up

    def gradients(
        self,
        x: torch.Tensor,
        dy: torch.Tensor,
        low: torch.Tensor | None,
        up: torch.Tensor | None,
        ends: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Of A and B in PEFT's shapes; low and up as `forward` and `backward` gave them."""
        if self.adapter is None or low is None or up is None:
            return []
        a, b = self.adapter.a, self.adapter.b
        rank = a.shape[0] // self.experts
        of_a = grouped_outer(up, x, ends)[:, :rank].flatten(0, 1)
        of_b = grouped_outer(low, dy, ends)[:, :rank].permute(2, 1, 0).flatten(1)
        return [of_a.to(a.dtype), of_b.to(b.dtype)]

    def parameters(self) -> list[nn.Parameter]:
        """What learns, in the order of `gradients`."""
        return [] if self.adapter is None else [self.adapter.a, self.adapter.b]

    def _a(self) -> torch.Tensor:
        """(experts, r, in) as computed with."""
        a = self._adapter.a.detach().view(self.experts, -1, self.k)
        return F.pad(a.to(self.like.dtype), (0, 0, 0, self.r - a.shape[1]))

    def _b(self) -> torch.Tensor:
        """(experts, out, r) as computed with."""
        b = self._adapter.b.detach().view(self.n, -1, self.experts).permute(2, 0, 1)
        whole = self.like.new_zeros(self.experts, self.n, self.r)
        whole[:, :, : b.shape[2]] = b
        return whole

    @property
    def _adapter(self) -> LowRank:
        if self.adapter is None:
            raise RuntimeError("no adapter")
        return self.adapter


@dataclass(frozen=True)
class Gating:
    """(up + shift) gate sigmoid(alpha gate), gate below `limit`, up within it on both sides.

    interleaved: gates and ups take turns in a row (gpt-oss); else all gates come first.
    """

    alpha: float = 1.0
    limit: float = float("inf")
    shift: float = 0.0
    interleaved: bool = False

    def parts(self, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of gate and up."""
        if self.interleaved:
            return gate_up[..., ::2], gate_up[..., 1::2]
        gate, up = gate_up.chunk(2, dim=-1)
        return gate, up


@dataclass
class Seen:
    """What the experts' backward needs beside gate_up: the low-rank products, where there are any."""

    low_gate_up: torch.Tensor | None = None
    low_down: torch.Tensor | None = None


@dataclass(eq=False)
class Experts:
    """gate_up: hidden to twice the inner width, down: back."""

    gate_up: Matrix
    down: Matrix
    gating: Gating = field(default_factory=Gating)

    def in_eight_bits(self, form: Format, scratch: Scratch) -> "Experts":
        """See Matrix."""
        gate_up, down = (part.in_eight_bits(form, scratch) for part in (self.gate_up, self.down))
        return replace(self, gate_up=gate_up, down=down)

    def let_go(self) -> None:
        """See Matrix."""
        self.gate_up.let_go()
        self.down.let_go()

    def open(self, n: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor | None]:
        """gate_up (pairs, 2 inner) without bias of n (tokens, hidden), and its low-rank product."""
        return self.gate_up.forward(n.index_select(0, routing.tokens), routing.ends)

    def close(self, gate_up: torch.Tensor, routing: Routing, residual: torch.Tensor, out: torch.Tensor) -> Seen:
        """out (tokens, hidden) = residual + what each token's experts say, times their weights."""
        act = gated(gate_up, self.gate_up.bias, routing.experts, self.gating)
        down, low = self.down.forward(act, routing.ends)
        combine(down, routing, out, bias=self.down.bias, residual=residual, weighted=True)
        return Seen(low_down=low)

    def backward(
        self, dy: torch.Tensor, n: torch.Tensor, gate_up: torch.Tensor | None, routing: Routing, seen: Seen
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """From dy (tokens, hidden): gradients of n, of the weights (tokens, chosen), and of what learns.

        gate_up, if it was saved, is overwritten; else it is made again, while down's turn in the scratch is over.
        """
        ends = routing.ends
        d_rows = dy.index_select(0, routing.tokens)
        d, up_down = self.down.backward(d_rows, ends)  # not yet times the weights: their gradient is d act
        if self.down.adapter is None:
            del d_rows
        rows = None
        if gate_up is None or self.gate_up.adapter is not None:
            rows = n.index_select(0, routing.tokens)
        if gate_up is None and rows is not None:
            gate_up, seen.low_gate_up = self.gate_up.forward(rows, ends)
        if gate_up is None:
            raise RuntimeError("gate and up are neither saved nor made again")
        if self.gate_up.adapter is None:
            rows = None
        share = routing.share
        of_pairs = gated_backward(d, gate_up, self.gate_up.bias, routing.experts, share, self.gating)
        d_weights = of_pairs.gather(0, routing.places.flatten()).view(routing.places.shape)
        if self.down.bias is not None:
            d_weights = d_weights + wide_product(dy, self.down.bias.t()).gather(1, routing.ids)
        of_down: list[torch.Tensor] = []
        if self.down.adapter is not None and seen.low_down is not None and up_down is not None:
            weight = share[:, None].to(dy.dtype)
            of_down = self.down.gradients(d, d_rows, seen.low_down * weight, up_down * weight, ends)
            del d_rows
        del d
        d_n_rows, up = self.gate_up.backward(gate_up, ends)
        of_gate_up = self.gate_up.gradients(rows, gate_up, seen.low_gate_up, up, ends) if rows is not None else []
        d_n = torch.empty_like(n)
        combine(d_n_rows, routing, d_n)
        return d_n, d_weights, [*of_gate_up, *of_down]

    def parameters(self) -> list[nn.Parameter]:
        """What learns, in the order of `backward`'s gradients."""
        return [*self.gate_up.parameters(), *self.down.parameters()]


def make_experts(module: Any, scratch: Scratch, dtype: torch.dtype) -> Experts:
    """Of transformers' experts, packed or not, or of PEFT's wrappers around them; plain weights are shared."""
    base, adapters = beneath(module)
    interleaved = hasattr(base, "limit")  # gpt-oss's, packed or not
    gating = Gating(float(base.alpha), float(base.limit), 1.0, True) if interleaved else Gating()
    gate_up, down = (_matrix(base, name, adapters.get(name), scratch, dtype) for name in ("gate_up_proj", "down_proj"))
    return Experts(gate_up, down, gating)


def _matrix(base: Any, name: str, adapter: LowRank | None, scratch: Scratch, dtype: torch.dtype) -> Matrix:
    bias = getattr(base, f"{name}_bias", None)
    bias = None if bias is None else bias.detach()
    if hasattr(base, f"{name}_blocks"):
        blocks, scales = getattr(base, f"{name}_blocks"), getattr(base, f"{name}_scales")
        count, k, n = base.shape_of(name)
        like = torch.empty(0, dtype=dtype, device=blocks.device)
        return Matrix(count, n, k, like, scratch, None, blocks, scales, bias, adapter)
    weight = getattr(base, name).detach().to(dtype)
    plain = weight.transpose(1, 2) if hasattr(base, "limit") else weight
    like = weight.new_empty(0)
    return Matrix(
        plain.shape[0],
        plain.shape[1],
        plain.shape[2],
        like,
        scratch,
        plain,
        bias=bias,
        adapter=adapter,
        base=getattr(base, name),
    )


@on_gpu
def gated(gate_up: torch.Tensor, bias: torch.Tensor | None, experts: torch.Tensor, by: Gating) -> torch.Tensor:
    """(pairs, inner) of gate_up (pairs, 2 inner) and the bias (experts, 2 inner) of each row's expert."""
    gate, up = by.parts(_biased(gate_up, bias, experts))
    gate, up = gate.clamp(max=by.limit), up.clamp(-by.limit, by.limit)
    return ((up + by.shift) * gate * torch.sigmoid(by.alpha * gate)).to(gate_up.dtype)


@on_gpu
def gated_backward(
    d: torch.Tensor,
    gate_up: torch.Tensor,
    bias: torch.Tensor | None,
    experts: torch.Tensor,
    share: torch.Tensor,
    by: Gating,
) -> torch.Tensor:
    """Turn gate_up into its gradient and d into the forward's output, in place; returns d act of each row, (pairs,).

    d: (pairs, inner), the gradient of the output before its row's `share` is multiplied in.
    """
    raw_gate, raw_up = by.parts(_biased(gate_up, bias, experts))
    gate, up = raw_gate.clamp(max=by.limit), raw_up.clamp(-by.limit, by.limit)
    sigmoid = torch.sigmoid(by.alpha * gate)
    act = (up + by.shift) * gate * sigmoid
    wide = d.to(act.dtype)
    of_rows = (wide * act).sum(1)
    slope = wide * share[:, None].to(act.dtype)
    to_gate, to_up = by.parts(gate_up)
    to_gate.copy_(slope * (up + by.shift) * sigmoid * (1 + by.alpha * gate * (1 - sigmoid)) * (raw_gate <= by.limit))
    to_up.copy_(slope * gate * sigmoid * (raw_up.abs() <= by.limit))
    d.copy_(act)
    return of_rows


def _biased(gate_up: torch.Tensor, bias: torch.Tensor | None, experts: torch.Tensor) -> torch.Tensor:
    wide = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32))
    return wide if bias is None else wide + bias[experts]


@on_gpu
def combine(
    rows: torch.Tensor,
    routing: Routing,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    weighted: bool = False,
) -> torch.Tensor:
    """out (tokens, hidden): each token's rows of `rows` (pairs, hidden) summed, with their experts' bias (experts,
    hidden), times their weights where `weighted`, beside a residual. Summed in at least fp32, in a fixed order."""
    parts = rows[routing.places].to(torch.promote_types(rows.dtype, torch.float32))
    if bias is not None:
        parts = parts + bias[routing.ids]
    if weighted:
        parts = parts * routing.weights[..., None]
    total = parts.sum(1)
    return out.copy_(total if residual is None else total + residual)


def fill_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Unpack blocks (experts, rows, groups, 16) and scales (experts, rows, groups) into (experts, rows, columns)."""
    if out.is_cuda and out.dtype == torch.bfloat16:
        from afina.engine import expert_kernels

        expert_kernels.fill_mxfp4(blocks, scales, out)
        return
    for place, packed, powers in zip(out, blocks, scales, strict=True):
        place.copy_(dequantise(packed, powers, out.dtype))
