"""One page about a run, written from whatever its folder holds: report.html, self-contained and without scripts.

Each part is optional: a run without evaluation, an interrupted run, a damaged file all give a page that says so. The
numbers are those of the folder's files; nothing is measured here. Words and layout are in report.html.jinja. Knows
nothing of models.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from afina import durable
from afina.artifact import MANIFEST
from afina.evaluate.plot import NARROW, PALETTE, loss_curve
from afina.evaluate.report.facts import (
    NOTHING,
    Facts,
    bytes_said,
    chance,
    count,
    cut,
    date,
    decimal,
    figure,
    interval,
    lasting,
    mapping,
    mappings,
    number,
    percent,
    points,
    sequence,
    span,
    tail,
    text,
)
from afina.evaluate.report.folder import Folder
from afina.evaluate.report.tasks import bars, inline, task_of
from afina.evaluate.spread import ratings as rated
from afina.evaluate.tasks.kind import problem_names
from afina.language import _, chosen
from afina.recipe.document import write as yaml

REPORT, MARKDOWN, NUMBERS = "report.html", "report.md", "report.json"
TEMPLATE, PLAIN_TEMPLATE = "report.html.jinja", "report.md.jinja"
FIRST_EXAMPLES = 4
"""Of the samples shown, those that are shown without asking; the rest folds away."""
SHOWN_REJECTED = 100


def draw(run: Path, commands: Sequence[tuple[str, str]] = ()) -> Path:
    """Write `run`/report.html anew, beside it the same in Markdown and its numbers as JSON; returns the page's path.

    `commands` are what may be wanted next, each with what it is for. Raises OutputError when a file cannot be written.
    """
    contents = _contents(run)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": count,
        "percent": percent,
        "points": points,
        "interval": interval,
        "figure": figure,
        "span": span,
        "duration": lasting,
        "size": bytes_said,
        "decimal": decimal,
        "chance": chance,
        "cut": cut,
        "tail": tail,
    }
    shown = {
        "_": _,
        "language": chosen(),
        "palette": PALETTE,
        "first": FIRST_EXAMPLES,
        "commands": commands,
        **contents,
    }
    shown["problem_names"] = problem_names()
    for name, template in ((REPORT, TEMPLATE), (MARKDOWN, PLAIN_TEMPLATE)):
        environment.autoescape = name == REPORT
        page = environment.get_template(template).render(**shown)
        durable.write_text(run / name, page.encode("utf-8", "replace").decode("utf-8"))
    numbers = json.dumps(_numbers(contents), ensure_ascii=False, indent=2)
    durable.write_text(run / NUMBERS, numbers.encode("utf-8", "replace").decode("utf-8") + "\n")
    return run / REPORT


def _numbers(contents: Facts) -> Facts:
    """What the page says in numbers: nothing drawn, no samples."""
    tasks = [
        {key: task[key] for key in ("name", "kind", "measure", "samples", "systems", "comparisons")}
        for task in contents["tasks"]
    ]
    keys = ("name", "finished", "made", "base", "method", "hardware", "seed", "training", "ratings")
    exports = [{key: entry[key] for key in ("file", "format", "bytes", "equal")} for entry in contents["exports"]]
    found = {**{key: contents[key] for key in keys}, "tasks": tasks, "exports": exports}
    if found["ratings"]:
        found["ratings"] = {key: value for key, value in found["ratings"].items() if key != "figure"}
    return found


def _contents(run: Path) -> Facts:
    """All the template asks for."""
    folder = Folder(run)
    manifest = folder.json(MANIFEST)
    recipe = mapping(manifest.get("recipe"))
    metrics = folder.lines("metrics.jsonl")
    evaluation = folder.json("evaluation/evaluation.json")
    predictions = folder.lines("evaluation/predictions.jsonl")
    exports = _exports(folder.json("export/" + MANIFEST))
    found = [task for task in sequence(evaluation.get("tasks")) if isinstance(task, dict)]
    tasks = [task_of(index, task, predictions) for index, task in enumerate(found)]
    return {
        "name": str(recipe.get("name") or run.resolve().name),
        "finished": bool(manifest),
        "record": bool(manifest) or bool(metrics),
        "made": date(manifest.get("made")),
        "base": text(mapping(recipe.get("model")).get("base")),
        "method": _method(recipe),
        "hardware": text(manifest.get("hardware")),
        "engine": text(manifest.get("engine")),
        "seed": text(manifest.get("seed")),
        "training": _training(manifest, metrics),
        "adapter_bytes": _adapter_bytes(manifest),
        "loss": _loss(metrics),
        "tasks": tasks,
        "bars": bars(found),
        "ratings": _ratings(folder.json("ratings.json")),
        "exports": exports,
        "data": _data(manifest),
        "resolved": bool(recipe),
        "recipe_text": _recipe_text(folder, recipe),
        "versions": mapping(manifest.get("versions")),
        "parents": [_source(entry) for entry in mappings(manifest.get("parents"))],
        "files": [
            {"name": name, "bytes": number(mapping(entry).get("bytes")), "sha256": text(mapping(entry).get("sha256"))}
            for name, entry in mapping(manifest.get("files")).items()
        ],
        "damaged": folder.damaged,
    }


def _training(manifest: Facts, metrics: Sequence[Facts]) -> Facts:
    """The figures of the manifest; for an interrupted run what the metrics say."""
    stated = mapping(manifest.get("training"))
    names = (
        *("steps", "samples", "tokens", "learnt_tokens", "seconds", "tokens_per_second", "peak_memory_bytes"),
        *("trainable_parameters", "parameters", "first_loss", "final_loss", "validation_loss"),
    )
    training: Facts = {name: number(stated.get(name)) for name in names}
    steps = [record for record in metrics if record.get("kind") == "step"]
    losses = [loss for record in steps if (loss := number(record.get("loss"))) is not None]
    if not stated and steps:
        training["steps"] = len(steps)
        training["tokens"] = sum(number(record.get("tokens")) or 0 for record in steps)
        training["seconds"] = sum(number(record.get("seconds")) or 0 for record in steps)
        training |= {"first_loss": losses[0], "final_loss": losses[-1]} if losses else {}
    training["lost"] = len(steps) - len(losses)
    training["asked"] = [_asked(record) for record in metrics if record.get("kind") == "evaluation"]
    best = mapping(stated.get("best"))
    training["best"] = {"step": number(best.get("step")), "figure": text(best.get("figure"))} if best else None
    training["kept_step"] = number(stated.get("kept_step"))
    return training


def _asked(record: Facts) -> Facts:
    """What one task said of the model after one step."""
    ends = [number(end) for end in sequence(record.get("interval"))]
    return {
        **{key: text(record.get(key)) for key in ("task", "measure")},
        **{key: number(record.get(key)) for key in ("step", "value", "samples", "answered")},
        "interval": ends if _is_interval(ends) else None,
    }


def _adapter_bytes(manifest: Facts) -> float | None:
    """Bytes under adapter/, tokenizer included; None where there is none."""
    files = mapping(manifest.get("files")).items()
    sizes = [number(mapping(entry).get("bytes")) or 0 for name, entry in files if name.startswith("adapter/")]
    return sum(sizes) if sizes else None


def _loss(metrics: Sequence[Facts]) -> Facts | None:
    if not metrics:
        return None
    return {
        "wide": inline(loss_curve(metrics, fmt="svg"), "loss"),
        "narrow": inline(loss_curve(metrics, fmt="svg", width=NARROW), "loss-narrow"),
    }


def _exports(manifest: Facts) -> list[Facts]:
    exports = []
    for entry in mappings(manifest.get("exports")):
        checks = mappings(entry.get("checks"))
        equal = sum(check.get("equal") is True for check in checks)
        exports.append(
            {
                "file": str(entry.get("file", "")),
                "format": str(entry.get("format", "")),
                "bytes": number(entry.get("bytes")),
                "sha256": str(entry.get("sha256", "")),
                "checks": [
                    {
                        **{key: str(check.get(key, "")) for key in ("prompt", "model", "gguf")},
                        "equal": check.get("equal") is True,
                    }
                    for check in checks
                ],
                "equal": equal,
            }
        )
    return exports


def _ratings(found: Facts) -> Facts | None:
    """People's ratings, each figure a finite number or None."""
    if not found:
        return None
    scores: dict[str, Facts] = {
        str(name): {
            **{key: number(mapping(one).get(key)) for key in ("mean", "ratings", "items")},
            "interval": [number(end) for end in sequence(mapping(one).get("interval"))],
            "counts": [number(mapping(mapping(one).get("counts")).get(str(value))) or 0 for value in range(1, 6)],
        }
        for name, one in mapping(found.get("scores")).items()
    }
    pairs = [
        {
            **{key: text(pair.get(key)) for key in ("left", "right")},
            **{key: number(pair.get(key)) for key in ("left_preferred", "right_preferred", "ties", "p_value", "items")},
        }
        for pair in mappings(found.get("pairs"))
    ]
    whole = {name: one for name, one in scores.items() if one["mean"] is not None and _is_interval(one["interval"])}
    drawn = [pair for pair in pairs if None not in (pair["left_preferred"], pair["right_preferred"], pair["ties"])]
    figure = None
    if whole or drawn:
        figure = {
            "wide": inline(rated(whole, drawn, fmt="svg"), "ratings"),
            "narrow": inline(rated(whole, drawn, fmt="svg", width=NARROW), "ratings-narrow"),
        }
    return {
        "raters": len(sequence(found.get("raters"))),
        "figure": figure,
        "scores": whole,
        "pairs": pairs,
        "alphas": {
            what: known
            for key, what in (("scores_alpha", _("1 to 5")), ("pairs_alpha", _("A/B")))
            if (known := number(found.get(key))) is not None
        },
    }


def _is_interval(ends: Sequence[float | None]) -> bool:
    return len(ends) == 2 and None not in ends


def _data(manifest: Facts) -> Facts | None:
    """The account of rows: what came in, what was learnt, kept back and rejected, and what no one accounts for."""
    data = mapping(manifest.get("data"))
    if not data:
        return None
    rejected = mappings(data.get("rejected"))
    rows, train, validation = (number(data.get(key)) for key in ("rows", "train", "validation"))
    missing = None
    if rows is not None:
        missing = rows - (train or 0) - (validation or 0) - len(rejected)
    return {
        "rows": rows,
        "train": train,
        "validation": validation,
        "rejected": len(rejected),
        "missing": missing,
        "reasons": [
            {"where": _where(entry), "reason": str(entry.get("reason", ""))} for entry in rejected[:SHOWN_REJECTED]
        ],
        "files": [_source(entry) for entry in sequence(data.get("files"))],
    }


def _where(entry: Facts) -> str:
    """`file:line` as far as it is known, the file by the end of its path."""
    parts = [tail(entry["file"])] if entry.get("file") else []
    line = number(entry.get("line"))
    return ":".join([*parts, *([f"{line:.0f}"] if line is not None else [])])


def _source(entry: object) -> Facts:
    """What was read: named by a path alone, or by an entry of `parents`."""
    facts = entry if isinstance(entry, dict) else {"name": entry}
    return {key: text(facts.get(key)) for key in ("role", "name", "sha256")}


def _method(recipe: Facts) -> str:
    """How much of the model learnt, in two words."""
    method = mapping(recipe.get("method"))
    if method.get("name") == "lora":
        return _("LoRA, rank {rank}").format(rank=method.get("rank", NOTHING))
    return _("every weight") if method.get("name") == "full" else ""


def _recipe_text(folder: Folder, recipe: Facts) -> str:
    """The recipe as resolved, as YAML; for an interrupted run the file recipe.yaml."""
    return yaml(recipe) if recipe else folder.content("recipe.yaml").decode("utf-8", "replace")
