"""Rows in eight bits, a scale for each: e4m3 (Micikevicius et al., 2022, arXiv:2209.05433) or INT8.

Each is one pass over memory: the norms, SwiGLU and their backwards write their result in eight bits at once, for a pass
of its own would eat a third of what 8-bit products gain. The plain code here is the definition; kernels in
eight_kernels.py, eight_matrix.py and eight_movers.py run on a GPU and are held to it. A row whose largest magnitude is
m has the scale m / peak; a row of zeros stays zeros, and a row with a NaN or an infinity has a scale that is no number:
what is broken stays visible.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from afina.engine.elementwise import Norm, gather_rotated, norm, norm_backward, swiglu_backward
from afina.engine.nf4 import Nf4
from afina.errors import ModelError
from afina.language import _

TINY = 1e-30
"""The least magnitude that a row's scale is made for; smaller rows are zeros."""


@dataclass(frozen=True)
class Format:
    """peak: to what the largest of a row is scaled. e4m3 leaves room above it for what is appended to the rows: as its
    steps are relative, that costs nothing. weights_peak: the same of weights. largest: what can be stored at all."""

    name: str
    dtype: torch.dtype
    peak: float
    weights_peak: float
    largest: float

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """To the nearest that can be stored; beyond the largest to the largest."""
        values = values.clamp(-self.largest, self.largest)
        if self.dtype == torch.int8:
            values = (values + 0.5).floor()
        return values.to(self.dtype)


FP8 = Format("fp8", torch.float8_e4m3fn, 224.0, 28.0, 448.0)
INT8 = Format("int8", torch.int8, 127.0, 127.0, 127.0)


@dataclass(frozen=True)
class Rows:
    """values: (rows, width + appended) in eight bits; scales: (rows,) fp32. What is appended belongs to `append`."""

    values: torch.Tensor
    scales: torch.Tensor
    width: int
    form: Format

    @classmethod
    def empty(cls, count: int, width: int, appended: int, form: Format, device: torch.device) -> "Rows":
        """Room for rows."""
        values = torch.empty(count, width + appended, dtype=form.dtype, device=device)
        return cls(values, torch.empty(count, dtype=torch.float32, device=device), width, form)

    def part(self, rows: slice) -> "Rows":
        """Some of the rows, the same memory."""
        return Rows(self.values[rows], self.scales[rows], self.width, self.form)

    def exact(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(rows, width), what the eight bits mean."""
        return self.values[:, : self.width].to(dtype) * self.scales[:, None].to(dtype)

    def write(self, x: torch.Tensor, peak: float | None = None, magnitude: torch.Tensor | None = None) -> None:
        """Round x (rows, width) into place; magnitude: (rows,) in place of the largest of each row."""
        wide = wide_of(x)
        largest = wide.abs().amax(1) if magnitude is None else magnitude
        scales = largest.clamp(min=TINY) / (peak or self.form.peak)
        self.scales.copy_(scales)
        self.values[:, : self.width] = self.form.round(wide / scales[:, None])


def quantise(x: torch.Tensor, to: Rows, fold: torch.Tensor | None = None, *, weights: bool = False) -> Rows:
    """x (rows, width), its columns times `fold` (width,) where given; `weights` are scaled to a peak of their own."""
    peak = to.form.weights_peak if weights else to.form.peak
    if x.is_cuda:
        from afina.engine import eight_kernels

        return eight_kernels.quantise(x, to, fold, peak)
    to.write(x if fold is None else wide_of(x) * fold, peak)
    return to


def norm_rows(
    x: torch.Tensor, by: Norm, to: Rows, past: torch.Tensor | None = None, total: torch.Tensor | None = None
) -> Rows:
    """The RMS norm of x, or of `total` = x + past where those are given. x, past, total: (rows, width)."""
    if x.is_cuda:
        from afina.engine import eight_kernels

        return eight_kernels.norm_rows(x, by, to, past, total)
    if past is not None and total is not None:
        x = total.copy_(wide_of(x) + past)
    to.write(norm(x, by, torch.empty_like(x)))
    return to


def norm_backward_rows(
    dy: torch.Tensor,
    x: torch.Tensor,
    by: Norm,
    dx: torch.Tensor,
    residual: torch.Tensor,
    again: Rows,
    to: Rows | None = None,
    fold: torch.Tensor | None = None,
) -> None:
    """dx of the RMS norm plus `residual`; the norm's output into `again`; dx, its columns times `fold`, into `to`."""
    if x.is_cuda:
        from afina.engine import eight_kernels

        eight_kernels.norm_backward_rows(dy, x, by, dx, residual, again, to, fold)
        return
    found, y = torch.empty_like(wide_of(x)), torch.empty_like(x)
    norm_backward(dy, x, by, found, residual=residual, y=y)
    again.write(y)
    dx.copy_(found)
    if to is not None and fold is not None:
        to.write(found * fold)


def swiglu_rows(gate_up: torch.Tensor, to: Rows) -> torch.Tensor:
    """silu(gate) * up. gate_up: (rows, 2 width). Returns what `swiglu_backward_rows` needs of each row, (3, rows) fp32:
    the scale, and the largest magnitudes of silu(gate) and of up.
    """
    if gate_up.is_cuda:
        from afina.engine import eight_kernels

        return eight_kernels.swiglu_rows(gate_up, to)
    gate, up = wide_of(gate_up).chunk(2, dim=1)
    silu = torch.nn.functional.silu(gate)
    to.write(silu * up)
    return torch.stack([to.scales, silu.abs().amax(1), up.abs().amax(1)]).float()


def swiglu_backward_rows(
    d: torch.Tensor, gate_up: torch.Tensor, fold: torch.Tensor, known: torch.Tensor, to: Rows, again: Rows
) -> None:
    """The gradient of gate and up, times `fold` (2 width,), into `to`; the forward's output into `again`.

    d: (rows, width); gate_up: (rows, 2 width); known: what `swiglu_rows` returned. e4m3 takes a bound for the largest
    of a row, from those of its factors: a few times too large costs it nothing, and a pass over the row is spared.
    """
    largest = fold.view(2, -1).amax(1) if to.form.dtype != torch.int8 else None
    if gate_up.is_cuda:
        from afina.engine import eight_kernels

        eight_kernels.swiglu_backward_rows(d, gate_up, fold, largest, known, to, again)
        return
    wide = wide_of(gate_up)
    slopes, act = wide.clone(), wide_of(d).clone()
    swiglu_backward(act, slopes)
    if largest is None:
        to.write(slopes * fold)
    else:
        most = torch.maximum(SILU_SLOPE * known[2] * largest[0], known[1] * largest[1])
        to.write(slopes * fold, magnitude=wide_of(d).abs().amax(1) * most)
    again.write(act, magnitude=known[0] * again.form.peak)


SILU_SLOPE = 1.1
"""The largest slope of silu is 1.0998."""


def cross_entropy_rows(logits: torch.Tensor, targets: torch.Tensor, fold: torch.Tensor, to: Rows) -> torch.Tensor:
    """Loss of each row (rows,), and softmax - one-hot, its columns times `fold` (vocabulary,), into `to`.

    None of a row is larger than 1 - the target's share, so no other pass looks for the largest.
    """
    if logits.is_cuda:
        from afina.engine import eight_kernels

        return eight_kernels.cross_entropy_rows(logits, targets, fold, fold.amax(), to)
    log_sum = torch.logsumexp(logits, dim=-1, keepdim=True)
    losses = (log_sum - logits.gather(1, targets[:, None]))[:, 0]
    slopes = (logits - log_sum).exp().scatter_add_(1, targets[:, None], torch.full_like(log_sum, -1))
    least = (1 - (-losses).exp()).clamp(min=LEAST_SLOPE) + losses * 0
    to.write(slopes * fold, to.form.largest, least * fold.amax())
    return losses


LEAST_SLOPE = 2.0**-20
"""The least 1 - share that a row's scale is made for: fp32 knows it no better."""


def gather_rotated_rows(
    d_heads: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, fold: torch.Tensor, to: Rows
) -> Rows:
    """As elementwise.gather_rotated, its columns times `fold`."""
    if cos.is_cuda:
        from afina.engine import eight_kernels

        return eight_kernels.gather_rotated_rows(d_heads, cos, sin, fold, to)
    out = torch.empty(cos.shape[0], to.width, dtype=wide_of(d_heads[0]).dtype)
    to.write(gather_rotated(out, [wide_of(part) for part in d_heads], cos, sin) * fold)
    return to


def inward(x: Rows, small: torch.Tensor, unfold: torch.Tensor | None, unit: torch.Tensor | None) -> torch.Tensor:
    """x small^T (rows, r) in small's dtype: the low-rank side of x. small: (r, width), times `unfold` (width,) if any.

    With a `unit`, (1,) fp32, it is also written behind x's columns, in units of a row's scale times `unit`: as e4m3,
    what e4m3 leaves of it, and e4m3 again, against the weights' e4m3 twice and what that leaves: eight bits' precision.
    """
    if x.values.is_cuda:
        from afina.engine import eight_matrix

        return eight_matrix.inward(x, small, unfold, unit)
    wide = torch.promote_types(small.dtype, torch.float32)
    found = x.values[:, : x.width].to(wide) @ (small.to(wide) if unfold is None else small.to(wide) * unfold).t()
    if unit is not None:
        high, rest = halves(found / unit, x.form)
        behind(x.values, x.width, (high, rest, high))
    return (found * x.scales[:, None]).to(small.dtype)


def outward(x: Rows, low: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """low^T x (r, width), summed in at least fp32: gradients of adapters' A. low: (rows, r)."""
    if x.values.is_cuda:
        from afina.engine import eight_matrix

        return eight_matrix.outward(x, low, dtype)
    return _outward(x, low).to(dtype)


def outward_turned(
    x: Rows, low: torch.Tensor, first: torch.Tensor, factors: torch.Tensor, rank: int, dtype: torch.dtype
) -> torch.Tensor:
    """x^T low (width, rank), each row times its factor, of `rank` columns of low, beginning at `first`: gradients of
    adapters' B, one below the other. low: (rows, r); first, factors: (width,)."""
    if x.values.is_cuda:
        from afina.engine import eight_matrix

        return eight_matrix.outward_turned(x, low, first, factors, rank, dtype)
    columns = first.long()[:, None] + torch.arange(rank)
    found = _outward(x, low).t().gather(1, columns.clamp(max=low.shape[1] - 1))
    return (found * factors[:, None]).to(dtype)


def _outward(x: Rows, low: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(low.dtype, torch.float32)
    return (low.to(wide) * x.scales[:, None]).t() @ x.values[:, : x.width].to(wide)


def append_up(weights: Rows, up: torch.Tensor, unit: torch.Tensor) -> None:
    """Write `up` (rows, r), in the units of a row's scale over `unit`, behind the weights' columns."""
    if up.is_cuda:
        from afina.engine import eight_movers

        eight_movers.append_up(weights, up, unit)
        return
    high, rest = halves(wide_of(up) * unit / weights.scales[:, None], weights.form)
    behind(weights.values, weights.width, (high, high, rest))


def spread(rows: Rows, out: torch.Tensor) -> None:
    """What the eight bits mean into out (rows, width)."""
    if out.is_cuda:
        from afina.engine import eight_movers

        eight_movers.spread(rows, out)
        return
    out.copy_(rows.exact(wide_of(out).dtype))


def refuse_no_numbers(weights: Rows) -> Rows:
    """The weights. Raises ModelError where one was a NaN or an infinity, and so its row's scale is. Those that have no
    memory are passed."""
    if not weights.scales.is_meta and not weights.scales.isfinite().all():
        raise ModelError(
            _("A weight of the base model is not a number, so it cannot be held in eight bits."),
            hint=_("Check the file of the base model, or set training.products to exact."),
        )
    return weights


def turn(weights: Rows, out: torch.Tensor) -> torch.Tensor:
    """The weights' values turned over into the first columns of out (width, rows + appended)."""
    if out.is_cuda:
        from afina.engine import eight_movers

        return eight_movers.turn(weights, out)
    out[:, : weights.values.shape[0]] = weights.values[:, : weights.width].t()
    return out


def unpack(packed: Sequence[tuple[slice, Nf4]], to: Rows) -> Rows:
    """Weights of four bits, each with its rows, as `to` with the scales that stand there already."""
    for rows, weight in packed:
        if to.values.is_cuda:
            from afina.engine import eight_movers

            eight_movers.unpack(weight, to.scales[rows], to.values[rows], False)
            continue
        plain = torch.empty(weight.rows, weight.columns)
        weight.fill(plain)
        to.values[rows, : to.width] = to.form.round(plain / to.scales[rows, None])
    return to


def unpack_turned(
    packed: Sequence[tuple[slice, Nf4]], scales: torch.Tensor, form: Format, out: torch.Tensor
) -> torch.Tensor:
    """The same turned over into the first columns of out (width, rows + appended); scales: (rows,)."""
    for rows, weight in packed:
        if out.is_cuda:
            from afina.engine import eight_movers

            eight_movers.unpack(weight, scales[rows], out[:, rows], True)
            continue
        plain = torch.empty(weight.rows, weight.columns)
        weight.fill(plain)
        out[:, rows] = form.round(plain / scales[rows, None]).t()
    return out


def append_down(out: torch.Tensor, rows: int, down: torch.Tensor, unit: torch.Tensor, form: Format) -> None:
    """`down` (r, width) times `unit`, turned over, behind the first `rows` columns of out (width, rows + appended)."""
    if out.is_cuda:
        from afina.engine import eight_movers

        eight_movers.append_down(out, rows, down, unit, form.largest)
        return
    high, rest = halves(wide_of(down).t() * unit, form)
    behind(out, rows, (high, high, rest))


def multiply(
    x: Rows,
    values: torch.Tensor,
    scales: torch.Tensor,
    like: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    fast: bool = True,
) -> torch.Tensor:
    """x W^T (rows, outputs) in the dtype of `like`, what is appended to both included. values: W's, (outputs, x's
    columns), in eight bits; scales: (outputs,); bias: (outputs,). fast: on a GPU e4m3 is summed
    in fewer bits than fp32, which cuts off a little at each step: not for the longest sums.
    """
    if x.values.is_cuda:
        from afina.engine import eight_matrix

        return eight_matrix.multiply(x, values, scales, like.dtype, bias, fast)
    wide = torch.promote_types(like.dtype, torch.float32)
    found = (x.values.to(wide) @ values.to(wide).t()) * x.scales[:, None] * scales
    return (found if bias is None else found + bias).to(like.dtype)


def halves(values: torch.Tensor, form: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """What eight bits hold of the values, and what eight bits hold of the rest."""
    high = form.round(values)
    return high, form.round(values - high.to(values.dtype))


def behind(values: torch.Tensor, width: int, parts: Sequence[torch.Tensor]) -> None:
    """Write parts side by side behind `width` columns, and zeros behind them."""
    for part in parts:
        values[:, width : width + part.shape[1]] = part
        width += part.shape[1]
    values[:, width:] = torch.zeros((), dtype=values.dtype)


def wide_of(x: torch.Tensor) -> torch.Tensor:
    """x in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
