"""The tasks of an evaluation for the page: everyone's figures, comparisons, and what changed sample by sample."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from afina.evaluate.metrics import NO_SHARES
from afina.evaluate.plot import NARROW, PALETTE, accuracy_bars, confusion_matrix
from afina.evaluate.report.facts import Facts, mapping, mappings, number, sequence, text
from afina.evaluate.spread import answer_lengths
from afina.language import _

SHOWN_EXAMPLES = 12
"""Samples shown of those fixed, and of those broken."""
LONGEST = 10**6
"""Tokens of an answer; a file that says more is not believed."""
DRAWN_LABELS = 40
"""A confusion matrix of more labels is not drawn."""


def bars(tasks: Sequence[Facts]) -> Facts | None:
    """Everyone's shares with their intervals; None where nothing that is a share was measured."""
    measured = [
        {"name": task.get("name", ""), "systems": {name: _system(task, name) or {} for name in _names(task)}}
        for task in tasks
        if task.get("measure") not in NO_SHARES
    ]
    if not any(any(system.values()) for task in measured for system in task["systems"].values()):
        return None
    return {
        "wide": inline(accuracy_bars(measured, fmt="svg"), "bars"),
        "narrow": inline(accuracy_bars(measured, fmt="svg", width=NARROW), "bars-narrow"),
    }


def task_of(index: int, task: Facts, predictions: Sequence[Facts]) -> Facts:
    """One task of evaluation.json with what its predictions add."""
    name = str(task.get("name", ""))
    systems = {key: figures for key in _names(task) if (figures := _system(task, key))}
    base, tuned = (systems.get(key, {}).get("accuracy") for key in ("base", "tuned"))
    records = [record for record in predictions if record.get("task") == name]
    changes = _changes(records)
    return {
        "name": name,
        "anchor": f"task-{index + 1}",
        "kind": task.get("kind"),
        "measure": str(task.get("measure") or "accuracy"),
        "samples": number(task.get("samples")),
        "verdict": str(task.get("verdict") or ""),
        "comparisons": [_comparison(pair) for pair in mappings(task.get("comparisons"))],
        "systems": systems,
        "trained_on": number(task.get("trained_on")) or 0,
        "unseen": {str(label): number(count) or 0 for label, count in mapping(task.get("unseen")).items()},
        "parts": _parts(systems),
        "gain": tuned - base if base is not None and tuned is not None else None,
        "matrices": [matrix for key in systems if (matrix := _matrix(index, key, systems[key]))],
        "labels": _labels(systems),
        "lengths": _lengths(index, records, systems),
        "changes": changes,
        "disagreement": _disagreement(changes, systems),
    }


def _names(task: Facts) -> list[str]:
    """Everyone who was asked, base and tuned first."""
    names = [str(name) for name in mapping(task.get("systems"))]
    return sorted(names, key=lambda name: {"base": 0, "tuned": 1}.get(name, 2))


def _comparison(pair: Facts) -> Facts:
    numbers = {key: number(pair.get(key)) for key in ("fixed", "broken", "better", "worse", "p_value", "samples")}
    return {**{key: text(pair.get(key)) for key in ("before", "after", "verdict")}, **numbers}


def _system(task: Facts, key: str) -> Facts | None:
    """The figures of one system, each a finite number or None; None where the task did not ask it."""
    figures = mapping(mapping(task.get("systems")).get(key))
    if not figures:
        return None
    ends = [number(end) for end in sequence(figures.get("interval"))]
    names = (
        *(
            "accuracy",
            "value",
            "correct",
            "f1_macro",
            "f1_weighted",
            "precision_macro",
            "recall_macro",
            "seconds",
            "samples_per_second",
            "answered",
        ),
        *("tokens_per_second", "file_bytes", "memory_bytes", "unanswered", "unasked"),
    )
    found = {name: number(figures.get(name)) for name in names}
    return {
        **found,
        "value": found["accuracy"] if found["value"] is None else found["value"],
        "interval": ends if len(ends) == 2 and None not in ends else None,
        "problems": {str(name): number(count) or 0 for name, count in mapping(figures.get("problems")).items()},
        "reasons": [str(reason) for reason in sequence(figures.get("reasons"))],
        "labels": [str(label) for label in sequence(figures.get("labels"))],
        "confusion": sequence(figures.get("confusion")),
        "per_label": mapping(figures.get("per_label")),
        "lengths": {key: number(value) for key, value in mapping(figures.get("lengths")).items()},
        "metrics": {
            str(name): {str(key): number(value) for key, value in mapping(one).items()}
            for name, one in mapping(figures.get("lm_eval")).items()
        },
        "shares": {**mapping(figures.get("areas")), **_forms(figures), **mapping(figures.get("fields"))},
    }


def _forms(figures: Facts) -> dict[str, Facts]:
    """Of JSON, how many answers are an object at all, and of the schema; of maths, how many of the calculations shown
    are right."""
    named = (
        (_("(a JSON object)"), "parsed", "answered"),
        (_("(of the schema)"), "of_schema", "answered"),
        (_("(calculations shown)"), "right_steps", "steps"),
    )
    return {name: {"right": figures[key], "of": figures.get(of)} for name, key, of in named if key in figures}


def _lengths(index: int, records: Sequence[Facts], systems: Mapping[str, Facts]) -> Facts | None:
    """Tokens of everyone's answers, drawn; None where nothing was written."""
    tokens: dict[str, list[int]] = {}
    for key in systems:
        counts = [number(mapping(record.get("tokens")).get(key)) for record in records]
        tokens[key] = [min(LONGEST, round(count)) for count in counts if count and count >= 1]
    if not any(tokens.values()):
        return None
    return {
        "wide": inline(answer_lengths(tokens, fmt="svg"), f"lengths-{index + 1}"),
        "narrow": inline(answer_lengths(tokens, fmt="svg", width=NARROW), f"lengths-{index + 1}-narrow"),
    }


def _parts(systems: Mapping[str, Facts]) -> list[Facts]:
    """What a task is right in, part by part (areas of general questions, fields of JSON), for everyone."""
    names = dict.fromkeys(name for system in systems.values() for name in system["shares"])
    return [
        {"name": str(name), "systems": {key: _share(system["shares"].get(name)) for key, system in systems.items()}}
        for name in names
    ]


def _share(found: object) -> Facts:
    return {key: number(mapping(found).get(key)) for key in ("right", "of")}


def _matrix(index: int, key: str, system: Facts) -> Facts | None:
    """The confusion matrix as figure and as numbers; None where it is not square, not whole, or too large to read."""
    labels = system["labels"]
    lines = [[number(count) for count in sequence(line)] for line in system["confusion"]]
    square = len(lines) == len(labels) and all(len(line) == len(labels) for line in lines)
    if not labels or len(labels) > DRAWN_LABELS or not square:
        return None
    counts = [[round(count) if count and count > 0 else 0 for count in line] for line in lines]
    figure = inline(confusion_matrix(labels, counts, fmt="svg"), f"confusion-{index + 1}-{key}")
    return {"system": key, "figure": figure, "rows": list(zip(labels, counts, strict=True)), "labels": labels}


def _labels(systems: Mapping[str, Facts]) -> list[Facts]:
    """Per label, how often it occurs and F1 of each system."""
    names = dict.fromkeys(label for system in systems.values() for label in system["per_label"])
    rows = []
    for label in names:
        figures = {key: mapping(system["per_label"].get(label)) for key, system in systems.items()}
        support = next((known for figure in figures.values() if (known := number(figure.get("support")))), None)
        names_of = ("precision", "recall", "f1")
        rows.append(
            {
                "label": label,
                "support": support,
                **{key: {name: number(figure.get(name)) for name in names_of} for key, figure in figures.items()},
            }
        )
    return rows


def _changes(records: Sequence[Facts]) -> Facts | None:
    """Sample by sample: what tuning fixed, broke and left, with the first examples of either change."""
    known = [record for record in records if {"expected", "base", "tuned"} <= record.keys()]
    both = [record for record in known if None not in mapping(record.get("right")).values()]  # scores are not right
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
    return [mapping(record.get("right")).get(system) is True for record in records]


def _example(record: Facts) -> Facts:
    return {key: str(record.get(key, "")) for key in ("where", "prompt", "expected", "base", "tuned")}


def _disagreement(changes: Facts | None, systems: Mapping[str, Facts]) -> bool:
    """Whether the predictions count other right answers than the evaluation states: one of the files was changed."""
    if changes is None:
        return False
    return any(
        systems[key]["correct"] is not None and systems[key]["correct"] != count
        for key, count in changes["right"].items()
        if key in systems
    )


def inline(svg: bytes, name: str) -> str:
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
