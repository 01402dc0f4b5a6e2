"""A run's answers rated by people: from its predictions to ratings.sqlite, figures, CSV and preferences."""

import getpass
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from afina import durable
from afina.console import Console
from afina.errors import DataError, RecipeError
from afina.evaluate.ratings.figures import as_csv, preferences, summary
from afina.evaluate.ratings.page import Page
from afina.evaluate.ratings.questions import Round, items
from afina.evaluate.ratings.store import FILE, Mode, Store
from afina.evaluate.ratings.terminal import rate
from afina.language import _

FIGURES = "ratings.json"


def rate_run(
    run: Path,
    console: Console,
    *,
    mode: Mode,
    systems: Sequence[str],
    rater: str | None,
    page: bool,
    port: int = 0,
    tasks: Sequence[str] = (),
) -> Path:
    """Have a person rate the answers of an evaluated run; returns the file of ratings. Raises DataError, RecipeError.

    In the terminal, or on a page of this machine until Ctrl-C. Of the `tasks`, or of those that were answered in a
    model's own words; of all where none was.
    """
    rows = _chosen(_predictions(run), tasks)
    names = list(systems) or ["base", "tuned"]
    if mode == "pair" and len(names) != 2:
        raise RecipeError(_("A pair is two systems; name both."), hint=_("For instance: --systems base,tuned"))
    wanted = items(rows, names, mode)
    if not wanted:
        raise DataError(
            _("There is nothing to rate: no sample has different answers of {names}.").format(names=", ".join(names)),
            hint=_("Evaluate the run first, or name other systems."),
        )
    store = Store(run / FILE)
    questions = Round(store, rater or _name(), wanted)
    if page:
        _serve(questions, console, port)
    else:
        rate(questions, console)
    figures = write_figures(run)
    show(figures, console)
    return run / FILE


def write_figures(run: Path) -> dict[str, Any]:
    """ratings.json, for the report."""
    figures = summary(Store(run / FILE).all())
    durable.write_json(run / FIGURES, figures)
    return figures


def export_ratings(run: Path, file: Path) -> int:
    """Write all ratings to `file`: CSV by its ending, else preferences as JSON lines. Returns how many."""
    if not (run / FILE).is_file():
        raise DataError(_("{run} has no ratings yet.").format(run=run), hint=_("Rate first: afina rate RUN"))
    ratings = Store(run / FILE).all()
    if file.suffix == ".csv":
        durable.write_text(file, as_csv(ratings))
        return len(ratings)
    text = preferences(ratings)
    durable.write_text(file, text)
    return text.count("\n")


def show(figures: dict[str, Any], console: Console) -> None:
    """Print averages, preferences and agreement."""
    if figures["scores"]:
        rows = [
            (name, f"{one['mean']:.2f}", "{:.2f} - {:.2f}".format(*one["interval"]), one["ratings"])
            for name, one in figures["scores"].items()
        ]
        console.table(("", _("mean of 1 to 5"), _("95% interval"), _("ratings")), rows)
    for pair in figures["pairs"]:
        console.line(
            _("{right} was preferred {wins} times, {left} {losses} times, {ties} ties (p = {chance:.2g}).").format(
                right=pair["right"],
                left=pair["left"],
                wins=pair["right_preferred"],
                losses=pair["left_preferred"],
                ties=pair["ties"],
                chance=pair["p_value"],
            )
        )
    for key, what in (("scores_alpha", _("1 to 5")), ("pairs_alpha", _("A/B"))):
        if figures[key] is not None:
            text = _("Agreement between raters, {what}: Krippendorff's alpha {alpha:.2f}")
            console.line(text.format(what=what, alpha=figures[key]))
    console.event("ratings", **figures)


def _serve(questions: Round, console: Console, port: int) -> None:
    page = Page(questions, port)
    console.line(_("Open {url} in a browser; Ctrl-C ends it.").format(url=page.url))
    console.event("page", url=page.url)
    try:
        with suppress(KeyboardInterrupt):
            while questions.next() is not None:
                time.sleep(0.5)
            time.sleep(1.0)  # the last page, which says thanks, is still to be fetched
    finally:
        page.close()


def _name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "-"


def _chosen(rows: list[dict[str, Any]], tasks: Sequence[str]) -> list[dict[str, Any]]:
    known = list(dict.fromkeys(str(row.get("task", "")) for row in rows))
    if unknown := [name for name in tasks if name not in known]:
        raise RecipeError(
            _("There are no answers of a task {name}.").format(name=unknown[0]),
            hint=_("It has {names}.").format(names=", ".join(known)),
        )
    if tasks:
        return [row for row in rows if row.get("task") in tasks]
    return [row for row in rows if row.get("tokens")] or rows


def _predictions(run: Path) -> list[dict[str, Any]]:
    file = run / "evaluation" / "predictions.jsonl"
    if not file.exists():
        raise DataError(
            _("{run} has no answers to rate yet.").format(run=run),
            hint=_("Evaluate the run first: afina eval {run}").format(run=run),
        )
    try:
        lines = file.read_bytes().split(b"\n")
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(
            _("There are no answers to rate: {reason}.").format(reason=error),
            hint=_("Evaluate the run first: afina eval {run}").format(run=run),
            file=file,
        ) from error
