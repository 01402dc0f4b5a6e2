"""Weights set to zero: by their size, or by their size times what they are multiplied with. The shape stays.

Wanda (Sun et al., 2023, arXiv:2306.11695) scores a weight by |w| times the norm of its input over some samples, and
compares within each output; sizes alone are compared within each matrix, or over all matrices of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from afina.compress.smallest import all_but, smallest
from afina.errors import ModelError
from afina.language import _
from afina.model.targets import body_of


@dataclass(frozen=True)
class Pattern:
    """N:M: of every `of` neighbours in a row, `kept` stay."""

    kept: int
    of: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"


@torch.no_grad()
def zero_weights(
    model: nn.Module, method: str, share: float, pattern: Pattern | None, squares: Mapping[str, torch.Tensor]
) -> None:
    """Set `share` of the weights of every linear layer but the head to zero, in place.

    method: magnitude, magnitude-global or wanda, which weighs by `squares`: of each matrix (columns,) the mean square
    of its input. Raises ModelError where a matrix has no room for the pattern.
    """
    matrices = {f"{name}.weight": _rows_of(module) for name, module in body_of(model).items()}
    if pattern is not None:
        for name, weight in matrices.items():
            if weight.shape[1] % pattern.of:
                raise ModelError(
                    _("{name} has {columns} columns, which are no multiple of {of}.").format(
                        name=name, columns=weight.shape[1], of=pattern.of
                    ),
                    hint=_("Take another --pattern, or a --share."),
                )
            weight.masked_fill_(all_but(_scores(weight, squares.get(name)), pattern.kept, pattern.of), 0)
    elif method == "magnitude-global":
        parts = [_scores(weight, None).reshape(1, -1) for weight in matrices.values()]
        marks = smallest(parts, round(share * sum(part.numel() for part in parts)))
        for weight, mark in zip(matrices.values(), marks, strict=True):
            weight.masked_fill_(mark.reshape(weight.shape), 0)
    else:
        for name, weight in matrices.items():
            scores = _scores(weight, squares.get(name))
            groups = scores if method == "wanda" else scores.reshape(1, -1)
            (mark,) = smallest([groups], round(share * groups.shape[1]))
            weight.masked_fill_(mark.reshape(weight.shape), 0)


def zeros_of(model: nn.Module) -> tuple[int, int]:
    """How many weights of the linear layers but the head are zero, and how many there are."""
    weights: list[Any] = [module.weight for module in body_of(model).values()]
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)


def _rows_of(module: Any) -> torch.Tensor:
    """The weight (outputs, inputs), a view of the layer's own."""
    weight: torch.Tensor = module.weight.detach()
    return weight if isinstance(module, nn.Linear) else weight.t()  # GPT-2's matrices lie the other way round


def _scores(weight: torch.Tensor, squares: torch.Tensor | None) -> torch.Tensor:
    sizes = weight.detach().abs().float()
    return sizes if squares is None else sizes * squares.sqrt().to(sizes)[None]
