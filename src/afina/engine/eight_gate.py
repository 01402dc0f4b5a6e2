"""Whether a model trains in eight bits here: by what the GPU multiplies, by the model's widths, and by proof.

The proof runs some of the exact engine's layers in eight bits too, on the user's own first batch. Where it fails, or
nothing can multiply so, the exact products stay, and a sentence says why.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch

from afina.engine.block import HERE, Block, Saved
from afina.engine.eight import FP8, INT8, Format
from afina.engine.eight_head import EightEnds
from afina.engine.eight_product import ALIGN, EightProduct
from afina.engine.eight_sequential import Scratches, in_eight_bits
from afina.engine.engine import Engine
from afina.engine.mixture import Mixture, SavedRouted
from afina.engine.plan import Plan, Rates, count_up
from afina.engine.products import Product
from afina.engine.proof import perturbed
from afina.language import _
from afina.model.loss import Targeted

Kind = TypeVar("Kind")
FORMATS = {"fp8": FP8, "int8": INT8}
HEAD = "head"
"""Its name among products."""

LEAST_OF_PRODUCTS = 0.999
"""Cosine of dx = dy W in eight bits with the exact one. Rounding both factors to e4m3 leaves 0.9994."""
LEAST_OF_LAYERS = 0.995
"""Of what a layer hands down: four products one after the other, each of what was rounded on its way there."""
LEAST_LEARNT = 0.99
"""Of the gradients of all of a layer's adapters."""


@dataclass(frozen=True)
class EightProof:
    """The least cosines among some layers, between exact and 8-bit. products: by name, of y and of dx, from the same x
    and dy. layers: of the gradient that a whole layer hands down; learnt: of all that its adapters learn.

    exact: names of products that were left exact, as their y or dx did not hold.
    """

    products: dict[str, float]
    layers: float
    learnt: float
    exact: frozenset[str] = frozenset()

    @property
    def failing(self) -> frozenset[str]:
        """Products that must stay exact. A cosine that is no number does not hold."""
        return frozenset(name for name, cosine in self.products.items() if not cosine >= LEAST_OF_PRODUCTS)

    @property
    def holds(self) -> bool:
        """Whether all point where the exact ones do."""
        return not self.failing and self.layers >= LEAST_OF_LAYERS and self.learnt >= LEAST_LEARNT


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
    products = engine.products
    if any(product.learnt for product in products):
        return _("every weight learns")
    if any(size % ALIGN for product in products for size in (product.n, product.k)):
        return _("a layer's width is not a multiple of {count}").format(count=ALIGN)
    if format_of(asked, engine.device, engine.dtype) is None:
        return _("this device does not multiply so")
    return None


def try_eight_bits(engine: Engine, batch: Targeted, asked: str, *, hold: bool = True, head: bool = True) -> str:
    """Turn the engine's products into eight bits where that holds; returns a sentence on what they are and why.

    hold: four-bit weights are held so. head: there is room for the head's too.
    """
    reason, form = why_exact(engine, asked), format_of(asked, engine.device, engine.dtype)
    if reason is not None or form is None:
        return _("exact products, not in eight bits: {reason}").format(reason=reason)
    left = frozenset() if head else frozenset({HEAD})
    proof = prove_eight(engine, batch, form, exact=left)
    if proof.failing and proof.products.keys() - {HEAD} - proof.failing:
        proof = prove_eight(engine, batch, form, exact=proof.failing | left)
    found = {"products": min(proof.products.values()), "layers": proof.layers, "learnt": proof.learnt}
    if not proof.holds:
        return _(
            "exact products, not in eight bits: on the first batch cosines with the exact ones fall to "
            "{products:.5f} for a product, {layers:.4f} for a layer's gradient, {learnt:.4f} for its adapters'"
        ).format(**found)
    into_eight_bits(engine, form, exact=proof.exact, hold=hold)
    said = _(
        "products in eight bits ({format}); on the first batch cosines with the exact ones are {products:.5f} "
        "for a product, {layers:.4f} for a layer's gradient, {learnt:.4f} for its adapters', or better"
    ).format(format={"fp8": "e4m3", "int8": "INT8"}[form.name], **found)
    if proof.exact - left:
        said += _("; exact, for their outliers: {names}").format(names=", ".join(sorted(proof.exact - left)))
    return said


def room_for_eight(engine: Engine, tokens: int, free_bytes: int, *, hold: bool, head: bool) -> bool:
    """Whether everything saved stays on the GPU with products in eight bits; hold: four-bit weights are held so; head:
    the head's are held so, beside those that make the logits."""
    added = engine.ends.weight.numel() if head else 0
    for part in engine.products:
        if not part.packed:
            added -= (engine.dtype.itemsize - 1) * part.n * part.k
        elif hold:
            added += part.n * part.k - sum(weight.packed.numel() for _rows, weight in part.packed)
    return count_up(engine, Plan(tokens, [HERE] * len(engine.blocks)), Rates()).bytes + added <= free_bytes


def held_in_eight(engine: Engine, tokens: int, free_bytes: int) -> tuple[bool, bool]:
    """Whether there is room for four-bit weights held in eight, and for the head's too."""
    hold = room_for_eight(engine, tokens, free_bytes, hold=True, head=False)
    return hold, room_for_eight(engine, tokens, free_bytes, hold=hold, head=True)


def head_goes_along(engine: Engine, form: Format, exact: Collection[str]) -> bool:
    """Whether the head's backward is in eight bits too where the layers are: e4m3 alone has the range for it."""
    return form is FP8 and HEAD not in exact and not engine.ends.passes_by and not engine.ends.learnt


@torch.no_grad()
def into_eight_bits(engine: Engine, form: Format, *, exact: Collection[str] = (), hold: bool = True) -> None:
    """Multiply in eight bits from now on. Frozen weights are held so too, layer by layer, so that what is freed makes
    room: the transformers model has none of these layers' any more. Weights of four bits may stay as they are, to be
    unpacked for each use, unless `hold`. exact: names of the products that stay as they are, among them the head.
    """
    scratches, of_layers = Scratches(), set(exact) - {HEAD}
    engine.blocks = [in_eight_bits(block, form, scratches, exact=of_layers, hold=hold) for block in engine.blocks]
    if head_goes_along(engine, form, exact):
        engine.ends = EightEnds.of(engine.ends)
    engine.copy = None
    any_exact = any(type(product) is not EightProduct for product in engine.products)
    if not any_exact and not any(isinstance(block, Mixture) for block in engine.blocks):
        engine.scratches.clear()
    engine.scratches += [scratches.straight, scratches.turned, scratches.opened]


@torch.no_grad()
def prove_eight(
    engine: Engine, batch: Targeted, form: Format, *, exact: frozenset[str] = frozenset(), layers: int = 4
) -> EightProof:
    """Run `layers` of the engine's exact layers, first and last among them, in eight bits too, on their own inputs and
    gradients in the batch, but for the products named in `exact`. The engine stays exact.
    """
    count = len(engine.blocks)
    chosen = {round(number * (count - 1) / max(1, layers - 1)) for number in range(layers)}
    of_layers = exact - {HEAD}
    products, handed_down, learnt = dict[str, float](), list[float](), list[float]()
    with perturbed(engine):
        engine.refresh()
        ids, at = engine.rows(batch, None)
        x, inputs, saved = engine.ends.embed(ids), list[torch.Tensor](), list[Saved | None]()
        for block in engine.blocks:
            inputs.append(x)
            x, kept = block.forward(x, at, save=True)
            saved.append(kept)
        wide = engine.ends.loss(x, batch, engine.blocks[-1].extra)[1][0]
        if head_goes_along(engine, form, exact):
            of_head = EightEnds.of(engine.ends).loss(x, batch, 0)[1][0]
            products[HEAD] = _cosine([of_head], [wide[:, : x.shape[1]]])
        for number in reversed(range(count)):
            block, kept, below = engine.blocks[number], _present(saved.pop()), engine.blocks[max(0, number - 1)].extra
            if number not in chosen:
                wide = _present(block.backward(wide, kept, at, below)[0])
                continue
            eight, dy = _placed(in_eight_bits(block, form, Scratches(), exact=of_layers, keep=True)), wide.clone()
            with _watched(block, eight, products):
                block.forward(inputs[number], at, save=False)
                wide, true = block.backward(wide, kept, at, below)
            wide = _present(wide)
            with _routed(block, kept):
                kept = _present(eight.forward(inputs[number], at, save=True)[1])
            found, of_adapters = eight.backward(dy, kept, at, below)
            hidden = inputs[number].shape[1]
            handed_down.append(_cosine([_present(found)[:, :hidden]], [wide[:, :hidden]]))
            learnt.append(_cosine(of_adapters, true))
    return EightProof(products, _least(handed_down), _least(learnt), exact)


@contextmanager
def _routed(block: Block, kept: Saved) -> Iterator[None]:
    """Within, a mixture's tokens go to the experts to which they went before: near ties would hide all else."""
    if isinstance(block, Mixture) and isinstance(kept, SavedRouted):
        block.router.told = torch.cat([routing.ids for _rows, routing, _seen in kept.routed])
    try:
        yield
    finally:
        if isinstance(block, Mixture):
            block.router.told = block.router.missed = None


def _placed(block: Block) -> Block:
    """With the adapters as they are now."""
    for product in block.products:
        for source, target, factor in product.placed():
            target.copy_(source * factor)
    return block


@contextmanager
def _watched(exact: Block, eight: Block, found: dict[str, float]) -> Iterator[None]:
    """Within, what each exact product makes is compared with what the 8-bit one makes of the same input."""

    def note(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        found[name] = _least([found.get(name, 1.0), _cosine([ours], [theirs])])

    def watch(name: str, product: Product, other: Product) -> None:
        forward, backward = product.forward, product.backward

        def compared(wide_x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
            note(name, other.forward(wide_x.clone()), forward(wide_x.clone()))
            return forward(wide_x, *rest, **named)

        def compared_backward(wide_dy: torch.Tensor, *rest: Any) -> torch.Tensor:
            dx = backward(wide_dy, *rest)
            note(name, other.backward(wide_dy.clone()), dx)
            return dx

        product.forward = compared  # type: ignore[method-assign]
        product.backward = compared_backward  # type: ignore[assignment,method-assign]

    pairs = []
    for field in fields(exact):
        product, other = getattr(exact, field.name), getattr(eight, field.name)
        if isinstance(other, EightProduct):
            pairs.append(product)
            watch(field.name, product, other)
    try:
        yield
    finally:
        for product in pairs:
            del product.forward, product.backward


def _least(cosines: Sequence[float]) -> float:
    """The least; one that is no number is less than all."""
    return min(cosines, key=lambda cosine: (cosine == cosine, cosine))


def _present(value: Kind | None) -> Kind:
    if value is None:
        raise RuntimeError("a layer left nothing")
    return value


def _cosine(found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """Between two lists of tensors, each taken as one vector; what is no number stays none. Over the mean of their
    squared lengths, so that it also falls where one is shorter: by 0.003 for 8%, by nothing for what rounding does."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, truth, strict=True)]

    def summed(chosen: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        return sum(float((a * b).sum()) for a, b in chosen)

    size = (summed([(a, a) for a, _b in pairs]) + summed([(b, b) for _a, b in pairs])) / 2
    return summed(pairs) / max(size, 1e-300)
