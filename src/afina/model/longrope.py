"""LongRoPE (Ding et al., 2024, arXiv:2402.13753): a sample turns by the factors of its own length.

Phi-3 and its kin have two sets of factors: short ones up to the context that they were first trained with, long ones
beyond. transformers chooses by the longest sample that is computed at once, so that a sample's numbers depended on its
neighbours. Here each sample chooses for itself, packed, padded and while answers are written: one that grows beyond the
original context is read again, since keys that are kept were turned by the short factors.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from afina.model.virtual import virtual_tokens


def original_context(model: nn.Module) -> int | None:
    """Tokens of the longest sample that the short factors serve, virtual ones left out; None where there is one set."""
    rope: Any = getattr(getattr(model, "config", None), "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return int(rope["original_max_position_embeddings"]) - virtual_tokens(model)


def choose_by_sample(model: Any) -> nn.Module:
    """Have a model of transformers choose the factors sample by sample; others stay as they are. Returns the model."""
    original = original_context(model)
    if original is not None:
        for module in model.modules():
            if getattr(module, "rope_type", None) == "longrope":
                module.forward = partial(_angles, module.forward, original)
        # Phi-3's own drops the cache once the widest row of a batch goes beyond the original context, for all rows.
        model.prepare_inputs_for_generation = super(type(model), model).prepare_inputs_for_generation
    return model  # type: ignore[no-any-return]


def crosses(model: nn.Module, prompts: Sequence[Sequence[int]], new: int) -> bool:
    """Whether one of the prompts, continued by up to `new` tokens, changes from the short factors to the long ones."""
    original = original_context(model)
    return original is not None and any(len(prompt) <= original < len(prompt) + new - 1 for prompt in prompts)


def _angles(turned: Any, original: int, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the rotary module gives for each set of factors, each where it belongs: (rows, width, width of a head).

    `turned` takes the long ones where the largest position asks for them, which is seen to here.
    """
    short = turned(x, position_ids.clamp(max=original - 1))
    long = turned(x, F.pad(position_ids, (0, 1), value=original))
    far = (_lengths(position_ids) > original)[..., None]
    return tuple(torch.where(far, b[..., :-1, :], a) for a, b in zip(short, long, strict=True))


def _lengths(positions: torch.Tensor) -> torch.Tensor:
    """Of each place the length that its sample has reached: positions (rows, width) rise by one within a sample."""
    width = positions.shape[-1]
    ends = F.pad(positions[..., 1:] != positions[..., :-1] + 1, (0, 1), value=True)
    places = torch.arange(width, device=positions.device).expand_as(ends).masked_fill(~ends, width)
    return positions.gather(-1, places.flip(-1).cummin(-1).values.flip(-1)) + 1
