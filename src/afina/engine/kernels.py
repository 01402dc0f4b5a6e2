"""The Triton twins of elementwise.py: one pass over memory each, statistics in fp32.

Imported on a GPU only. Row strides are arguments, so that inputs and outputs may be parts of wider rows; offsets are
64-bit, because 32,768 tokens times 128,256 logits do not fit into 32.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from afina.engine.elementwise import around_swiglu

if TYPE_CHECKING:
    from afina.engine.elementwise import LowRank
    from afina.engine.nf4 import Nf4

MOST_RANK = 64
"""Low-rank terms up to this rank are computed while SwiGLU's tensors pass by; wider ones as products of their own."""


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


def swiglu(gate_up: torch.Tensor, low: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """See elementwise.swiglu."""
    rows, (r, width) = gate_up.shape[0], low.shape
    if not 0 < r <= MOST_RANK:
        block = 2048
        _swiglu[(rows, triton.cdiv(width, block))](
            gate_up, gate_up.stride(0), out, out.stride(0), width, block, num_warps=8
        )
        if r:
            torch.mm(out[:, :width], low.t(), out=out[:, width:])
        return out
    _swiglu_low[(triton.cdiv(rows, 16),)](
        gate_up, gate_up.stride(0), low, low.stride(0), out, out.stride(0), rows, width, r, 16, 256, _rank(r),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def _swiglu(gate_up, gate_up_stride, out, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * gate_up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _swiglu_low(
    gate_up, gate_up_stride, low, low_stride, out, out_stride, rows, width, r,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    rank = tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row < rows) & (column < width)[None, :]
        place = gate_up + row * gate_up_stride + column[None, :]
        gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
        product = (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty)
        tl.store(out + row * out_stride + column[None, :], product, mask=inside)
        weight = tl.load(
            low + rank[None, :] * low_stride + column[:, None],
            mask=(rank < r)[None, :] & (column < width)[:, None], other=0.0,
        )  # fmt: skip
        total += tl.dot(product, weight)
    tl.store(out + row * out_stride + width + rank[None, :], total, mask=(row < rows) & (rank < r)[None, :])


def swiglu_backward(
    d: torch.Tensor, gate_up: torch.Tensor, d_gate_up: torch.Tensor, terms: Sequence["LowRank"], dy_low: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """See elementwise.swiglu_backward."""
    rows, width = d.shape
    ranks = [term.up.shape[1] for term in terms]
    complete = [term.half for term in terms] == [0, 1] and len(set(ranks)) == 1
    if not complete or max(*ranks, dy_low.shape[1]) > MOST_RANK or d.element_size() != 2 or not dy_low.shape[1]:
        block = 2048
        _swiglu_backward[(rows, triton.cdiv(width, block))](
            d, d.stride(0), gate_up, gate_up.stride(0), d_gate_up, d_gate_up.stride(0), width, block, num_warps=8
        )
        return around_swiglu(d, d_gate_up, terms, dy_low)
    gate, up = terms
    rank, r = _rank(ranks[0]), _rank(dy_low.shape[1])
    raised = torch.zeros(rows, 2 * ranks[0], dtype=torch.float32, device=d.device)
    d_ups = torch.zeros(2, width, ranks[0], dtype=torch.float32, device=d.device)
    d_low = torch.zeros(width, dy_low.shape[1], dtype=torch.float32, device=d.device)
    columns, parts = triton.cdiv(width, 256), 1
    while columns * parts < 512 and parts * 64 < rows:
        parts += 1
    _swiglu_backward_low[(columns, parts)](
        d, d.stride(0), gate_up, gate_up.stride(0), d_gate_up, d_gate_up.stride(0),
        gate.up, gate.up.stride(0), up.up, up.up.stride(0), gate.low, gate.low.stride(0), up.low, up.low.stride(0),
        dy_low, dy_low.stride(0), raised, d_ups, d_low, rows, triton.cdiv(triton.cdiv(rows, 32), parts) * 32, width,
        ranks[0], dy_low.shape[1], 32, 256, rank, r, num_warps=8, num_stages=2,
    )  # fmt: skip
    here = d_gate_up[:, 2 * width :]
    here[:, gate.columns].copy_(raised[:, : ranks[0]])
    here[:, up.columns].copy_(raised[:, ranks[0] :])
    return [d_ups[0], d_ups[1]], d_low.t()


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


@triton.jit
def _swiglu_backward_low(
    d, d_stride, gate_up, gate_up_stride, out, out_stride,
    gate_up_w, gate_up_w_stride, up_up_w, up_up_w_stride, gate_low, gate_low_stride, up_low, up_low_stride,
    dy_low, dy_low_stride, raised, d_ups, d_low, rows, rows_each, width, rank, r,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A column of blocks walks down a part of the rows: what sums over rows stays in registers, what sums over columns
    (gradient times up, 2 rank numbers a row) is added in memory."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    narrow, other = tl.arange(0, RANK), tl.arange(0, R)
    is_column = column < width
    of_up = is_column[:, None] & (narrow < rank)[None, :]
    gate_w = tl.load(gate_up_w + column[:, None] * gate_up_w_stride + narrow[None, :], mask=of_up, other=0.0)
    up_w = tl.load(up_up_w + column[:, None] * up_up_w_stride + narrow[None, :], mask=of_up, other=0.0)
    sum_gate = tl.zeros((BLOCK, RANK), tl.float32)
    sum_up = tl.zeros((BLOCK, RANK), tl.float32)
    sum_low = tl.zeros((BLOCK, R), tl.float32)
    begin = tl.program_id(1) * rows_each
    for start in range(begin, tl.minimum(begin + rows_each, rows), ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & is_column[None, :]
        place = gate_up + row * gate_up_stride + column[None, :]
        gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(d + row * d_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        d_gate = (slope * up * (sigmoid + silu * (1 - sigmoid))).to(out.dtype.element_ty)
        d_up = (slope * silu).to(out.dtype.element_ty)
        product = (silu * up).to(out.dtype.element_ty)
        here = out + row * out_stride + column[None, :]
        tl.store(here, d_gate, mask=inside)
        tl.store(here + width, d_up, mask=inside)
        of_low = (row < rows) & (narrow < rank)[None, :]
        gate_l = tl.load(gate_low + row * gate_low_stride + narrow[None, :], mask=of_low, other=0.0)
        up_l = tl.load(up_low + row * up_low_stride + narrow[None, :], mask=of_low, other=0.0)
        dy_l = tl.load(
            dy_low + row * dy_low_stride + other[None, :], mask=(row < rows) & (other < r)[None, :], other=0.0
        )
        sum_gate += tl.dot(tl.trans(d_gate), gate_l)
        sum_up += tl.dot(tl.trans(d_up), up_l)
        sum_low += tl.dot(tl.trans(product), dy_l)
        to = raised + row * 2 * rank + narrow[None, :]
        tl.atomic_add(to, tl.dot(d_gate, gate_w), mask=of_low, sem="relaxed")
        tl.atomic_add(to + rank, tl.dot(d_up, up_w), mask=of_low, sem="relaxed")
    to = d_ups + column[:, None] * rank + narrow[None, :]
    tl.atomic_add(to, sum_gate, mask=of_up, sem="relaxed")
    tl.atomic_add(to + width * rank, sum_up, mask=of_up, sem="relaxed")
    of_r = is_column[:, None] & (other < r)[None, :]
    tl.atomic_add(d_low + column[:, None] * r + other[None, :], sum_low, mask=of_r, sem="relaxed")


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


def _rank(r: int) -> int:
    return max(16, triton.next_power_of_2(r))


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16
