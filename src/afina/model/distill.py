"""A student learns from a teacher's whole distribution, beside the answers themselves (Hinton et al., 2015,
arXiv:1503.02531).

The loss of a target is alpha CE + (1 - alpha) T^2 KL, where both distributions of the divergence are at temperature T;
T^2 keeps its gradient as large as that of CE. Of both models the last hidden states are held, at the places that
predict a target alone, and their heads go over some of these at a time, so that whole logits are never there.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from afina.model.attach import base_of
from afina.model.loss import Targeted
from afina.model.packed import packed_attention
from afina.model.virtual import lay

LOGITS_AT_ONCE = 2**24
"""Of each model, at a time: with all that the divergence makes of them some 0.5 GiB in fp32."""


@dataclass(frozen=True)
class Teacher:
    """Who teaches, and how. `model` does not learn. divergence: forward KL(teacher || student), which covers all that
    the teacher may say; reverse KL(student || teacher), which keeps to what it would."""

    model: nn.Module
    temperature: float
    alpha: float
    divergence: Literal["forward", "reverse"]


def distilled_loss(model: nn.Module, batch: Targeted, teacher: Teacher, noise: float = 0.0) -> torch.Tensor:
    """Sum over the batch's targets of the loss above, each times its weight. `noise`: NEFTune's, for the student."""
    with torch.no_grad(), packed_attention(teacher.model, batch.lengths is not None):
        theirs = _rows(teacher.model, batch, 0.0)
    ours = _rows(model, batch, noise)
    weights = torch.ones_like(batch.targets, dtype=torch.float32) if batch.weights is None else batch.weights
    columns = max(_columns(model), _columns(teacher.model))
    parts = [part.split(max(1, LOGITS_AT_ONCE // columns)) for part in (ours, theirs, batch.targets, weights)]
    again = len(parts[0]) > 1 and torch.is_grad_enabled()
    total = torch.zeros((), device=ours.device, dtype=torch.promote_types(ours.dtype, torch.float32))
    for part in zip(*parts, strict=True):
        given = (model, teacher, *part)
        total = total + (checkpoint(_loss, *given, use_reentrant=False) if again else _loss(*given))
    return total


def divergences(ours: torch.Tensor, theirs: torch.Tensor, teacher: Teacher) -> torch.Tensor:
    """T^2 KL of each row, (rows,), of logits (rows, vocabulary), at least fp32."""
    student = F.log_softmax(ours / teacher.temperature, -1)
    taught = F.log_softmax(theirs / teacher.temperature, -1)
    one, other = (taught, student) if teacher.divergence == "forward" else (student, taught)
    return teacher.temperature**2 * (one.exp() * (one - other)).sum(-1)


def _loss(
    model: nn.Module,
    teacher: Teacher,
    ours: torch.Tensor,
    theirs: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Of some rows (rows, hidden)."""
    student = _logits(model, ours)
    with torch.no_grad():
        taught = _logits(teacher.model, theirs)
    both = min(student.shape[1], taught.shape[1])  # beyond lie rows that pad a vocabulary, which mean no token
    apart = divergences(student[:, :both], taught[:, :both], teacher)
    plain = F.cross_entropy(student, targets, reduction="none")
    return ((teacher.alpha * plain + (1 - teacher.alpha) * apart) * weights).sum()


def _rows(model: nn.Module, batch: Targeted, noise: float) -> torch.Tensor:
    """What enters the head at the places that predict a target, (targets, hidden)."""
    laid = lay(model, batch, noise)
    whole: Any = base_of(laid.model)
    trunk = getattr(whole, whole.base_model_prefix)
    output = trunk(**laid.inputs, use_cache=False, packed_lengths=laid.lengths)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])[laid.predicting]


def _logits(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """(rows, vocabulary), at least fp32, of what enters the head, as the model's own code makes them: some families
    scale or cap them there."""
    whole: Any = base_of(model)
    name, trunk = whole.base_model_prefix, getattr(whole, whole.base_model_prefix)
    setattr(whole, name, _Known(rows[None]))
    try:
        logits: torch.Tensor = whole(inputs_embeds=rows[None], use_cache=False).logits[0]
    finally:
        setattr(whole, name, trunk)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _Known(nn.Module):
    """Stands for the layers of a model whose last hidden states (1, rows, hidden) are known."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_inputs: object, **_named: object) -> "_Output":
        return _Output(self.hidden)


class _Output:
    """What the layers give, and nothing beside."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: int) -> torch.Tensor:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


def _columns(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)
