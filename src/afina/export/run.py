"""A finished run to files that others run: merged, converted, and each GGUF proved to be the model in llama.cpp."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from afina import durable
from afina.artifact import Artifact, open_artifact, parent, seal, sha256
from afina.console import Console, size
from afina.data.conversation import Sample
from afina.data.read import read
from afina.errors import ProofError, RecipeError, ResourceError
from afina.export.certificate import LIMITS, TOP, Question, certify, distributions, pose
from afina.export.gguf import write_gguf
from afina.export.imatrix import SAMPLES, collect
from afina.export.lora import write_lora
from afina.export.merging import expected_changes, prove_merge
from afina.export.mixes import EXPORTS
from afina.export.mixes import FORMATS as GGUF
from afina.export.ollama import modelfile
from afina.language import _
from afina.model.attach import merged, save_whole
from afina.recipe.schema import PrefixTuning, PromptTuning, Recipe
from afina.train.reopen import Tuned, check_unchanged, recipe_of, reopen

QUESTIONS = 16
"""Held-out prompts that the model and each GGUF file are both asked."""
AROUND = ("ollama", "lmstudio")
"""Formats that are a folder around a GGUF file: the first one asked for, or q8_0."""
MERGED_DIVERGENCE = 1e-5
"""Nats a token between merged and adapter beside base, both in F32: 1e-9 was measured; a module left out gives 1e-2."""
CERTIFICATE = "certificate.json"


@dataclass
class Export:
    """An export under way: the run, the folder it fills, what the model was asked, and the entries so far."""

    tuned: Tuned
    folder: Path
    console: Console
    questions: list[Question]
    importance: dict[str, torch.Tensor] | None = None
    entries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def whole(self) -> Path:
        """The merged model."""
        return self.folder / "merged"

    @property
    def name(self) -> str:
        """What the files are called by."""
        return self.tuned.recipe.name


def export_run(run: Path, out: Path, formats: Sequence[str], console: Console) -> Artifact:
    """Write `formats` (see EXPORTS of mixes.py) into the new folder `out`, with a certificate.

    Raises ProofError, leaving nothing, when the merge did not take effect, or a file is not the model.
    """
    formats = _wanted(run, formats)
    check_unchanged(open_artifact(run, "run"))
    _refuse_virtual(recipe_of(open_artifact(run, "run"))[0])
    tuned = reopen(run, "fp32")
    with durable.new_folder(out) as folder:
        export = Export(tuned, folder, console, pose(tuned.model, tuned.renderer, _held_out(tuned)))
        merge, model = _merge(export, run)
        if tuned.recipe.export.imatrix:
            export.importance = collect(model, _training_ids(tuned))
        del model
        for kind in formats:
            if kind in GGUF:
                _add_gguf(export, kind)
        for kind in formats:
            if kind not in GGUF:
                _add_other(export, kind, run)
        if "merged" not in formats:
            shutil.rmtree(export.whole)
        export.entries.sort(key=lambda entry: formats.index(entry["format"]))
        durable.write_json(folder / CERTIFICATE, _certificate(export, merge))
        seal(folder, "export", parents=[parent(run.name, tuned.run.digest, "run")], exports=export.entries)
    show(export.entries, out, console)
    return open_artifact(out, "export")


def show(exports: list[dict[str, Any]], out: Path, console: Console) -> None:
    """Print each file with its size and how near it is to the model."""
    rows = []
    for entry in exports:
        equal, asked = sum(check["equal"] for check in entry["checks"]), len(entry["checks"])
        same = f"{equal}/{asked}" if asked else _("not run")
        proof = entry.get("certificate")
        near = (f"{proof['divergence']:.2g}", f"{proof['agreement']:.1%}") if proof else ("", "")
        rows.append((entry["file"], size(entry["bytes"]), same, *near))
        console.event("export", **entry)
    columns = (_("file"), _("size"), _("same answers in llama.cpp"), _("nats/token away"), _("same likeliest"))
    console.table(columns, rows, title=str(out))


def _wanted(run: Path, formats: Sequence[str]) -> list[str]:
    found = list(dict.fromkeys(kind.removeprefix("gguf:") for kind in formats))
    if unknown := [kind for kind in found if kind not in EXPORTS]:
        raise RecipeError(
            _("There is no format {name}.").format(name=unknown[0]),
            hint=_("There are {names}.").format(names=", ".join(EXPORTS)),
        )
    if not found:
        raise RecipeError(
            _("The recipe of {run} names no formats to export.").format(run=run),
            hint=_("Name some: afina export {run} --to q8_0").format(run=run),
        )
    if set(found) & set(AROUND) and not set(found) & set(GGUF):
        found.insert(0, "q8_0")
    return found


def _refuse_virtual(recipe: Recipe) -> None:
    if isinstance(recipe.method, PromptTuning | PrefixTuning):
        raise RecipeError(
            _("What {method} learns lies outside the weights: neither GGUF nor a merged model can hold it.").format(
                method=recipe.method.name
            ),
            hint=_(
                "afina chat opens the run folder, and so do transformers with PEFT (adapter/). For files, take lora."
            ),
        )


def _held_out(tuned: Tuned) -> list[Sample]:
    """Samples the model was not trained on where the recipe has some, else the first of its training files."""
    data = tuned.recipe.data
    asked = next((task for task in tuned.recipe.tasks if task.data is not None and task.mapping is None), None)
    source = asked.data if asked is not None and asked.data is not None else data.train
    samples: list[Sample] = read(source, data, tuned.folder).samples
    return sorted(samples, key=lambda sample: sample.digest("export"))[:QUESTIONS]


def _training_ids(tuned: Tuned) -> list[list[int]]:
    data = tuned.recipe.data
    samples = sorted(read(data.train, data, tuned.folder).samples, key=lambda sample: sample.digest("imatrix"))
    rendered = tuned.renderer.samples(samples[:SAMPLES])
    return [row.ids[: tuned.recipe.model.max_length].tolist() for row in rendered]


def _merge(export: Export, run: Path) -> tuple[dict[str, Any], nn.Module]:
    """Merge, save, and prove that what was saved is base plus adapter. Returns the facts and the merged model."""
    tuned = export.tuned
    changes = expected_changes(tuned.model)
    model = merged(tuned.model)
    facts: dict[str, Any] = {"method": tuned.recipe.method.name}
    if changes:
        away, largest = _apart(model, export.questions)
        facts |= {"divergence": away, "largest_difference": largest}
        if not away <= MERGED_DIVERGENCE:
            raise ProofError(
                _("The merged model is {divergence:.2g} nats a token away from base and adapter.").format(
                    divergence=away
                ),
                hint=_("Nothing was kept. Please report this with the model's name."),
            )
    save_whole(model, export.whole)
    tuned.renderer.tokenizer.save(export.whole)
    if changes:
        facts |= prove_merge(changes, run / "adapter" / "adapter_model.safetensors", export.whole)
    return facts, model


def _apart(model: nn.Module, questions: Sequence[Question]) -> tuple[float, float]:
    """Mean KL(adapter beside base || merged) over all positions, in nats, and the largest difference of a log-
    probability that is not negligible."""
    found, largest = [], 0.0
    for question in questions:
        ours, theirs = question.logprobs, distributions(model, question.prompt, question.answer)
        found += (np.exp(ours) * (ours - theirs)).sum(-1).tolist()
        largest = max(largest, float(np.abs(ours - theirs)[ours > -10].max()))
    return max(0.0, float(np.mean(found))), largest


def _add_gguf(export: Export, kind: str) -> None:
    file = export.folder / f"{export.name}-{kind}.gguf"
    label = _("Writing {file}").format(file=file.name)
    weights = sum(path.stat().st_size for path in export.whole.glob("*.safetensors")) / 4
    with export.console.progress(label, weights) as progress:
        facts = write_gguf(
            export.whole,
            file,
            kind,
            name=export.name,
            importance=export.importance,
            device="cuda" if torch.cuda.is_available() else None,
            on_progress=lambda count: progress.advance(count, f"{count:,}"),
        )
    entry = {"file": file.name, "format": kind, "bytes": file.stat().st_size, "sha256": sha256(file), "checks": []}
    for note in facts["notes"]:
        export.console.warn(note)
    try:
        with export.console.progress(_("Asking {file}").format(file=file.name), len(export.questions)) as progress:
            proof = certify(file, kind, export.questions, export.tuned.renderer, progress.advance)
    except ResourceError as error:
        export.console.warn(_("{file} was not run: {reason}").format(file=file.name, reason=error.message))
    else:
        entry["checks"] = proof.pop("checks")
        entry["certificate"] = proof
    keys = ("types", "fallbacks", "not_quantised", "bits_per_weight", "notes")
    export.entries.append(entry | {key: facts[key] for key in keys})


def _add_other(export: Export, kind: str, run: Path) -> None:
    gguf = next((entry for entry in export.entries if entry["format"] in GGUF), None)
    notes: list[str] = []
    match kind:
        case "merged":
            file = export.whole
        case "lora":
            if export.tuned.recipe.method.name == "full":
                raise RecipeError(_("A fully tuned model has no adapter; export it merged."))
            file = export.folder / f"{export.name}-lora.gguf"
            write_lora(run / "adapter", export.whole, file, name=export.name)
        case "ollama":
            file = export.folder / "Modelfile"
            notes = _add_modelfile(export, file, gguf or {})
        case _:
            # LM Studio finds models as publisher/model/file; a second name costs no room on the disk.
            file = export.folder / "lmstudio"
            name = str((gguf or {})["file"])
            place = file / "afina" / export.name
            place.mkdir(parents=True)
            os.link(export.folder / name, place / name)
    total = _bytes(file) if file.is_dir() else file.stat().st_size
    export.entries.append({"file": file.name, "format": kind, "bytes": total, "checks": [], "notes": notes})


def _add_modelfile(export: Export, file: Path, gguf: dict[str, Any]) -> list[str]:
    recipe = export.tuned.recipe
    system = recipe.chat.system or recipe.data.system
    context = recipe.model.max_length
    text, notes = modelfile(
        export.tuned.renderer.tokenizer, str(gguf["file"]), recipe.chat, system=system, context=context
    )
    durable.write_text(file, text)
    for note in notes:
        export.console.warn(note)
    return notes


def _certificate(export: Export, merge: dict[str, Any]) -> dict[str, Any]:
    """What certificate.json says: how it was measured, the merge, and each file's figures beside its limits."""
    return {
        "format": 1,
        "questions": len(export.questions),
        "held_out": bool(export.tuned.recipe.tasks),
        "measure": f"KL(model || file) in nats a token at the positions of the model's greedy answer; tokens beyond "
        f"llama.cpp's {TOP} likeliest count as one, so it is a lower bound",
        "reference": "base and adapter in fp32, by transformers",
        "merge": merge,
        "imatrix": {"samples": SAMPLES, "matrices": len(export.importance)} if export.importance else None,
        "files": [
            {key: entry[key] for key in ("file", "format", "bytes", "certificate", "fallbacks") if key in entry}
            | {"passed": "certificate" in entry or None}
            for entry in export.entries
            if entry["format"] in LIMITS
        ],
    }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
