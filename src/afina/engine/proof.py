"""The engine proves itself: on one batch of the user's own, loss and gradients against the reference."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from afina.engine.engine import Engine
from afina.model.loss import Targeted, summed_loss


@dataclass(frozen=True)
class Proof:
    """The largest relative differences between engine and reference on one batch."""

    loss: float
    gradient: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether engine and reference agree to the rounding of their arithmetic."""
        return self.loss <= self.tolerance and self.gradient <= 20 * self.tolerance


def prove(
    engine: Engine, model: nn.Module, batch: Targeted, autocast: torch.autocast, parameters: Sequence[nn.Parameter]
) -> Proof:
    """Compare loss and gradients with the reference on `batch`, every B perturbed: with B = 0 dA is zero.

    Nothing is dropped meanwhile; the adapters are as before afterwards.
    """
    found, trains = [], model.training
    model.eval()
    with perturbed(engine):
        for loss_fn in (engine.summed_loss, summed_loss):
            with autocast:
                loss = loss_fn(model, batch)
            found.append((loss.item(), torch.autograd.grad(loss, list(parameters))))
    model.train(trains)
    (ours, our_gradients), (theirs, their_gradients) = found
    pairs = [(a.float(), b.float()) for a, b in zip(our_gradients, their_gradients, strict=True)]
    error = sum((a - b).square().sum().item() for a, b in pairs) ** 0.5
    norm = sum(b.square().sum().item() for _a, b in pairs) ** 0.5
    tolerance = 1e-5 if engine.dtype in (torch.float32, torch.float64) else 5e-3
    return Proof(abs(ours - theirs) / max(abs(theirs), 1e-9), error / max(norm, 1e-12), tolerance)


@contextmanager
def perturbed(engine: Engine) -> Iterator[None]:
    """Every B is another within: where it is zero, as at the start, nothing comes through it."""
    adapters = [adapter for block in engine.blocks for product in block.products for adapter in product.adapters]
    kept = [adapter.b.detach().clone() for adapter in adapters]
    generator = torch.Generator(device="cpu").manual_seed(0)
    with torch.no_grad():
        for adapter in adapters:
            adapter.b.add_((torch.randn(adapter.b.shape, generator=generator) * 0.02).to(adapter.b))
    try:
        yield
    finally:
        with torch.no_grad():
            for adapter, value in zip(adapters, kept, strict=True):
                adapter.b.copy_(value)
