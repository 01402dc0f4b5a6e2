"""A finished run, asked: every task of its recipe put to everyone who is to answer, figures and predictions written.

Or a recipe's tasks put to any models without a run.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from afina import durable
from afina.artifact import Artifact, open_artifact, parent, seal, sha256
from afina.console import Console, size
from afina.data.read import Reading, read
from afina.errors import AfinaError, DataError, RecipeError
from afina.evaluate.answers import FILE, Answers, Clock
from afina.evaluate.measure import Sitting, prepare
from afina.evaluate.measure import work as units
from afina.evaluate.metrics import NO_SHARES
from afina.evaluate.systems.asking import System
from afina.evaluate.systems.gguf import PromptOf
from afina.evaluate.systems.opening import Opening
from afina.evaluate.tasks.kind import Asked, problem_names
from afina.language import _
from afina.recipe.schema import Data, Recipe, Task
from afina.train.reopen import check_unchanged, recipe_of


@dataclass(frozen=True)
class Wanted:
    """What of a recipe's evaluation is wanted now. `others` are asked beside those that the recipe names; `learnt`
    reads the training data again."""

    others: Sequence[str] = ()
    tasks: Sequence[str] = ()
    limit: int | None = None
    minutes: float | None = None
    prompt_of: PromptOf | None = None
    learnt: Callable[[], "Learnt"] | None = None


@dataclass(frozen=True)
class Learnt:
    """What the training data hold: their answers, and the digests of their samples."""

    answers: frozenset[str] = frozenset()
    samples: frozenset[bytes] = frozenset()


def evaluate_run(run: Path, out: Path, console: Console, wanted: Wanted = Wanted()) -> Artifact:
    """Write evaluation.json and predictions.jsonl into the folder `out`, in place of what it held.

    Answers of before, in answers.jsonl beside `out`, are not asked again. Raises RecipeError without tasks.
    """
    artifact = open_artifact(run, "run")
    check_unchanged(artifact)
    recipe, folder = recipe_of(artifact)
    if not recipe.tasks:
        raise RecipeError(
            _("The recipe of {run} names no tasks to evaluate.").format(run=run),
            hint=_("Add a tasks: section to the recipe; afina init writes one."),
        )
    names = [*recipe.evaluation.systems, *wanted.others]
    parents = [parent(run.name, artifact.digest, "run")]
    wanted = replace(wanted, learnt=partial(_learnt, recipe, folder))
    return _evaluate(recipe, folder, run, names, out, console, wanted, parents)


def evaluate_models(
    recipe: Recipe, folder: Path, models: Sequence[str], out: Path, console: Console, wanted: Wanted
) -> Artifact:
    """The same without a run: the recipe's tasks put to these models alone."""
    if not recipe.tasks:
        raise RecipeError(_("The recipe names no tasks to evaluate."), hint=_("Add a tasks: section to the recipe."))
    return _evaluate(recipe, folder, None, models, out, console, wanted, [])


def _evaluate(
    recipe: Recipe,
    folder: Path,
    run: Path | None,
    names: Sequence[str],
    out: Path,
    console: Console,
    wanted: Wanted,
    parents: list[dict[str, str]],
) -> Artifact:
    opening = Opening(folder, wanted.prompt_of or _no_template, recipe.evaluation.key_variable)
    systems = opening.systems(names, run)
    readings, asked = questions(recipe, folder, wanted)
    total = sum(units(one, len(systems)) for one in asked)
    clock = Clock(wanted.minutes or recipe.evaluation.minutes)
    with Answers(out.parent / FILE) as answers:
        with console.progress(_("Evaluating"), max(1, total)) as progress:
            judge = partial(_judge, opening)
            sitting = Sitting(systems, asked, answers, lambda done: progress.advance(done, _("asking")), clock, judge)
            sitting.ask()
        results, rows = sitting.results()
        _note_learnt(results, asked, wanted)
        for system in systems:
            _remember_facts(system, results, answers)
    durable.remove(out)
    with durable.new_folder(out) as place:
        durable.write_json(place / "evaluation.json", {"tasks": results})
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        durable.write_text(place / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
        data = [parent(file, sha256(file), "data") for reading in readings for file in reading.files]
        seal(place, "evaluation", parents=[*parents, *data], seed=recipe.seed, systems=[_named(one) for one in systems])
    show(results, console)
    return open_artifact(out, "evaluation")


def questions(recipe: Recipe, folder: Path, wanted: Wanted = Wanted()) -> tuple[list[Reading], list[Asked]]:
    """What each task's data holds, and what will be asked of it. Raises DataError."""
    chosen = [task for task in recipe.tasks if not wanted.tasks or task.name in wanted.tasks]
    if unknown := set(wanted.tasks) - {task.name for task in recipe.tasks}:
        raise RecipeError(
            _("The recipe has no task {name}.").format(name=sorted(unknown)[0]),
            hint=_("It has {names}.").format(names=", ".join(task.name for task in recipe.tasks)),
        )
    if shape := recipe.data.schema_file:  # what answers are held to in training, they are held to here
        told = {"schema_file": shape}
        chosen = [
            task.model_copy(update=told) if task.kind == "json" and not task.schema_file else task for task in chosen
        ]
    readings = [_read(task, recipe, folder) for task in chosen]
    asked = []
    for task, reading in zip(chosen, readings, strict=True):
        if wanted.limit is not None:
            task = replace_limit(task, wanted.limit)
        asked.append(prepare(task, reading.samples, recipe.seed, folder))
    return readings, asked


def replace_limit(task: Task, limit: int) -> Task:
    """The task with at most so many samples."""
    return task.model_copy(update={"limit": min(limit, task.limit or limit)})


def _read(task: Task, recipe: Recipe, folder: Path) -> Reading:
    if task.data is None:
        return Reading()
    data: Data = recipe.data
    if task.mapping is not None:
        data = data.model_copy(update={"mapping": task.mapping, "dialect": "mapping"})
    reading = read(task.data, data, folder)
    for sample in reading.samples:
        if sample.is_text:
            raise DataError(
                _("This is plain text: there is nothing to ask, and nothing to compare an answer with."),
                file=sample.file,
                line=sample.line,
                hint=_("Name questions with answers in the task's data."),
            )
    return reading


def _learnt(recipe: Recipe, folder: Path) -> Learnt:
    """What the training data hold, which may be gone by now: then nothing."""
    try:
        samples = read(recipe.data.train, recipe.data, folder).samples
    except AfinaError:
        return Learnt()
    return Learnt(
        frozenset(sample.answer.strip() for sample in samples), frozenset(sample.digest() for sample in samples)
    )


def _note_learnt(results: list[dict[str, Any]], asked: Sequence[Asked], wanted: Wanted) -> None:
    """Samples that stand in the training data; and labels that are asked for and were never answered there, with how
    many samples have them."""
    if wanted.learnt is None or all(one.task.data is None for one in asked):
        return
    known = wanted.learnt()
    for result, one in zip(results, asked, strict=True):
        result["trained_on"] = sum(sample.digest() in known.samples for sample in one.samples)
        if one.task.kind == "classification" and known.answers:
            counts = Counter(sample.answer.strip() for sample in one.samples)
            result["unseen"] = {label: count for label, count in counts.items() if label not in known.answers}


def _judge(opening: Opening, task: Task) -> System:
    named = replace(opening, key_variable=task.key_variable or opening.key_variable)
    return named.other(task.judge or "")


def _no_template(_llama: Any) -> Any:
    raise RecipeError(_("A GGUF file can only be asked with a way to its chat template."))


def _named(system: System) -> dict[str, str]:
    return {"name": system.name, "kind": system.kind, "identity": system.identity}


def _remember_facts(system: System, results: list[dict[str, Any]], answers: Answers) -> None:
    """What is known only of a loaded model is told of it also when all its answers were remembered."""
    facts = answers.facts(system, system.facts())
    for result in results:
        result["systems"][system.name] |= facts


def show(results: list[dict[str, Any]], console: Console) -> None:
    """Print everyone side by side, task by task, with intervals, problems and the verdicts."""
    names = problem_names()
    for result in results:
        key, own = next(
            (pair for pair in _own() if any(pair[0] in one for one in result["systems"].values())), ("", "")
        )
        console.table(
            ("", shown_measure(result["measure"]), _("95% interval"), *filter(None, [own]), _("samples/s"), _("size")),
            [_row(name, figures, result["measure"], key) for name, figures in result["systems"].items()],
            title=(
                _("{task}: {count} samples") if result.get("trained_on") else _("{task}: {count} held-out samples")
            ).format(task=result["name"], count=result["samples"]),
        )
        if count := result.get("trained_on"):
            console.warn(trained_on_said(count, result["samples"]))
        for name, figures in result["systems"].items():
            said = [f"{count} {names.get(problem, problem)}" for problem, count in figures["problems"].items()]
            if figures["unanswered"]:
                said.append(
                    _("{count} without an answer: {reason}").format(
                        count=figures["unanswered"], reason="; ".join(figures["reasons"]) or "-"
                    )
                )
            if figures["unasked"]:
                said.append(_("{count} not asked, the time was up").format(count=figures["unasked"]))
            if said:
                console.line(f"  {name}: {', '.join(said)}")
        for label, count in result.get("unseen", {}).items():
            console.warn(unseen_said(label, count))
        for pair in result["comparisons"]:
            console.line(pair["verdict"])
        console.event("task", **result)


def trained_on_said(count: int, samples: int) -> str:
    """A sentence about samples that are no test of anything."""
    return _("{count} of these {samples} samples stand in the training data: what they measure is memory.").format(
        count=count, samples=samples
    )


def unseen_said(label: str, count: int) -> str:
    """A sentence about a label that training never showed."""
    return _("The label {label} never occurs in the training data; {count} samples have it.").format(
        label=label, count=count
    )


def _own() -> tuple[tuple[str, str], ...]:
    """The figure that a kind of task shows beside its main one, and what it is called; the first that there is."""
    return (
        ("f1_macro", _("macro F1")),
        ("of_schema", _("of the schema")),
        ("parsed", _("JSON objects")),
        ("right_steps", _("steps right")),
        ("rougeL", _("ROUGE-L")),
    )


OUT_OF = {"of_schema": "answered", "parsed": "answered", "right_steps": "steps"}
"""Counts, told out of another."""


def _beside(figures: dict[str, Any], key: str) -> str:
    if key not in figures:
        return "-"
    if key in OUT_OF:
        return _("{count} of {total}").format(count=figures[key], total=figures[OUT_OF[key]])
    return f"{figures[key]:.3f}"


def _row(name: str, figures: dict[str, Any], measure: str, own: str) -> tuple[str, ...]:
    speed = f"{figures['samples_per_second']:,.1f}" if figures["samples_per_second"] else "-"
    weight = size(figures["file_bytes"]) if figures.get("file_bytes") else "-"
    value, interval = _("not measured"), "-"
    if figures["value"] is not None:
        value = said(figures["value"], measure)
        interval = " - ".join(said(end, measure) for end in figures["interval"] or ()) or "-"
    return name, value, interval, *([_beside(figures, own)] if own else []), speed, weight


def said(value: float, measure: str) -> str:
    """A figure as people say it: a share in percent, a perplexity or a score as a number."""
    return f"{value:.2f}" if measure in NO_SHARES else f"{value:.1%}"


def shown_measure(measure: str) -> str:
    """What the main figure is called."""
    names = {"perplexity": _("perplexity"), "preference": _("preferred"), "score": _("score")}
    return {"accuracy": _("accuracy"), **names}.get(measure, measure)
