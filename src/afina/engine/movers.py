"""Triton kernels that move weights: out of four bits, adapters into their places, rows out of the computer's memory.

Imported on a GPU only.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from afina.engine.elementwise import Copy
    from afina.engine.nf4 import Nf4


def fill_nf4(weight: "Nf4", out: torch.Tensor) -> None:
    """See nf4.Nf4.fill."""
    blocks = 32
    _fill_nf4[(weight.rows, triton.cdiv(weight.columns, 64 * blocks))](
        weight.packed, weight.levels, weight.scales, weight.scale_levels, weight.outer_scales, weight.offset, out,
        out.stride(0), weight.columns, weight.outer_block, blocks, weight.scale_levels is not None, num_warps=4,
    )  # fmt: skip


@triton.jit
def _fill_nf4(
    packed, levels, scales, scale_levels, outer, offset, out, out_stride, columns, outer_block,
    BLOCKS: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block * 64 < columns
    place = row * (columns // 64) + block
    scale = tl.load(scales + place, mask=inside, other=0)
    if NESTED:
        wide = tl.load(outer + place // outer_block, mask=inside, other=0.0)
        scale = tl.load(scale_levels + scale.to(tl.int32)) * wide + tl.load(offset)
    pairs = place[:, None] * 32 + tl.arange(0, 32)[None, :]
    pair = tl.load(packed + pairs, mask=inside[:, None], other=0).to(tl.int32)
    first = tl.load(levels + (pair >> 4)) * scale[:, None]
    second = tl.load(levels + (pair & 15)) * scale[:, None]
    column = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + row * out_stride + column, tl.interleave(first, second), mask=inside[:, None])


def copying(copies: Sequence["Copy"]) -> Callable[[], None]:
    """See products.copying: matrices of one precision on one GPU, into places of one precision, hundreds of adapters in
    one launch. Their rows lie side by side."""
    if any(tensor.stride(1) != 1 for copy in copies for tensor in copy[:2]):
        raise RuntimeError("rows must lie side by side")
    rows = [(a.data_ptr(), b.data_ptr(), *a.shape, a.stride(0), b.stride(0)) for a, b, _factor in copies]
    source, target, _factor = copies[0]
    places = torch.tensor(rows, dtype=torch.int64).to(source.device)
    factors = torch.tensor([factor for _a, _b, factor in copies]).to(source.device)
    return lambda: _copy_many[(len(rows), 128)](places, factors, source, target, 1024, num_warps=4)


@triton.jit
def _copy_many(places, factors, source, target, BLOCK: tl.constexpr):
    entry = tl.program_id(0)
    at = places + entry * 6
    read = tl.load(at).to(tl.pointer_type(source.dtype.element_ty))
    write = tl.load(at + 1).to(tl.pointer_type(target.dtype.element_ty))
    rows, columns = tl.load(at + 2), tl.load(at + 3)
    read_stride, write_stride = tl.load(at + 4), tl.load(at + 5)
    factor = tl.load(factors + entry)
    for start in range(tl.program_id(1) * BLOCK, rows * columns, tl.num_programs(1) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        row, column = place // columns, place % columns
        inside = place < rows * columns
        value = tl.load(read + row * read_stride + column, mask=inside).to(tl.float32)
        tl.store(write + row * write_stride + column, value * factor, mask=inside)


def gather_rows(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of a table in pinned memory of the computer, read from the GPU as they are needed. (tokens, width)."""
    width = table.shape[1]
    out = torch.empty(ids.numel(), width, dtype=table.dtype, device=ids.device)
    _gather_rows[(ids.numel(),)](table, table.stride(0), ids, out, width, triton.next_power_of_2(width), num_warps=4)
    return out


@triton.jit
def _gather_rows(table, stride, ids, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    value = tl.load(table + tl.load(ids + row) * stride + columns, mask=columns < width)
    tl.store(out + row * width + columns, value, mask=columns < width)
