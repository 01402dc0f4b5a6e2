"""The head's backward in e4m3: dx = dy W, half of what the head multiplies. Logits, and so the loss, stay exact.

The largest of softmax - one-hot in a row is that of the target, 1 - its share, so the row's scale is known before it is
written, and e4m3 reaches down to a two-millionth of it. 512 rows make one tile for each of a Hopper's multiprocessors,
which leaves e4m3 at bf16's rate: some chunks of logits, of whole tiles, are multiplied together, a quarter of the size
that they had.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch

from afina.engine import eight
from afina.engine.eight import FP8, Rows
from afina.engine.eight_product import ALIGN, TILE
from afina.engine.head import Ends, Host, logits_of

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


@dataclass(kw_only=True, eq=False)
class EightEnds(Ends):
    """See Ends. eight: what dx is made of; None where the head waits in the computer's memory, as it is."""

    eight: EightHead | None

    @classmethod
    def of(cls, exact: Ends) -> "EightEnds":
        """From ends whose head is frozen and lies on the GPU; they are as before."""
        parts = {part.name: getattr(exact, part.name) for part in fields(Ends)}
        return cls(**parts, eight=EightHead.of(exact.weight))

    def leave(self, which: Host) -> None:
        """See Ends."""
        super().leave(which)
        if self.passes_by:
            self.eight = None

    def at_work(self, tokens: int, host: Host) -> int:
        """See Ends."""
        exact = super().at_work(tokens, host)
        return exact if host == "both" else exact + min(CHUNKS * exact // 4, tokens * self.weight.shape[0])

    def spared(self, host: Host) -> int:
        """See Ends."""
        return super().spared(host) + (self.eight.turned.nbytes if self.eight is not None and host == "both" else 0)

    def rows_at_once(self, slopes_too: bool) -> int:
        """See Ends: some chunks of whole tiles."""
        rows = super().rows_at_once(slopes_too)
        if self.eight is None or not slopes_too:
            return rows
        return CHUNKS * (rows - rows % TILE if rows > TILE else rows)

    def loss_of(
        self, rows: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, sums: list[torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Ends."""
        if self.eight is None or sums is None:
            return super().loss_of(rows, targets, weights, sums)
        logits = partial(logits_of, head=self.weight, bias=self.bias)
        return self.eight.loss(logits, rows, targets, weights, self.rows_at_once(True) // CHUNKS)
