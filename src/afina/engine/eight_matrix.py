"""The Triton twins of eight.py that multiply: base products, and the low-rank ones beside them. Imported on a GPU only.

Rows are read as they lie in eight bits, so the low-rank products move a half of what 16-bit copies would.
"""

from dataclasses import replace
from functools import cache

import torch
import triton
import triton.language as tl

from afina.engine.eight import Rows

PAD = tl.constexpr(128)
"""More columns than are ever left behind what is appended."""


def multiply(
    x: Rows, values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None, fast: bool
) -> torch.Tensor:
    """See eight.multiply. cuBLAS takes the rows of both factors as they lie: W is turned over by a view.

    It wants more than 16 rows of INT8, and takes the scale of a single row for one of all.
    """
    rows = x.values.shape[0]
    if rows <= 16:
        padded = Rows.empty(32, x.values.shape[1], 0, x.form, x.values.device)
        padded.values.view(torch.uint8).zero_()[:rows] = x.values.view(torch.uint8)
        padded.scales.fill_(1.0)[:rows] = x.scales
        x = replace(padded, width=x.width)
        return multiply(x, values, scales, dtype, bias, fast)[:rows]
    if x.form.dtype == torch.int8:
        return _rescale(torch._int_mm(x.values, values.t()), x.scales, scales, dtype, bias)
    if by_row(x.values.device.index or 0):
        return torch._scaled_mm(
            x.values, values.t(), scale_a=x.scales[:, None], scale_b=scales[None], bias=bias, out_dtype=dtype,
            use_fast_accum=fast,
        )  # fmt: skip
    one = torch.ones((), device=values.device)
    whole = torch._scaled_mm(x.values, values.t(), scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=fast)
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


def inward(x: Rows, small: torch.Tensor, unfold: torch.Tensor | None, unit: torch.Tensor | None) -> torch.Tensor:
    """See eight.inward. Columns are split among programs, so that there are enough; the last to come adds up the parts
    of some rows, always in one order."""
    rows, r = x.values.shape[0], small.shape[0]
    low = torch.empty(rows, r, dtype=small.dtype, device=small.device)
    block = max(16, triton.next_power_of_2(r))
    block_t, block_k, warps, stages, programs = INWARD.get(block, INWARD[64])
    tiles = triton.cdiv(rows, block_t)
    splits = max(1, min(programs // tiles, triton.cdiv(x.width, 4 * block_k)))
    parts = low if splits == 1 else torch.empty(splits, rows, r, dtype=torch.float32, device=low.device)
    _inward[(tiles, splits)](
        x.values, x.values.stride(0), x.scales, small, *small.stride(), x.scales if unfold is None else unfold, low,
        parts, _arrived(low.device.index or 0, tiles), x.scales if unit is None else unit, rows, x.width,
        x.values.shape[1], r, x.form.largest, block_t, block_k, block, unfold is not None, unit is not None, splits,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return low


INWARD = {16: (32, 256, 4, 4, 1024), 32: (64, 128, 4, 4, 256), 64: (32, 128, 4, 4, 256)}
"""By rank: rows and columns of a program's tile, warps, and tiles on their way; larger ones spill registers. And how
many programs there may be: with larger ranks what they have to add up afterwards weighs more."""


@cache
def _counters(index: int, count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=f"cuda:{index}" if torch.cuda.is_available() else "cpu")


def _arrived(index: int, tiles: int) -> torch.Tensor:
    """(tiles or more,) zeros, how many programs have made their part; whoever adds them up sets them back."""
    return _counters(index, triton.next_power_of_2(tiles))


@triton.jit
def _inward(
    x, x_stride, scales, small, small_stride, small_step, unfold, low, parts, arrived, unit, rows, width, whole, r,
    largest, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, UNFOLDS: tl.constexpr,
    APPENDS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rank = tl.arange(0, BLOCK_R)
    found = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(tl.program_id(1) * BLOCK_K, width, SPLITS * BLOCK_K):
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
    place = row[:, None] * r + rank[None, :]
    last = True
    if SPLITS > 1:
        tl.store(parts + tl.program_id(1).to(tl.int64) * rows * r + place, found, mask=known)
        tl.debug_barrier()
        last = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel") == SPLITS - 1
    if last:
        if SPLITS > 1:
            tl.store(arrived + tl.program_id(0), 0)
            found = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
            for split in range(SPLITS):
                found += tl.load(parts + split * rows.to(tl.int64) * r + place, mask=known, other=0.0)
        tl.store(low + place, found * scale[:, None], mask=known)
        if APPENDS:
            tl.debug_barrier()  # read again, in the layout of rows: no tile of eight bits changes its own
            found = tl.load(low + place, mask=known, other=0.0).to(tl.float32)
            found = found / tl.where(row < rows, scale, 1.0)[:, None]
            _append(found / tl.load(unit), x + row[:, None] * x_stride, row[:, None] < rows, rank[None, :], width,
                    whole, r, largest)  # fmt: skip


@triton.jit
def _append(value, at, there, rank, width, whole, r, largest):
    """e4m3, what it leaves, and e4m3 again, behind the columns of rows that begin at `at`, and zeros behind them."""
    known = there & (rank < r)
    high, rest = halves(value, largest)
    high = high.to(at.dtype.element_ty)
    tl.store(at + width + rank, high, mask=known)
    tl.store(at + width + r + rank, rest.to(at.dtype.element_ty), mask=known)
    tl.store(at + width + 2 * r + rank, high, mask=known)
    behind = width + 3 * r + tl.arange(0, PAD)[None, :]
    tl.store(at + behind, (behind * 0).to(tl.float32).to(at.dtype.element_ty), mask=there & (behind < whole))


@triton.jit
def halves(value, largest):
    """What e4m3 holds of a value up to `largest`, and what that leaves, in fp32.

    By arithmetic: turned into e4m3 and back, ptxas of CUDA 12.8 reads the stack pointer where four lie in a register.
    """
    value = tl.minimum(tl.maximum(value, -largest), largest)
    power = (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.maximum(power, 0.015625) * 0.125  # three bits behind the leading one; below 2^-6 steps are alike
    high = ((value / step + 12582912.0) - 12582912.0) * step  # 1.5 * 2^23: the sum has no bits behind the point
    return high, value - high


def outward(x: Rows, low: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See eight.outward. Tokens are split among programs, whose sums are added up afterwards, always in one order."""
    sums = _partial(x, low)
    out = torch.empty(sums.shape[1:], dtype=dtype, device=low.device)
    r, width = out.shape
    _add_up[(triton.cdiv(width, 512), r)](sums, sums.shape[0], r, width, out, x.scales, x.scales, 512, False)
    return out


def outward_turned(
    x: Rows, low: torch.Tensor, first: torch.Tensor, factors: torch.Tensor, rank: int, dtype: torch.dtype
) -> torch.Tensor:
    """See eight.outward_turned."""
    sums = _partial(x, low)
    out = torch.empty(x.width, rank, dtype=dtype, device=low.device)
    grid = (triton.cdiv(x.width, 512), rank)
    _add_up[grid](sums, sums.shape[0], low.shape[1], x.width, out, first, factors, 512, True)
    return out


@triton.jit
def _add_up(sums, splits, r, width, out, first, factors, BLOCK: tl.constexpr, TURNED: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    rank = tl.program_id(1)
    if TURNED:
        from_rank = tl.load(first + column, mask=inside, other=0) + rank
        place = column.to(tl.int64) * tl.num_programs(1) + rank
    else:
        from_rank = rank + column * 0
        place = rank.to(tl.int64) * width + column
    known = inside & (from_rank < r)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(sums + (split * r + from_rank).to(tl.int64) * width + column, mask=known, other=0.0)
    if TURNED:
        total = total * tl.load(factors + column, mask=inside, other=0.0)
    tl.store(out + place, total, mask=inside)


def _partial(x: Rows, low: torch.Tensor) -> torch.Tensor:
    """(splits, r, width) fp32, whose sum is low^T x."""
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
    return sums


OUTWARD = (64, 256, 4, 3)
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
