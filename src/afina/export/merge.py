"""The merged model of an export: room for it, base plus adapter on the disk, and the proof that it took effect."""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from afina import durable
from afina.console import Console, size
from afina.data.read import read
from afina.errors import ProofError, ResourceError
from afina.export.certificate import LIMITS, Question
from afina.export.divergence import LOGITS, distributions
from afina.export.folding import can_fold, fold, read_adapter
from afina.export.gguf import planned_bytes
from afina.export.gguf_vocab import read_json
from afina.export.merging import expected_changes, prove_merge
from afina.export.mixes import FORMATS
from afina.export.weights import Held, Source
from afina.language import _
from afina.model.attach import merged
from afina.model.imatrix import SAMPLES, collect
from afina.model.load import DTYPES, Hardware, load_model
from afina.model.quantize import is_quantised
from afina.model.saved import only_adds, save_configuration, save_whole, settings_of
from afina.recipe.schema import Recipe
from afina.train.reopen import Tuned

if TYPE_CHECKING:
    from afina.export.run import Export

DIVERGENCE = {
    torch.float32: 1e-5,
    torch.float16: LIMITS["f16"].divergence,
    torch.bfloat16: LIMITS["bf16"].divergence,
}
"""Nats a token between merged and adapter beside base. In F32 1e-9 was measured; a module left out gives 1e-2."""
SPARE = 64 * 2**20
"""Bytes of the disk left alone."""
RUNNING = 2**30
"""Bytes of Python, torch and llama.cpp, whatever the model."""


def check_room(
    base: Path | None, out: Path, formats: Sequence[str], recipe: Recipe, adapter: Path, console: Console
) -> None:
    """Say what the export of a run takes, and raise ResourceError where there is no room for it on the disk.

    `base` is its base model, `adapter` what was trained. Of a base that lies in no folder, such as a GGUF file, nothing
    is said.
    """
    if base is None:
        return
    with closing(Source(base)) as source:
        shapes = [source.stored_shape(name) for name in source.names()]
    weights = sum(map(math.prod, shapes))
    width = DTYPES[recipe.export.precision].itemsize
    needed = weights * width
    if "nf4" in formats:  # a byte a weight is more than it takes; and for a while there is the sum with a plain base
        needed += weights * (1 + width * (recipe.model.quantization != "none"))
    needed += sum(planned_bytes(base, kind) for kind in formats if kind in FORMATS)
    free = durable.free_bytes(out)
    console.line(
        _("Takes {needed} of the disk, of which {free} are free, and {memory} of memory, pages of files apart.").format(
            needed=size(needed), free=size(free), memory=size(_memory(shapes, recipe, adapter))
        )
    )
    if needed + SPARE > free:
        raise ResourceError(
            _("The export needs {needed} on the disk of {out}, and {free} are free.").format(
                needed=size(needed), out=out, free=size(free)
            ),
            hint=_("Free some space, name fewer formats with --to, or set export.precision to bf16."),
        )


def _memory(shapes: Sequence[tuple[int, ...]], recipe: Recipe, adapter: Path) -> int:
    """Bytes of its own that an export needs at most. Weights that are computed with as they are stored are pages of
    their files."""
    weights, vocabulary = sum(map(math.prod, shapes)), max((shape[0] for shape in shapes), default=0)
    largest = max((math.prod(shape) for shape in shapes if shape[:1] != (vocabulary,)), default=0)
    held = 0
    if recipe.method.name != "full":
        if not only_adds(settings_of(adapter)):
            held = 4 * weights
        elif recipe.model.quantization != "none":  # embeddings and head stay in 16 bits
            held = weights * (5 if recipe.model.quantization == "int8" else 3) // 4
    return RUNNING + held + 16 * largest + 12 * min(LOGITS, 2**12 * vocabulary)


def merge(export: "Export", run: Path, base: Path | None) -> None:
    """Write the merged model into `export.whole`, and prove that what was written is base plus adapter.

    Sets `export.merge`, and `export.importance` where it is wanted. The model in memory is let go.
    """
    tuned = export.tuned
    changes = expected_changes(tuned.model)
    if export.merge is None:
        with durable.new_folder(export.whole) as folder:
            facts = _write(export, run, base, folder)
            tuned.renderer.tokenizer.save(folder)
    else:
        facts = export.merge
    export.tuned = tuned = replace(tuned, model=nn.Identity())
    model = load_model(str(export.whole), Hardware(tuned.hardware.device, torch.float32), held=True)
    if changes:
        away, largest = apart(model, export.questions)
        facts |= {"divergence": away, "largest_difference": largest}
        if not away <= DIVERGENCE[export.precision]:
            raise ProofError(
                _("The merged model is {divergence:.2g} nats a token away from base and adapter.").format(
                    divergence=away
                ),
                hint=_("Nothing was kept. Please report this with the model's name."),
            )
        facts |= prove_merge(changes, run / "adapter" / "adapter_model.safetensors", export.whole, export.precision)
    if tuned.recipe.export.imatrix:
        export.importance = collect(model, _training_ids(tuned))
    export.merge = facts
    export.note()


def _write(export: "Export", run: Path, base: Path | None, folder: Path) -> dict[str, Any]:
    """Base plus adapter as files: streamed where the adapter is no more than sums, else by PEFT in memory."""
    tuned = export.tuned
    facts: dict[str, Any] = {"method": tuned.recipe.method.name, "precision": tuned.recipe.export.precision}
    adapter = None if tuned.recipe.method.name == "full" else read_adapter(run / "adapter")
    source = Held(tuned.model) if is_quantised(tuned.model) else None if base is None else Source(base)
    if source is not None and adapter is not None:
        with closing(source):
            if can_fold(source, adapter):
                weights = sum(math.prod(source.stored_shape(name)) for name in source.names())
                with export.console.progress(_("Merging"), weights) as progress:
                    facts |= fold(source, adapter, folder, export.precision, progress.advance)
                save_configuration(tuned.model, folder, export.precision)
                if base is not None:
                    _keep_packing(base, folder)
                return facts | {"streamed": True}
    save_whole(merged(tuned.model).to(export.precision), folder)
    return facts | {"streamed": False}


def _keep_packing(base: Path, folder: Path) -> None:
    """What was copied in MXFP4 must be said to be so, or transformers looks for experts in floats."""
    packed = read_json(base / "config.json").get("quantization_config")
    if isinstance(packed, dict) and packed.get("quant_method") == "mxfp4":
        said = read_json(folder / "config.json") | {"quantization_config": {"quant_method": "mxfp4"}}
        durable.write_json(folder / "config.json", said)


def apart(model: nn.Module, questions: Sequence[Question]) -> tuple[float, float]:
    """Mean KL(adapter beside base || merged) over all positions, in nats, and the largest difference of a log-
    probability that is not negligible beside the likeliest."""
    found, largest = [], 0.0
    noted = distributions(model, [(question.prompt, question.answer) for question in questions])
    for question, theirs in zip(questions, noted, strict=True):
        ours = question.logprobs
        found += (np.exp(ours) * (ours - theirs)).sum(-1).tolist()
        likely = ours > ours.max(-1, keepdims=True) - 10
        largest = max(largest, float(np.abs(ours - theirs)[likely].max()))
    return max(0.0, float(np.mean(found))), largest


def _training_ids(tuned: Tuned) -> list[list[int]]:
    data = tuned.recipe.data
    samples = sorted(read(data.train, data, tuned.folder).samples, key=lambda sample: sample.digest("imatrix"))
    rendered = tuned.renderer.samples(samples[:SAMPLES])
    return [row.ids[: tuned.recipe.model.max_length].tolist() for row in rendered]
