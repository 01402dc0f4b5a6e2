"""Attention for what PyTorch's own does not know: soft-capped scores (Gemma 2) and sinks (gpt-oss), in any precision.

The reference's, in place of transformers' eager one, which takes scores in the model's precision: in fp16 they overflow
and become no number. Here they are fp32, some queries at a time, and made again in the backward: a step never holds the
scores of a whole layer. Windows and padding come as a mask, as in transformers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "afina_careful"
SCORES_AT_ONCE = 2**25
"""Scores held at a time: 128 MiB in fp32."""


@contextmanager
def attending(model: nn.Module, name: str) -> Iterator[None]:
    """Inside the block transformers computes this model's attention by what is registered as `name`."""
    config: Any = model.config
    before = config._attn_implementation
    model.set_attn_implementation(name)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """query: (rows, heads, n, width); key, value: (rows, kv heads, m, width); attention_mask: (rows, 1, n, m), added.

    `s_aux`: (heads,) the sinks' scores. Returns (rows, n, heads, width).
    """
    rows, heads, n, width = query.shape
    kv_heads, m = key.shape[1:3]
    grouped = query.view(rows, kv_heads, heads // kv_heads, n, width)
    sinks = None if s_aux is None else s_aux.view(1, kv_heads, -1, 1, 1)
    step = max(1, SCORES_AT_ONCE // (rows * heads * m))
    kept = torch.is_grad_enabled() and step < n
    parts = []
    for start in range(0, n, step):
        mask = None if attention_mask is None else attention_mask[:, None, :, start : start + step, :m]
        given = (grouped[..., start : start + step, :], key, value, mask, sinks, scaling, softcap, dropout)
        parts.append(checkpoint(_some, *given, use_reentrant=False) if kept else _some(*given))
    whole = torch.cat(parts, dim=3)
    return whole.view(rows, heads, n, width).transpose(1, 2).contiguous(), None


def _some(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    dropout: float,
) -> torch.Tensor:
    """query: (rows, kv heads, heads each, some, width). Returns the same shape."""
    kind = query.device.type
    with torch.autocast(kind, enabled=False):
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = (query.to(wide) * scaling) @ key[:, :, None].to(wide).transpose(-1, -2)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            scores = scores + mask.to(wide)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(wide).expand(*scores.shape[:-1], 1)], dim=-1)
        shares = torch.softmax(scores, dim=-1)
        if sinks is not None:
            shares = shares[..., :-1]
        if dropout:
            shares = nn.functional.dropout(shares, dropout)
        found: torch.Tensor = shares.to(value.dtype) @ value[:, :, None]
    return found.to(query.dtype)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)
