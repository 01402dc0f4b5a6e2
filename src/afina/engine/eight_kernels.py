"""The Triton twins of eight.py: one pass over memory each. Imported on a GPU only.

Rows are quantised by the program that makes them: it must have seen the whole row before it knows the scale. SwiGLU's
backward, whose row does not fit into registers, goes over the incoming gradient twice (for INT8 over all of it), the
second time out of the L2 cache.
"""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from afina.engine.eight import Rows
    from afina.engine.elementwise import Norm
    from afina.engine.nf4 import Nf4

TINY = tl.constexpr(1e-30)
PAD = tl.constexpr(128)
BACKWARD = (2048, 8)
"""Columns of SwiGLU's backward that are in registers at a time, and warps."""


def quantise(x: torch.Tensor, to: "Rows", fold: torch.Tensor | None, peak: float) -> "Rows":
    """See eight.quantise."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    _quantise[(rows,)](
        x, x.stride(0), to.scales if fold is None else fold, to.values, to.values.stride(0), to.scales, width,
        peak, block, fold is not None, num_warps=_warps(block),
    )  # fmt: skip
    return to


@triton.jit
def _quantise(x, x_stride, fold, out, out_stride, scales, width, peak, BLOCK: tl.constexpr, FOLDS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if FOLDS:
        value = value * tl.load(fold + columns, mask=inside, other=0.0)
    _write(value, out + row * out_stride + columns, scales + row, peak, inside)


@triton.jit
def _write(value, out, scale_at, peak, inside):
    """Scale a whole row to its peak and round it into place."""
    scale = _scale(tl.max(tl.abs(value), axis=0), tl.sum(value * 0.0, axis=0), peak)
    tl.store(scale_at, scale)
    tl.store(out, _rounded(value / scale, out.dtype.element_ty), mask=inside)


@triton.jit
def _scale(largest, nothing, peak):
    """nothing: the sum of the row times zero, which is NaN where the row has a NaN or an infinity."""
    return tl.maximum(largest, TINY) / peak + nothing


@triton.jit
def _rounded(value, KIND: tl.constexpr):
    if tl.int8 == KIND:
        return tl.floor(value + 0.5).to(tl.int8)
    return value.to(KIND)


def norm_rows(x: torch.Tensor, by: "Norm", to: "Rows", past: torch.Tensor | None, total: torch.Tensor | None) -> "Rows":
    """See eight.norm_rows."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    other, sums = (x, x) if past is None or total is None else (past, total)
    _norm_rows[(rows,)](
        x, x.stride(0), other, other.stride(0), sums, sums.stride(0), by.weight, to.values, to.values.stride(0),
        to.scales, width, by.eps, to.form.peak, block, past is not None, num_warps=_warps(block),
    )  # fmt: skip
    return to


@triton.jit
def _norm_rows(
    x, x_stride, past, past_stride, total, total_stride, w, out, out_stride, scales, width, eps, peak,
    BLOCK: tl.constexpr, HAS_PAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_PAST:
        value += tl.load(past + row * past_stride + columns, mask=inside, other=0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty)
        tl.store(total + row * total_stride + columns, value, mask=inside)
        value = value.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    weight = tl.load(w + columns, mask=inside, other=0.0).to(tl.float32)
    rounded = (value * inverse).to(x.dtype.element_ty).to(tl.float32)
    _write(weight * rounded, out + row * out_stride + columns, scales + row, peak, inside)


def norm_backward_rows(
    dy: torch.Tensor,
    x: torch.Tensor,
    by: "Norm",
    dx: torch.Tensor,
    residual: torch.Tensor,
    again: "Rows",
    to: "Rows | None",
    fold: torch.Tensor | None,
) -> None:
    """See eight.norm_backward_rows."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    d, by_column = (again, again.scales) if to is None or fold is None else (to, fold)
    _norm_backward_rows[(rows,)](
        dy, dy.stride(0), x, x.stride(0), by.weight, residual, residual.stride(0), dx, dx.stride(0),
        again.values, again.values.stride(0), again.scales, d.values, d.values.stride(0), d.scales, by_column,
        width, by.eps, again.form.peak, block, to is not None, num_warps=_warps(block),
    )  # fmt: skip


@triton.jit
def _norm_backward_rows(
    dy, dy_stride, x, x_stride, w, past, past_stride, dx, dx_stride, again, again_stride, again_scales,
    d, d_stride, d_scales, fold, width, eps, peak, BLOCK: tl.constexpr, FOLDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(dy + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(w + columns, mask=inside, other=0.0).to(tl.float32)
    scaled = slope * weight
    inverse = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    normed = value * inverse
    found = (scaled - normed * (tl.sum(scaled * normed, axis=0) / width)) * inverse
    found += tl.load(past + row * past_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row * dx_stride + columns, found, mask=inside)
    rounded = normed.to(x.dtype.element_ty).to(tl.float32)
    _write(weight * rounded, again + row * again_stride + columns, again_scales + row, peak, inside)
    if FOLDS:
        found = found * tl.load(fold + columns, mask=inside, other=0.0)
        _write(found, d + row * d_stride + columns, d_scales + row, peak, inside)


def swiglu_rows(gate_up: torch.Tensor, to: "Rows") -> torch.Tensor:
    """See eight.swiglu_rows."""
    rows, block = gate_up.shape[0], triton.next_power_of_2(to.width)
    known = torch.empty(3, rows, dtype=torch.float32, device=gate_up.device)
    _swiglu_rows[(rows,)](
        gate_up, gate_up.stride(0), to.values, to.values.stride(0), to.scales, known, rows, to.width, to.form.peak,
        block, num_warps=_warps(block),
    )  # fmt: skip
    return known


@triton.jit
def _swiglu_rows(gate_up, gate_up_stride, out, out_stride, scales, known, rows, width, peak, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * gate_up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    silu = gate * tl.sigmoid(gate)
    tl.store(known + rows + row, tl.max(tl.abs(silu), axis=0))
    tl.store(known + 2 * rows + row, tl.max(tl.abs(up), axis=0))
    value = silu * up
    scale = _scale(tl.max(tl.abs(value), axis=0), tl.sum(value * 0.0, axis=0), peak)
    tl.store(known + row, scale)
    tl.store(scales + row, scale)
    tl.store(out + row * out_stride + columns, _rounded(value / scale, out.dtype.element_ty), mask=inside)


def swiglu_backward_rows(
    d: torch.Tensor,
    gate_up: torch.Tensor,
    fold: torch.Tensor,
    largest: torch.Tensor | None,
    known: torch.Tensor,
    to: "Rows",
    again: "Rows",
) -> None:
    """See eight.swiglu_backward_rows; largest: (2,) of `fold` for gate and up, None to look through the row."""
    rows, block = d.shape[0], min(BACKWARD[0], triton.next_power_of_2(again.width))
    _swiglu_backward_rows[(rows,)](
        d, d.stride(0), gate_up, gate_up.stride(0), fold, known if largest is None else largest, known, known.stride(0),
        to.values, to.values.stride(0), to.scales, again.values, again.values.stride(0), again.scales, again.width,
        to.form.peak, block, largest is not None, num_warps=BACKWARD[1],
    )  # fmt: skip


@triton.jit
def _swiglu_slopes(d, gate_up, fold, width, columns):
    inside = columns < width
    gate = tl.load(gate_up + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + width + columns, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(d + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = slope * up * (sigmoid + silu * (1 - sigmoid)) * tl.load(fold + columns, mask=inside, other=0.0)
    d_up = slope * silu * tl.load(fold + width + columns, mask=inside, other=0.0)
    return d_gate, d_up, silu * up, inside


@triton.jit
def _swiglu_backward_rows(
    d, d_stride, gate_up, gate_up_stride, fold, fold_largest, known, known_stride, out, out_stride, scales,
    again, again_stride, again_scales, width, peak, BLOCK: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d += row * d_stride
    gate_up += row * gate_up_stride
    out += row * out_stride
    again += row * again_stride
    largest = tl.zeros((BLOCK,), tl.float32)
    nothing = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        if BOUNDED:
            slope = tl.load(d + columns, mask=columns < width, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(slope))
            nothing += slope * 0.0
        else:
            d_gate, d_up, act, inside = _swiglu_slopes(d, gate_up, fold, width, columns)
            largest = tl.maximum(largest, tl.maximum(tl.abs(d_gate), tl.abs(d_up)))
            nothing += (d_gate + d_up) * 0.0
    most = tl.max(largest, axis=0)
    if BOUNDED:
        of_gate = 1.1 * tl.load(known + 2 * known_stride + row) * tl.load(fold_largest)
        most = most * tl.maximum(of_gate, tl.load(known + known_stride + row) * tl.load(fold_largest + 1))
    scale, scale_act = _scale(most, tl.sum(nothing, axis=0), peak), tl.load(known + row)
    tl.store(scales + row, scale)
    tl.store(again_scales + row, scale_act)
    by, by_act = 1.0 / scale, 1.0 / scale_act
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        d_gate, d_up, act, inside = _swiglu_slopes(d, gate_up, fold, width, columns)
        tl.store(out + columns, _rounded(d_gate * by, out.dtype.element_ty), mask=inside)
        tl.store(out + width + columns, _rounded(d_up * by, out.dtype.element_ty), mask=inside)
        tl.store(again + columns, _rounded(act * by_act, again.dtype.element_ty), mask=inside)


def gather_rotated_rows(
    d_heads: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, fold: torch.Tensor, to: "Rows"
) -> "Rows":
    """See eight.gather_rotated_rows."""
    q, k, v = d_heads
    length, heads, width = q.shape[1:]
    half, group = cos.shape[1], triton.next_power_of_2(heads + 2 * k.shape[2])
    block, block_rest = triton.next_power_of_2(half), triton.next_power_of_2(max(1, width - 2 * half))
    _gather_rotated_rows[(cos.shape[0],)](
        q, q.stride(0), q.stride(1), q.stride(2), k, k.stride(0), k.stride(1), k.stride(2),
        v, v.stride(0), v.stride(1), v.stride(2), cos, sin, fold, to.values, to.values.stride(0), to.scales, length,
        heads, k.shape[2], width, half, to.form.peak, group, block, block_rest, width > 2 * half,
        num_warps=_warps(group * block),
    )  # fmt: skip
    return to


@triton.jit
def _gather_rotated_rows(
    q, q_sample, q_token, q_head, k, k_sample, k_token, k_head, v, v_sample, v_token, v_head,
    cos, sin, fold, out, out_stride, scales, length, heads, kv_heads, width, half, peak,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr, HAS_REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    sample, place = token // length, token % length
    head = tl.arange(0, GROUP)[:, None]
    of_q = q + sample * q_sample + place * q_token + head * q_head
    of_k = k + sample * k_sample + place * k_token + (head - heads) * k_head
    of_v = v + sample * v_sample + place * v_token + (head - heads - kv_heads) * v_head
    source = tl.where(head < heads, of_q, tl.where(head < heads + kv_heads, of_k, of_v))
    known = head < heads + 2 * kv_heads
    column = tl.arange(0, BLOCK)[None, :]
    inside = known & (column < half)
    first = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half + column, mask=inside, other=0.0).to(tl.float32)
    turns = inside & (head < heads + kv_heads)
    c = tl.load(cos + token * half + column, mask=turns, other=1.0)
    s = tl.load(sin + token * half + column, mask=turns, other=0.0)
    by = fold + head * width + column
    one = (first * c + second * s) * tl.load(by, mask=inside, other=0.0)
    two = (second * c - first * s) * tl.load(by + half, mask=inside, other=0.0)
    largest = tl.max(tl.max(tl.maximum(tl.abs(one), tl.abs(two)), axis=1), axis=0)
    nothing = tl.sum(tl.sum((one + two) * 0.0, axis=1), axis=0)
    at = out + token * out_stride + head * width
    if HAS_REST:
        behind = 2 * half + tl.arange(0, BLOCK_REST)[None, :]
        there = known & (behind < width)
        rest = tl.load(source + behind, mask=there, other=0.0).to(tl.float32)
        rest = rest * tl.load(fold + head * width + behind, mask=there, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.max(tl.abs(rest), axis=1), axis=0))
        nothing += tl.sum(tl.sum(rest * 0.0, axis=1), axis=0)
    scale = _scale(largest, nothing, peak)
    tl.store(scales + token, scale)
    tl.store(at + column, _rounded(one / scale, out.dtype.element_ty), mask=inside)
    tl.store(at + half + column, _rounded(two / scale, out.dtype.element_ty), mask=inside)
    if HAS_REST:
        tl.store(at + behind, _rounded(rest / scale, out.dtype.element_ty), mask=there)


def inward(x: "Rows", small: torch.Tensor, unfold: torch.Tensor | None, unit: torch.Tensor | None) -> torch.Tensor:
    """See eight.inward."""
    rows, r = x.values.shape[0], small.shape[0]
    low = torch.empty(rows, r, dtype=small.dtype, device=small.device)
    block = max(16, triton.next_power_of_2(r))
    _inward[(triton.cdiv(rows, INWARD[0]),)](
        x.values, x.values.stride(0), x.scales, small, *small.stride(), x.scales if unfold is None else unfold, low,
        x.scales if unit is None else unit, rows, x.width, x.values.shape[1], r, x.form.largest, INWARD[0], INWARD[1],
        block, unfold is not None, unit is not None, num_warps=INWARD[2], num_stages=INWARD[3],
    )  # fmt: skip
    return low


INWARD = (64, 256, 4, 3)
"""Rows and columns of a program's tile, warps, and tiles on their way."""


@triton.jit
def _inward(
    x, x_stride, scales, small, small_stride, small_step, unfold, low, unit, rows, width, whole, r, largest,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, UNFOLDS: tl.constexpr, APPENDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rank = tl.arange(0, BLOCK_R)
    found = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, width, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
        known = (rank[None, :] < r) & (column[:, None] < width)
        by = tl.load(small + rank[None, :] * small_stride + column[:, None] * small_step, mask=known, other=0.0)
        if UNFOLDS:
            by = (by.to(tl.float32) * tl.load(unfold + column, mask=column < width, other=0.0)[:, None]).to(by.dtype)
        found = tl.dot(value.to(tl.float32).to(by.dtype), by, found, input_precision="ieee")
    scale = tl.load(scales + row, mask=row < rows, other=0.0)
    known = (row[:, None] < rows) & (rank[None, :] < r)
    tl.store(low + row[:, None] * r + rank[None, :], found * scale[:, None], mask=known)
    if APPENDS:
        _append(found / tl.load(unit), x + row[:, None] * x_stride, row[:, None] < rows, rank[None, :], width, whole, r,
                largest)  # fmt: skip


def halve(small: torch.Tensor, unfold: torch.Tensor | None, unit: torch.Tensor, out: torch.Tensor) -> None:
    """See eight.halve."""
    r, width = small.shape
    block = 1024
    _halve[(r, triton.cdiv(width, block))](
        small, *small.stride(), unit if unfold is None else unfold, unit, out, out.stride(0), width, LARGEST, block,
        unfold is not None, num_warps=4,
    )  # fmt: skip


LARGEST = 448.0


@triton.jit
def _halve(
    small, small_stride, small_step, unfold, unit, out, half, width, largest, BLOCK: tl.constexpr, UNFOLDS: tl.constexpr
):  # fmt: skip
    rank = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(small + rank * small_stride + column * small_step, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.load(unit)
    if UNFOLDS:
        value = value * tl.load(unfold + column, mask=inside, other=0.0)
    value = tl.minimum(tl.maximum(value, -largest), largest)
    high = value.to(out.dtype.element_ty)
    tl.store(out + rank * width + column, high, mask=inside)
    tl.store(out + half + rank * width + column, (value - high.to(tl.float32)).to(out.dtype.element_ty), mask=inside)


def inward_halves(
    x: "Rows", halves: torch.Tensor, of_halves: torch.Tensor, unit: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """As `inward`, by e4m3's own matrix units: halves (2, r, width) are what `halve` made, in units of `of_halves`."""
    rows, r = x.values.shape[0], halves.shape[1]
    low = torch.empty(rows, r, dtype=dtype, device=halves.device)
    block_t, block_k, warps, stages = INWARD_HALVES
    _inward_halves[(triton.cdiv(rows, block_t),)](
        x.values, x.values.stride(0), x.scales, halves, halves.stride(0), of_halves, low,
        of_halves if unit is None else unit, rows, x.width, x.values.shape[1], r, x.form.largest, block_t, block_k,
        max(16, triton.next_power_of_2(r)), unit is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return low


INWARD_HALVES = (64, 256, 4, 4)
"""Rows and columns of a program's tile, warps, and tiles on their way."""


@triton.jit
def _inward_halves(
    x, x_stride, scales, halves, half, of_halves, low, unit, rows, width, whole, r, largest,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, APPENDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rank = tl.arange(0, BLOCK_R)
    found = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, width, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
        known = (rank[None, :] < r) & (column[:, None] < width)
        at = halves + rank[None, :] * width + column[:, None]
        found = tl.dot(value, tl.load(at, mask=known, other=0.0), found)
        found = tl.dot(value, tl.load(at + half, mask=known, other=0.0), found)
    found = found / tl.load(of_halves)
    scale = tl.load(scales + row, mask=row < rows, other=0.0)
    known = (row[:, None] < rows) & (rank[None, :] < r)
    tl.store(low + row[:, None] * r + rank[None, :], found * scale[:, None], mask=known)
    if APPENDS:
        _append(found / tl.load(unit), x + row[:, None] * x_stride, row[:, None] < rows, rank[None, :], width, whole, r,
                largest)  # fmt: skip


@triton.jit
def _append(value, at, there, rank, width, whole, r, largest):
    """e4m3, what it leaves, and e4m3 again, behind the columns of rows that begin at `at`, and zeros behind them."""
    known = there & (rank < r)
    value = tl.minimum(tl.maximum(value, -largest), largest)
    high = value.to(at.dtype.element_ty)
    tl.store(at + width + rank, high, mask=known)
    tl.store(at + width + r + rank, (value - high.to(tl.float32)).to(at.dtype.element_ty), mask=known)
    tl.store(at + width + 2 * r + rank, high, mask=known)
    behind = width + 3 * r + tl.arange(0, PAD)[None, :]
    tl.store(at + behind, (behind * 0).to(tl.float32).to(at.dtype.element_ty), mask=there & (behind < whole))


def outward(x: "Rows", low: torch.Tensor) -> torch.Tensor:
    """See eight.outward. Tokens are split among programs, whose sums are added up afterwards, always in one order."""
    rows, r = low.shape
    block_t, block_n, warps, stages = OUTWARD
    block = max(16, triton.next_power_of_2(r))
    columns = triton.cdiv(x.width, block_n)
    splits = max(1, min(triton.cdiv(rows, 4 * block_t), triton.cdiv(512, columns)))
    sums = torch.empty(splits, r, x.width, dtype=torch.float32, device=low.device)
    _outward[(columns, splits)](
        x.values, x.values.stride(0), x.scales, low, low.stride(0), sums, rows, x.width, r, block_t, block_n, block,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return sums[0] if splits == 1 else sums.sum(0)


OUTWARD = (64, 128, 4, 3)
"""Rows and columns of a program's tile, warps, and tiles on their way."""


@triton.jit
def _outward(
    x, x_stride, scales, low, low_stride, out, rows, width, r,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = tl.arange(0, BLOCK_R)
    found = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(tl.program_id(1) * BLOCK_T, rows, tl.num_programs(1) * BLOCK_T):
        row = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
        known = (row[None, :] < rows) & (rank[:, None] < r)
        by = tl.load(low + row[None, :] * low_stride + rank[:, None], mask=known, other=0.0)
        scale = tl.load(scales + row, mask=row < rows, other=0.0)
        by = (by.to(tl.float32) * scale[None, :]).to(by.dtype)
        found = tl.dot(by, value.to(tl.float32).to(by.dtype), found, input_precision="ieee")
    place = tl.program_id(1).to(tl.int64) * r * width + rank[:, None] * width + column[None, :]
    tl.store(out + place, found, mask=(rank[:, None] < r) & (column[None, :] < width))


def append_up(weights: "Rows", up: torch.Tensor, unit: torch.Tensor) -> None:
    """See eight.append_up."""
    rows, r = up.shape
    block = triton.next_power_of_2(r)
    group = max(1, 2048 // max(block, 128))
    _append_up[(triton.cdiv(rows, group),)](
        weights.values, weights.values.stride(0), weights.scales, up, up.stride(0), rows, weights.width,
        weights.values.shape[1], r, unit, weights.form.largest, group, block, num_warps=4,
    )  # fmt: skip


@triton.jit
def _append_up(
    values, stride, scales, up, up_stride, rows, width, whole, r, unit, largest,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)[:, None]
    rank = tl.arange(0, BLOCK)[None, :]
    known = (row < rows) & (rank < r)
    value = tl.load(up + row * up_stride + rank, mask=known, other=0.0).to(tl.float32)
    value = value * tl.load(unit) / tl.load(scales + row, mask=row < rows, other=1.0)
    value = tl.minimum(tl.maximum(value, -largest), largest)
    at = values + row * stride + width + rank
    high = value.to(values.dtype.element_ty)
    rest = (value - high.to(tl.float32)).to(values.dtype.element_ty)
    tl.store(at, high, mask=known)
    tl.store(at + r, high, mask=known)
    tl.store(at + 2 * r, rest, mask=known)
    behind = width + 3 * r + tl.arange(0, PAD)[None, :]
    nothing = tl.zeros((GROUP, PAD), tl.float32).to(values.dtype.element_ty)
    tl.store(values + row * stride + behind, nothing, mask=(row < rows) & (behind < whole))


def turn(weights: "Rows", out: torch.Tensor) -> torch.Tensor:
    """See eight.turn."""
    rows, width = weights.values.shape[0], weights.width
    bits, turned = weights.values.view(torch.uint8), out.view(torch.uint8)
    block_n, block_k, warps = TURN
    _turn[(triton.cdiv(rows, block_n), triton.cdiv(width, block_k))](
        bits, bits.stride(0), turned, turned.stride(0), rows, width, block_n, block_k, num_warps=warps
    )
    return out


TURN = (128, 128, 8)
"""Rows and columns of a tile, and warps."""


@triton.jit
def _turn(x, x_stride, out, out_stride, rows, width, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0)
    inside = (row[None, :] < rows) & (column[:, None] < width)
    tl.store(out + column[:, None] * out_stride + row[None, :], tl.trans(value), mask=inside)


def append_down(out: torch.Tensor, rows: int, down: torch.Tensor, unit: torch.Tensor, largest: float) -> None:
    """See eight.append_down."""
    r, width = down.shape
    block = triton.next_power_of_2(r)
    group = max(1, 2048 // max(block, 128))
    _append_down[(triton.cdiv(width, group),)](
        out, out.stride(0), down, down.stride(0), rows, width, out.shape[1], r, unit, largest, group, block, num_warps=4
    )


@triton.jit
def _append_down(
    out, stride, down, down_stride, rows, width, whole, r, unit, largest, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)[:, None]
    rank = tl.arange(0, BLOCK)[None, :]
    known = (column < width) & (rank < r)
    value = tl.load(down + rank * down_stride + column, mask=known, other=0.0).to(tl.float32) * tl.load(unit)
    value = tl.minimum(tl.maximum(value, -largest), largest)
    at = out + column * stride + rows + rank
    high = value.to(out.dtype.element_ty)
    rest = (value - high.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(at, high, mask=known)
    tl.store(at + r, high, mask=known)
    tl.store(at + 2 * r, rest, mask=known)
    behind = rows + 3 * r + tl.arange(0, PAD)[None, :]
    nothing = tl.zeros((GROUP, PAD), tl.float32).to(out.dtype.element_ty)
    tl.store(out + column * stride + behind, nothing, mask=(column < width) & (behind < whole))


def unpack(weight: "Nf4", scales: torch.Tensor, out: torch.Tensor, turned: bool) -> None:
    """See eight.unpack: 0.53 bytes read and one written a weight, as it lies or turned over."""
    nested = weight.scale_levels is not None
    levels = weight.scale_levels if nested else weight.levels
    outer = weight.outer_scales if nested else weight.scales
    offset = weight.offset if nested else weight.levels
    block_n, block_k, warps = UNPACK
    _unpack[(triton.cdiv(weight.rows, block_n), triton.cdiv(weight.columns, block_k))](
        weight.packed, weight.levels, weight.scales, levels, outer, offset, scales, out, out.stride(0), weight.rows,
        weight.columns, weight.outer_block, block_n, block_k, nested, turned, num_warps=warps,
    )  # fmt: skip


UNPACK = (64, 128, 8)
"""Rows and columns of a tile, and warps."""


@triton.jit
def _unpack(
    packed, levels, scales, scale_levels, outer, offset, row_scales, out, out_stride, rows, columns, outer_block,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NESTED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    half = tl.program_id(1) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    inside = (row[:, None] < rows) & (half[None, :] * 2 < columns)
    pair = tl.load(packed + row[:, None] * (columns // 2) + half[None, :], mask=inside, other=0).to(tl.int32)
    place = (row[:, None] * columns + half[None, :] * 2) // 64
    scale = tl.load(scales + place, mask=inside, other=0)
    if NESTED:
        wide = tl.load(outer + place // outer_block, mask=inside, other=0.0)
        scale = tl.load(scale_levels + scale.to(tl.int32)) * wide + tl.load(offset)
    scale = scale / tl.load(row_scales + row, mask=row < rows, other=1.0)[:, None]
    both = tl.interleave(tl.load(levels + (pair >> 4)) * scale, tl.load(levels + (pair & 15)) * scale)
    value = _rounded(both, out.dtype.element_ty)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    if TURNED:
        known = (row[None, :] < rows) & (column[:, None] < columns)
        tl.store(out + column[:, None].to(tl.int64) * out_stride + row[None, :], tl.trans(value), mask=known)
    else:
        known = (row[:, None] < rows) & (column[None, :] < columns)
        tl.store(out + row[:, None] * out_stride + column[None, :], value, mask=known)


def multiply(
    x: "Rows", values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None
) -> torch.Tensor:
    """See eight.multiply. cuBLAS and CUTLASS take the rows of both factors as they lie: W is turned over by a view."""
    if x.form.dtype == torch.int8:
        return _rescale(_int_product(x.values, values), x.scales, scales, dtype, bias)
    if by_row(x.values.device.index or 0):
        return torch._scaled_mm(
            x.values, values.t(), scale_a=x.scales[:, None], scale_b=scales[None], bias=bias, out_dtype=dtype,
            use_fast_accum=True,
        )  # fmt: skip
    one = torch.ones((), device=values.device)
    whole = torch._scaled_mm(x.values, values.t(), scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=True)
    return _rescale(whole, x.scales, scales, dtype, bias)


@cache
def by_row(index: int) -> bool:
    """Whether this GPU's products take a scale a row; sm_120 (GeForce Blackwell) and others take one for all."""
    try:
        rows = torch.zeros(64, 64, dtype=torch.float8_e4m3fn, device=f"cuda:{index}")
        scales = torch.ones(64, device=rows.device)
        torch._scaled_mm(
            rows, rows.t(), scale_a=scales[:, None], scale_b=scales[None], out_dtype=torch.bfloat16, use_fast_accum=True
        )
    except RuntimeError:
        return False
    return True


def _int_product(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """In int32; cuBLAS wants more than 16 rows."""
    if x.shape[0] > 16:
        return torch._int_mm(x, values.t())
    return torch._int_mm(torch.cat([x, x.new_zeros(32 - x.shape[0], x.shape[1])]), values.t())[: x.shape[0]]


def _rescale(
    whole: torch.Tensor, scales: torch.Tensor, by_column: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None
) -> torch.Tensor:
    """whole times the scales of its rows and columns, in place where the dtype is the same."""
    out = whole if whole.dtype == dtype else torch.empty(whole.shape, dtype=dtype, device=whole.device)
    rows, width = whole.shape
    block = 2048
    _rescale_kernel[(rows, triton.cdiv(width, block))](
        whole, whole.stride(0), out, out.stride(0), scales, by_column, by_column if bias is None else bias, width,
        block, bias is not None, num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def _rescale_kernel(
    x, x_stride, out, out_stride, scales, by_column, bias, width, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0).to(tl.float32)
    value = value * tl.load(scales + row) * tl.load(by_column + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, value, mask=inside)


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16
