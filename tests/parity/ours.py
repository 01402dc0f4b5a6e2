"""Every method and family, trained twice with the same seeds and data: by Afina's parts, and by plain PEFT.

What is measured for a pair stands in `Measured`; `tools/methods_table.py` runs every pair of `METHODS` and `FAMILIES`,
records what was measured in docs/methods.json, and draws docs/methods.md from it.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parity.plain import plain_gradients, plain_losses
from small import CPU
from torch import nn

from afina.data.batch import Batch, micro_batches
from afina.data.template import Rendered
from afina.engine.engine import Engine
from afina.engine.families import why_not
from afina.model.attach import attach, learning, merged
from afina.model.generate import generate
from afina.model.load import load_model
from afina.model.loss import summed_loss
from afina.model.packed import covers, packed_attention
from afina.model.saved import load_adapter, save_adapter, save_whole
from afina.model.virtual import virtual_tokens, without
from afina.recipe.schema import Full, Lora, Method, Model, PrefixTuning, PromptTuning, Training
from afina.train.loop import accumulate, train
from afina.train.state import Follower, begin

STEPS, SAMPLES, BATCH, SEED = 20, 12, 3, 7
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-5
"""The issue's: loss over 20 steps, and gradients at step 0, relative, in fp32."""


PLAIN, STEADY = Model(), Training(learning_rate=1e-3, schedule="constant", warmup=0.0)


@dataclass(frozen=True)
class Case:
    """One way of training: the recipe's method, how the base is held, and whether it can be merged."""

    method: Method
    model: Model = PLAIN
    training: Training = STEADY

    @property
    def mergeable(self) -> bool:
        """Virtual tokens lie outside the weights."""
        return not isinstance(self.method, PromptTuning | PrefixTuning)


RANK = {"rank": 4, "alpha": 8.0}
METHODS: dict[str, Case] = {
    "full": Case(Full(name="full")),
    "full, last layer": Case(Full(name="full", layers=[-1])),
    "LoRA": Case(Lora(**RANK)),
    "LoRA, some targets": Case(Lora(**RANK, targets=["*.layers.1.*"])),
    "LoRA with biases": Case(Lora(**RANK, bias="all")),
    "rsLoRA": Case(Lora(**RANK, rslora=True)),
    "DoRA": Case(Lora(**RANK, dora=True)),
    "LoRA, PiSSA start": Case(Lora(**RANK, init="pissa")),
    "LoRA and head": Case(Lora(**RANK, modules_to_save=["lm_head"])),
    "LoRA+": Case(Lora(**RANK, lora_plus_ratio=16.0)),
    "QLoRA, nf4": Case(Lora(**RANK), Model(quantization="nf4")),
    "QLoRA, fp4": Case(Lora(**RANK), Model(quantization="fp4", double_quantization=False)),
    "QLoRA, int8": Case(Lora(**RANK), Model(quantization="int8")),
    "QDoRA, nf4": Case(Lora(**RANK, dora=True), Model(quantization="nf4")),
    "QLoRA, LoftQ start": Case(Lora(**RANK, init="loftq"), Model(quantization="nf4")),
    "prompt tuning": Case(PromptTuning(name="prompt-tuning", virtual_tokens=5)),
    "prefix tuning": Case(PrefixTuning(name="prefix-tuning", virtual_tokens=5)),
}


@dataclass(frozen=True)
class Measured:
    """Differences from plain PEFT and transformers, and from itself after each thing that is done with it.

    loss: the largest relative difference of 20 losses; weights: of what was learnt, relative to how far it moved, keys'
    biases left out (where no angle turns them, every score of a query shifts alike: their gradient is rounding noise,
    of which AdamW makes steps);
    gradient: relative, at step 0 with B perturbed; engine: the same between fused engine and reference, None where the
    reference trains; saved, merged: the largest difference of a logit; generated: answers that equal those of plain
    transformers, of how many; packed: whether samples lie end to end.
    """

    loss: float
    gradient: float
    weights: float
    saved: float
    merged: float | None
    generated: bool
    packed: bool
    engine: float | None

    def holds(self) -> bool:
        """Whether all of it is as the issue asks."""
        return (
            self.loss <= LOSS_TOLERANCE
            and self.gradient <= GRADIENT_TOLERANCE
            and self.weights <= 1e-3
            and self.saved <= 1e-5
            and (self.merged is None or self.merged <= 1e-4)
            and self.generated
            and (self.engine is None or self.engine <= 1e-4)
        )

    def plain(self) -> dict[str, Any]:
        """For JSON, figures with two digits: their last bits are the machine's."""
        return {
            key: float(f"{value:.1e}") if isinstance(value, float) else value for key, value in asdict(self).items()
        }


def samples(vocabulary: int) -> list[Rendered]:
    """Odd lengths; about half of the tokens are learnt, the last always."""
    random = np.random.default_rng(3)
    made = []
    for _number in range(SAMPLES):
        length = int(random.integers(4, 30))
        learnt = np.append(random.random(length - 1) < 0.5, True)
        made.append(Rendered(random.integers(3, vocabulary, length).astype(np.int32), learnt))
    return made


def steps_of(rows: list[Rendered], *, packing: bool, extra: int) -> Callable[[int], list[Batch]]:
    """The micro-batches of each step, two as a rule."""

    def make(step: int) -> list[Batch]:
        chosen = [(step * BATCH + place) % len(rows) for place in range(BATCH)]
        return micro_batches(rows, chosen, budget=40 + 2 * extra, packing=packing, pad_id=0, extra=extra)

    return make


def opened(folder: Path, case: Case) -> nn.Module:
    """The model with its method, as a run opens it."""
    return attach(
        load_model(str(folder), CPU, case.model),
        case.method,
        seed=SEED,
        plain=lambda: load_model(str(folder), CPU),
    )


def perturbed(model: nn.Module) -> nn.Module:
    """With B = 0 the gradient of A is zero, and hides its mistakes."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in learning(model):
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


class Losses(Follower):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, report, samples):
        self.losses.append(report.loss)


def measure(folder: Path, case: Case) -> Measured:
    """Train, save, merge and ask one pair; the base lies in `folder` as transformers saves it."""
    model = opened(folder, case)
    longest = 64
    rows, packing = samples(model.config.vocab_size), covers(model)
    make = steps_of(rows, packing=packing, extra=virtual_tokens(model))
    with packed_attention(model, packing):
        gradient = _gradient_difference(folder, case, make, rows)
        engine = _engine_difference(folder, case, make, longest) if packing else None
        begun = {name: parameter.detach().clone() for name, parameter in learning(model)}
        follower = Losses()
        state = begin(model, case.training, CPU, case.method)
        train(
            model, make, state, steps=STEPS, training=case.training, seed=SEED, hardware=CPU, loss_fn=summed_loss,
            follower=follower,
        )  # fmt: skip
    losses, learnt = plain_losses(folder, case, rows)
    loss = max(abs(one - two) / abs(two) for one, two in zip(follower.losses, losses, strict=True))
    told = [name for name in begun if not (".k_proj." in name and name.endswith(".bias"))]
    moved = _norm(learnt[name] - begun[name] for name in told)
    apart = _norm(model.get_parameter(name).detach() - learnt[name] for name in told)
    saved, whole, generated = _afterwards(folder, case, model, rows)
    return Measured(loss, gradient, apart / moved, saved, whole, generated, packing, engine)


def _gradient_difference(folder: Path, case: Case, make, rows: list[Rendered]) -> float:
    model = perturbed(opened(folder, case)).train()
    batches = make(0)
    with packed_attention(model, covers(model)):
        accumulate(model, batches, sum(batch.targets.numel() for batch in batches), SEED, 0, CPU, summed_loss)
    truth = plain_gradients(folder, case, rows)
    found = {name: parameter.grad for name, parameter in learning(model) if parameter.grad is not None}
    assert found.keys() == truth.keys()
    return _norm(found[name] - truth[name] for name in truth) / _norm(truth.values())


def _engine_difference(folder: Path, case: Case, make, longest: int) -> float | None:
    model = perturbed(opened(folder, case)).train()
    if why_not(model) is not None:
        return None
    (batch, *_more), parameters = make(0), [parameter for _name, parameter in learning(model)]
    with packed_attention(model):
        truth = torch.autograd.grad(summed_loss(model, batch), parameters)
        found = torch.autograd.grad(Engine(model).summed_loss(model, batch), parameters)
    return _norm(one - two for one, two in zip(found, truth, strict=True)) / _norm(truth)


def logits(model: nn.Module, row: Rendered) -> torch.Tensor:
    """(tokens, vocabulary) of one sample, by the loss's own way into the model."""
    from afina.model.virtual import lay

    (batch,) = micro_batches([row], [0], budget=10_000, packing=False, pad_id=0)
    with torch.inference_mode():
        laid = lay(model.eval(), batch)
        return laid.model(**laid.inputs, use_cache=False).logits[0, -row.ids.size :]


def _afterwards(folder: Path, case: Case, model: nn.Module, rows: list[Rendered]) -> tuple[float, float | None, bool]:
    """Saved and loaded again; merged and loaded again; writing, alone and in a batch, and without the adapter."""
    full = isinstance(case.method, Full)
    before = [logits(model, row) for row in rows[:3]]
    with tempfile.TemporaryDirectory() as place:
        save_adapter(model, Path(place) / "adapter", base="somewhere/base")
        again = (
            load_model(f"{place}/adapter", CPU)
            if full
            else load_adapter(load_model(str(folder), CPU, case.model), Path(place) / "adapter")
        )
        saved = max(_largest(logits(again, row), truth) for row, truth in zip(rows, before, strict=False))
        whole = None
        if case.mergeable:
            plain = load_model(str(folder), CPU, case.model, plain=True)
            one = again if full else merged(load_adapter(plain, Path(place) / "adapter"))
            save_whole(one, Path(place) / "merged")
            loaded = load_model(f"{place}/merged", CPU)
            truth = before
            if case.model.quantization == "int8":  # its layers round their inputs too, which plain ones do not
                side = load_adapter(load_model(str(folder), CPU, case.model, plain=True), Path(place) / "adapter")
                truth = [logits(side, row) for row in rows[:3]]
            whole = max(_largest(logits(loaded, row), right) for row, right in zip(rows, truth, strict=False))
    prompts = [row.ids[:length].tolist() for row, length in zip(rows[:3], (3, 9, 4), strict=True)]
    asked = {"end_ids": [2], "pad_id": 0, "max_new_tokens": 6}
    together = generate(again, prompts, **asked)
    alone = [generate(again, [prompt], **asked)[0] for prompt in prompts]
    right = [greedy(again, prompt, 6) for prompt in prompts]
    generated = together == alone == right
    if not full:
        with without(again):
            base = load_model(str(folder), CPU, case.model)
            generated = generated and all(torch.equal(logits(again, row), logits(base, row)) for row in rows[:2])
    return saved, whole, generated


def greedy(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """The likeliest token after the whole text so far, again and again: no cache, no padding."""
    ids = list(prompt)
    for _token in range(count):
        row = Rendered(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool))
        ids.append(int(logits(model, row)[-1].argmax()))
        if ids[-1] == 2:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


def _norm(tensors) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors)) ** 0.5


def _largest(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max())
