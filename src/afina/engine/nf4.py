"""Weights kept in four bits (NF4, Dettmers et al., 2023, arXiv:2305.14314), as bitsandbytes stores them.

Sixteen levels, a scale for every 64 weights, the scales themselves in eight bits (double quantisation) or fp32. One
pass turns them into 16-bit weights inside a buffer that a product uses and the next one overwrites: 0.53 bytes read
and 2 written a weight. The numbers are bitsandbytes' own.
"""

from dataclasses import dataclass
from typing import Any

import torch

BLOCK = 64
"""Weights that share a scale; the only block size taken."""


@dataclass(frozen=True)
class Nf4:
    """A (rows, columns) weight. packed: (rows * columns / 2,) uint8, the first of two weights in the high bits.

    levels: (16,) fp32. scales: one a block, fp32; or uint8 indices into `scale_levels` (256,), times `outer_scales`,
    one for every `outer_block` blocks, plus `offset`.
    """

    rows: int
    columns: int
    packed: torch.Tensor
    levels: torch.Tensor
    scales: torch.Tensor
    scale_levels: torch.Tensor | None
    outer_scales: torch.Tensor | None
    outer_block: int
    offset: torch.Tensor | None

    def fill(self, out: torch.Tensor) -> None:
        """Write the weights into `out` (rows, columns), which may be part of wider rows."""
        if out.is_cuda:
            from afina.engine import movers

            movers.fill_nf4(self, out)
            return
        places = torch.stack([self.packed >> 4, self.packed & 15], dim=1).flatten().long()
        scales = self.scales
        if self.scale_levels is not None and self.outer_scales is not None and self.offset is not None:
            outer = self.outer_scales.repeat_interleave(self.outer_block)[: scales.numel()]
            scales = self.scale_levels[scales.long()] * outer + self.offset
        values = self.levels[places].view(-1, BLOCK) * scales[:, None]
        out.copy_(values.view(self.rows, self.columns))


def from_bitsandbytes(weight: Any) -> Nf4 | None:
    """The same bytes, seen as ours; None for layouts other than NF4 or FP4 in blocks of 64 whose rows they divide."""
    state = getattr(weight, "quant_state", None)
    if state is None or state.blocksize != BLOCK or state.shape[1] % BLOCK:
        return None
    nested = bool(state.nested)
    return Nf4(
        rows=state.shape[0],
        columns=state.shape[1],
        packed=weight.data.flatten(),
        levels=state.code.float(),
        scales=state.absmax,
        scale_levels=state.state2.code.float() if nested else None,
        outer_scales=state.state2.absmax if nested else None,
        outer_block=state.state2.blocksize if nested else 1,
        offset=state.offset.float().reshape(1) if nested else None,
    )
