"""The Triton twins of elementwise.py: one pass over memory each, statistics in fp32.

Imported on a GPU only. Row strides are arguments, so that inputs and outputs may be parts of wider rows; offsets are
64-bit, because 32,768 tokens times 128,256 logits do not fit into 32.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from afina.engine.elementwise import Norm


def norm(x: torch.Tensor, by: "Norm", out: torch.Tensor) -> torch.Tensor:
    """See elementwise.norm."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    _norm[(rows,)](
        x, x.stride(0), by.weight, by.bias, out, out.stride(0), width, by.eps, block,
        by.bias is not None, num_warps=_warps(block),
    )  # fmt: skip
    return out


@triton.jit
def _norm(x, x_stride, w, b, y, y_stride, width, eps, BLOCK: tl.constexpr, CENTRED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        value = tl.where(inside, value - tl.sum(value, axis=0) / width, 0.0)
    inverse = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    weight = tl.load(w + columns, mask=inside, other=0.0)
    _write_normed(y + row * y_stride, value * inverse, weight, b, columns, inside, CENTRED)


@triton.jit
def _write_normed(y, normed, weight, b, columns, inside, CENTRED: tl.constexpr):
    """A row of what a norm returns, as transformers rounds."""
    if CENTRED:
        found = normed * weight.to(tl.float32) + tl.load(b + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        found = weight.to(tl.float32) * normed.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + columns, found, mask=inside)


def norm_backward(
    dy: torch.Tensor, x: torch.Tensor, by: "Norm", dx: torch.Tensor, *,
    residual: torch.Tensor | None = None, y: torch.Tensor | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """See elementwise.norm_backward. What the weights learn is summed by program, then over programs."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    past, again = dy if residual is None else residual, dx if y is None else y
    programs = min(rows, 1024) if by.learnt else rows
    sums = torch.empty(2 if by.learnt else 0, programs, width, dtype=torch.float32, device=x.device)
    _norm_backward[(programs,)](
        dy, dy.stride(0), x, x.stride(0), by.weight, by.bias, past, past.stride(0), dx, dx.stride(0),
        again, again.stride(0), sums, rows, width, by.eps, block, by.bias is not None, residual is not None,
        y is not None, bool(by.learnt), num_warps=_warps(block),
    )  # fmt: skip
    return list(sums.sum(1))[: len(by.learnt)] if by.learnt else []


@triton.jit(do_not_specialize=["rows"])  # rows of a head vary: it would be compiled for each kind of number
def _norm_backward(
    dy, dy_stride, x, x_stride, w, b, past, past_stride, dx, dx_stride, y, y_stride, sums, rows, width, eps,
    BLOCK: tl.constexpr, CENTRED: tl.constexpr, HAS_PAST: tl.constexpr, HAS_Y: tl.constexpr, LEARNS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(w + columns, mask=inside, other=0.0)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    everywhere = inside
    for turn in tl.range(0, tl.cdiv(rows, tl.num_programs(0)), num_stages=3):  # 104 us for 144 without
        row = tl.program_id(0).to(tl.int64) + turn * tl.num_programs(0)
        inside = columns < tl.where(row < rows, width, 0)
        value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            value = tl.where(inside, value - tl.sum(value, axis=0) / width, 0.0)
        slope = tl.load(dy + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
        scaled = slope * weight.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
        normed = value * inverse
        found = scaled - normed * (tl.sum(scaled * normed, axis=0) / width)
        if CENTRED:
            found -= tl.sum(scaled, axis=0) / width
        found = found * inverse
        if HAS_PAST:
            found += tl.load(past + row * past_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_Y:
            _write_normed(y + row * y_stride, normed, weight, b, columns, inside, CENTRED)
        tl.store(dx + row * dx_stride + columns, found, mask=inside)
        if LEARNS:
            of_weight += slope * normed
            of_bias += slope
    if LEARNS:
        place = sums + tl.program_id(0).to(tl.int64) * width + columns
        tl.store(place, of_weight, mask=everywhere)
        tl.store(place + tl.num_programs(0).to(tl.int64) * width, of_bias, mask=everywhere)


HEADS, WIDE = 8, 4096
"""Heads that one program norms; columns of an activation that one program takes."""


def head_norms(
    x: torch.Tensor, norms: Sequence["Norm"], heads: Sequence[int], out: torch.Tensor, d: torch.Tensor | None = None
) -> torch.Tensor:
    """See elementwise.head_norms. With d, the gradient of what it returned, out receives that of x."""
    width, slopes = norms[0].weight.numel(), x if d is None else d
    count = x.shape[1] // width
    _head_norms[(x.shape[0], triton.cdiv(count, HEADS))](
        x, x.stride(0), slopes, slopes.stride(0), out, out.stride(0), norms[0].weight, norms[1].weight, *heads, count,
        width, norms[0].eps, HEADS, triton.next_power_of_2(width), d is not None, num_warps=4,
    )  # fmt: skip
    return out


def head_norms_backward(
    d: torch.Tensor, x: torch.Tensor, norms: Sequence["Norm"], heads: Sequence[int]
) -> torch.Tensor:
    """See elementwise.head_norms_backward."""
    return head_norms(x, norms, heads, x, d)


@triton.jit
def _head_norms(
    x, x_stride, d, d_stride, out, out_stride, w_q, w_k, heads, kv_heads, all_heads, width, eps,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (head < all_heads) & (column < width)
    place = head * width + column
    value = tl.load(x + token * x_stride + place, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    of_q = tl.load(w_q + column, mask=column < width, other=0.0)
    of_k = tl.load(w_k + column, mask=column < width, other=0.0)
    weight = tl.where(head < heads, of_q, of_k)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)[:, None]
    normed = wide * inverse
    is_normed = head < heads + kv_heads
    if BACKWARD:
        slope = tl.load(d + token * d_stride + place, mask=inside, other=0.0)
        scaled = slope.to(tl.float32) * weight.to(tl.float32)
        found = inverse * (scaled - normed * (tl.sum(scaled * normed, axis=1) / width)[:, None])
        tl.store(out + token * out_stride + place, tl.where(is_normed, found, slope.to(tl.float32)), mask=inside)
    else:
        rounded = normed.to(out.dtype.element_ty).to(tl.float32)
        found = tl.where(is_normed, weight.to(tl.float32) * rounded, wide)
        tl.store(out + token * out_stride + place, found, mask=inside)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    """See elementwise.rotate: gathered from where they are, and turned the other way."""
    turned = x[:, : heads * width].view(1, x.shape[0], heads, width)
    return gather_rotated(x, (turned, turned[:, :, :0], turned[:, :, :0]), cos, -sin)


def gather_rotated(
    out: torch.Tensor, d_heads: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """See elementwise.gather_rotated."""
    q, k, v = d_heads
    length, heads, width = q.shape[1:]
    half = cos.shape[1]
    block, rest = triton.next_power_of_2(half), triton.next_power_of_2(max(1, width - 2 * half))
    group = max(1, 1024 // block)
    grid = (out.shape[0], triton.cdiv(heads + 2 * k.shape[2], group))
    _gather_rotated[grid](
        q, q.stride(0), q.stride(1), q.stride(2), k, k.stride(0), k.stride(1), k.stride(2),
        v, v.stride(0), v.stride(1), v.stride(2), cos, sin, out, out.stride(0), length, heads, k.shape[2], width,
        half, group, block, rest, width > 2 * half, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["length"])
def _gather_rotated(
    q, q_sample, q_token, q_head, k, k_sample, k_token, k_head, v, v_sample, v_token, v_head,
    cos, sin, out, out_stride, length, heads, kv_heads, width, half, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    REST: tl.constexpr, HAS_REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    sample, place = token // length, token % length
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[:, None]
    from_q = q + sample * q_sample + place * q_token + head * q_head
    from_k = k + sample * k_sample + place * k_token + (head - heads) * k_head
    from_v = v + sample * v_sample + place * v_token + (head - heads - kv_heads) * v_head
    source = tl.where(head < heads, from_q, tl.where(head < heads + kv_heads, from_k, from_v))
    to = out + token * out_stride + head * width
    known, column = head < heads + 2 * kv_heads, tl.arange(0, BLOCK)[None, :]
    inside, turns = known & (column < half), (head < heads + kv_heads) & (column < half)
    first = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half + column, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * half + column, mask=turns, other=1.0)
    s = tl.load(sin + token * half + column, mask=turns, other=0.0)
    tl.store(to + column, first * c + second * s, mask=inside)
    tl.store(to + half + column, second * c - first * s, mask=inside)
    if HAS_REST:
        behind = 2 * half + tl.arange(0, REST)[None, :]
        there = known & (behind < width)
        tl.store(to + behind, tl.load(source + behind, mask=there, other=0.0), mask=there)


def swiglu(gate_up: torch.Tensor, out: torch.Tensor, *, backward: bool = False) -> torch.Tensor:
    """See elementwise.swiglu. `backward`: out has the gradient of what was returned, as for swiglu_backward."""
    grid = out.shape[0], triton.cdiv(out.shape[1], WIDE)
    _swiglu[grid](out, out.stride(0), gate_up, gate_up.stride(0), out.shape[1], WIDE, backward, num_warps=8)
    return out


def swiglu_backward(d: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """See elementwise.swiglu_backward."""
    return swiglu(gate_up, d, backward=True)


@triton.jit
def _swiglu(d, d_stride, gate_up, gate_up_stride, width, BLOCK: tl.constexpr, BACKWARD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    place = gate_up + row * gate_up_stride + columns
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    if BACKWARD:
        slope = tl.load(d + row * d_stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, slope * up * (sigmoid + silu * (1 - sigmoid)), mask=inside)
        tl.store(place + width, slope * silu, mask=inside)
    tl.store(d + row * d_stride + columns, silu * up, mask=inside)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """See elementwise.cross_entropy."""
    rows, width = logits.shape
    slopes = logits.view(dtype)[:, :width]
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _cross_entropy[(rows,)](
        logits, logits.stride(0), targets, slopes, slopes.stride(0), losses, width, 4096, num_warps=8
    )
    return losses, slopes


@triton.jit
def log_sum_exp(logits, width, BLOCK: tl.constexpr):
    """Of one row."""
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):  # a running maximum per lane, joined once at the end
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(logits + columns, mask=columns < width, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(largest, value)
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(largest - shift) + tl.exp(value - shift)
        largest = higher
    peak = tl.max(largest, axis=0)
    return peak + tl.log(tl.sum(total * tl.exp(largest - peak), axis=0))


@triton.jit
def _cross_entropy(logits, logits_stride, targets, out, out_stride, losses, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    log_sum = log_sum_exp(logits + row * logits_stride, width, BLOCK)
    target = tl.load(targets + row)
    truth = tl.load(logits + row * logits_stride + target).to(tl.float32)
    tl.store(losses + row, log_sum - truth)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        value = tl.load(logits + row * logits_stride + columns, mask=inside, other=-float("inf")).to(tl.float32)
        share = tl.exp(value - log_sum) - tl.where(columns == target, 1.0, 0.0)
        tl.debug_barrier()  # what is written lies in what other threads may still have to read
        tl.store(out + row * out_stride + columns, share, mask=inside)


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16
