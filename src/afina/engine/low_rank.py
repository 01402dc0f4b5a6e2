"""The Triton kernel for what a gradient dy meets in an adapter: dy sB and dB = dy^T low, with dy read once for both.

A program owns a strip of dy's columns and a group of its rows. It keeps its share of dB in registers while it walks down
the rows, and leaves a partial dy sB for each row; both are then summed, in a fixed order. Imported on a GPU only.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from afina.engine.elementwise import Part

STRIP, ROWS = 512, 64
"""Columns of dy that a program owns, and rows that it reads at a time."""


def meet(
    dy: torch.Tensor, up: torch.Tensor, low: torch.Tensor, parts: Sequence[Part], out: torch.Tensor
) -> list[torch.Tensor]:
    """See elementwise.meet."""
    tokens, rank = dy.shape[0], max(16, triton.next_power_of_2(max(end - first for _, _, first, end in parts)))
    table, firsts = _strips(tuple(parts), dy.device)
    strips = table.shape[0]
    groups = _groups(strips, tokens, torch.cuda.get_device_properties(dy.device).multi_processor_count)
    at_once = triton.cdiv(triton.cdiv(tokens, groups), ROWS) * ROWS
    downs = torch.empty(strips, tokens, rank, dtype=torch.float32, device=dy.device)
    ups = torch.empty(triton.cdiv(tokens, at_once), strips * STRIP, rank, dtype=torch.float32, device=dy.device)
    _meet[(strips, ups.shape[0])](
        dy, dy.stride(0), up, up.stride(0), low, low.stride(0), table, downs, ups, tokens, at_once, strips * STRIP,
        STRIP, ROWS, rank, num_warps=8, num_stages=3,
    )  # fmt: skip
    _gather[(triton.cdiv(tokens, ROWS), len(parts))](downs, firsts, out, out.stride(0), tokens, ROWS, rank, num_warps=4)
    found, summed = [], ups.sum(0)
    for (first, end, column, after), strip in zip(parts, _first_strips(parts), strict=True):
        found.append(summed[strip * STRIP :][: end - first, : after - column])
    return found


def _first_strips(parts: Sequence[Part]) -> list[int]:
    counts = [triton.cdiv(end - first, STRIP) for first, end, _column, _after in parts]
    return [sum(counts[:number]) for number in range(len(counts) + 1)][: len(parts)]


@lru_cache(maxsize=256)
def _strips(parts: tuple[Part, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Each strip's columns of dy and of the extra ones; each part's first strip, the one after its last, its columns."""
    table = [
        (start, min(start + STRIP, end), column, after)
        for first, end, column, after in parts
        for start in range(first, end, STRIP)
    ]
    begins = [*_first_strips(parts), len(table)]
    firsts = [(begins[n], begins[n + 1], column, after) for n, (_first, _end, column, after) in enumerate(parts)]
    return torch.tensor(table, dtype=torch.int32).to(device), torch.tensor(firsts, dtype=torch.int32).to(device)


def _groups(strips: int, tokens: int, processors: int) -> int:
    """How many groups of rows keep most processors busy."""
    most = max(1, min(32, tokens // (8 * ROWS)))

    def busy(groups: int) -> float:
        programs = strips * groups
        return programs / (-(-programs // processors) * processors)

    return max(range(1, most + 1), key=lambda groups: round(busy(groups), 2))


@triton.jit
def _meet(
    dy, dy_stride, up, up_stride, low, low_stride, table, downs, ups, tokens, at_once, all_columns,
    STRIP: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    strip, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, end = tl.load(table + strip * 4), tl.load(table + strip * 4 + 1)
    extra, after = tl.load(table + strip * 4 + 2), tl.load(table + strip * 4 + 3)
    column = first + tl.arange(0, STRIP)
    ranks = tl.arange(0, RANK)
    here, within = column < end, extra + ranks < after
    b = tl.load(
        up + column[:, None].to(tl.int64) * up_stride + extra + ranks[None, :],
        mask=here[:, None] & within[None, :],
        other=0.0,
    )
    of_up = tl.zeros((STRIP, RANK), tl.float32)
    for start in range(group * at_once, tl.minimum((group + 1) * at_once, tokens), ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        exists = row < tokens
        slope = tl.load(
            dy + row[:, None] * dy_stride + column[None, :], mask=exists[:, None] & here[None, :], other=0.0
        )
        given = tl.load(
            low + row[:, None] * low_stride + extra + ranks[None, :],
            mask=exists[:, None] & within[None, :],
            other=0.0,
        )
        down = tl.dot(slope, b, input_precision="ieee")
        tl.store(downs + (strip * tokens + row[:, None]) * RANK + ranks[None, :], down, mask=exists[:, None])
        of_up = tl.dot(tl.trans(slope), given, of_up, input_precision="ieee")
    place = group * all_columns + strip * STRIP + tl.arange(0, STRIP)
    tl.store(ups + place[:, None] * RANK + ranks[None, :], of_up)


@triton.jit
def _gather(downs, firsts, out, out_stride, tokens, ROWS: tl.constexpr, RANK: tl.constexpr):
    part = tl.program_id(1)
    begin, end = tl.load(firsts + part * 4), tl.load(firsts + part * 4 + 1)
    extra, after = tl.load(firsts + part * 4 + 2), tl.load(firsts + part * 4 + 3)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    ranks = tl.arange(0, RANK)
    exists = row[:, None] < tokens
    total = tl.zeros((ROWS, RANK), tl.float32)
    for strip in range(begin, end):
        total += tl.load(
            downs + (strip * tokens.to(tl.int64) + row[:, None]) * RANK + ranks[None, :], mask=exists, other=0.0
        )
    tl.store(
        out + row[:, None] * out_stride + extra + ranks[None, :], total, mask=exists & (extra + ranks < after)[None, :]
    )
