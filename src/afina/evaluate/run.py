"""A finished run, asked: every task of its recipe put to base and tuned, figures and predictions written beside it."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from afina import durable
from afina.artifact import Artifact, open_artifact, parent, seal, sha256
from afina.console import Console, duration
from afina.data.read import Reading, read
from afina.errors import DataError, RecipeError
from afina.evaluate.tasks import Asked, System, ask, prepare, work
from afina.language import _
from afina.model.load import load_model
from afina.recipe.place import model_source
from afina.recipe.schema import Recipe
from afina.train.reopen import Tuned, check_unchanged, reopen


def evaluate_run(run: Path, out: Path, console: Console) -> Artifact:
    """Write evaluation.json and predictions.jsonl into the new folder `out`. Raises RecipeError without tasks."""
    check_unchanged(open_artifact(run, "run"))
    tuned = reopen(run)
    tasks = tuned.recipe.tasks
    if not tasks:
        raise RecipeError(
            _("The recipe of {run} names no tasks to evaluate.").format(run=run),
            hint=_("Add a tasks: section to the recipe; afina init writes one."),
        )
    readings, asked = questions(tuned.recipe, tuned.folder)
    systems = _systems(tuned)
    results: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    total = sum(work(one) for one in asked) * len(systems)
    with console.progress(_("Evaluating"), total) as progress:
        for one in asked:
            result, predictions = ask(
                one, systems, tuned.renderer, tuned.hardware, lambda done: progress.advance(done, _("asking"))
            )
            results.append(result)
            rows += predictions
    with durable.new_folder(out) as folder:
        durable.write_json(folder / "evaluation.json", {"tasks": results})
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        durable.write_text(folder / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
        data = [parent(file, sha256(file), "data") for reading in readings for file in reading.files]
        seal(
            folder,
            "evaluation",
            parents=[parent(run.name, tuned.run.digest, "run"), *data],
            seed=tuned.recipe.seed,
            hardware=str(tuned.hardware),
        )
    show(results, console)
    return open_artifact(out, "evaluation")


def questions(recipe: Recipe, folder: Path) -> tuple[list[Reading], list[Asked]]:
    """What each task's data holds, and what will be asked of it. Raises DataError."""
    readings = [read(task.data, recipe.data, folder) for task in recipe.tasks]
    for sample in (sample for reading in readings for sample in reading.samples):
        if sample.is_text:
            raise DataError(
                _("This is plain text: there is nothing to ask, and nothing to compare an answer with."),
                file=sample.file,
                line=sample.line,
                hint=_("Name questions with answers in the task's data."),
            )
    return readings, [
        prepare(task, reading.samples, recipe.seed) for task, reading in zip(recipe.tasks, readings, strict=True)
    ]


def show(results: list[dict[str, Any]], console: Console) -> None:
    """Print base beside tuned, task by task, with intervals and the verdict."""
    for result in results:
        rows = []
        for name, figures in result["systems"].items():
            low, high = figures["interval"]
            f1 = f"{figures['f1_macro']:.3f}" if "f1_macro" in figures else "-"
            rows.append(
                (name, f"{figures['accuracy']:.1%}", f"{low:.1%} - {high:.1%}", f1, duration(figures["seconds"]))
            )
        console.table(
            ("", _("accuracy"), _("95% interval"), _("macro F1"), _("time")),
            rows,
            title=_("{task}: {count} held-out samples").format(task=result["name"], count=result["samples"]),
        )
        console.line(result.get("verdict", ""))
        console.event("task", **result)


def _systems(tuned: Tuned) -> list[System]:
    if tuned.recipe.method.name == "full":
        source = model_source(tuned.recipe.model.base, tuned.folder)
        before = load_model(source, tuned.hardware, tuned.recipe.model)
        return [System("base", before, nullcontext), System("tuned", tuned.model, nullcontext)]
    return [System("base", tuned.model, tuned.base), System("tuned", tuned.model, nullcontext)]
