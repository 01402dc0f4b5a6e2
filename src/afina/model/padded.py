"""PyTorch's own attention over padded rows, summed in a fixed order inside `exact`: the reference's, on a GPU.

Its backward takes that order only for those who want an error rather than a warning (repeatable.py). The nodes around
it in autograd's graph say so just before it, and take it back just after: nodes made later are run sooner, so no other
operation is between them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from afina.model.attention import attending
from afina.model.repeatable import in_order, strict

NAME = "afina_padded"
PLAIN = "sdpa"


@contextmanager
def padded_attention(model: nn.Module) -> Iterator[None]:
    """Inside the block, and inside `exact`, attention that PyTorch computes gives the same bits each time."""
    config: Any = model.config
    if config._attn_implementation != PLAIN or not torch.are_deterministic_algorithms_enabled():
        yield
        return
    with attending(model, NAME):
        yield


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *given: Any, **more: Any
) -> tuple[torch.Tensor, None]:
    """query: (rows, heads, n, width); key, value: (rows, kv heads, m, width). Returns (rows, n, heads, width)."""
    query, key, value = _After.apply(query, key, value)  # type: ignore[no-untyped-call]
    with in_order():
        out, _weights = _PLAIN_ATTENTION(module, query, key, value, *given, **more)
    found: torch.Tensor = _Before.apply(out)  # type: ignore[no-untyped-call]
    return found, None


class _Before(torch.autograd.Function):
    """Its backward comes just before that of what it was given."""

    @staticmethod
    def forward(_ctx: Any, out: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(_ctx: Any, d_out: torch.Tensor) -> torch.Tensor:
        strict(True)
        return d_out


class _After(torch.autograd.Function):
    """Its backward comes just after that of what was made of its outputs."""

    @staticmethod
    def forward(_ctx: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part.view_as(part) for part in inputs)

    @staticmethod
    def backward(_ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        strict(False)
        return gradients


_PLAIN_ATTENTION: Any = AttentionInterface()[PLAIN]
AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()[PLAIN])
