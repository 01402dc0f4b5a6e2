"""The verbs, as prose: what each reads, does and leaves. The Python API and the command line both call these.

init → train → evaluate → export → chat or serve, or run, which does all of it and skips what is done.
"""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from afina import durable
from afina.artifact import MANIFEST, RUNS, Artifact, open_artifact, parent, seal, sha256, source_digest, versions
from afina.beside import begun
from afina.console import console, size
from afina.drawing import Drawing
from afina.errors import OutputError, ResourceError
from afina.garbage import importing
from afina.language import _
from afina.recipe.load import dump, load, places_told
from afina.recipe.place import model_source
from afina.recipe.schema import Recipe
from afina.summary import next_commands, say_done, say_trained

if TYPE_CHECKING:
    from afina.data.conversation import Sample
    from afina.export.certificate import Right

WORKPLACE = ".evaluating"
"""The folder whose lock says that a run is being evaluated."""
DERIVED = ("report.html", "report.md", "report.json")
"""Drawn anew from the artifacts by each verb, so no part of what is sealed."""


def train(
    recipe: str | Path, out: str | Path | None = None, overrides: Sequence[str] = (), *, resume: bool = False
) -> Path:
    """Fine-tune as a recipe file says; returns the new run folder (runs/NAME). Raises AfinaError.

    While it trains the folder has no manifest, and checkpoints; the same call goes on from the newest of them. With
    `resume` it does only that, and never begins a run.
    """
    from afina.train.ahead import rows_ahead
    from afina.train.resume import STATE, WORKING, clear, is_unfinished, refuse_other_recipe

    wanted, folder = load(Path(recipe), overrides), Path(recipe).resolve().parent
    place = Path(out) if out else RUNS / wanted.name
    if not is_unfinished(place):
        _refuse_existing(place)
    if resume and not (place / STATE).is_file():
        raise OutputError(
            _("{path} holds no run that was stopped.").format(path=place),
            hint=_("Leave out --resume to begin it."),
        )
    with Drawing() as drawing:
        with durable.claim(place), rows_ahead(wanted, folder, place) as ahead:
            refuse_other_recipe(place, wanted)
            base = begun(lambda: _base(wanted, folder))  # hashing gigabytes takes as long as what is imported below

            with importing():  # after what fails at once: this loads torch, for seconds
                from afina.model.load import spare_imports

                spare_imports()
                from afina.evaluate.during import while_training
                from afina.export.card import model_card
                from afina.train.run import train_run

            _check_formats(wanted, folder)
            _check_tasks(wanted, folder)
            console.heading(_("Training {name}").format(name=wanted.name))
            drawing.begin()  # not needed before the end
            with places_told(Path(recipe), overrides):
                facts = train_run(wanted, folder, place, console, base, while_training(wanted, folder), ahead)
            durable.write_text(place / "recipe.yaml", dump(wanted))
            drawing.curve(place)
            durable.write_text(place / "README.md", model_card(wanted, facts, versions()))
            seal(
                place,
                "run",
                parents=[base.result(), *facts["data"]["files"]],
                leaving_out=WORKING,
                recipe=wanted.resolved(),
                recipe_folder=str(folder),
                **facts,
            )
            clear(place)
        drawing.report(place, _commands(place))
    say_trained(facts, place)
    return place


def evaluate(
    source: str | Path,
    *others: str,
    recipe: str | Path | None = None,
    out: str | Path | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    minutes: float | None = None,
) -> Path:
    """Put a recipe's tasks to everyone named; returns the folder with the figures. Raises AfinaError.

    `source` is a run, whose recipe says what is asked and of whom, or with `recipe` any model; `others` are asked
    beside it. What was answered before is not asked again.
    """
    with importing():
        from afina.model.load import spare_imports

        spare_imports()
        from afina.evaluate.run import Wanted, evaluate_models, evaluate_run

    wanted = Wanted(others, tasks, limit, minutes, _prompts_of)
    if recipe is None:
        run = _run_folder(source)
        place = Path(out) if out else run
        console.heading(_("Evaluating {run}").format(run=run))
        with durable.claim(place / WORKPLACE):
            evaluate_run(run, place / "evaluation", console, wanted)
    else:
        place = Path(out) if out else Path("evaluation")
        console.heading(_("Evaluating {run}").format(run=", ".join([str(source), *others])))
        asked, folder = load(Path(recipe)), Path(recipe).resolve().parent
        with durable.claim(place / WORKPLACE):
            evaluate_models(asked, folder, [str(source), *others], place / "evaluation", console, wanted)
    _draw(place)
    return place / "evaluation"


def rate(
    run: str | Path,
    *,
    mode: Literal["score", "pair"] = "score",
    systems: Sequence[str] = ("base", "tuned"),
    rater: str | None = None,
    page: bool = False,
    port: int = 0,
    tasks: Sequence[str] = (),
) -> Path:
    """Have a person rate an evaluated run's answers, blind; returns the file of ratings. Raises AfinaError."""
    from afina.evaluate.ratings.run import rate_run

    place = _run_folder(run)
    file = rate_run(place, console, mode=mode, systems=systems, rater=rater, page=page, port=port, tasks=tasks)
    _draw(place)
    return file


def export_ratings(run: str | Path, file: str | Path) -> Path:
    """Write a run's ratings as CSV (.csv), or as preference data with prompt, chosen and rejected (.jsonl)."""
    from afina.evaluate.ratings.run import export_ratings as write

    count = write(_run_folder(run), Path(file))
    console.line(_("{count} lines in {path}").format(count=count, path=file))
    console.event("ratings exported", path=str(file), lines=count)
    return Path(file)


def _prompts_of(llama: Any) -> Any:
    """How an open GGUF file makes a prompt of a conversation: with its own template, as in chat."""
    from afina.serve.speakers import GgufSpeaker

    return GgufSpeaker("", llama).prompt


def export(run: str | Path, formats: Sequence[str] = ()) -> Path:
    """Write the files of the recipe's `export.formats`, or of `formats`; returns RUN/export. Raises AfinaError."""
    with importing():
        from afina.model.load import spare_imports

        spare_imports()
        from afina.export.ollama import create_in_ollama
        from afina.export.run import export_run
        from afina.train.reopen import open_tuned, recipe_of

    run = Path(run)
    place, record = run / "export", open_tuned(run)
    durable.sweep(run)
    _refuse_existing(place, _("Remove the folder to export again."))
    recipe, start = recipe_of(record)
    console.heading(_("Exporting {run}").format(run=run))
    wanted = formats or recipe.export.formats
    export_run(run, place, wanted, console, _marker(recipe, start))
    if "ollama" in wanted:
        create_in_ollama(place, recipe.name, console)
    if record.kind == "run":
        _draw(run)
    return place


def push(
    run: str | Path, repository: str, what: Sequence[str] = ("adapter",), *, private: bool = True, dry_run: bool = False
) -> None:
    """Upload adapter, merged model or GGUF files of a run, with their card, to OWNER/NAME on the hub.

    Raises AfinaError.
    """
    from afina.export.push import chosen_files, push_files

    files = chosen_files(_run_folder(run), what)  # type: ignore[arg-type]
    rows = [(place, size(path.stat().st_size)) for place, path in files]
    console.table((_("file"), _("size")), rows, title=repository)
    address = None if dry_run else push_files(files, repository, private=private)
    if address is not None:
        console.line(_("Uploaded: {address}").format(address=address))
    console.event("push", repository=repository, files=[place for place, _path in files], address=address)


def _marker(recipe: Recipe, folder: Path) -> "Right":
    """Whether an answer is right, as the recipe's first task marks it."""
    from afina.evaluate.measure import KINDS
    from afina.evaluate.systems.asking import Answer
    from afina.export.certificate import the_same

    task = next((task for task in recipe.tasks if task.data is not None), None)
    if task is None or task.kind not in ("exact", "json"):
        return the_same
    kind = KINDS[task.kind]

    def right(sample: "Sample", given: str) -> bool:
        (mark,) = kind.mark(kind.prepare(task, [sample], folder), [0], [[Answer(given)]])
        return bool(mark.right)

    return right


def run(recipe: str | Path, out: str | Path | None = None, overrides: Sequence[str] = ()) -> Path:
    """All of it, in order, skipping what is done; returns the run folder. Raises AfinaError.

    A finished run is only continued when it was made from this very recipe.
    """
    from afina.train.resume import clear

    started = time.perf_counter()
    wanted = load(Path(recipe), overrides)
    place = Path(out) if out else RUNS / wanted.name
    if (place / MANIFEST).is_file():
        _refuse_another(place, wanted)
        clear(place)
        console.line(_("{path} is trained already.").format(path=place))
    else:
        train(recipe, place, overrides)
    if wanted.export.formats and not (place / "export" / MANIFEST).is_file():
        export(place)
    if wanted.tasks and not (place / "evaluation" / MANIFEST).is_file():
        evaluate(place)  # last, so that what was exported is asked too
    say_done(place, time.perf_counter() - started)
    return place


def init(use_case: str, folder: str | Path | None = None, base: str | None = None) -> Path:
    """Lay out a project folder with a commented recipe; returns it. Raises AfinaError.

    For a `base`, the recipe gets the method that fits it on this machine, and the reason is said.
    """
    from afina.recipe.starter import create_project, known, rows_of

    place = Path(folder) if folder else Path(use_case)
    changes: dict[str, Any] = {}
    if base is not None:
        from afina.model.machine import look
        from afina.recipe.advice import advise

        machine = look(Path())
        advice = advise(base, rows_of(known(use_case)), machine.device_memory, gpu=bool(machine.gpus))
        if advice.method is None:
            raise ResourceError(advice.why)
        changes = {**advice.overrides, "model": {"base": base, **advice.overrides.get("model", {})}}
        console.line(_("Method    {why}").format(why=advice.why))
    made = create_project(place, use_case, changes)
    for file in made:
        console.line(f"  {file}")
    console.line(_("Next: cd {folder} && afina run recipe.yaml").format(folder=shlex.quote(str(place))))
    console.event("init", folder=str(place), files=[str(file) for file in made])
    return place


def doctor(base: str | None = None, rows: int | None = None) -> None:
    """Print what this machine is, which models each method trains on it, and, for a `base`, which method fits it."""
    from afina.model.machine import look, show
    from afina.recipe.advice import advise

    machine = look(Path())
    fits = show(machine, console)
    advice = None if base is None else advise(base, rows, machine.device_memory, gpu=bool(machine.gpus))
    if advice is not None:
        console.line(_("Method    {why}").format(why=advice.why))
    facts = {"method": advice.method, "why": advice.why, "needs": advice.needs} if advice is not None else None
    console.line(_("Whether a recipe fits, and how long it takes, says: afina plan RECIPE"))
    console.event("doctor", machine=machine.facts(), fits=fits, advice=facts)


def chat(
    source: str | Path,
    *,
    prompt: str | None = None,
    beside_base: bool = False,
    adapters: Sequence[str] = (),
    seed: int = 0,
    **settings: Any,
) -> None:
    """Talk to a run folder, a model folder, a hub name or a GGUF file in the terminal.

    `adapters` are personalities on a base model, NAME=FOLDER each. `settings` are the recipe's chat. With `prompt`, ask
    once and return. Raises AfinaError.
    """
    from afina.serve.opening import chat_with

    chat_with(str(source), adapters, console, prompt=prompt, beside_base=beside_base, seed=seed, settings=settings)


def serve(
    source: str | Path, adapters: Sequence[str] = (), *, at_once: int = 32, waiting: int = 128, **where: Any
) -> None:
    """Answer OpenAI's API for whatever `chat` takes, until a signal comes. Raises AfinaError.

    `at_once` answers are written together, and `waiting` may wait. `where`: host, port and key.
    """
    from afina.serve.serving import serve_source

    serve_source(str(source), adapters, console, at_once=at_once, waiting=waiting, **where)


def _run_folder(run: str | Path) -> Path:
    place = Path(run)
    open_artifact(place, "run")
    durable.sweep(place)
    return place


def _refuse_existing(place: Path, hint: str = "") -> None:
    durable.sweep(place.parent)
    if place.exists() or place.is_symlink():
        raise OutputError(
            _("{path} exists already.").format(path=place),
            hint=hint or _("Give this one another name (name: in the recipe, or --out), or remove the folder."),
        )


def _refuse_another(place: Path, wanted: Recipe) -> None:
    """A finished run is continued only with the recipe and the data it was made from."""
    manifest = open_artifact(place, "run").manifest
    hint = _("Give this one another name (name: in the recipe, or --out), or remove the folder.")
    if manifest.get("recipe") != wanted.resolved():
        raise OutputError(_("{path} holds a run of another recipe.").format(path=place), hint=hint)
    for entry in manifest["parents"]:
        file = Path(entry["name"])
        if entry["role"] == "data" and file.is_file() and sha256(file) != entry["sha256"]:
            raise OutputError(
                _("{path} was trained before {file} was changed.").format(path=place, file=file), hint=hint
            )


def _check_formats(recipe: Recipe, folder: Path) -> None:
    """Say before training, not after, that a base cannot become GGUF."""
    from afina.export.beforehand import why_no_gguf

    if (error := why_no_gguf(recipe, folder)) is not None:
        raise error


def _check_tasks(recipe: Recipe, folder: Path) -> None:
    """Say before training, not after, that a task's data is missing or cannot be marked."""
    if recipe.tasks:
        from afina.evaluate.run import questions

        questions(recipe, folder)


def _draw(place: Path) -> None:
    """The report anew."""
    from afina.evaluate.report import draw

    draw(place, _commands(place))


def _commands(place: Path) -> Sequence[tuple[str, str]]:
    """What may be wanted next, as it is typed where the run folder's parent lies."""
    whole = place.resolve()
    return next_commands(place, Path(whole.parent.name, whole.name))


def _base(recipe: Recipe, folder: Path) -> dict[str, str]:
    source = Path(model_source(recipe.model.base, folder))
    digest = source_digest(source) or recipe.model.revision or "main"
    return parent(recipe.model.base, digest, "base")


def artifact(path: str | Path) -> Artifact:
    """Open any finished folder of ours and verify its hashes. Raises AfinaError."""
    found = open_artifact(Path(path))
    found.verify()
    return found
