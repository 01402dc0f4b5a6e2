"""From a recipe to a folder with a trained adapter: data in, labels audited, model prepared, the loop, what it leaves.

Knows nothing of evaluation, export or where the folder will finally lie.
"""

import heapq
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afina import durable
from afina.apart import Apart
from afina.artifact import parent, sha256
from afina.beside import begun
from afina.console import Console
from afina.data.batch import Batch, micro_batches
from afina.data.cache import FOLDER
from afina.data.order import order_of
from afina.data.template import Rendered
from afina.engine.eight_gate import room_for_eight, try_eight_bits
from afina.engine.engine import Engine
from afina.engine.families import why_not
from afina.engine.proof import prove
from afina.errors import Interrupted, ResourceError
from afina.language import _
from afina.model.distill import Teacher, distilled_loss
from afina.model.load import Hardware, choose_hardware, load_model
from afina.model.loss import summed_loss
from afina.model.packed import covers, packed_attention
from afina.model.repeatable import same_bits
from afina.model.saved import save_adapter
from afina.model.virtual import virtual_tokens
from afina.recipe.place import model_source
from afina.recipe.schema import Recipe, Training
from afina.train.best import GROUPS
from afina.train.examples import Examples, places, prepare_once, renderer_of, say_examples
from afina.train.keeper import Keeper
from afina.train.kept_plan import keep_plan, kept_plan
from afina.train.looking import Looking, OnEvaluate
from afina.train.loop import LossFunction, accumulate, measure, train
from afina.train.memory import Room, within_memory
from afina.train.opening import adapter_of, open_model, why_padded, why_reference
from afina.train.plan import Plan
from afina.train.record import Record
from afina.train.repeats import WATCHED, notice, repeated
from afina.train.resume import CHECKPOINTS
from afina.train.resume import begin as enter
from afina.train.session import Session
from afina.train.state import begin
from afina.train.stop import Stop
from afina.train.surroundings import surroundings
from afina.train.teaching import open_teacher

MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384, "mps": 4096}
"""Computed at once where the recipe says nothing: enough to fill the device, little enough to fit by the weights."""
BACKWARD_WORK = 3
"""A learnt token costs about three times a token that is only looked at."""

USABLE = 0.92
"""Of the memory that is free on a GPU; the rest is for what fragments and for other programs' sudden needs."""
STANDING = 3
"""Beside what learns: its two moments, and the gradients of the micro-batches before."""
PROOF_TOKENS = 512
"""On so many tokens of the first step the fused engine is compared with the reference."""


def train_run(
    recipe: Recipe,
    folder: Path,
    place: Path,
    console: Console,
    base: Future[dict[str, str]] | None = None,
    on_evaluate: OnEvaluate | None = None,
    ahead: Apart | None = None,
) -> dict[str, Any]:
    """Train as the recipe says, or go on where `place` left off; returns the facts for its manifest.

    Leaves adapter, tokenizer and metrics in `place`. `folder` is where the recipe's relative paths start; `base` will
    name the base model by hash; `on_evaluate` asks the tasks of `training.evaluate`; `ahead` prepares the rows already.
    The model is read while data are.
    """
    hardware = choose_hardware(recipe.model)
    source = model_source(recipe.model.base, folder)
    reading = begun(lambda: load_model(source, hardware, recipe.model))
    renderer = renderer_of(recipe, folder)
    tokenizer = renderer.tokenizer
    examples = prepare_once(recipe, folder, renderer, console, place.parent / FOLDER, ahead)
    say_examples(examples, console)
    adapter = adapter_of(recipe, folder, base.result() if base and recipe.model.adapter else None)
    with same_bits(recipe.training.exact and hardware.device.type == "cuda"):
        model, counts = open_model(recipe, reading.result(), source, hardware, tokenizer, console, adapter)
        if adapter is not None:
            examples.files.append(parent(adapter, sha256(adapter / "adapter_model.safetensors"), "adapter"))
        teacher, taught_by = open_teacher(recipe, folder, tokenizer, hardware, console)
        examples.files.extend(taught_by)
        parents = [*([base.result()] if base else []), *examples.files]
        run = enter(place, recipe, parents, examples.train + examples.validation)
        looking = Looking(model, renderer, hardware, on_evaluate)
        measured = _run_loop(looking, recipe, examples, teacher, place, run, console)
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
            "rejected": places(examples.rejected),
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
    look: Looking, recipe: Recipe, examples: Examples, teacher: Teacher | None, place: Path, run: str, console: Console
) -> dict[str, Any]:
    """Drive train(), from the newest checkpoint where there is one; returns what was measured."""
    model, hardware, training, pad_id = look.model, look.hardware, recipe.training, look.pad_id
    packing = training.packing and covers(model)
    order = order_of([row.ids.size for row in examples.train], training, recipe.seed)
    steps = training.steps or order.steps
    extra = virtual_tokens(model)
    most = max(recipe.model.max_length + extra, MICRO_BATCH_TOKENS[hardware.device.type])
    room = Room(training.micro_batch_tokens or most)

    def lay_out(rows: Sequence[Rendered], samples: Sequence[int]) -> list[Batch]:
        return micro_batches(rows, samples, budget=room.tokens, packing=packing, pad_id=pad_id, extra=extra)

    def work(step: int) -> int:
        return BACKWARD_WORK * sum(examples.train[index].ids.size for index in order.step(step))

    def once(batch: Batch) -> None:
        on_device = batch.to(hardware.device)
        accumulate(model.train(), [on_device], batch.weight, recipe.seed, 0, hardware, loss_fn)

    first = lay_out(examples.train, _few(examples.train, order.step(0)))[0]
    with packed_attention(model, packing):
        loss_fn, engine = _choose_engine(model, recipe, hardware, first if packing else None, room, place, teacher)
    console.line(_("Engine    {engine}").format(engine=engine))
    again = repeated(examples.train)
    if told := notice(again, len(examples.train), order.epoch(steps), lambda sample: examples.origin[sample].where):
        console.warn(told)
    held_out = sum(row.ids.size for row in examples.validation)
    validate_after = _validation_steps(steps, training.validations) if held_out else frozenset()
    asking = look.asking(_validation_steps(steps, training.evaluations))
    keeper = Keeper(place / CHECKPOINTS, run, training, console.warn)
    plan = Plan(
        steps=steps,
        hardware=hardware,
        epoch=order.epoch,
        work=work,
        held_out=lambda: [lay_out(examples.validation, group) for group in _dealt(len(examples.validation))],
        again=again[:WATCHED],
        learnt_again=lambda: [lay_out(examples.train, [one.sample]) for one in again[:WATCHED]],
        measure=lambda groups: measure(model, groups, hardware, summed_loss if teacher else loss_fn),
        measure_work=held_out,
        validate_after=validate_after,
        where=lambda sample: examples.origin[sample].where,
        early_stop=training.early_stop,
        held_out_samples=len(examples.validation),
        exact=training.exact or hardware.device.type != "cuda",
        criterion=look.criterion(training.best_by) if training.keep == "best" else None,
        surroundings=_surroundings(hardware, loss_fn, place),
        asking=asking,
    )
    record, stop = Record(place), Stop(aside=hardware.device.type == "cpu")
    total = sum(work(step) for step in range(steps)) + held_out * len(validate_after) + asking.work * len(asking.after)
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
                validate_after=validate_after | asking.after,
            )
            digest = session.finish(state)
        except Interrupted as stopped:
            raise session.interrupted(state, stopped) from None
    return {"engine": engine, "training": session.figures(state, digest)}


def _choose_engine(
    model: nn.Module,
    recipe: Recipe,
    hardware: Hardware,
    first: Batch | None,
    room: Room,
    place: Path,
    teacher: Teacher | None,
) -> tuple[LossFunction, str]:
    """The loss function that trains, and a sentence on which engine it is and why. `first`: a packed batch, if packed.

    The fused engine proves itself on that batch against the reference; on a mismatch the reference trains. On a GPU it
    plans what fits, as in the sitting before where it still does: `room` shrinks to that.
    """
    noise = recipe.training.neftune_alpha or 0.0
    plain: LossFunction = partial(summed_loss, noise=noise)
    if teacher is not None:
        plain = partial(distilled_loss, teacher=teacher, noise=noise)
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
    planned = False

    def plan() -> None:
        nonlocal planned
        found = engine.plan(room.tokens, recipe.model.max_length, _free_bytes(engine, hardware), kept_plan(place))
        keep_plan(place, found)
        room.tokens = found.tokens
        planned = True

    trial = partial(prove, engine, model, batch, hardware.autocast(), engine.parameters)
    proof = within_memory(trial)
    if proof is None and hardware.device.type == "cuda":
        proof = within_memory(partial(trial, lean=plan))
    if proof is None:
        raise ResourceError(
            _("The memory does not hold a forward and backward pass of {tokens} tokens.").format(tokens=batch.tokens),
            hint=_(
                "Close other programs that use this device, set model.quantization to nf4, lower model.max_length, or "
                "take a smaller base model."
            ),
        )
    if not proof.holds:
        model.to(hardware.device)  # where the plan had sent a part away
        reason = _("on the first batch the fused loss differs by {loss:.1e}, its gradients by {gradient:.1e}")
        return plain, _("reference (transformers + PEFT) with packed attention: {reason}").format(
            reason=reason.format(loss=proof.loss, gradient=proof.gradient)
        )
    said = _("exact products")
    if recipe.training.products != "exact":
        fits = partial(room_for_eight, engine, room.tokens, _free_bytes(engine, hardware))
        hold = fits(hold=True, head=False)
        head = fits(hold=hold, head=True)
        said = try_eight_bits(engine, batch, recipe.training.products, hold=hold, head=head)
    if hardware.device.type == "cuda" and not planned:
        plan()
    return engine.summed_loss, _(
        "fused blocks; on the first batch loss and gradients are the reference's to {loss:.0e} and {gradient:.0e}; "
        "{products}"
    ).format(loss=proof.loss, gradient=proof.gradient, products=said)


def _surroundings(hardware: Hardware, loss_fn: LossFunction, place: Path) -> dict[str, str]:
    """What the last bits depend on; on a GPU the engine's plan too."""
    fused = not isinstance(loss_fn, partial)
    plan = kept_plan(place) if fused and hardware.device.type == "cuda" else None
    return surroundings(str(hardware), "fused" if fused else "reference", None if plan is None else plan.arithmetic)


def _free_bytes(engine: Engine, hardware: Hardware) -> int:
    """Of the GPU's memory, beside the optimiser's moments that are still to come; off a GPU nothing runs short."""
    if hardware.device.type != "cuda":
        return sys.maxsize
    torch.cuda.empty_cache()
    learnt = sum(parameter.numel() * parameter.element_size() for parameter in engine.parameters)
    return int(torch.cuda.mem_get_info(hardware.device)[0] * USABLE) - STANDING * learnt


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


def _dealt(samples: int) -> list[range]:
    """Validation samples in groups, whose losses show how much they scatter."""
    return [range(group, samples, GROUPS) for group in range(min(GROUPS, samples))]


def _validation_steps(steps: int, times: int) -> frozenset[int]:
    return frozenset(max(1, round(steps * number / times)) for number in range(1, times + 1))
