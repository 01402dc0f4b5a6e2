"""The head's backward in e4m3: dx = dy W, half of what the head multiplies. Logits, and so the loss, stay exact.

The largest of softmax - one-hot in a row is that of the target, 1 - its share, so the row's scale is known before it is
written, and e4m3 reaches down to a two-millionth of it.
"""

from dataclasses import dataclass

import torch

from afina.engine import eight
from afina.engine.eight import FP8, Rows
from afina.engine.eight_product import ALIGN


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
        straight = eight.quantise(weight, Rows.empty(vocabulary, hidden, 0, FP8, weight.device), weights=True)
        turned = torch.empty(hidden, -(-vocabulary // ALIGN) * ALIGN, dtype=FP8.dtype, device=weight.device)
        turned[:, vocabulary:] = torch.zeros((), dtype=FP8.dtype)
        eight.turn(straight, turned)
        return cls(turned, straight.scales, torch.ones(hidden, device=weight.device))

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return self.turned.numel()

    def loss(
        self, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of each row (rows,) times its weight, and the gradient (rows, hidden), in the dtype of `like`, of what
        entered the head. logits: (rows, vocabulary); targets, weights: (rows,)."""
        rows, vocabulary = logits.shape
        slopes = Rows.empty(rows, vocabulary, self.turned.shape[1] - vocabulary, FP8, logits.device)
        slopes.values[:, vocabulary:] = torch.zeros((), dtype=FP8.dtype)
        losses = eight.cross_entropy_rows(logits, targets, self.fold, slopes)
        if weights is not None:
            losses = losses * weights
            slopes.scales.mul_(weights)
        return losses, eight.multiply(slopes, self.turned, self.ones, like)
