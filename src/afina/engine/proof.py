"""The engine proves itself: on one batch of the user's own, loss and gradients against the reference."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from afina.engine.engine import Engine
from afina.engine.mixture import routed_alike
from afina.model.loss import Targeted, saved_elsewhere, summed_loss


@dataclass(frozen=True)
class Proof:
    """The largest relative differences between engine and reference on one batch; `missed`: of a mixture's choices."""

    loss: float
    gradient: float
    tolerance: float
    missed: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether engine and reference agree to the rounding of their arithmetic."""
        alike = self.loss <= self.tolerance and self.gradient <= 20 * self.tolerance
        return alike and self.missed <= min(0.25, 1000 * self.tolerance)  # at random it would be 0.87 of gpt-oss's


def prove(
    engine: Engine,
    model: nn.Module,
    batch: Targeted,
    autocast: torch.autocast,
    parameters: Sequence[nn.Parameter],
    lean: Callable[[], object] | None = None,
) -> Proof:
    """Compare loss and gradients with the reference on `batch`, every B perturbed: with B = 0 dA is zero.

    Nothing is dropped meanwhile; the adapters are as before afterwards. The experts of a mixture are the
    reference's: in 16 bits near ties fall one way or the other, and what follows differs by more than rounding.
    lean: for little memory: what the reference saves waits in the computer's, and before the engine's turn this is
    called, to place what the engine saves.
    """
    found: list[tuple[float, tuple[torch.Tensor, ...]]] = []
    trains = model.training
    model.eval()
    try:
        with perturbed(engine), routed_alike(engine.blocks, model) as told:
            for loss_fn in (summed_loss, engine.summed_loss):
                if lean is not None and found:
                    lean()
                with autocast, nullcontext() if lean is None else saved_elsewhere(model):
                    loss = loss_fn(model, batch)
                found.append((loss.item(), torch.autograd.grad(loss, list(parameters))))
            missed = max((float(router.missed) for router in told if router.missed is not None), default=0.0)
    finally:
        model.train(trains)
    (theirs, their_gradients), (ours, our_gradients) = found
    pairs = [(a.float(), b.float()) for a, b in zip(our_gradients, their_gradients, strict=True)]
    error = sum((a - b).square().sum().item() for a, b in pairs) ** 0.5
    norm = sum(b.square().sum().item() for _a, b in pairs) ** 0.5
    tolerance = 1e-5 if engine.dtype in (torch.float32, torch.float64) else 5e-3
    return Proof(abs(ours - theirs) / max(abs(theirs), 1e-9), error / max(norm, 1e-12), tolerance, missed)


@contextmanager
def perturbed(engine: Engine) -> Iterator[None]:
    """Every B is another within: where it is zero, as at the start, nothing comes through it."""
    ups = [up for block in engine.blocks for up in block.ups]
    kept = [up.detach().clone() for up in ups]
    generator = torch.Generator(device="cpu").manual_seed(0)
    with torch.no_grad():
        for up in ups:
            up.add_((torch.randn(up.shape, generator=generator) * 0.02).to(up))
    try:
        yield
    finally:
        with torch.no_grad():
            for up, value in zip(ups, kept, strict=True):
                up.copy_(value)
