"""The Triton twins of experts.py and grouped.py: one pass over memory each, sums in fp32. Imported on a GPU only."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from afina.engine.experts import Gating
    from afina.engine.router import Routing


def gated(gate_up: torch.Tensor, bias: torch.Tensor | None, experts: torch.Tensor, by: "Gating") -> torch.Tensor:
    """See experts.gated."""
    pairs, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(pairs, width, dtype=gate_up.dtype, device=gate_up.device)
    block = 1024
    _gated[(pairs, triton.cdiv(width, block))](
        gate_up, gate_up if bias is None else bias, experts, out, width, by.alpha, by.limit, by.shift, block,
        by.interleaved, bias is not None, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _gate_and_up(row_of, columns, width, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(BLOCK,) of gate and of up, fp32, from a row that holds both."""
    if INTERLEAVED:
        both = columns[:, None] * 2 + tl.arange(0, 2)[None, :]
        pair = tl.load(row_of + both, mask=both < 2 * width, other=0.0).to(tl.float32)
        gate, up = tl.split(pair)
    else:
        gate = tl.load(row_of + columns, mask=columns < width, other=0.0).to(tl.float32)
        up = tl.load(row_of + width + columns, mask=columns < width, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _gated(
    gate_up, bias, experts, out, width, alpha, limit, shift,
    BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate, up = _gate_and_up(gate_up + row * 2 * width, columns, width, BLOCK, INTERLEAVED)
    if HAS_BIAS:
        of_gate, of_up = _gate_and_up(bias + tl.load(experts + row) * 2 * width, columns, width, BLOCK, INTERLEAVED)
        gate += of_gate
        up += of_up
    gate = tl.minimum(gate, limit)
    up = tl.maximum(tl.minimum(up, limit), -limit)
    tl.store(out + row * width + columns, (up + shift) * gate * tl.sigmoid(alpha * gate), mask=columns < width)


def gated_backward(
    d: torch.Tensor,
    gate_up: torch.Tensor,
    bias: torch.Tensor | None,
    experts: torch.Tensor,
    share: torch.Tensor,
    by: "Gating",
) -> torch.Tensor:
    """See experts.gated_backward."""
    pairs, width = d.shape
    block = 1024
    parts = torch.empty(triton.cdiv(width, block), pairs, dtype=torch.float32, device=d.device)
    _gated_backward[(pairs, parts.shape[0])](
        d, gate_up, gate_up if bias is None else bias, experts, share, parts, width, by.alpha, by.limit, by.shift,
        block, by.interleaved, bias is not None, num_warps=4,
    )  # fmt: skip
    return parts.sum(0)


@triton.jit
def _gated_backward(
    d, gate_up, bias, experts, share, parts, width, alpha, limit, shift,
    BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    own = gate_up + row * 2 * width
    gate, up = _gate_and_up(own, columns, width, BLOCK, INTERLEAVED)
    if HAS_BIAS:
        of_gate, of_up = _gate_and_up(bias + tl.load(experts + row) * 2 * width, columns, width, BLOCK, INTERLEAVED)
        gate += of_gate
        up += of_up
    passes_gate = gate <= limit
    passes_up = (up <= limit) & (up >= -limit)
    gate = tl.minimum(gate, limit)
    up = tl.maximum(tl.minimum(up, limit), -limit) + shift
    sigmoid = tl.sigmoid(alpha * gate)
    act = up * gate * sigmoid
    slope = tl.load(d + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(tl.where(inside, slope * act, 0.0), axis=0)
    tl.store(parts + tl.program_id(1) * tl.num_programs(0) + row, total)
    slope = slope * tl.load(share + row).to(tl.float32)
    d_gate = tl.where(passes_gate, slope * up * sigmoid * (1 + alpha * gate * (1 - sigmoid)), 0.0)
    d_up = tl.where(passes_up, slope * gate * sigmoid, 0.0)
    if INTERLEAVED:
        both = columns[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(own + both, tl.join(d_gate, d_up), mask=both < 2 * width)
    else:
        tl.store(own + columns, d_gate, mask=inside)
        tl.store(own + width + columns, d_up, mask=inside)
    tl.store(d + row * width + columns, act, mask=inside)


def combine(
    rows: torch.Tensor,
    routing: "Routing",
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    weighted: bool = False,
) -> torch.Tensor:
    """See experts.combine."""
    tokens, chosen = routing.places.shape
    width, block = rows.shape[1], 1024
    past = out if residual is None else residual
    _combine[(tokens, triton.cdiv(width, block))](
        rows, routing.places, routing.ids, routing.weights, rows if bias is None else bias, past, past.stride(0),
        out, out.stride(0), width, chosen, block, bias is not None, residual is not None, weighted, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _combine(
    rows, places, ids, weights, bias, past, past_stride, out, out_stride, width, chosen: tl.constexpr,
    BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAST: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_PAST:
        total += tl.load(past + token * past_stride + columns, mask=inside, other=0.0).to(tl.float32)
    for slot in tl.static_range(chosen):
        pair = token * chosen + slot
        part = tl.load(rows + tl.load(places + pair) * width + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            part += tl.load(bias + tl.load(ids + pair) * width + columns, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weights + pair).to(tl.float32)
        total += part
    tl.store(out + token * out_stride + columns, total, mask=inside)


def fill_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """See experts.fill_mxfp4; out: contiguous, bf16."""
    words = blocks.view(torch.int32).view(-1)
    block = 1024
    _fill_mxfp4[(triton.cdiv(words.numel(), block),)](words, scales, out, words.numel(), block, num_warps=4)


@triton.jit
def _fill_mxfp4(words, scales, out, count, BLOCK: tl.constexpr):
    """Four bits s e e m stand in the same order in fp32, the exponent 126 too low: 0.5 is there a subnormal 2^-127."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + place, mask=place < count, other=0)
    power = tl.load(scales + place // 4, mask=place < count, other=127).to(tl.int32)
    scale = tl.where(power == 0, 0x00400000, power << 23).to(tl.float32, bitcast=True)
    nibble = word[:, None] >> (4 * tl.arange(0, 8))[None, :]
    bits = ((nibble & 8) << 28) | ((nibble & 7) << 22)
    value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
    inside = (place < count)[:, None] & (tl.arange(0, 8) >= 0)[None, :]
    tl.store(out + place[:, None] * 8 + tl.arange(0, 8)[None, :], value * scale[:, None], mask=inside)


def grouped_outer(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """See grouped.grouped_outer; fp32."""
    experts, r, width = ends.numel(), a.shape[1], b.shape[1]
    out = torch.empty(experts, r, width, dtype=torch.float32, device=a.device)
    rank, block = max(16, triton.next_power_of_2(r)), 128
    _grouped_outer[(experts, triton.cdiv(width, block))](
        a, b, ends, out, r, width, rank, block, 64, num_warps=4, num_stages=3
    )
    return out


@triton.jit
def _grouped_outer(a, b, ends, out, r, width, RANK: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    expert = tl.program_id(0)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    last = tl.load(ends + expert)
    ranks, columns = tl.arange(0, RANK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((RANK, BLOCK), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        low = tl.load(
            a + row[None, :] * r + ranks[:, None], mask=(row < last)[None, :] & (ranks < r)[:, None], other=0.0
        )
        wide = tl.load(
            b + row[:, None] * width + columns[None, :], mask=(row < last)[:, None] & (columns < width)[None, :],
            other=0.0,
        )  # fmt: skip
        total = tl.dot(low, wide, total, input_precision="ieee")
    place = out + expert.to(tl.int64) * r * width + ranks[:, None] * width + columns[None, :]
    tl.store(place, total, mask=(ranks < r)[:, None] & (columns < width)[None, :])


def grouped_add(y: torch.Tensor, low: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """See grouped.grouped_add."""
    experts, r, width = weights.shape
    rank, block = max(16, triton.next_power_of_2(r)), 128
    _grouped_add[(experts, triton.cdiv(width, block), 4)](
        y, low, weights, *weights.stride(), ends, r, width, rank, block, 64, num_warps=4
    )
    return y


@triton.jit
def _grouped_add(
    y, low, weights, of_expert, of_rank, of_column, ends, r, width,
    RANK: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0).to(tl.int64)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0) + tl.program_id(2) * ROWS
    last = tl.load(ends + expert)
    ranks, columns = tl.arange(0, RANK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(
        weights + expert * of_expert + ranks[:, None] * of_rank + columns[None, :] * of_column,
        mask=(ranks < r)[:, None] & inside[None, :], other=0.0,
    )  # fmt: skip
    for start in range(first, last, ROWS * tl.num_programs(2)):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        there = row < last
        part = tl.load(low + row[:, None] * r + ranks[None, :], mask=there[:, None] & (ranks < r)[None, :], other=0.0)
        place = y + row[:, None] * width + columns[None, :]
        both = there[:, None] & inside[None, :]
        total = tl.load(place, mask=both, other=0.0).to(tl.float32)
        total = tl.dot(part, weight, total, input_precision="ieee")
        tl.store(place, total, mask=both)
