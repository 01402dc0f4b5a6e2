"""A finished run to files that others run: merged, converted, and each GGUF proved to be the model in llama.cpp."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from afina import durable
from afina.artifact import Artifact, open_artifact, parent, seal, sha256, versions
from afina.console import Console, size
from afina.data.conversation import Message, Sample
from afina.data.read import read
from afina.errors import ProofError, RecipeError, ResourceError
from afina.export.certificate import ANSWER_TOKENS, NotTheModel, Question, Right, certify, pose, the_same
from afina.export.gguf import write_gguf
from afina.export.lora import write_lora
from afina.export.merge import check_room, merge
from afina.export.mixes import EXPORTS
from afina.export.mixes import FORMATS as GGUF
from afina.export.nf4 import certify_nf4, recommendation, write_nf4
from afina.export.ollama import modelfile
from afina.export.page import certificate_of, page
from afina.language import _
from afina.model.hub import weights_of
from afina.model.load import DTYPES, limit_of
from afina.model.quantize import bitsandbytes
from afina.recipe.place import model_source
from afina.train.reopen import (
    Tuned,
    check_unchanged,
    learnt_in,
    open_tuned,
    recipe_of,
    refuse_virtual,
    reopen,
)

QUESTIONS = 16
"""Held-out prompts that the model and each GGUF file are both asked."""
BEGINNING = 200
"""Characters of plain text that are put as a question."""
AROUND = ("ollama", "lmstudio")
"""Formats that are a folder around a GGUF file: the first one asked for, or q8_0."""
CERTIFICATE, PAGE = "certificate.json", "certificate.html"
JOURNAL = "journal.json"
"""What is finished, in an export under way."""


@dataclass
class Export:
    """An export under way: the run, the folder it fills, what the model was asked, who says whether an answer is right,
    and what there is so far. `merge` and `entries` are in the journal as soon as they are true; `told` are the notes
    that the screen has shown."""

    tuned: Tuned
    folder: Path
    console: Console
    questions: list[Question]
    right: Right
    importance: dict[str, torch.Tensor] | None = None
    merge: dict[str, Any] | None = None
    entries: list[dict[str, Any]] = field(default_factory=list)
    told: set[str] = field(default_factory=set)

    @property
    def whole(self) -> Path:
        """The merged model."""
        return self.folder / "merged"

    @property
    def name(self) -> str:
        """What the files are called by."""
        return self.tuned.recipe.name

    @property
    def precision(self) -> torch.dtype:
        """How the merged model is written."""
        return DTYPES[self.tuned.recipe.export.precision]

    def take_up(self) -> None:
        """What an interrupted export of the same run has finished, as it was written; the rest is removed."""
        journal = self.folder / JOURNAL
        said = json.loads(journal.read_text("utf-8")) if journal.is_file() else {"merge": None, "entries": []}
        self.merge = said["merge"] if self.whole.is_dir() else None
        if self.merge is None:
            durable.remove(self.whole)
        for entry in said["entries"]:
            file = self.folder / entry["file"]
            if self.merge is not None and file.is_file() and sha256(file) == entry["sha256"]:
                self.entries.append(entry)
                self.console.line(_("{file} was written before.").format(file=entry["file"]))
        kept = {JOURNAL, self.whole.name, *(entry["file"] for entry in self.entries)}
        for path in self.folder.iterdir():
            if path.name not in kept:
                durable.remove(path)

    def note(self) -> None:
        """Let the journal say what is done."""
        durable.write_json(self.folder / JOURNAL, {"merge": self.merge, "entries": self.entries})


def export_run(run: Path, out: Path, formats: Sequence[str], console: Console, right: Right = the_same) -> Artifact:
    """Write `formats` (see EXPORTS of mixes.py) into the new folder `out`, with a certificate and its page.

    `right` says whether an answer is as good as the sample's own. An interrupted export is taken up where it was.
    Raises ResourceError where the disk has no room, before anything is written; ProofError when the merge did not take
    effect, or a file is not the model: nothing is left then but a folder beside, OUT-failed, that says why.
    """
    formats = _wanted(run, formats)
    record = open_tuned(run)
    check_unchanged(record)
    recipe, start = recipe_of(record)
    refuse_virtual(recipe)
    adapter = learnt_in(record)
    source = str(adapter) if recipe.method.name == "full" else model_source(recipe.model.base, start)
    base = weights_of(source, recipe.model.revision)
    if "nf4" in formats:
        bitsandbytes()  # where it is missing, that is said now
    check_room(base, out, formats, recipe, adapter, console)
    failed = out.with_name(f"{out.name}-failed")
    durable.remove(failed)
    tuned = reopen(run, "fp32")
    settings = [recipe.export.precision, recipe.export.imatrix, QUESTIONS, versions().get("afina")]
    with durable.taken_up(out, f"{record.digest} {settings}") as folder:
        export = Export(tuned, folder, console, pose(tuned.model, tuned.renderer, to_ask(tuned)), right)
        export.take_up()
        try:
            merge(export, run, base)
            for kind in formats:
                if kind in GGUF and not any(entry["format"] == kind for entry in export.entries):
                    _add_gguf(export, kind)
            export.entries = [entry for entry in export.entries if entry["format"] in formats]
            for kind in formats:
                if kind not in GGUF:
                    _add_other(export, kind, run)
        except ProofError as error:
            _tell_failure(export, error, failed)
            raise
        if "merged" not in formats:
            shutil.rmtree(export.whole)
        export.entries.sort(key=lambda entry: formats.index(entry["format"]))
        said = certificate_of(export)
        durable.write_json(folder / CERTIFICATE, said)
        durable.write_text(folder / PAGE, page(said, export.name))
        durable.remove(folder / JOURNAL)
        seal(folder, "export", parents=[parent(run.name, record.digest, record.kind)], exports=export.entries)
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
    columns = (_("file"), _("size"), _("same answers"), _("nats/token away"), _("same likeliest"))
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


def held_out(tuned: Tuned) -> list[Sample]:
    """Samples the model was not trained on where the recipe has some, else the first of its training files."""
    data = tuned.recipe.data
    task = next((task for task in tuned.recipe.tasks if task.data is not None), None)
    if task is not None and task.mapping is not None:
        data = data.model_copy(update={"mapping": task.mapping, "dialect": "mapping"})
    source = data.train if task is None or task.data is None else task.data
    samples = sorted(read(source, data, tuned.folder).samples, key=lambda sample: sample.digest("export"))
    asked: dict[tuple[Message, ...], Sample] = {}  # each prompt once
    for sample in map(_asked, samples):
        asked.setdefault(sample.prompt, sample)
    return list(asked.values())


def to_ask(tuned: Tuned) -> list[Sample]:
    """The first samples held out whose prompts leave room for an answer; where none does, the beginnings of some."""
    limit, samples = limit_of(tuned.model), held_out(tuned)
    if limit is None:
        return samples[:QUESTIONS]
    fitting = (one for one in samples if len(tuned.renderer.prompt(one.prompt)) + ANSWER_TOKENS <= limit)
    return list(islice(fitting, QUESTIONS)) or [
        _beginning(one, one.prompt[-1].content, min(BEGINNING, limit // 2)) for one in samples[:QUESTIONS]
    ]


def _asked(sample: Sample) -> Sample:
    """Of plain text, which asks nothing, the beginning as a question."""
    return _beginning(sample, sample.messages[-1].content) if sample.is_text else sample


def _beginning(sample: Sample, text: str, characters: int = BEGINNING) -> Sample:
    return replace(sample, messages=(Message("user", text[:characters]), Message("assistant", "")))


def _add_gguf(export: Export, kind: str) -> None:
    file = export.folder / f"{export.name}-{kind}.gguf"
    label = _("Writing {file}").format(file=file.name)
    weights = sum(path.stat().st_size for path in export.whole.glob("*.safetensors")) / export.precision.itemsize
    with export.console.progress(label, weights) as progress:
        facts = write_gguf(
            export.whole,
            file,
            kind,
            name=export.name,
            importance=export.importance,
            device="cuda" if torch.cuda.is_available() else None,
            on_progress=progress.advance,
        )
    keys = ("types", "fallbacks", "not_quantised", "bits_per_weight", "notes")
    entry = {"file": file.name, "format": kind, "bytes": file.stat().st_size, "sha256": sha256(file), "checks": []}
    entry |= {key: facts[key] for key in keys}
    with export.console.progress(_("Asking {file}").format(file=file.name), len(export.questions)) as progress:
        try:
            ask = partial(certify, file, kind, export.questions, export.tuned.renderer, progress.advance, export.right)
            _prove(entry, export, partial(ask, exact=facts["exact"]))
        except ResourceError as error:
            export.console.warn(_("{file} was not run: {reason}").format(file=file.name, reason=error.message))
    _keep(export, entry)
    export.note()


def _prove(entry: dict[str, Any], export: Export, ask: Callable[[], dict[str, Any]]) -> None:
    """Add what `ask` measures to what is said of a file; where that is not the model it is kept with the failure."""
    try:
        proof = ask()
    except ProofError as error:
        found = error.found if isinstance(error, NotTheModel) else {}
        measured = {"checks": found.pop("checks"), "certificate": found} if found else {}
        export.entries.append(entry | measured | {"failed": error.message})
        raise
    entry |= {"checks": proof.pop("checks"), "certificate": proof}
    right = proof["right_answers"]
    if right["gguf"] < right["model"]:
        fewer = _("{file} answers {count} of {all} prompts right, the model {model}.").format(
            file=entry["file"], count=right["gguf"], all=len(entry["checks"]), model=right["model"]
        )
        entry["notes"] = [*entry["notes"], fewer]


def _keep(export: Export, entry: dict[str, Any]) -> None:
    """Note a file that is done, and tell what its user should know."""
    export.entries.append(entry)
    for note in entry["notes"]:
        if note not in export.told:
            export.console.warn(note)
            export.told.add(note)


def _tell_failure(export: Export, error: ProofError, place: Path) -> None:
    """A folder with the certificate of what failed and its page, without the files."""
    said = certificate_of(export) | {"failed": error.message}
    with durable.new_folder(place) as folder:
        durable.write_json(folder / CERTIFICATE, said)
        durable.write_text(folder / PAGE, page(said, export.name))
    error.hint = f"{error.hint} {_('{file} shows what was measured.').format(file=place / PAGE)}".strip()


def _add_other(export: Export, kind: str, run: Path) -> None:
    gguf = next((entry for entry in export.entries if entry["format"] in GGUF), None)
    entry: dict[str, Any] = {"file": kind, "format": kind, "bytes": 0, "checks": [], "notes": []}
    match kind:
        case "merged":
            file = export.whole
        case "nf4":
            file = write_nf4(export)
            _prove(entry, export, lambda: certify_nf4(export))
            entry["notes"] = [*entry["notes"], recommendation(export, entry["certificate"]["divergence"])]
        case "lora":
            if export.tuned.recipe.method.name == "full":
                raise RecipeError(_("A fully tuned model has no adapter; export it merged."))
            file = export.folder / f"{export.name}-lora.gguf"
            write_lora(run / "adapter", export.whole, file, name=export.name)
        case "ollama":
            file = export.folder / "Modelfile"
            entry["notes"] = _add_modelfile(export, file, gguf or {})
        case _:
            # LM Studio finds models as publisher/model/file; a second name costs no room on the disk.
            file = export.folder / "lmstudio"
            name = str((gguf or {})["file"])
            place = file / "afina" / export.name
            place.mkdir(parents=True)
            os.link(export.folder / name, place / name)
    total = _bytes(file) if file.is_dir() else file.stat().st_size
    _keep(export, entry | {"file": file.name, "bytes": total})


def _add_modelfile(export: Export, file: Path, gguf: dict[str, Any]) -> list[str]:
    recipe = export.tuned.recipe
    system = recipe.chat.system or recipe.data.system
    context = recipe.model.max_length
    text, notes = modelfile(
        export.tuned.renderer.tokenizer, str(gguf["file"]), recipe.chat, system=system, context=context
    )
    durable.write_text(file, text)
    return notes


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
