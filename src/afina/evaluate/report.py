"""One page about a run, written from whatever its folder holds: report.html, self-contained and without scripts.

Each part is optional: a run without evaluation, an interrupted run, a damaged file all give a page that says so. The
numbers are those of the folder's files; nothing is measured here. Words and layout are in report.html.jinja. Knows
nothing of models.
"""

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from afina import durable
from afina.artifact import MANIFEST
from afina.console import duration, size
from afina.evaluate.plot import NARROW, PALETTE, accuracy_bars, confusion_matrix, loss_curve
from afina.language import _, chosen
from afina.recipe.document import write as yaml

REPORT = "report.html"
TEMPLATE = "report.html.jinja"
SHOWN_EXAMPLES = 12
"""Samples shown of those fixed, and of those broken."""
FIRST_EXAMPLES = 4
"""Of these, shown without asking; the rest folds away."""
SHOWN_LETTERS = 1200
"""Of a prompt or an answer."""
SHOWN_REJECTED = 100
DRAWN_LABELS = 40
"""A confusion matrix of more labels is not drawn."""
NOTHING = "–"
"""Stands where there is no number."""

Facts = dict[str, Any]


def draw(run: Path) -> Path:
    """Write `run`/report.html anew and return its path. Raises OutputError when it cannot be written."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": _count,
        "percent": _percent,
        "points": _points,
        "interval": _interval,
        "duration": _duration,
        "size": _size,
        "decimal": _decimal,
        "cut": _cut,
        "tail": _tail,
    }
    page = environment.get_template(TEMPLATE).render(
        _=_, language=chosen(), palette=PALETTE, first=FIRST_EXAMPLES, **_contents(run)
    )
    durable.write_text(run / REPORT, page.encode("utf-8", "replace").decode("utf-8"))
    return run / REPORT


class _Folder:
    """Reads what is there; what is damaged is noted, for the page to say, and counts as absent."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.damaged: list[tuple[str, str]] = []

    def json(self, name: str) -> Facts:
        """The object in a JSON file; empty where there is none."""
        content = self.content(name)
        try:
            return _dict(json.loads(content)) if content else {}
        except (ValueError, RecursionError) as error:
            self.damaged.append((name, str(error)))
            return {}

    def lines(self, name: str) -> list[Facts]:
        """The objects of a file of JSON lines."""
        records, broken = [], 0
        for line in self.content(name).split(b"\n"):
            try:
                record = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                broken += 1
                continue
            if isinstance(record, dict):
                records.append(record)
        if broken:
            self.damaged.append((name, _("lines that are not JSON: {count}").format(count=broken)))
        return records

    def content(self, name: str) -> bytes:
        """The bytes of a file; none where it is absent or cannot be read."""
        try:
            return (self.run / name).read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            self.damaged.append((name, error.strerror or str(error)))
            return b""


def _contents(run: Path) -> Facts:
    """All the template asks for."""
    folder = _Folder(run)
    manifest = folder.json(MANIFEST)
    recipe = _dict(manifest.get("recipe"))
    metrics = folder.lines("metrics.jsonl")
    evaluation = folder.json("evaluation/evaluation.json")
    predictions = folder.lines("evaluation/predictions.jsonl")
    exports = _exports(folder.json("export/" + MANIFEST))
    found = [task for task in _list(evaluation.get("tasks")) if isinstance(task, dict)]
    kinds = {str(task.get("name")): task for task in _list(recipe.get("tasks")) if isinstance(task, dict)}
    tasks = [_task(index, task, predictions, kinds) for index, task in enumerate(found)]
    return {
        "name": str(recipe.get("name") or run.resolve().name),
        "finished": bool(manifest),
        "made": _date(manifest.get("made")),
        "base": _text(_dict(recipe.get("model")).get("base")),
        "method": _method(recipe),
        "hardware": _text(manifest.get("hardware")),
        "engine": _text(manifest.get("engine")),
        "seed": _text(manifest.get("seed")),
        "training": _training(manifest, metrics),
        "adapter_bytes": _adapter_bytes(manifest),
        "loss": _loss(metrics),
        "tasks": tasks,
        "bars": _bars(found),
        "exports": exports,
        "data": _data(manifest),
        "resolved": bool(recipe),
        "recipe_text": _recipe_text(folder, recipe),
        "versions": _dict(manifest.get("versions")),
        "parents": [_source(entry) for entry in _dicts(manifest.get("parents"))],
        "files": [
            {"name": name, "bytes": _number(_dict(entry).get("bytes")), "sha256": _text(_dict(entry).get("sha256"))}
            for name, entry in _dict(manifest.get("files")).items()
        ],
        "commands": _commands(run, recipe, bool(tasks), exports) if manifest else [],
        "damaged": folder.damaged,
    }


def _training(manifest: Facts, metrics: Sequence[Facts]) -> Facts:
    """The figures of the manifest; for an interrupted run what the metrics say."""
    stated = _dict(manifest.get("training"))
    names = (
        *("steps", "samples", "tokens", "learnt_tokens", "seconds", "tokens_per_second", "peak_memory_bytes"),
        *("trainable_parameters", "parameters", "first_loss", "final_loss", "validation_loss"),
    )
    training = {name: _number(stated.get(name)) for name in names}
    steps = [record for record in metrics if record.get("kind") == "step"]
    losses = [loss for record in steps if (loss := _number(record.get("loss"))) is not None]
    if not stated and steps:
        training["steps"] = len(steps)
        training["tokens"] = sum(_number(record.get("tokens")) or 0 for record in steps)
        training["seconds"] = sum(_number(record.get("seconds")) or 0 for record in steps)
        training |= {"first_loss": losses[0], "final_loss": losses[-1]} if losses else {}
    training["lost"] = len(steps) - len(losses)
    return training


def _adapter_bytes(manifest: Facts) -> float | None:
    """Bytes under adapter/, tokenizer included; None where there is none."""
    files = _dict(manifest.get("files")).items()
    sizes = [_number(_dict(entry).get("bytes")) or 0 for name, entry in files if name.startswith("adapter/")]
    return sum(sizes) if sizes else None


def _loss(metrics: Sequence[Facts]) -> Facts | None:
    if not metrics:
        return None
    return {
        "wide": _inline(loss_curve(metrics, fmt="svg"), "loss"),
        "narrow": _inline(loss_curve(metrics, fmt="svg", width=NARROW), "loss-narrow"),
    }


def _bars(tasks: Sequence[Facts]) -> Facts | None:
    measured = [
        {"name": task.get("name", ""), "systems": {name: _system(task, name) or {} for name in ("base", "tuned")}}
        for task in tasks
    ]
    if not any(any(system.values()) for task in measured for system in task["systems"].values()):
        return None
    return {
        "wide": _inline(accuracy_bars(measured, fmt="svg"), "bars"),
        "narrow": _inline(accuracy_bars(measured, fmt="svg", width=NARROW), "bars-narrow"),
    }


def _task(index: int, task: Facts, predictions: Sequence[Facts], wanted: Mapping[str, Facts]) -> Facts:
    """One task of evaluation.json with what its predictions add."""
    name = str(task.get("name", ""))
    systems = {key: figures for key in ("base", "tuned") if (figures := _system(task, key))}
    base, tuned = (systems.get(key, {}).get("accuracy") for key in ("base", "tuned"))
    records = [record for record in predictions if record.get("task") == name]
    changes = _changes(records)
    return {
        "name": name,
        "anchor": f"task-{index + 1}",
        "kind": task.get("kind"),
        "samples": _number(task.get("samples")),
        "verdict": str(task.get("verdict") or ""),
        "systems": systems,
        "gain": tuned - base if base is not None and tuned is not None else None,
        "matrices": [matrix for key in systems if (matrix := _matrix(index, key, systems[key]))],
        "labels": _labels(systems),
        "changes": changes,
        "disagreement": _disagreement(changes, systems),
    }


def _system(task: Facts, key: str) -> Facts | None:
    """The figures of one system, each a finite number or None; None where the task did not ask it."""
    figures = _dict(_dict(task.get("systems")).get(key))
    if not figures:
        return None
    interval = [_number(end) for end in _list(figures.get("interval"))]
    return {
        **{name: _number(figures.get(name)) for name in ("accuracy", "correct", "f1_macro", "seconds")},
        "interval": interval if len(interval) == 2 and None not in interval else None,
        "labels": [str(label) for label in _list(figures.get("labels"))],
        "confusion": _list(figures.get("confusion")),
        "per_label": _dict(figures.get("per_label")),
    }


def _matrix(index: int, key: str, system: Facts) -> Facts | None:
    """The confusion matrix as figure and as numbers; None where it is not square, not whole, or too large to read."""
    labels = system["labels"]
    lines = [[_number(count) for count in _list(line)] for line in system["confusion"]]
    square = len(lines) == len(labels) and all(len(line) == len(labels) for line in lines)
    if not labels or len(labels) > DRAWN_LABELS or not square:
        return None
    counts = [[round(count) if count and count > 0 else 0 for count in line] for line in lines]
    figure = _inline(confusion_matrix(labels, counts, fmt="svg"), f"confusion-{index + 1}-{key}")
    return {"system": key, "figure": figure, "rows": list(zip(labels, counts, strict=True)), "labels": labels}


def _labels(systems: Mapping[str, Facts]) -> list[Facts]:
    """Per label, how often it occurs and F1 of each system."""
    names = dict.fromkeys(label for system in systems.values() for label in system["per_label"])
    rows = []
    for label in names:
        figures = {key: _dict(system["per_label"].get(label)) for key, system in systems.items()}
        support = next((known for figure in figures.values() if (known := _number(figure.get("support")))), None)
        names_of = ("precision", "recall", "f1")
        rows.append(
            {
                "label": label,
                "support": support,
                **{key: {name: _number(figure.get(name)) for name in names_of} for key, figure in figures.items()},
            }
        )
    return rows


def _changes(records: Sequence[Facts]) -> Facts | None:
    """Sample by sample: what tuning fixed, broke and left, with the first examples of either change."""
    both = [record for record in records if {"expected", "base", "tuned"} <= record.keys()]
    if not both:
        return None
    base, tuned = (_marks(both, system) for system in ("base", "tuned"))
    outcomes = [_OUTCOMES[pair] for pair in zip(base, tuned, strict=True)]
    counts = Counter(outcomes)
    examples = {
        outcome: [_example(record) for record, found in zip(both, outcomes, strict=True) if found == outcome]
        for outcome in ("fixed", "broken")
    }
    return {
        "total": len(both),
        "counts": {outcome: counts[outcome] for outcome in _OUTCOMES.values()},
        "examples": {outcome: shown[:SHOWN_EXAMPLES] for outcome, shown in examples.items()},
        "right": {"base": sum(base), "tuned": sum(tuned)},
    }


_OUTCOMES = {(True, True): "kept", (False, True): "fixed", (True, False): "broken", (False, False): "wrong"}
"""(base was right, tuned was right): what that is called."""


def _marks(records: Sequence[Facts], system: str) -> list[bool]:
    """Which answers are right, as the evaluation marked them."""
    return [_dict(record.get("right")).get(system) is True for record in records]


def _example(record: Facts) -> Facts:
    return {key: str(record.get(key, "")) for key in ("where", "prompt", "expected", "base", "tuned")}


def _disagreement(changes: Facts | None, systems: Mapping[str, Facts]) -> bool:
    """Whether the predictions count other right answers than the evaluation states: one of the files was changed."""
    if changes is None:
        return False
    return any(
        system["correct"] is not None and system["correct"] != changes["right"][key] for key, system in systems.items()
    )


def _exports(manifest: Facts) -> list[Facts]:
    exports = []
    for entry in _dicts(manifest.get("exports")):
        checks = _dicts(entry.get("checks"))
        equal = sum(check.get("equal") is True for check in checks)
        exports.append(
            {
                "file": str(entry.get("file", "")),
                "format": str(entry.get("format", "")),
                "bytes": _number(entry.get("bytes")),
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


def _data(manifest: Facts) -> Facts | None:
    """The account of rows: what came in, what was learnt, kept back and rejected, and what no one accounts for."""
    data = _dict(manifest.get("data"))
    if not data:
        return None
    rejected = _dicts(data.get("rejected"))
    rows, train, validation = (_number(data.get(key)) for key in ("rows", "train", "validation"))
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
        "files": [_source(entry) for entry in _list(data.get("files"))],
    }


def _where(entry: Facts) -> str:
    """`file:line` as far as it is known, the file by the end of its path."""
    parts = [_tail(entry["file"])] if entry.get("file") else []
    line = _number(entry.get("line"))
    return ":".join([*parts, *([f"{line:.0f}"] if line is not None else [])])


def _source(entry: object) -> Facts:
    """What was read: named by a path alone, or by an entry of `parents`."""
    facts = entry if isinstance(entry, dict) else {"name": entry}
    return {key: _text(facts.get(key)) for key in ("role", "name", "sha256")}


def _method(recipe: Facts) -> str:
    """How much of the model learnt, in two words."""
    method = _dict(recipe.get("method"))
    if method.get("name") == "lora":
        return _("LoRA, rank {rank}").format(rank=method.get("rank", NOTHING))
    return _("every weight") if method.get("name") == "full" else ""


def _recipe_text(folder: _Folder, recipe: Facts) -> str:
    """The recipe as resolved, as YAML; for an interrupted run the file recipe.yaml."""
    return yaml(recipe) if recipe else folder.content("recipe.yaml").decode("utf-8", "replace")


def _commands(run: Path, recipe: Facts, evaluated: bool, exports: Sequence[Facts]) -> list[Facts]:
    """What a user may want next: (what for, command). Paths start where the run folder's parent lies."""
    place = Path(run.resolve().parent.name, run.resolve().name)
    quoted = shlex.quote(str(place))
    commands = [{"purpose": _("Talk to it, beside the base model"), "command": f"afina chat {quoted} --beside-base"}]
    if recipe.get("tasks") and not evaluated:
        commands.append({"purpose": _("Measure it on held-out samples"), "command": f"afina eval {quoted}"})
    if not exports:
        command = f"afina export {quoted} --format q8_0"
        commands.append({"purpose": _("Make a file for llama.cpp, Ollama and LM Studio"), "command": command})
    gguf = next((entry["file"] for entry in exports if entry["file"].endswith(".gguf")), None)
    if gguf:
        file = shlex.quote(str(place / "export" / gguf))
        commands.append({"purpose": _("Talk to the exported file"), "command": f"afina chat {file}"})
    return commands


def _inline(svg: bytes, name: str) -> str:
    """A figure of plot.py as part of the page: its colours become the page's, its ids its own, prolog and style go.

    Only tags are touched. Labels, which come from data, stay as matplotlib escaped them: no `<` is ever left in one.
    """
    text = svg.decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    return re.sub(r"<[^<>]+>", lambda tag: _of_page(tag[0], name), text)


def _of_page(tag: str, name: str) -> str:
    """One tag of a figure, with the page's colours and with ids that no other figure has."""
    tag = re.sub(r'^<g id="[^"]*"', "<g", tag)
    tag = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", tag)
    tag = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"', "", tag)
    for role, colour in PALETTE.items():
        tag = tag.replace(f": {colour}", f": var(--{role})")
    return tag.replace("<svg", '<svg aria-hidden="true" focusable="false"')


def _dict(value: object) -> Facts:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _dicts(value: object) -> list[Facts]:
    return [entry for entry in _list(value) if isinstance(entry, dict)]


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _number(value: object) -> float | None:
    """The value where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or math.isnan(value):
        return None
    return value


def _date(value: object) -> str:
    """An ISO time to the minute, in the zone it was written in; what is none stays as it is."""
    try:
        made = datetime.fromisoformat(str(value))
    except ValueError:
        return str(value) if value else ""
    return f"{made:%Y-%m-%d %H:%M} {made.tzname() or ''}".strip()


def _count(value: float | None) -> str:
    """A whole number with narrow spaces between thousands, which every language reads alike (SI Brochure, 5.4.4)."""
    return NOTHING if value is None else f"{round(value):,}".replace(",", "\u202f")


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.1%}"


def _points(share: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    return NOTHING if share is None else f"{100 * share:+.1f}".replace("-", "−")


def _interval(ends: Sequence[float]) -> str:
    return f"{100 * ends[0]:.1f}–{100 * ends[1]:.1f}%"


def _duration(seconds: float | None) -> str:
    return NOTHING if seconds is None else duration(seconds)


def _size(count: float | None) -> str:
    return NOTHING if count is None else size(count)


def _decimal(value: float | None, digits: int = 3) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def _cut(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= SHOWN_LETTERS else text[:SHOWN_LETTERS].rstrip() + " …"


def _tail(path: object) -> str:
    """The end of a long path: a report that is sent to others need not tell where its maker's home lies."""
    parts = Path(str(path)).parts
    return str(path) if len(parts) <= 3 and not str(path).startswith("/") else "…/" + "/".join(parts[-2:])
