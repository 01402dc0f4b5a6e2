"""A finished run to files that others run: merged, converted, and each GGUF asked the same questions as the model."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afina import durable
from afina.artifact import Artifact, open_artifact, parent, seal, sha256
from afina.console import Console, size
from afina.data.conversation import Message, Sample
from afina.data.read import read
from afina.errors import ProofError, ResourceError
from afina.export.gguf import write_gguf
from afina.language import _
from afina.model.attach import merged, save_whole
from afina.model.generate import generate
from afina.model.llamacpp import LlamaCpp
from afina.train.reopen import Tuned, reopen

QUESTIONS = 8
"""Held-out prompts that the model and each GGUF file are both asked."""
ANSWER_TOKENS = 32
"""How far the two answers are compared."""
EXACT = ("f32", "f16")
"""Formats that must give the model's very answers; 8-bit weights may break a tie the other way."""


def export_run(run: Path, out: Path, formats: Sequence[str], console: Console) -> Artifact:
    """Write `formats` (merged, f32, f16, q8_0) into the new folder `out`.

    Raises ProofError, leaving nothing, when a file's prompts or exact answers differ from the model's.
    """
    tuned = reopen(run)
    prompts = _questions(tuned)
    answers = _answers(tuned, prompts)
    exports: list[dict[str, Any]] = []
    with durable.new_folder(out) as folder:
        whole = folder / "merged"
        model = merged(tuned.model)
        save_whole(model, whole)
        tuned.renderer.tokenizer.save(whole)
        for kind in formats:
            if kind == "merged":
                exports.append({"file": "merged", "format": "merged", "bytes": _bytes(whole), "checks": []})
                continue
            file = folder / f"{tuned.recipe.name}-{kind}.gguf"
            write_gguf(whole, file, kind, name=tuned.recipe.name)  # type: ignore[arg-type]
            checks = _compare(file, kind, tuned, prompts, answers, console)
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


def _answers(tuned: Tuned, prompts: Sequence[tuple[Message, ...]]) -> list[str]:
    tokenizer = tuned.renderer.tokenizer
    written = generate(
        tuned.model,
        [tuned.renderer.prompt(prompt) for prompt in prompts],
        end_ids=tokenizer.end_ids,
        pad_id=tokenizer.pad_id,
        max_new_tokens=ANSWER_TOKENS,
    )
    return [tokenizer.decode(ids) for ids in written]


def _compare(
    file: Path,
    kind: str,
    tuned: Tuned,
    prompts: Sequence[tuple[Message, ...]],
    answers: Sequence[str],
    console: Console,
) -> list[dict[str, Any]]:
    """Ask real llama.cpp the questions: its own rendering must give our ids; are its answers the model's?"""
    checks = []
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
            written = llama.complete(ids, max_new_tokens=ANSWER_TOKENS).text
            checks.append({"prompt": prompt[-1].content, "model": answer, "gguf": written, "equal": written == answer})
    different = sum(not check["equal"] for check in checks)
    if different and kind in EXACT:
        raise ProofError(
            _("{count} of {all} answers of {file} are not the model's.").format(
                count=different, all=len(checks), file=file.name
            ),
            hint=_("Nothing was kept. Please report this with the model's name."),
        )
    return checks


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
