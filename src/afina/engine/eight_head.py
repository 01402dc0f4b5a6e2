"""The head's backward in e4m3: dx = dy W, half of what the head multiplies. Logits, and so the loss, stay exact.

The largest of softmax - one-hot in a row is that of the target, 1 - its share, so the row's scale is known before it is
written, and e4m3 reaches down to a two-millionth of it. 512 rows make one tile for each of a Hopper's multiprocessors,
which leaves e4m3 at bf16's rate: some chunks of logits, of whole tiles, are multiplied together, a quarter of the size
that they had.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from afina.engine import eight
from afina.engine.eight import FP8, Rows
from afina.engine.eight_product import ALIGN

AT_ONCE = 8192
"""Rows of the head that are turned over together."""
CHUNKS = 4
"""Of logits, whose slopes in eight bits take the room of one in fp32."""


@dataclass(frozen=True, eq=False)
class EightHead:
    """turned: (hidden, vocabulary, rounded up) in e4m3; ones: (hidden,); fold: (vocabulary,) the weights' scales, by
    which dy is multiplied before it is quantised."""

    turned: torch.Tensor
    fold: torch.Tensor
    ones: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> "EightHead":
        """From the head's weight (vocabulary, hidden), which is as before."""
        vocabulary, hidden = weight.shape
        turned = torch.empty(hidden, -(-vocabulary // ALIGN) * ALIGN, dtype=FP8.dtype, device=weight.device)
        turned[:, vocabulary:] = torch.zeros((), dtype=FP8.dtype)
        fold = torch.empty(vocabulary, dtype=torch.float32, device=weight.device)
        for start in range(0, vocabulary, AT_ONCE):  # as it lies and turned over, all of it would take twice the room
            part = weight[start : start + AT_ONCE]
            straight = Rows.empty(part.shape[0], hidden, 0, FP8, weight.device)
            eight.turn(eight.quantise(part, straight, weights=True), turned[:, start:])
            fold[start : start + AT_ONCE] = straight.scales
        eight.refuse_no_numbers(Rows(turned, fold, vocabulary, FP8))
        return cls(turned, fold, torch.ones(hidden, device=weight.device))

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return self.turned.numel()

    def loss(
        self,
        logits: Callable[[torch.Tensor], torch.Tensor],
        rows: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        at_once: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of each row (rows,) times its weight, and the gradient of rows (rows, hidden) in their dtype. targets,
        weights: (rows,); logits: of some rows (at_once, hidden), at least fp32."""
        count, vocabulary = rows.shape[0], self.fold.shape[0]
        slopes = Rows.empty(count, vocabulary, self.turned.shape[1] - vocabulary, FP8, rows.device)
        slopes.values[:, vocabulary:] = torch.zeros((), dtype=FP8.dtype)
        losses = []
        for start in range(0, count, at_once):
            part = slice(start, start + at_once)
            losses.append(eight.cross_entropy_rows(logits(rows[part]), targets[part], self.fold, slopes.part(part)))
        whole = torch.cat(losses)
        if weights is not None:
            whole = whole * weights
            slopes.scales.mul_(weights)
        return whole, eight.multiply(slopes, self.turned, self.ones, rows, fast=False)
