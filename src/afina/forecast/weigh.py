"""What a recipe takes on a device, in bytes: from exact shapes and the longest real samples, without any weights.

Where the fused engine trains, its own planner answers, as it will in training. Elsewhere one forward and backward pass
is gone through with tensors that have no memory, and every storage is counted while it lives.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from afina.data.batch import Batch, micro_batches
from afina.data.template import Rendered
from afina.data.tokenizer import Tokenizer
from afina.engine.eight_gate import HEAD, held_in_eight, into_eight_bits, why_exact
from afina.engine.engine import Engine
from afina.engine.plan import Plan, Rates, choose, count_up
from afina.forecast.device import RUNNING, Device, in_eight_bits
from afina.language import _
from afina.model.attach import attach, learning, recompute, refuse_quantised
from afina.model.footprint import Footprint
from afina.model.load import Hardware, skeleton, without_dropout
from afina.model.loss import summed_loss
from afina.model.packed import covers, packed_attention, remember_layout
from afina.model.quantize import weights_in
from afina.model.skeleton import hold, on_cpu
from afina.model.virtual import virtual_tokens
from afina.recipe.schema import Full, Lora, Method, Recipe, Training
from afina.train.loop import LossFunction, accumulate
from afina.train.memory import Room, at_once, fullest, left_for_a_pass
from afina.train.opening import check_context, left_to_the_reference
from afina.train.optimizer import moments

GONE_THROUGH = 4, 6
"""Layers of a deep model whose pass is gone through, to see what each takes."""


@dataclass(frozen=True)
class Given:
    """What is known before anything is weighed: the recipe, its base's place, its samples as they are learnt. layers:
    of the model no more than so many."""

    recipe: Recipe
    source: str
    rows: Sequence[Rendered]
    tokenizer: Tokenizer
    layers: int | None = None


@dataclass(frozen=True)
class Need:
    """Bytes on the device by part, at the worst moment; `host`: in the computer's memory, for a GPU.

    limit: what may be taken. tokens: of the largest micro-batch there will be; budget: the most of any. reason: why the
    reference trains; None where the engine does. plan: the engine's, `fused`, by `rates`. flops: of a pass over
    `tokens`, where one was gone through. unknown: why it could not be; then parts are the least.
    """

    parts: dict[str, int]
    limit: int
    tokens: int
    budget: int
    host: int
    parameters: int
    learnt: int
    layers: int
    packing: bool = True
    extra: int = 0
    reason: str | None = None
    plan: Plan | None = None
    fused: Engine | None = field(default=None, repr=False, compare=False)
    rates: Rates = field(default=Rates(), repr=False, compare=False)
    flops: int = 0
    unknown: str | None = None

    @property
    def peak(self) -> int:
        """Bytes at the worst moment."""
        return sum(self.parts.values())

    @property
    def least(self) -> int:
        """The same without weights that are kept unpacked for speed, where there is room for it."""
        return self.peak - self.parts.get("unpacked", 0)

    @property
    def fits(self) -> bool:
        """Whether that is within the limit."""
        return self.least <= self.limit


def weigh(given: Given, device: Device) -> Need:
    """Count one recipe. Raises what opening its base would: RecipeError and ModelError."""
    engine = None
    with Footprint() as held:
        model, kind = opened(given, device)
        _hold(model, kind, given)
        reason = left_to_the_reference(model, given.recipe)
        if device.kind == "cuda" and reason is None:
            engine = Engine(model.train(), device.dtype)
    if engine is not None:
        return _planned(given, device, model, engine, held)
    need = _rehearsed(given, device, reason)
    if given.recipe.training.distill is not None:
        return replace(need, unknown=_("what the teacher takes is not counted"))
    return need


def opened(given: Given, device: Device) -> tuple[nn.Module, str | None]:
    """The model that would train, as open_model makes it, and what its layers are to be held in."""
    recipe = given.recipe
    model, kind = skeleton(given.source, recipe.model, device.dtype, given.layers)
    without_dropout(model)
    if kind is not None and isinstance(recipe.method, Full):
        refuse_quantised()
    model = attach(model, _counted(recipe.method), seed=recipe.seed, tokens=given.tokenizer.turn_tokens)
    check_context(model, recipe)
    if recipe.training.gradient_checkpointing:
        recompute(model)
    return model, kind


def _hold(model: nn.Module, kind: str | None, given: Given) -> None:
    if kind is not None:
        hold(model, kind, given.recipe.model.double_quantization)


def _counted(method: Method) -> Method:
    """The same shapes, with nothing that looks at weights or draws numbers."""
    return method.model_copy(update={"init": "default", "dropout": 0.0}) if isinstance(method, Lora) else method


def _planned(given: Given, device: Device, model: nn.Module, engine: Engine, held: Footprint) -> Need:
    """As run.py lets the engine plan: for the most that is computed at once; then what the longest samples take so."""
    recipe, training = given.recipe, given.recipe.training
    most, rates = at_once(recipe, device.kind, 0), device.rates

    def left() -> int:
        return left_for_a_pass(device.memory - device.taken - held.now, engine.parameters, training)

    form = device.eight_bits(training.products)
    if form is not None and why_exact(engine, form.name) is None:
        hold_wide, head = held_in_eight(engine, most, left())
        with held:
            into_eight_bits(engine, form, exact=() if head else (HEAD,), hold=hold_wide)
        rates = in_eight_bits(rates, engine, form)
    plan = choose(engine, most, recipe.model.max_length, left(), rates)
    largest, several = largest_batch(given, plan.tokens)
    tokens = largest.input_ids.numel()
    here = count_up(engine, replace(plan, tokens=tokens), rates)
    unpacked = plan.held * engine.blocks[0].unpacked * engine.dtype.itemsize
    spared = engine.ends.spared(plan.host)
    parts = _standing(model, training, held.now - spared)
    if not several:  # they come to be while the backward goes, and are counted there
        parts["gradients"] = 0
    parts |= {"saved": here.saved, "head": here.head, "working": here.bytes + spared - here.saved - here.head}
    parts["unpacked"] = unpacked
    counts = _counts(model)
    return Need(
        parts=parts,
        limit=device.limit(held.now),
        tokens=tokens,
        budget=plan.tokens,
        host=RUNNING + here.away + spared,
        plan=replace(here, held=plan.held),
        fused=engine,
        rates=rates,
        layers=len(engine.blocks),
        parameters=counts["parameters"],
        learnt=counts["learnt"],
    )


def _rehearsed(given: Given, device: Device, reason: str | None) -> Need:
    """A pass of the reference, or of the engine off a GPU, with tensors without memory; in smaller micro-batches, as in
    training, until one fits."""
    rehearsals = [_Rehearsal(cut, device, reason) for cut in _cut(given, device)]
    first = rehearsals[0]
    standing = _extended([one.standing for one in rehearsals], first.whole)
    counts = _extended([one.counts for one in rehearsals], first.whole)
    limit = device.limit(standing["weights"] + standing["adapters"])
    room = Room(at_once(given.recipe, device.kind, first.extra))
    while True:
        largest, several = largest_batch(given, room.tokens, packing=first.packing, extra=first.extra)
        passed, unknown = {"saved": 0, "working": 0, "flops": 0}, None
        try:
            passed = _extended([one.go(largest) for one in rehearsals], first.whole)
        except RuntimeError as error:  # an operation whose shapes depend on numbers, or that is not known without any
            unknown = _("a pass cannot be counted without numbers: {reason}").format(reason=str(error).split("\n")[0])
        alone = {} if several else {"gradients": 0}
        need = Need(
            parts={**standing, **alone, "saved": passed["saved"], "head": 0, "working": passed["working"]},
            limit=limit,
            tokens=largest.input_ids.numel() + first.extra * len(largest.samples),
            budget=room.tokens,
            host=RUNNING,
            packing=first.packing,
            extra=first.extra,
            reason=reason,
            flops=passed["flops"],
            unknown=unknown,
            layers=first.whole,
            parameters=counts["parameters"],
            learnt=counts["learnt"],
        )
        if need.fits or unknown is not None or len(largest.samples) == 1:
            return need
        room.shrink(0, [largest])


def _cut(given: Given, device: Device) -> list[Given]:
    """As it is; of a deep model twice a part of it, as each further layer takes what the one before took."""
    whole = layers_of(opened(given, device)[0])
    if given.layers is not None or whole <= max(GONE_THROUGH) or getattr(given.recipe.method, "layers", None):
        return [given]
    return [replace(given, layers=count) for count in GONE_THROUGH]


def _extended(found: Sequence[dict[str, int]], layers: int) -> dict[str, int]:
    """What all layers take, from what GONE_THROUGH layers do."""
    if len(found) == 1:
        return found[0]
    (few, more), (less, most) = GONE_THROUGH, found
    return {key: less[key] + (most[key] - less[key]) * (layers - few) // (more - few) for key in less}


class _Rehearsal:
    """A model of tensors without memory, and what stands there when a pass begins. whole: layers it should have."""

    def __init__(self, given: Given, device: Device, reason: str | None) -> None:
        training = given.recipe.training
        self.hardware = Hardware(torch.device("cpu"), device.dtype)
        self.mode, self.held = FakeTensorMode(allow_non_fake_inputs=True), Footprint()
        self.whole = layers_of(opened(replace(given, layers=None), device)[0])
        self.model, kind = opened(given, device)
        with self.mode, self.held:
            _hold(on_cpu(self.model.train()), kind, given)
            self.loss_fn: LossFunction = partial(summed_loss, noise=training.neftune_alpha or 0.0)
            if reason is None:
                self.loss_fn = Engine(self.model, device.dtype).summed_loss
        self.standing, self.counts = _standing(self.model, training, self.held.now), _counts(self.model)
        self.packing, self.extra = training.packing and covers(self.model), virtual_tokens(self.model)

    def go(self, batch: Batch) -> dict[str, int]:
        """Forward and backward: bytes that are saved in between, the most that there are besides, and operations."""
        if batch.lengths is not None:
            remember_layout(tuple(length + self.extra for length in batch.lengths))
        columns = int(np.unique(batch.predicting.numpy() % batch.input_ids.shape[1]).size)
        before, saved = self.held.now, 0

        def noting(model: nn.Module, batch: Batch) -> torch.Tensor:
            nonlocal saved
            loss: torch.Tensor = self.loss_fn(model, batch)
            saved = self.held.now - before
            return loss

        counter = FlopCounterMode(display=False)
        with torch.random.fork_rng(devices=[]), quiet(), self.mode, self.held, counter, _Answering(columns):
            self.held.peak = before
            with packed_attention(self.model, self.packing):
                accumulate(self.model, [batch], 1.0, 0, 0, self.hardware, noting)
            peak = self.held.peak
            for parameter in self.model.parameters():
                parameter.grad = None
        return {"saved": saved, "working": peak - before - saved, "flops": counter.get_total_flops()}


@contextmanager
def quiet() -> Iterator[None]:
    """Within, torch's tensors without memory do not log what they could not do: whoever asked is told."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


ASKED = (torch.Tensor.__bool__, torch.Tensor.item, torch.Tensor.__contains__)


class _Answering(TorchFunctionMode):
    """Tells what tensors without numbers cannot: how many columns of a padded batch predict something, and that
    nothing is so (all tokens real, all positions short), so that nothing is spared."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Of a tensor with numbers the answer is the true one."""
        if func is torch.unique:
            return args[0].new_empty(self.columns)
        if func in ASKED and isinstance(args[0], FakeTensor):
            return False
        return func(*args, **(kwargs or {}))


def largest_batch(given: Given, budget: int, *, packing: bool = True, extra: int = 0) -> tuple[Batch, bool]:
    """The largest micro-batch there will be, and whether steps have several."""
    recipe = given.recipe
    tried = fullest(given.rows, recipe.training, recipe.seed, budget, extra)
    cut = [batches_of(given, samples, budget, packing=packing, extra=extra) for samples in tried]
    every = [batch for batches in cut for batch in batches]
    return max(every, key=lambda batch: batch.input_ids.numel()), max(map(len, cut)) > 1


def batches_of(
    given: Given, samples: Sequence[int], budget: int, *, packing: bool = True, extra: int = 0
) -> list[Batch]:
    """Samples of a step in micro-batches, as training lays them out."""
    pad = given.tokenizer.pad_id
    return micro_batches(given.rows, samples, budget=budget, packing=packing, pad_id=pad, extra=extra)


def _standing(model: nn.Module, training: Training, held: int) -> dict[str, int]:
    """What lies there before a pass, or comes with the first step; held: all of the model's tensors."""
    parameters = [parameter for _name, parameter in learning(model)]
    learnt = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    whole: Any = model
    outside = [
        part for end in (whole.get_input_embeddings(), whole.get_output_embeddings()) for part in end.parameters()
    ]
    adapters = 0 if len(parameters) == len(list(model.parameters())) else learnt
    return {
        "weights": held - adapters,
        "adapters": adapters,
        "gradients": learnt,
        "moments": moments(parameters, training, outside),
    }


def layers_of(model: nn.Module) -> int:
    """How many decoder layers a model has."""
    config: Any = model.config
    return int(config.get_text_config().num_hidden_layers)


def _counts(model: nn.Module) -> dict[str, int]:
    return {
        "parameters": sum(weights_in(parameter) for parameter in model.parameters()),
        "learnt": sum(parameter.numel() for _name, parameter in learning(model)),
    }
