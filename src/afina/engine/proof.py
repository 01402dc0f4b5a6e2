"""The engine proves itself on one batch of the user's own: loss and gradients against the reference; and in eight bits
some layers' gradients against those of the exact layers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from afina.engine.eight import Format
from afina.engine.eight_product import Turned
from afina.engine.eight_sequential import in_eight_bits
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


LEAST_COSINE = 0.999
"""Of what a layer hands down, in eight bits beside exact."""
LEAST_COSINE_LEARNT = 0.98
"""Of the gradients of a layer's adapters: rounding e4m3's two factors alone turns a product by 0.9994."""


@dataclass(frozen=True)
class EightProof:
    """The least cosines among some layers, between exact and 8-bit: of the gradient that a layer hands down, and of all
    that its adapters learn."""

    handed_down: float
    learnt: float

    @property
    def holds(self) -> bool:
        """Whether both point where the exact ones do. A cosine that is no number does not hold."""
        return self.handed_down >= LEAST_COSINE and self.learnt >= LEAST_COSINE_LEARNT


@torch.no_grad()
def prove_eight(engine: Engine, batch: Targeted, form: Format, layers: int = 4) -> EightProof:
    """Run `layers` of the engine's exact layers, first and last among them, in eight bits too, on their own inputs and
    gradients in the batch. The engine stays exact.
    """
    count = len(engine.blocks)
    chosen = {round(number * (count - 1) / max(1, layers - 1)) for number in range(layers)}
    handed_down, learnt = [], []
    with perturbed(engine):
        engine._refresh()
        at = engine._positions(batch, None)
        x, inputs, saved = engine.ends.embed(batch.input_ids[0]), [], []
        for block in engine.blocks:
            inputs.append(x)
            x, kept = block.forward(x, at, save=True)
            saved.append(kept)
        wide = engine.ends.loss(x, batch, engine.blocks[-1].last.r)[1][0]
        for number in reversed(range(count)):
            block, kept, hidden = engine.blocks[number], saved.pop(), inputs[number].shape[1]
            if kept is None:
                raise RuntimeError("nothing was saved")
            below = engine.blocks[number - 1].last.r if number else 0
            dy = wide.clone()
            wide, exact = block.backward(wide, kept, at, below)
            if number not in chosen or wide is None:
                continue
            eight = in_eight_bits(block, form, Turned(), Turned(), keep=True)
            for product in eight.products:
                for source, target, factor in product.placed():
                    target.copy_(source * factor)
            kept = eight.forward(inputs[number], at, save=True)[1]
            if kept is None:
                raise RuntimeError("nothing was saved")
            found, of_adapters = eight.backward(dy, kept, at, below)
            if found is not None:
                handed_down.append(_cosine([found[:, :hidden]], [wide[:, :hidden]]))
            learnt.append(_cosine(of_adapters, exact))
            del eight
    return EightProof(min(handed_down), min(learnt))


def _cosine(found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """Between two lists of tensors, each taken as one vector; what is no number stays none."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, truth, strict=True)]
    product, ours, theirs = (
        sum(float((a * b).sum()) for a, b in chosen)
        for chosen in (pairs, [(a, a) for a, _b in pairs], [(b, b) for _a, b in pairs])
    )
    return product / max((ours * theirs) ** 0.5, 1e-300)
