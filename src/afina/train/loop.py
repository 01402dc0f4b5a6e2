"""THE LOOP. Everything else prepares it or looks at what came out.

A step is a list of micro-batches. The loss is summed over the learnt tokens of all of them and divided by their
number, so the gradient does not depend on how the step was cut. Order, learning rate and dropout are pure functions
of the step's number. The loop knows nothing of files, methods or models: it gets a model some of whose parameters
learn, a function that makes the micro-batches of a step, and callables to report to.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from afina.data.batch import Batch
from afina.data.order import derived_seed
from afina.errors import AfinaError
from afina.language import _
from afina.model.load import Hardware
from afina.recipe.schema import Training
from afina.train.optimizer import make_optimizer
from afina.train.schedule import learning_rate

LossFunction = Callable[[nn.Module, Batch], torch.Tensor]
"""Model and batch to the sum of the loss over the batch's targets."""


@dataclass(frozen=True)
class StepReport:
    """What one optimiser step did. `loss` is nats per learnt token; `seconds` of wall-clock time."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    learnt: int
    seconds: float


class Diverged(AfinaError):
    """The loss or the gradient stopped being a number."""


def train(
    model: nn.Module,
    make_step: Callable[[int], Sequence[Batch]],
    *,
    steps: int,
    training: Training,
    seed: int,
    hardware: Hardware,
    loss_fn: LossFunction,
    on_step: Callable[[StepReport], None],
    on_validate: Callable[[int], None] = lambda step: None,
    validate_after: frozenset[int] = frozenset(),
) -> None:
    """Run `steps` optimiser steps. `on_validate(step)` is called after the steps named in `validate_after`.

    Raises Diverged, with the samples at fault, when the loss is not finite; the weights are then those before the step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(parameters, training)
    scaler = torch.amp.GradScaler(hardware.device.type, enabled=hardware.dtype == torch.float16)
    model.train()

    for step in range(steps):
        started = time.perf_counter()
        rate = learning_rate(training, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate

        batches = [batch.to(hardware.device) for batch in make_step(step)]
        learnt = sum(batch.targets.numel() for batch in batches)
        loss = accumulate(model, batches, learnt, seed, step, hardware, loss_fn, scaler)

        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, training.clip_norm or float("inf"))
        if not torch.isfinite(loss) or (not torch.isfinite(norm) and not scaler.is_enabled()):
            raise _diverged(step, batches)
        scaler.step(optimizer)  # in fp16 a step whose gradients overflow is left out, and the scale halved
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        on_step(
            StepReport(
                step=step + 1,
                loss=loss.item(),
                grad_norm=norm.item(),
                learning_rate=rate,
                tokens=sum(batch.tokens for batch in batches),
                learnt=learnt,
                seconds=time.perf_counter() - started,
            )
        )
        if step + 1 in validate_after:
            model.eval()
            on_validate(step + 1)
            model.train()

    model.eval()


def accumulate(
    model: nn.Module,
    batches: Sequence[Batch],
    learnt: int,
    seed: int,
    step: int,
    hardware: Hardware,
    loss_fn: LossFunction,
    scaler: torch.amp.GradScaler | None = None,
) -> torch.Tensor:
    """Add the gradients of a step's mean loss to the parameters' `.grad`; returns that mean, on the device.

    Dropout of micro-step m depends on (seed, step, m) alone.
    """
    total = torch.zeros((), device=hardware.device)
    for micro_step, batch in enumerate(batches):
        torch.manual_seed(derived_seed(seed, "dropout", step, micro_step))
        with hardware.autocast():
            loss = loss_fn(model, batch) / learnt
        (scaler.scale(loss) if scaler else loss).backward()
        total += loss.detach()
    return total


@torch.inference_mode()
def mean_loss(model: nn.Module, batches: Sequence[Batch], hardware: Hardware, loss_fn: LossFunction) -> float:
    """Mean loss over all targets of `batches`, in nats per token, without learning from them."""
    total = torch.zeros((), dtype=torch.float64, device=hardware.device)
    for batch in batches:
        with hardware.autocast():
            total += loss_fn(model, batch.to(hardware.device)).double()
    return float(total) / sum(batch.targets.numel() for batch in batches)


def _diverged(step: int, batches: Sequence[Batch]) -> Diverged:
    samples = sorted(sample for batch in batches for sample in batch.samples)
    return Diverged(
        _("The loss of step {step} is not a number; the step was not taken.").format(step=step + 1),
        hint=_("Lower training.learning_rate, or look at these training samples: {samples}.").format(samples=samples),
    )
