"""How much each column of each matrix matters, from the user's own data: what encoders and pruning weigh errors by.

An output is the sum of columns, each times an input; an error of a column weighs as the mean square of that input.
Collected through hooks while the model reads samples as it was trained to. Knows nothing of files.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from afina.model.targets import is_linear

SAMPLES = 64
"""Samples read; a few thousand tokens settle a mean square to some per cent."""


@torch.inference_mode()
def collect(model: nn.Module, sequences: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Weight name to (columns,) mean square of what it is multiplied with, over all tokens of `sequences`."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    device = next(model.parameters()).device
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if is_linear(module):
                handle = module.register_forward_pre_hook(_adder(f"{name}.weight", sums, counts))
                stack.callback(handle.remove)
        for ids in sequences:
            model(input_ids=torch.tensor([list(ids)], device=device))
    return {name: total.cpu() / counts[name] for name, total in sums.items()}


def _adder(name: str, sums: dict[str, torch.Tensor], counts: dict[str, int]) -> Any:
    def add(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].float().reshape(-1, inputs[0].shape[-1])
        square = x.square().sum(0)
        sums[name] = sums[name] + square if name in sums else square
        counts[name] = counts.get(name, 0) + x.shape[0]

    return add
