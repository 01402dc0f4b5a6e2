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
    from afina.engine.nf4 import Nf4


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """See elementwise.rms_norm."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    _rms_norm[(rows,)](x, x.stride(0), weight, out, out.stride(0), width, eps, block, num_warps=_warps(block))
    return out


@triton.jit
def _rms_norm(x, x_stride, w, y, y_stride, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    weight = tl.load(w + columns, mask=inside, other=0.0)
    normed = (value * inverse).to(y.dtype.element_ty)
    tl.store(y + row * y_stride + columns, weight * normed, mask=inside)


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dx: torch.Tensor,
    residual: torch.Tensor | None,
    y: torch.Tensor | None,
) -> torch.Tensor:
    """See elementwise.rms_norm_backward."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    past, again = dy if residual is None else residual, dx if y is None else y
    _rms_norm_backward[(rows,)](
        dy, dy.stride(0), x, x.stride(0), weight, past, past.stride(0), dx, dx.stride(0), again, again.stride(0),
        width, eps, block, residual is not None, y is not None, num_warps=_warps(block),
    )  # fmt: skip
    return dx


@triton.jit
def _rms_norm_backward(
    dy, dy_stride, x, x_stride, w, past, past_stride, dx, dx_stride, y, y_stride,
    width, eps, BLOCK: tl.constexpr, HAS_PAST: tl.constexpr, HAS_Y: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(w + columns, mask=inside, other=0.0)
    scaled = tl.load(dy + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32) * weight.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    normed = value * inverse
    found = inverse * (scaled - normed * (tl.sum(scaled * normed, axis=0) / width))
    if HAS_PAST:
        found += tl.load(past + row * past_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_Y:
        tl.store(y + row * y_stride + columns, weight * normed.to(y.dtype.element_ty), mask=inside)
    tl.store(dx + row * dx_stride + columns, found, mask=inside)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, backward: bool) -> torch.Tensor:
    """See elementwise.rotate."""
    tokens, half = cos.shape
    group = max(1, 1024 // triton.next_power_of_2(half))
    grid = (tokens, triton.cdiv(heads, group))
    _rotate[grid](x, x.stride(0), cos, sin, half, heads, group, triton.next_power_of_2(half), backward, num_warps=4)
    return x


@triton.jit
def _rotate(
    x, x_stride, cos, sin, half, heads, GROUP: tl.constexpr, BLOCK: tl.constexpr, BACKWARD: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (column < half)
    c = tl.load(cos + token * half + column, mask=column < half, other=0.0)
    s = tl.load(sin + token * half + column, mask=column < half, other=0.0)
    if BACKWARD:
        s = -s
    place = x + token * x_stride + head * 2 * half + column
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, first * c - second * s, mask=inside)
    tl.store(place + half, second * c + first * s, mask=inside)


def gather_rotated(
    d_heads: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """See elementwise.gather_rotated."""
    q, k, v = d_heads
    length, heads, width = q.shape[1:]
    group = max(1, 1024 // triton.next_power_of_2(width // 2))
    grid = (out.shape[0], triton.cdiv(heads + 2 * k.shape[2], group))
    _gather_rotated[grid](
        q, q.stride(0), q.stride(1), q.stride(2), k, k.stride(0), k.stride(1), k.stride(2),
        v, v.stride(0), v.stride(1), v.stride(2), cos, sin, out, out.stride(0), length, heads, k.shape[2], width // 2,
        group, triton.next_power_of_2(width // 2), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _gather_rotated(
    q, q_sample, q_token, q_head, k, k_sample, k_token, k_head, v, v_sample, v_token, v_head,
    cos, sin, out, out_stride, length, heads, kv_heads, half, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    sample, place = token // length, token % length
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    is_q, is_k = head < heads, (head >= heads) & (head < heads + kv_heads)
    is_v = (head >= heads + kv_heads) & (head < heads + 2 * kv_heads)
    inside = column < half
    from_q = q + sample * q_sample + place * q_token + head * q_head + column
    from_k = k + sample * k_sample + place * k_token + (head - heads) * k_head + column
    from_v = v + sample * v_sample + place * v_token + (head - heads - kv_heads) * v_head + column
    first = tl.load(from_q, mask=is_q & inside, other=0.0).to(tl.float32)
    first += tl.load(from_k, mask=is_k & inside, other=0.0).to(tl.float32)
    first += tl.load(from_v, mask=is_v & inside, other=0.0).to(tl.float32)
    second = tl.load(from_q + half, mask=is_q & inside, other=0.0).to(tl.float32)
    second += tl.load(from_k + half, mask=is_k & inside, other=0.0).to(tl.float32)
    second += tl.load(from_v + half, mask=is_v & inside, other=0.0).to(tl.float32)
    c = tl.where(is_v, 1.0, tl.load(cos + token * half + column, mask=inside, other=0.0))
    s = tl.where(is_v, 0.0, tl.load(sin + token * half + column, mask=inside, other=0.0))
    here = out + token * out_stride + head * 2 * half + column
    written = (is_q | is_k | is_v) & inside
    tl.store(here, first * c + second * s, mask=written)
    tl.store(here + half, second * c - first * s, mask=written)


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """See elementwise.swiglu."""
    rows, width = out.shape
    block = 2048
    _swiglu[(rows, triton.cdiv(width, block))](
        gate_up, gate_up.stride(0), out, out.stride(0), width, block, num_warps=8
    )
    return out


@triton.jit
def _swiglu(gate_up, gate_up_stride, out, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * gate_up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, gate * tl.sigmoid(gate) * up, mask=inside)


def swiglu_backward(d: torch.Tensor, gate_up: torch.Tensor, d_gate_up: torch.Tensor) -> torch.Tensor:
    """See elementwise.swiglu_backward."""
    rows, width = d.shape
    block = 2048
    _swiglu_backward[(rows, triton.cdiv(width, block))](
        d, d.stride(0), gate_up, gate_up.stride(0), d_gate_up, d_gate_up.stride(0), width, block, num_warps=8
    )
    return d


@triton.jit
def _swiglu_backward(d, d_stride, gate_up, gate_up_stride, out, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * gate_up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(d + row * d_stride + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(out + row * out_stride + columns, slope * up * (sigmoid + silu * (1 - sigmoid)), mask=inside)
    tl.store(out + row * out_stride + width + columns, slope * silu, mask=inside)
    tl.store(d + row * d_stride + columns, silu * up, mask=inside)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, d_logits: torch.Tensor) -> torch.Tensor:
    """See elementwise.cross_entropy."""
    rows, width = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _cross_entropy[(rows,)](
        logits, logits.stride(0), targets, d_logits, d_logits.stride(0), losses, width, 4096, num_warps=16
    )
    return losses


@triton.jit
def _cross_entropy(logits, logits_stride, targets, out, out_stride, losses, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):  # a running maximum per lane, joined once at the end
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * logits_stride + columns, mask=columns < width, other=-float("inf")).to(
            tl.float32
        )
        higher = tl.maximum(largest, value)
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(largest - shift) + tl.exp(value - shift)
        largest = higher
    peak = tl.max(largest, axis=0)
    log_sum = peak + tl.log(tl.sum(total * tl.exp(largest - peak), axis=0))
    target = tl.load(targets + row)
    truth = tl.load(logits + row * logits_stride + target).to(tl.float32)
    tl.store(losses + row, log_sum - truth)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        value = tl.load(logits + row * logits_stride + columns, mask=inside, other=-float("inf")).to(tl.float32)
        share = tl.exp(value - log_sum) - tl.where(columns == target, 1.0, 0.0)
        tl.store(out + row * out_stride + columns, share, mask=inside)


def fill_nf4(weight: "Nf4", out: torch.Tensor) -> None:
    """See nf4.Nf4.fill."""
    nested = weight.scale_levels is not None
    levels = weight.scale_levels if nested else weight.levels
    outer = weight.outer_scales if nested else weight.scales
    offset = weight.offset if nested else weight.levels
    block = 1024
    _fill_nf4[(weight.rows, triton.cdiv(weight.columns, block))](
        weight.packed, weight.levels, weight.scales, levels, outer, offset, out, out.stride(0), weight.columns,
        weight.outer_block, block, nested, num_warps=4,
    )  # fmt: skip


@triton.jit
def _fill_nf4(
    packed, levels, scales, scale_levels, outer, offset, out, out_stride, columns, outer_block,
    BLOCK: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    half = tl.program_id(1) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    inside = half * 2 < columns
    pair = tl.load(packed + row * (columns // 2) + half, mask=inside, other=0).to(tl.int32)
    place = (row * columns + half * 2) // 64
    scale = tl.load(scales + place, mask=inside, other=0)
    if NESTED:
        wide = tl.load(outer + place // outer_block, mask=inside, other=0.0)
        scale = tl.load(scale_levels + scale.to(tl.int32)) * wide + tl.load(offset)
    first = tl.load(levels + (pair >> 4)) * scale
    second = tl.load(levels + (pair & 15)) * scale
    both = tl.interleave(first, second)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + row * out_stride + column, both, mask=column < columns)


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16
