"""Weights that are zero stay so while the others learn: how a pruned model is healed."""

from typing import Any

import torch
from torch import nn

from afina.errors import RecipeError
from afina.language import _
from afina.model.targets import body_of


def hold_zeros(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """From now on weights of linear layers that are zero stay zero, to the bit, under any optimiser.

    No gradient reaches them, before norms are taken; and each step puts them back, as eight-bit moments have no exact
    zero and Muon turns whole matrices. Takes a byte for each weight of these layers. Raises RecipeError where no weight
    that learns is zero.
    """
    layers: list[Any] = list(body_of(model).values())
    learning = {layer.weight: layer.weight.detach() != 0 for layer in layers if layer.weight.requires_grad}
    learning = {weight: mask for weight, mask in learning.items() if not bool(mask.all())}
    if not learning:
        raise RecipeError(
            _("method.keep_zeros: no weight that learns is zero."),
            hint=_("Name a pruned model as model.base, or leave keep_zeros out."),
            key=("method", "keep_zeros"),
        )

    def mask_gradient(weight: torch.Tensor) -> None:
        if weight.grad is not None:
            weight.grad.mul_(learning[weight])

    @torch.no_grad()
    def mask_weights(*_step: object) -> None:
        for weight, mask in learning.items():
            weight.mul_(mask)

    for weight in learning:
        weight.register_post_accumulate_grad_hook(mask_gradient)
    optimizer.register_step_post_hook(mask_weights)
