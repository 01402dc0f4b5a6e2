"""Cross-entropy of a batch's targets, computed on the places that predict a target and on no others.

The reference: transformers' own forward and head. Logits are taken at the predicting places only, so a batch of
which a third is learnt pays for a third of the head.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from afina.model.virtual import Row, lay

LOGITS_AT_ONCE = 2**26
"""Logits that stand in fp32 at a time, 256 MiB; of more, they are made again in the backward."""


class Targeted(Row, Protocol):
    """What the loss needs of a batch; `data/batch.py` explains the fields and their shapes."""

    @property
    def targets(self) -> torch.Tensor: ...
    @property
    def weights(self) -> torch.Tensor | None: ...


def target_logits(model: nn.Module, batch: Targeted, noise: float = 0.0) -> torch.Tensor:
    """Logits (targets, vocabulary), at least fp32, at the places that predict a target. `noise`: NEFTune's alpha."""
    return _wide(_logits(model, batch, noise))


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _logits(model: nn.Module, batch: Targeted, noise: float) -> torch.Tensor:
    """As `target_logits`, in the precision in which the head gives them."""
    laid = lay(model, batch, noise)
    if laid.lengths is not None:
        columns, rows = laid.predicting, slice(0, 1)
    else:
        columns, rows = torch.unique(laid.predicting % laid.width), slice(None)
    output = laid.model(**laid.inputs, use_cache=False, logits_to_keep=columns, packed_lengths=laid.lengths)
    logits: torch.Tensor = output.logits[rows]
    if logits.shape[0] == 1:  # the columns are the predicting places, in their order
        return logits[0]
    kept = torch.searchsorted(columns, laid.predicting % laid.width)
    return logits[laid.predicting // laid.width, kept]


def token_losses(model: nn.Module, batch: Targeted, noise: float = 0.0) -> torch.Tensor:
    """Negative log-likelihood of each target, (targets,) fp32, in nats."""
    logits = _logits(model, batch, noise)
    step = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    if logits.shape[0] <= step or not torch.is_grad_enabled():
        return torch.cat([_losses(*part) for part in _parts(logits, batch.targets, step)])
    parts = [
        checkpoint(_losses, *part, use_reentrant=False, preserve_rng_state=False)
        for part in _parts(logits, batch.targets, step)
    ]
    return torch.cat(parts)


@torch.no_grad()
def judged(model: nn.Module, batch: Targeted) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_losses` without a graph, and whether another token was likelier: (targets,) fp32 and bool."""
    logits = _logits(model, batch, 0.0)
    step = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    losses = torch.cat([_losses(*part) for part in _parts(logits, batch.targets, step)])
    return losses, logits.argmax(-1) != batch.targets


def _parts(logits: torch.Tensor, targets: torch.Tensor, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(logits.split(step), targets.split(step), strict=True)


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(_wide(logits), targets, reduction="none")


def summed_loss(model: nn.Module, batch: Targeted, noise: float = 0.0) -> torch.Tensor:
    """Sum of `token_losses`, each times its weight; the loop divides by what all targets of the step count."""
    losses = token_losses(model, batch, noise)
    return (losses if batch.weights is None else losses * batch.weights).sum()


def saved_elsewhere(model: nn.Module) -> AbstractContextManager[None]:
    """Within, what autograd saves waits in the computer's memory, weights excepted, which are there anyway."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: torch.Tensor) -> Any:
        return tensor if tensor.untyped_storage().data_ptr() in own else (tensor.device, tensor.cpu())

    def unpack(kept: Any) -> torch.Tensor:
        found: torch.Tensor = kept if isinstance(kept, torch.Tensor) else kept[1].to(kept[0])
        return found

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
