"""The Triton twins of eight.py that move 8-bit weights: turned over, out of four bits, adapters into their places.

Imported on a GPU only.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from afina.engine.eight_kernels import rounded
from afina.engine.eight_matrix import PAD, halves

if TYPE_CHECKING:
    from afina.engine.eight import Rows
    from afina.engine.nf4 import Nf4


def append_up(weights: "Rows", up: torch.Tensor, unit: torch.Tensor) -> None:
    """See eight.append_up."""
    _behind(weights.values, weights.width, up, weights.scales, unit, weights.form.largest)


def append_down(out: torch.Tensor, rows: int, down: torch.Tensor, unit: torch.Tensor, largest: float) -> None:
    """See eight.append_down."""
    _behind(out, rows, down.t(), None, unit, largest)


def _behind(
    values: torch.Tensor,
    width: int,
    factor: torch.Tensor,
    scales: torch.Tensor | None,
    unit: torch.Tensor,
    largest: float,
) -> None:
    """factor (rows, r) times unit, over scales (rows,) if any, behind `width` columns of values, in three parts."""
    rows, r = factor.shape
    block = triton.next_power_of_2(r)
    group = max(1, 2048 // max(block, 128))
    _append[(triton.cdiv(rows, group),)](
        values, values.stride(0), width, values.shape[1], factor, factor.stride(0), factor.stride(1), rows, r,
        unit if scales is None else scales, unit, largest, group, block, scales is not None, num_warps=4,
    )  # fmt: skip


@triton.jit
def _append(
    values, stride, width, whole, factor, factor_stride, factor_step, rows, r, scales, unit, largest,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)[:, None]
    rank = tl.arange(0, BLOCK)[None, :]
    known = (row < rows) & (rank < r)
    value = tl.load(factor + row * factor_stride + rank * factor_step, mask=known, other=0.0).to(tl.float32)
    value = value * tl.load(unit)
    if SCALES:
        value = value / tl.load(scales + row, mask=row < rows, other=1.0)
    high, rest = halves(value, largest)
    high, rest = high.to(values.dtype.element_ty), rest.to(values.dtype.element_ty)
    at = values + row * stride + width + rank
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


def spread(rows: "Rows", out: torch.Tensor) -> None:
    """See eight.spread."""
    count, block = out.shape[0], min(4096, triton.next_power_of_2(rows.width))
    _spread[(count, triton.cdiv(rows.width, block))](
        rows.values, rows.values.stride(0), rows.scales, out, out.stride(0), rows.width, block, num_warps=4
    )


@triton.jit
def _spread(values, stride, scales, out, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + row * stride + columns, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, value * tl.load(scales + row), mask=columns < width)


def unpack(weight: "Nf4", scales: torch.Tensor, out: torch.Tensor, turned: bool) -> None:
    """See eight.unpack: 0.53 bytes read and one written a weight, as it lies or turned over."""
    nested = weight.scale_levels is not None
    levels = weight.scale_levels if nested else weight.levels
    outer = weight.outer_scales if nested else weight.scales
    offset = weight.offset if nested else weight.levels
    block_n, blocks, warps = UNPACK[turned]
    _unpack[(triton.cdiv(weight.rows, block_n), triton.cdiv(weight.columns, 64 * blocks))](
        weight.packed, weight.levels, weight.scales, levels, outer, offset, scales, out, out.stride(0), weight.rows,
        weight.columns, weight.outer_block, block_n, blocks, nested, turned, num_warps=warps,
    )  # fmt: skip


UNPACK = {False: (8, 16, 8), True: (128, 2, 8)}
"""As they lie, and turned over: rows of a tile and blocks of 64 columns, and warps."""


@triton.jit
def _unpack(
    packed, levels, scales, scale_levels, outer, offset, row_scales, out, out_stride, rows, columns, outer_block,
    BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, NESTED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    inside = (row[:, None] < rows) & (block[None, :] * 64 < columns)
    place = row[:, None] * (columns // 64) + block[None, :]
    scale = tl.load(scales + place, mask=inside, other=0)  # one for 64 weights: a division for each took 30 ms a step
    if NESTED:
        wide = tl.load(outer + place // outer_block, mask=inside, other=0.0)
        scale = tl.load(scale_levels + scale.to(tl.int32)) * wide + tl.load(offset)
    scale = (scale / tl.load(row_scales + row, mask=row < rows, other=1.0)[:, None])[:, :, None]
    pairs = place[:, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    pair = tl.load(packed + pairs, mask=inside[:, :, None], other=0).to(tl.int32)
    both = tl.interleave(tl.load(levels + (pair >> 4)) * scale, tl.load(levels + (pair & 15)) * scale)
    value = tl.reshape(rounded(both, out.dtype.element_ty), (BLOCK_N, BLOCKS * 64))
    column = tl.program_id(1) * (BLOCKS * 64) + tl.arange(0, BLOCKS * 64)
    if TURNED:
        known = (row[None, :] < rows) & (column[:, None] < columns)
        tl.store(out + column[:, None].to(tl.int64) * out_stride + row[None, :], tl.trans(value), mask=known)
    else:
        known = (row[:, None] < rows) & (column[None, :] < columns)
        tl.store(out + row[:, None] * out_stride + column[None, :], value, mask=known)
