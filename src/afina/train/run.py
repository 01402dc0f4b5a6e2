"""From a recipe to a folder with a trained adapter: data in, labels audited, model prepared, the loop, what it leaves.

Knows nothing of evaluation, export or where the folder will finally lie.
"""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afina import durable
from afina.artifact import parent, sha256
from afina.console import Console
from afina.data.batch import Batch, micro_batches
from afina.data.conversation import Sample
from afina.data.order import Order
from afina.data.read import read
from afina.data.split import split
from afina.data.template import Rendered, Renderer, audit
from afina.data.tokenizer import load_tokenizer
from afina.engine.attention import covers, packed_attention
from afina.engine.engine import Engine, prove, why_not
from afina.errors import DataError, RecipeError
from afina.language import _
from afina.model.attach import attach, learning, save_adapter
from afina.model.load import Hardware, choose_hardware, limit_of, load_model
from afina.model.loss import summed_loss
from afina.recipe.place import model_source
from afina.recipe.schema import Recipe
from afina.train.loop import LossFunction, StepReport, mean_loss, train

MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384, "mps": 4096}
"""Computed at once where the recipe says nothing: enough to fill the device, little enough to fit by the weights."""
SHOWN_PROBLEMS = 20
"""Samples with problems printed one by one; the rest is counted, and the manifest has them all."""
BACKWARD_WORK = 3
"""A learnt token costs about three times a token that is only looked at."""

PROOF_TOKENS = 512
"""On so many tokens of the first step the fused engine is compared with the reference."""


@dataclass
class Examples:
    """The samples of a recipe, rendered and audited. `files` names what was read, by hash."""

    train: list[Rendered]
    validation: list[Rendered]
    rejected: list[tuple[Sample, str]]
    rows: int
    files: list[dict[str, str]]
    dialects: list[str]
    encodings: dict[str, int]

    @property
    def tokens(self) -> int:
        """Tokens of one pass over the training samples."""
        return sum(row.ids.size for row in self.train)


@dataclass
class Tally:
    """Figures gathered while training."""

    engine: str = ""
    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    tokens: int = 0
    learnt: int = 0
    seconds: float = 0.0


def prepare(recipe: Recipe, folder: Path, renderer: Renderer, console: Console) -> Examples:
    """Read, split, render and audit the examples. Raises DataError before anything is loaded or trained."""
    data = recipe.data
    reading = read(data.train, data, folder)
    rows = len(reading.samples)
    if isinstance(data.validation, float | int):
        kept, held_out = split(reading.samples, data.validation, recipe.seed)
    else:
        other = read(data.validation, data, folder)
        kept, held_out, rows = reading.samples, other.samples, rows + len(other.samples)
        reading.files += other.files
    rejected: list[tuple[Sample, str]] = []
    rendered: list[list[Rendered]] = []
    for samples in (kept, held_out):
        good, bad = _render(samples, renderer, recipe)
        rendered.append(good)
        rejected += bad
    if not rendered[0]:
        raise DataError(
            _("No sample is left to learn from:") + "\n" + "\n".join(_listed(rejected)),
            hint=_("Raise model.max_length, or shorten the samples."),
        )
    for encoding, files in reading.encodings.items():
        if encoding != data.encoding[0]:
            console.warn(_("{count} file(s) read as {encoding}.").format(count=len(files), encoding=encoding))
    return Examples(
        train=rendered[0],
        validation=rendered[1],
        rejected=rejected,
        rows=rows,
        files=[parent(file, sha256(file), "data") for file in reading.files],
        dialects=sorted(reading.dialects),
        encodings={encoding: len(files) for encoding, files in reading.encodings.items()},
    )


def train_run(recipe: Recipe, folder: Path, out: Path, console: Console) -> dict[str, Any]:
    """Train as the recipe says and write adapter, tokenizer and metrics into `out`; returns the facts for its manifest.

    `folder` is where the recipe's relative paths start.
    """
    hardware = choose_hardware(recipe.model)
    source = model_source(recipe.model.base, folder)
    tokenizer = load_tokenizer(
        source, template=recipe.model.chat_template, folder=folder, revision=recipe.model.revision
    )
    renderer = Renderer(tokenizer, recipe.data.learn)
    examples = prepare(recipe, folder, renderer, console)
    _say_data(examples, console)
    model = load_model(source, hardware, revision=recipe.model.revision)
    limit = limit_of(model)
    if limit is not None and recipe.model.max_length > limit:
        raise RecipeError(
            _("model.max_length is {wanted}, but the model was made for {limit} tokens.").format(
                wanted=recipe.model.max_length, limit=limit
            ),
            hint=_("Set model.max_length to {limit} or less.").format(limit=limit),
        )
    model = attach(model, recipe.method, seed=recipe.seed)
    trainable = sum(parameter.numel() for _name, parameter in learning(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    console.line(
        _("Model     {base}, {total:.1f} M parameters, {trainable:.2f} M learn ({method}), on {hardware}").format(
            base=recipe.model.base,
            total=total / 1e6,
            trainable=trainable / 1e6,
            method=recipe.method.name,
            hardware=hardware,
        )
    )
    packing = recipe.training.packing and covers(model, recipe.model.max_length)
    tally, steps = _run_loop(model, recipe, examples, hardware, tokenizer.pad_id, packing, out, console)

    save_adapter(model, out / "adapter", base=recipe.model.base)
    tokenizer.save(out / "adapter")
    return {
        "seed": recipe.seed,
        "hardware": str(hardware),
        "engine": tally.engine,
        "data": {
            "rows": examples.rows,
            "train": len(examples.train),
            "validation": len(examples.validation),
            "rejected": _places(examples.rejected),
            "files": examples.files,
            "dialects": examples.dialects,
            "encodings": examples.encodings,
        },
        "training": {
            "steps": steps,
            "samples": len(examples.train),
            "tokens": tally.tokens,
            "learnt_tokens": tally.learnt,
            "seconds": tally.seconds,
            "tokens_per_second": tally.tokens / max(tally.seconds, 1e-9),
            "peak_memory_bytes": peak_memory(hardware),
            "trainable_parameters": trainable,
            "parameters": total,
            "first_loss": tally.losses[0],
            "final_loss": tally.losses[-1],
            "validation_loss": tally.validation[-1] if tally.validation else None,
        },
    }


def _run_loop(
    model: nn.Module,
    recipe: Recipe,
    examples: Examples,
    hardware: Hardware,
    pad_id: int,
    packing: bool,
    out: Path,
    console: Console,
) -> tuple[Tally, int]:
    """Drive train() and write metrics.jsonl; returns what was measured and the number of steps."""
    training, tally = recipe.training, Tally()
    order = Order(len(examples.train), training.batch_size, training.epochs, recipe.seed)
    steps = training.steps or order.steps
    if training.steps is not None:
        order = Order(len(examples.train), training.batch_size, _epochs_for(steps, order), recipe.seed)
    budget = training.micro_batch_tokens or max(recipe.model.max_length, MICRO_BATCH_TOKENS[hardware.device.type])

    def lay_out(rows: Sequence[Rendered], samples: Sequence[int]) -> list[Batch]:
        return micro_batches(rows, samples, budget=budget, packing=packing, pad_id=pad_id)

    first = lay_out(examples.train, _few(examples.train, order.step(0)))[0]
    with packed_attention(model, packing):
        loss_fn, tally.engine = _choose_engine(model, recipe, hardware, first if packing else None)
    console.line(_("Engine    {engine}").format(engine=tally.engine))
    held_out = lay_out(examples.validation, range(len(examples.validation)))
    held_out_tokens = sum(batch.tokens for batch in held_out)
    validate_after = _validation_steps(steps, training.validations) if held_out else frozenset()
    work = BACKWARD_WORK * sum(examples.train[index].ids.size for step in range(steps) for index in order.step(step))
    work += held_out_tokens * len(validate_after)

    learnt = [parameter for _name, parameter in learning(model)]

    with (
        durable.Log(out / "metrics.jsonl") as log,
        console.progress(_("Training"), work) as progress,
        packed_attention(model, packing),
    ):

        def on_step(report: StepReport) -> None:
            torch.autograd.graph.increment_version(learnt)  # fused AdamW does not, and the engine goes by it
            tally.losses.append(report.loss)
            tally.tokens += report.tokens
            tally.learnt += report.learnt
            facts = {"kind": "step", "epoch": round(order.epoch(report.step), 4), **vars(report)}
            log.append(facts)
            text = _("step {step}/{steps} · loss {loss:.3f} · lr {rate:.1e} · {speed:,.0f} tokens/s · {memory:.2f} GiB")
            progress.advance(
                BACKWARD_WORK * report.tokens,
                text.format(
                    step=report.step,
                    steps=steps,
                    loss=report.loss,
                    rate=report.learning_rate,
                    speed=report.tokens / report.seconds,
                    memory=peak_memory(hardware) / 2**30,
                ),
                **facts,
            )

        def on_validate(step: int) -> None:
            loss = mean_loss(model, held_out, hardware, loss_fn)
            tally.validation.append(loss)
            log.append({"kind": "validation", "step": step, "loss": loss})
            progress.advance(held_out_tokens)
            console.event("validation", step=step, loss=loss)

        started = time.perf_counter()
        train(
            model,
            lambda step: lay_out(examples.train, order.step(step)),
            steps=steps,
            training=training,
            seed=recipe.seed,
            hardware=hardware,
            loss_fn=loss_fn,
            on_step=on_step,
            on_validate=on_validate,
            validate_after=validate_after,
        )
        tally.seconds = time.perf_counter() - started
    return tally, steps


def _choose_engine(
    model: nn.Module, recipe: Recipe, hardware: Hardware, first: Batch | None
) -> tuple[LossFunction, str]:
    """The loss function that trains, and a sentence on which engine it is and why. `first`: a packed batch, if packed.

    The fused engine proves itself on that batch against the reference; on a mismatch the reference trains.
    """
    if recipe.training.engine == "reference":
        return summed_loss, _("reference (transformers + PEFT), as the recipe asks")
    if first is None:
        return summed_loss, _("reference (transformers + PEFT), as batches are padded")
    if reason := why_not(model, recipe.model.max_length):
        return summed_loss, _("reference (transformers + PEFT) with packed attention: {reason}").format(reason=reason)
    engine, batch = Engine(model), first.to(hardware.device)
    model.train()
    proof = prove(engine, model, batch, hardware.autocast(), engine.parameters)
    if not proof.holds:
        reason = _("on the first batch the fused loss differs by {loss:.1e}, its gradients by {gradient:.1e}")
        return summed_loss, _("reference (transformers + PEFT) with packed attention: {reason}").format(
            reason=reason.format(loss=proof.loss, gradient=proof.gradient)
        )
    return engine.summed_loss, _(
        "fused blocks; on the first batch loss and gradients are the reference's to {loss:.0e} and {gradient:.0e}"
    ).format(loss=proof.loss, gradient=proof.gradient)


def _render(
    samples: list[Sample], renderer: Renderer, recipe: Recipe
) -> tuple[list[Rendered], list[tuple[Sample, str]]]:
    """Rendered samples that pass the audit, and those set aside. Raises DataError where none may be."""
    rendered = renderer.samples(samples)
    limit = recipe.model.max_length
    too_long = {id(sample) for sample, row in zip(samples, rendered, strict=True) if row.ids.size > limit}
    reasons: dict[int, tuple[Sample, str]] = {}
    for sample, reason in audit(samples, rendered, renderer.tokenizer, limit):
        reasons[id(sample)] = (sample, f"{reasons[id(sample)][1]}; {reason}" if id(sample) in reasons else reason)
    aside = too_long if recipe.data.too_long == "reject" else set()
    fatal = [problem for key, problem in reasons.items() if key not in aside]
    if fatal:
        raise DataError(
            _("{count} of {all} samples cannot be learnt as they are:").format(count=len(fatal), all=len(samples))
            + "\n"
            + "\n".join(_listed(fatal)),
            file=fatal[0][0].file,
            line=fatal[0][0].line,
            hint=_(
                "Raise model.max_length, shorten them, or set data.too_long to reject to go on without the long ones."
            )
            if all(id(sample) in too_long for sample, _reason in fatal)
            else _("Mend these samples, or use a chat template that closes the answer (model.chat_template)."),
        )
    good = [row for sample, row in zip(samples, rendered, strict=True) if id(sample) not in aside]
    return good, list(reasons.values())


def _say_data(examples: Examples, console: Console) -> None:
    """Account for every row: what is learnt, what is kept back, and which were set aside and why."""
    console.line(
        _("Data      {rows} rows = {train} to learn + {validation} for validation + {rejected} rejected").format(
            rows=examples.rows,
            train=len(examples.train),
            validation=len(examples.validation),
            rejected=len(examples.rejected),
        )
    )
    for line in _listed(examples.rejected):
        console.line(f"          {line}")
    console.event(
        "data",
        rows=examples.rows,
        train=len(examples.train),
        validation=len(examples.validation),
        rejected=_places(examples.rejected),
    )


def _places(rejected: Sequence[tuple[Sample, str]]) -> list[dict[str, str | int]]:
    """Rejected samples for the manifest and for machines."""
    return [{"file": str(sample.file), "line": sample.line, "reason": reason} for sample, reason in rejected]


def _listed(problems: Sequence[tuple[Sample, str]]) -> list[str]:
    """The first problems, a line each, and how many more there are."""
    shown = [f"{sample.where}: {reason}" for sample, reason in problems[:SHOWN_PROBLEMS]]
    more = len(problems) - len(shown)
    return [*shown, _("... and {count} more").format(count=more)] if more else shown


def _few(rows: Sequence[Rendered], samples: Sequence[int]) -> list[int]:
    """The first samples of a step, PROOF_TOKENS together or one at least: the reference needs more memory than us."""
    chosen, tokens = [samples[0]], rows[samples[0]].ids.size
    for index in samples[1:]:
        tokens += rows[index].ids.size
        if tokens > PROOF_TOKENS:
            break
        chosen.append(index)
    return chosen


def _epochs_for(steps: int, order: Order) -> float:
    """So many passes that `steps` steps are full ones."""
    return steps * order.batch_size / order.samples


def _validation_steps(steps: int, times: int) -> frozenset[int]:
    return frozenset(max(1, round(steps * number / times)) for number in range(1, times + 1))


def peak_memory(hardware: Hardware) -> int:
    """Most bytes held so far: on the GPU by tensors, else by this whole process."""
    if hardware.device.type == "cuda":
        return torch.cuda.max_memory_allocated(hardware.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
