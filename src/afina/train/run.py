"""From a recipe to a folder with a trained adapter: data in, labels audited, model prepared, the loop, what it leaves.

Knows nothing of evaluation, export or where the folder will finally lie.
"""

import heapq
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afina import durable
from afina.artifact import parent, sha256
from afina.console import Console
from afina.data.batch import Batch, micro_batches
from afina.data.conversation import Sample
from afina.data.order import order_of
from afina.data.read import read
from afina.data.split import split
from afina.data.targets import check_targets, read_schema
from afina.data.template import Rendered, Renderer, audit
from afina.data.tokenizer import load_tokenizer
from afina.engine.attention import covers, packed_attention
from afina.engine.engine import Engine
from afina.engine.families import why_not
from afina.engine.proof import prove
from afina.errors import DataError, Interrupted
from afina.language import _
from afina.model.attach import save_adapter
from afina.model.load import Hardware, choose_hardware
from afina.model.loss import summed_loss
from afina.model.virtual import virtual_tokens
from afina.recipe.place import model_source
from afina.recipe.schema import Recipe, Training
from afina.train.keeper import Keeper
from afina.train.loop import LossFunction, accumulate, mean_loss, train
from afina.train.memory import Room
from afina.train.opening import open_model, why_padded, why_reference
from afina.train.record import Record
from afina.train.resume import CHECKPOINTS
from afina.train.resume import begin as enter
from afina.train.session import Plan, Session
from afina.train.state import begin
from afina.train.stop import Stop
from afina.train.surroundings import surroundings

MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384, "mps": 4096}
"""Computed at once where the recipe says nothing: enough to fill the device, little enough to fit by the weights."""
SHOWN_PROBLEMS = 20
"""Samples with problems printed one by one; the rest is counted, and the manifest has them all."""
BACKWARD_WORK = 3
"""A learnt token costs about three times a token that is only looked at."""

USABLE = 0.92
"""Of the memory that is free on a GPU; the rest is for what fragments and for other programs' sudden needs."""
STANDING = 3
"""Beside what learns: its two moments, and the gradients of the micro-batches before."""
PROOF_TOKENS = 512
"""On so many tokens of the first step the fused engine is compared with the reference."""


@dataclass
class Examples:
    """The samples of a recipe, rendered and audited. `origin`: where those of `train` come from; `files`: by hash."""

    train: list[Rendered]
    origin: list[Sample]
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
    if data.schema_file is not None:
        check_targets([*kept, *held_out], read_schema(folder / data.schema_file, "data.schema_file"))
    kept, held_out = renderer.apart(kept), renderer.apart(held_out)
    if len(kept) + len(held_out) > rows:
        console.line(
            _(
                "Template  it writes earlier answers otherwise than the last, so each answer is learnt as a sample of "
                "its own: {rows} rows, {samples} samples (data.learn: last learns the last answers only)"
            ).format(rows=rows, samples=len(kept) + len(held_out))
        )
        rows = len(kept) + len(held_out)
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
    aside = {id(sample) for sample, _reason in rejected}
    for encoding, files in reading.encodings.items():
        if encoding != data.encoding[0]:
            console.warn(_("{count} file(s) read as {encoding}.").format(count=len(files), encoding=encoding))
    return Examples(
        train=rendered[0],
        origin=[sample for sample in kept if id(sample) not in aside],
        validation=rendered[1],
        rejected=rejected,
        rows=rows,
        files=[parent(file, sha256(file), "data") for file in reading.files],
        dialects=sorted(reading.dialects),
        encodings={encoding: len(files) for encoding, files in reading.encodings.items()},
    )


def train_run(
    recipe: Recipe, folder: Path, place: Path, console: Console, base: dict[str, str] | None = None
) -> dict[str, Any]:
    """Train as the recipe says, or go on where `place` left off; returns the facts for its manifest.

    Leaves adapter, tokenizer and metrics in `place`. `folder` is where the recipe's relative paths start; `base` names
    the base model by hash.
    """
    hardware = choose_hardware(recipe.model)
    source = model_source(recipe.model.base, folder)
    tokenizer = load_tokenizer(
        source,
        template=recipe.model.chat_template,
        folder=folder,
        revision=recipe.model.revision,
        turn_tokens=recipe.model.turn_tokens,
    )
    renderer = Renderer(tokenizer, recipe.data.learn)
    examples = prepare(recipe, folder, renderer, console)
    _say_data(examples, console)
    model, counts = open_model(recipe, source, hardware, tokenizer, console)
    parents = [*([base] if base else []), *examples.files]
    run = enter(place, recipe, parents, examples.train + examples.validation)
    measured = _run_loop(model, recipe, examples, hardware, tokenizer.pad_id, place, run, console)
    durable.remove(place / "adapter")  # of a sitting that was killed before the manifest stood
    with durable.new_folder(place / "adapter") as adapter:
        save_adapter(model, adapter, base=recipe.model.base)
        tokenizer.save(adapter)
    return {
        "seed": recipe.seed,
        "hardware": str(hardware),
        "engine": measured["engine"],
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
            "samples": len(examples.train),
            "tokens_per_epoch": examples.tokens,
            **counts,
            **measured["training"],
        },
    }


def _run_loop(
    model: nn.Module,
    recipe: Recipe,
    examples: Examples,
    hardware: Hardware,
    pad_id: int,
    place: Path,
    run: str,
    console: Console,
) -> dict[str, Any]:
    """Drive train(), from the newest checkpoint where there is one; returns what was measured."""
    training = recipe.training
    packing = training.packing and covers(model)
    order = order_of([row.ids.size for row in examples.train], training, recipe.seed)
    steps = training.steps or order.steps
    extra = virtual_tokens(model)
    room = Room(
        training.micro_batch_tokens or max(recipe.model.max_length + extra, MICRO_BATCH_TOKENS[hardware.device.type])
    )

    def lay_out(rows: Sequence[Rendered], samples: Sequence[int]) -> list[Batch]:
        return micro_batches(rows, samples, budget=room.tokens, packing=packing, pad_id=pad_id, extra=extra)

    def work(step: int) -> int:
        return BACKWARD_WORK * sum(examples.train[index].ids.size for index in order.step(step))

    def measure() -> float:
        return mean_loss(model, lay_out(examples.validation, range(len(examples.validation))), hardware, loss_fn)

    def once(batch: Batch) -> None:
        on_device = batch.to(hardware.device)
        accumulate(model.train(), [on_device], batch.weight, recipe.seed, 0, hardware, loss_fn)

    first = lay_out(examples.train, _few(examples.train, order.step(0)))[0]
    with packed_attention(model, packing):
        loss_fn, engine = _choose_engine(model, recipe, hardware, first if packing else None, room)
    console.line(_("Engine    {engine}").format(engine=engine))
    held_out = sum(row.ids.size for row in examples.validation)
    validate_after = _validation_steps(steps, training.validations) if held_out else frozenset()
    keeper = Keeper(place / CHECKPOINTS, run, training, console.warn)
    plan = Plan(
        steps=steps,
        hardware=hardware,
        epoch=order.epoch,
        work=work,
        measure=measure,
        measure_work=held_out,
        validate_after=validate_after,
        where=lambda sample: examples.origin[sample].where,
        surroundings=surroundings(str(hardware), "reference" if isinstance(loss_fn, partial) else "fused"),
    )
    record, stop = Record(place), Stop()
    total = sum(work(step) for step in range(steps)) + held_out * len(validate_after)
    with (
        stop.handled(),
        closing(record),
        console.progress(_("Training"), total) as progress,
        packed_attention(model, packing),
    ):
        state = begin(model, training, hardware, recipe.method)
        session = Session(plan, console, progress, record, keeper, stop, room)
        session.go_on(state)
        try:
            longest = _longest(examples.train, training)
            session.try_memory(lambda: lay_out(examples.train, longest), once, state)
            train(
                model,
                lambda step: lay_out(examples.train, order.step(step)),
                state,
                steps=steps,
                training=training,
                seed=recipe.seed,
                hardware=hardware,
                loss_fn=loss_fn,
                follower=session,
                validate_after=validate_after,
            )
            digest = session.finish(state)
        except Interrupted as stopped:
            raise session.interrupted(state, stopped) from None
    return {"engine": engine, "training": session.figures(state, digest)}


def _choose_engine(
    model: nn.Module, recipe: Recipe, hardware: Hardware, first: Batch | None, room: Room
) -> tuple[LossFunction, str]:
    """The loss function that trains, and a sentence on which engine it is and why. `first`: a packed batch, if packed.

    The fused engine proves itself on that batch against the reference; on a mismatch the reference trains. On a GPU it
    plans what fits: `room` shrinks to that.
    """
    plain = partial(summed_loss, noise=recipe.training.neftune_alpha or 0.0)
    if recipe.training.engine == "reference":
        return plain, _("reference (transformers + PEFT), as the recipe asks")
    if first is None and recipe.training.packing:
        return plain, _("reference (transformers + PEFT), padded: {reason}").format(reason=why_padded(model))
    if first is None:
        return plain, _("reference (transformers + PEFT), as batches are padded")
    if reason := why_reference(model, recipe) or why_not(model):
        return plain, _("reference (transformers + PEFT) with packed attention: {reason}").format(reason=reason)
    engine, batch = Engine(model, hardware.dtype), first.to(hardware.device)
    model.train()
    proof = prove(engine, model, batch, hardware.autocast(), engine.parameters)
    if not proof.holds:
        reason = _("on the first batch the fused loss differs by {loss:.1e}, its gradients by {gradient:.1e}")
        return plain, _("reference (transformers + PEFT) with packed attention: {reason}").format(
            reason=reason.format(loss=proof.loss, gradient=proof.gradient)
        )
    if hardware.device.type == "cuda":
        torch.cuda.empty_cache()
        learnt = sum(parameter.numel() * parameter.element_size() for parameter in engine.parameters)
        free = int(torch.cuda.mem_get_info(hardware.device)[0] * USABLE) - STANDING * learnt
        room.tokens = engine.plan(room.tokens, recipe.model.max_length, free).tokens
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


def _longest(rows: Sequence[Rendered], training: Training) -> list[int]:
    """The longest samples, as many as a step may hold: they fill the largest micro-batch there can be."""
    lengths = [int(row.ids.size) for row in rows]
    count = training.batch_size if training.batch_tokens is None else 1 + training.batch_tokens // min(lengths)
    return heapq.nlargest(count, range(len(rows)), lengths.__getitem__)


def _few(rows: Sequence[Rendered], samples: Sequence[int]) -> list[int]:
    """The first samples of a step, PROOF_TOKENS together or one at least: the reference needs more memory than us."""
    chosen, tokens = [samples[0]], rows[samples[0]].ids.size
    for index in samples[1:]:
        tokens += rows[index].ids.size
        if tokens > PROOF_TOKENS:
            break
        chosen.append(index)
    return chosen


def _validation_steps(steps: int, times: int) -> frozenset[int]:
    return frozenset(max(1, round(steps * number / times)) for number in range(1, times + 1))
