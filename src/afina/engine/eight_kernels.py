"""The Triton twins of eight.py: one pass over memory each. Imported on a GPU only.

Rows are quantised by the program that makes them: it must have seen the whole row before it knows the scale. SwiGLU's
backward, whose row does not fit into registers, goes over the incoming gradient twice (for INT8 over all of it), the
second time out of the L2 cache.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from afina.engine.kernels import log_sum_exp

if TYPE_CHECKING:
    from afina.engine.eight import Rows
    from afina.engine.elementwise import Norm

TINY = tl.constexpr(1e-30)
LEAST_SLOPE = tl.constexpr(2.0**-20)
BACKWARD = (4096, 32)
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
    tl.store(out, rounded(value / scale, out.dtype.element_ty), mask=inside)


@triton.jit
def _scale(largest, nothing, peak):
    """nothing: the sum of the row times zero, which is NaN where the row has a NaN or an infinity."""
    return tl.maximum(largest, TINY) / peak + nothing


@triton.jit
def rounded(value, KIND: tl.constexpr):
    """To the nearest that can be stored."""
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
    tl.store(out + row * out_stride + columns, rounded(value / scale, out.dtype.element_ty), mask=inside)


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
        tl.store(out + columns, rounded(d_gate * by, out.dtype.element_ty), mask=inside)
        tl.store(out + width + columns, rounded(d_up * by, out.dtype.element_ty), mask=inside)
        tl.store(again + columns, rounded(act * by_act, again.dtype.element_ty), mask=inside)


def cross_entropy_rows(
    logits: torch.Tensor, targets: torch.Tensor, fold: torch.Tensor, most: torch.Tensor, to: "Rows"
) -> torch.Tensor:
    """See eight.cross_entropy_rows; most: () the largest of `fold`."""
    rows, width = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _cross_entropy_rows[(rows,)](
        logits, logits.stride(0), targets, fold, most, to.values, to.values.stride(0), to.scales, losses, width,
        to.form.largest, 4096, num_warps=16,
    )  # fmt: skip
    return losses


@triton.jit
def _cross_entropy_rows(
    logits, logits_stride, targets, fold, most, out, out_stride, scales, losses, width, peak, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    log_sum = log_sum_exp(logits, width, BLOCK)
    target = tl.load(targets + row)
    loss = log_sum - tl.load(logits + target).to(tl.float32)
    tl.store(losses + row, loss)
    scale = tl.maximum(1 - tl.exp(-loss), LEAST_SLOPE) * tl.load(most) / peak + loss * 0.0
    tl.store(scales + row, scale)
    by = 1.0 / scale
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        value = tl.load(logits + columns, mask=inside, other=-float("inf")).to(tl.float32)
        slope = tl.exp(value - log_sum) - tl.where(columns == target, 1.0, 0.0)
        slope = slope * tl.load(fold + columns, mask=inside, other=0.0) * by
        tl.store(out + row * out_stride + columns, rounded(slope, out.dtype.element_ty), mask=inside)


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
    tl.store(at + column, rounded(one / scale, out.dtype.element_ty), mask=inside)
    tl.store(at + half + column, rounded(two / scale, out.dtype.element_ty), mask=inside)
    if HAS_REST:
        tl.store(at + behind, rounded(rest / scale, out.dtype.element_ty), mask=there)


def _warps(block: int) -> int:
    return 4 if block <= 4096 else 8 if block <= 8192 else 16
