"""A finished run to files that others run: merged, converted, and each GGUF asked the same questions as the model."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afina import durable
from afina.artifact import Artifact, open_artifact, parent, seal, sha256
from afina.console import Console, size
from afina.data.conversation import Message, Sample
from afina.data.read import read
from afina.errors import ProofError, RecipeError, ResourceError
from afina.export.gguf import write_gguf
from afina.language import _
from afina.model.attach import merged, save_whole
from afina.model.generate import generate
from afina.model.llamacpp import LlamaCpp
from afina.train.reopen import Tuned, check_unchanged, reopen

QUESTIONS = 8
"""Held-out prompts that the model and each GGUF file are both asked."""
ANSWER_TOKENS = 32
"""How far the two answers are compared."""
TIES = {"f32": 0.02, "f16": 0.1, "q8_0": 1.0}
"""Nats by which the model may prefer its own token where a file's answer first departs from its. Rounding decides ties
the other way, more of it with fewer bits; a file that departs where the model was sure is not the model."""
FORMATS = ("merged", *TIES)


def export_run(run: Path, out: Path, formats: Sequence[str], console: Console) -> Artifact:
    """Write `formats` (merged, f32, f16, q8_0) into the new folder `out`.

    Raises ProofError, leaving nothing, when a file sees other prompts, or departs from the model's answers where the
    model was sure.
    """
    formats = list(dict.fromkeys(formats))
    if unknown := [kind for kind in formats if kind not in FORMATS]:
        raise RecipeError(
            _("There is no format {name}.").format(name=unknown[0]),
            hint=_("There are {names}.").format(names=", ".join(FORMATS)),
        )
    if not formats:
        raise RecipeError(
            _("The recipe of {run} names no formats to export.").format(run=run),
            hint=_("Name some: afina export {run} --format q8_0").format(run=run),
        )
    check_unchanged(open_artifact(run, "run"))
    tuned = reopen(run, "fp32")
    prompts = _questions(tuned)
    exports: list[dict[str, Any]] = []
    with durable.new_folder(out) as folder:
        whole = folder / "merged"
        model = merged(tuned.model)
        answers = _answers(model, tuned, prompts)
        save_whole(model, whole)
        tuned.renderer.tokenizer.save(whole)
        for kind in formats:
            if kind == "merged":
                exports.append({"file": "merged", "format": "merged", "bytes": _bytes(whole), "checks": []})
                continue
            file = folder / f"{tuned.recipe.name}-{kind}.gguf"
            write_gguf(whole, file, kind, name=tuned.recipe.name)  # type: ignore[arg-type]
            checks = _compare(file, kind, model, tuned, prompts, answers, console)
            exports.append(
                {
                    "file": file.name,
                    "format": kind,
                    "bytes": file.stat().st_size,
                    "sha256": sha256(file),
                    "checks": checks,
                }
            )
        if "merged" not in formats:
            shutil.rmtree(whole)
        seal(folder, "export", parents=[parent(run.name, tuned.run.digest, "run")], exports=exports)
    show(exports, out, console)
    return open_artifact(out, "export")


def show(exports: list[dict[str, Any]], out: Path, console: Console) -> None:
    """Print each file with its size and how many of its answers were the model's."""
    rows = []
    for entry in exports:
        equal, asked = sum(check["equal"] for check in entry["checks"]), len(entry["checks"])
        same = f"{equal}/{asked}" if asked else _("not run")
        rows.append((str(out / entry["file"]), size(entry["bytes"]), same))
        console.event("export", **entry)
    console.table((_("file"), _("size"), _("same answers in llama.cpp")), rows)


def _questions(tuned: Tuned) -> list[tuple[Message, ...]]:
    """Prompts the model was not trained on where the recipe has some, else the first of its training files."""
    data = tuned.recipe.data
    source = tuned.recipe.tasks[0].data if tuned.recipe.tasks else data.train
    samples: list[Sample] = read(source, data, tuned.folder).samples
    chosen = sorted(samples, key=lambda sample: sample.digest("export"))[:QUESTIONS]
    return [sample.prompt for sample in chosen]


def _answers(model: nn.Module, tuned: Tuned, prompts: Sequence[tuple[Message, ...]]) -> list[list[int]]:
    """What the model says, greedily, as ids without the end."""
    tokenizer = tuned.renderer.tokenizer
    return generate(
        model,
        [tuned.renderer.prompt(prompt) for prompt in prompts],
        end_ids=tokenizer.end_ids,
        pad_id=tokenizer.pad_id,
        max_new_tokens=ANSWER_TOKENS,
    )


def _compare(
    file: Path,
    kind: str,
    model: nn.Module,
    tuned: Tuned,
    prompts: Sequence[tuple[Message, ...]],
    answers: Sequence[list[int]],
    console: Console,
) -> list[dict[str, Any]]:
    """Ask real llama.cpp the questions: its own rendering must give our ids; are its answers the model's?"""
    checks: list[dict[str, Any]] = []
    try:
        llama = LlamaCpp(file)
    except ResourceError as error:
        console.warn(_("{file} was not run: {reason}").format(file=file.name, reason=error.message))
        return []
    with llama:
        for prompt, answer in zip(prompts, answers, strict=True):
            rendered = llama.apply_template([{"role": turn.role, "content": turn.content} for turn in prompt])
            ids = tuned.renderer.prompt(prompt)
            if llama.tokenize(rendered, special=True, add_special=True) != ids:
                raise ProofError(
                    _("{file} would see another prompt than the one trained: {start}").format(
                        file=file.name, start=rendered[:200]
                    ),
                    hint=_(
                        "The chat template means something else to llama.cpp. Use another one (model.chat_template)."
                    ),
                )
            written = llama.complete(ids, max_new_tokens=ANSWER_TOKENS)
            ours = tuned.renderer.tokenizer.decode(answer)
            checks.append(
                {
                    "prompt": prompt[-1].content,
                    "model": ours,
                    "gguf": written.text,
                    "equal": written.text.strip() == ours.strip(),
                    "gap": _gap(model, ids, answer, written.ids),
                }
            )
    different = sum(not check["equal"] and check["gap"] > TIES[kind] for check in checks)
    if different:
        raise ProofError(
            _("{count} of {all} answers of {file} are not the model's.").format(
                count=different, all=len(checks), file=file.name
            ),
            hint=_("Nothing was kept. Please report this with the model's name."),
        )
    return checks


@torch.inference_mode()
def _gap(model: nn.Module, prompt: list[int], ours: list[int], theirs: list[int]) -> float:
    """Nats by which the model prefers its own token where `theirs` first departs from its greedy answer; else 0."""
    same = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
    if same >= len(theirs):
        return 0.0
    device = next(model.parameters()).device
    logits = model(input_ids=torch.tensor([[*prompt, *ours[:same]]], device=device)).logits[0, -1].float()
    return float(logits.max() - logits[theirs[same]])


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
