"""Whether a model trains in eight bits here: by what the GPU multiplies, by the model's widths, and by proof.

The proof runs some of the exact engine's layers in eight bits too, on the user's own first batch. Where it fails, or
nothing can multiply so, the exact products stay, and a sentence says why.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from afina.engine.block import Block, Saved
from afina.engine.eight import FP8, INT8, Format
from afina.engine.eight_product import ALIGN, Turned
from afina.engine.eight_sequential import in_eight_bits
from afina.engine.engine import Engine
from afina.engine.products import Product
from afina.engine.proof import perturbed
from afina.language import _
from afina.model.loss import Targeted

Kind = TypeVar("Kind")
FORMATS = {"fp8": FP8, "int8": INT8}

LEAST_OF_PRODUCTS = 0.999
"""Cosine of dx = dy W in eight bits with the exact one. Rounding both factors to e4m3 leaves 0.9994."""
LEAST_OF_LAYERS = 0.995
"""Of what a layer hands down: four products one after the other, each with an input that was rounded on the way there."""
LEAST_LEARNT = 0.99
"""Of the gradients of all of a layer's adapters."""


@dataclass(frozen=True)
class EightProof:
    """The least cosines among some layers, between exact and 8-bit: of their products' dx from the same dy, of the
    gradient that a whole layer hands down, and of all that its adapters learn."""

    products: float
    layers: float
    learnt: float

    @property
    def holds(self) -> bool:
        """Whether all point where the exact ones do. A cosine that is no number does not hold."""
        return self.products >= LEAST_OF_PRODUCTS and self.layers >= LEAST_OF_LAYERS and self.learnt >= LEAST_LEARNT


def format_of(asked: str, device: torch.device, dtype: torch.dtype) -> Format | None:
    """What `asked` (8bit, fp8 or int8) is on a device; None where it does not multiply so.

    e4m3 from Ada on (8.9), INT8 from Turing on (7.5). A CPU emulates what is named, for tests: no faster than exact.
    """
    if device.type != "cuda":
        return FORMATS.get(asked)
    capability = torch.cuda.get_device_capability(device)
    able = {"fp8": capability >= (8, 9) and dtype == torch.bfloat16, "int8": capability >= (7, 5)}
    wanted = ["fp8", "int8"] if asked == "8bit" else [asked]
    return next((FORMATS[name] for name in wanted if able[name]), None)


def why_exact(engine: Engine, asked: str) -> str | None:
    """Why this engine's products cannot be in eight bits; None where they can."""
    products = [product for block in engine.blocks for product in block.products]
    if any(product.learnt for product in products):
        return _("every weight learns")
    if any(size % ALIGN for product in products for size in (product.n, product.k)):
        return _("a layer's width is not a multiple of {count}").format(count=ALIGN)
    if format_of(asked, engine.device, engine.dtype) is None:
        return _("this device does not multiply so")
    return None


def try_eight_bits(engine: Engine, batch: Targeted, asked: str, *, hold: bool = True) -> str:
    """Turn the engine's products into eight bits where that holds; returns a sentence on what they are and why."""
    reason, form = why_exact(engine, asked), format_of(asked, engine.device, engine.dtype)
    if reason is not None or form is None:
        return _("exact products, not in eight bits: {reason}").format(reason=reason)
    proof = prove_eight(engine, batch, form)
    found = {"products": proof.products, "layers": proof.layers, "learnt": proof.learnt}
    if not proof.holds:
        return _(
            "exact products, not in eight bits: on the first batch cosines with the exact gradients fall to "
            "{products:.5f} for a product, {layers:.4f} for a layer, {learnt:.4f} for its adapters"
        ).format(**found)
    engine.into_eight_bits(form, hold=hold)
    return _(
        "products in eight bits ({format}); on the first batch cosines with the exact gradients are {products:.5f} "
        "for a product, {layers:.4f} for a layer, {learnt:.4f} for its adapters, or better"
    ).format(format={"fp8": "e4m3", "int8": "INT8"}[form.name], **found)


@torch.no_grad()
def prove_eight(engine: Engine, batch: Targeted, form: Format, layers: int = 4) -> EightProof:
    """Run `layers` of the engine's exact layers, first and last among them, in eight bits too, on their own inputs and
    gradients in the batch. The engine stays exact.
    """
    count = len(engine.blocks)
    chosen = {round(number * (count - 1) / max(1, layers - 1)) for number in range(layers)}
    products, handed_down, learnt = list[float](), list[float](), list[float]()
    with perturbed(engine):
        engine._refresh()
        at = engine._positions(batch, None)
        x, inputs, saved = engine.ends.embed(batch.input_ids[0]), list[torch.Tensor](), list[Saved | None]()
        for block in engine.blocks:
            inputs.append(x)
            x, kept = block.forward(x, at, save=True)
            saved.append(kept)
        wide = engine.ends.loss(x, batch, engine.blocks[-1].last.r)[1][0]
        for number in reversed(range(count)):
            block, kept, below = engine.blocks[number], _present(saved.pop()), engine.blocks[max(0, number - 1)].last.r
            if number not in chosen:
                wide = _present(block.backward(wide, kept, at, below)[0])
                continue
            eight, dy = _placed(in_eight_bits(block, form, Turned(), Turned(), keep=True)), wide.clone()
            with _watched(block, eight, products):
                wide, exact = block.backward(wide, kept, at, below)
            wide = _present(wide)
            kept = _present(eight.forward(inputs[number], at, save=True)[1])
            found, of_adapters = eight.backward(dy, kept, at, below)
            hidden = inputs[number].shape[1]
            handed_down.append(_cosine([_present(found)[:, :hidden]], [wide[:, :hidden]]))
            learnt.append(_cosine(of_adapters, exact))
    return EightProof(min(products), min(handed_down), min(learnt))


def _placed(block: Block) -> Block:
    """With the adapters as they are now."""
    for product in block.products:
        for source, target, factor in product.placed():
            target.copy_(source * factor)
    return block


@contextmanager
def _watched(exact: Block, eight: Block, found: list[float]) -> Iterator[None]:
    """Within, each exact product's dx is compared with the 8-bit one from the same dy; cosines go to `found`."""

    def watch(product: Product, other: Product) -> Callable[..., torch.Tensor]:
        backward = product.backward

        def compared(wide_dy: torch.Tensor, seed: int | None = None) -> torch.Tensor:
            dx = backward(wide_dy, seed)
            found.append(_cosine([other.backward(wide_dy, seed)], [dx]))
            return dx

        return compared

    pairs = list(zip(exact.products, eight.products, strict=True))
    for product, other in pairs:
        product.backward = watch(product, other)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for product, _other in pairs:
            del product.backward


def _present(value: Kind | None) -> Kind:
    if value is None:
        raise RuntimeError("a layer left nothing")
    return value


def _cosine(found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """Between two lists of tensors, each taken as one vector; what is no number stays none."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, truth, strict=True)]
    product, ours, theirs = (
        sum(float((a * b).sum()) for a, b in chosen)
        for chosen in (pairs, [(a, a) for a, _b in pairs], [(b, b) for _a, b in pairs])
    )
    return product / max((ours * theirs) ** 0.5, 1e-300)
