"""Cross-entropy of a batch's targets, computed on the places that predict a target and on no others.

The reference: transformers' own forward and head. Logits are taken at the predicting places only, so a batch of
which a third is learnt pays for a third of the head.
"""

from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from afina.model.virtual import lay


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


def target_logits(model: nn.Module, batch: Targeted, noise: float = 0.0) -> torch.Tensor:
    """Logits (targets, vocabulary), at least fp32, at the places that predict a target. `noise`: NEFTune's alpha."""
    laid = lay(model, batch, noise)
    if laid.lengths is not None:
        columns, rows = laid.predicting, slice(0, 1)
    else:
        columns, rows = torch.unique(laid.predicting % laid.width), slice(None)
    output = laid.model(**laid.inputs, use_cache=False, logits_to_keep=columns, packed_lengths=laid.lengths)
    logits: torch.Tensor = output.logits[rows].to(torch.promote_types(output.logits.dtype, torch.float32))
    if laid.lengths is not None:
        return logits[0]
    kept = torch.searchsorted(columns, laid.predicting % laid.width)
    return logits[laid.predicting // laid.width, kept]


def token_losses(model: nn.Module, batch: Targeted, noise: float = 0.0) -> torch.Tensor:
    """Negative log-likelihood of each target, (targets,) fp32, in nats."""
    return F.cross_entropy(target_logits(model, batch, noise), batch.targets, reduction="none")


def summed_loss(model: nn.Module, batch: Targeted, noise: float = 0.0) -> torch.Tensor:
    """Sum of `token_losses`; the loop divides by the number of targets of the whole step."""
    return token_losses(model, batch, noise).sum()
