"""Cross-entropy of a batch's targets, computed on the places that predict a target and on no others.

The reference: transformers' own forward and head. Logits are taken at the predicting places only, so a batch of
which a third is learnt pays for a third of the head.
"""

from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F


class Targeted(Protocol):
    """What the loss needs of a batch; `data/batch.py` explains the fields and their shapes."""

    @property
    def input_ids(self) -> torch.Tensor: ...
    @property
    def position_ids(self) -> torch.Tensor: ...
    @property
    def attention_mask(self) -> torch.Tensor | None: ...
    @property
    def lengths(self) -> tuple[int, ...] | None: ...
    @property
    def predicting(self) -> torch.Tensor: ...
    @property
    def targets(self) -> torch.Tensor: ...


def target_logits(model: nn.Module, batch: Targeted) -> torch.Tensor:
    """Logits (targets, vocabulary), at least fp32, at the places that predict a target."""
    width = batch.input_ids.shape[1]
    if batch.lengths is not None:
        columns, rows = batch.predicting, slice(0, 1)
    else:
        columns, rows = torch.unique(batch.predicting % width), slice(None)
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        logits_to_keep=columns,
        packed_lengths=batch.lengths,
    )
    logits: torch.Tensor = output.logits[rows].to(torch.promote_types(output.logits.dtype, torch.float32))
    if batch.lengths is not None:
        return logits[0]
    kept = torch.searchsorted(columns, batch.predicting % width)
    return logits[batch.predicting // width, kept]


def token_losses(model: nn.Module, batch: Targeted) -> torch.Tensor:
    """Negative log-likelihood of each target, (targets,) fp32, in nats."""
    return F.cross_entropy(target_logits(model, batch), batch.targets, reduction="none")


def summed_loss(model: nn.Module, batch: Targeted) -> torch.Tensor:
    """Sum of `token_losses`; the loop divides by the number of targets of the whole step."""
    return token_losses(model, batch).sum()
