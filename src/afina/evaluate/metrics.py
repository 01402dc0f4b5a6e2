"""From what was expected and answered to figures with intervals. Knows no model."""

import math
from collections.abc import Sequence
from typing import Any

Z_95 = 1.959963984540054
"""Two-sided 95% of a normal distribution."""


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson, 1927); sensible at 0% and 100% and for few samples."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = correct / total, Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    reach = Z_95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def mcnemar(fixed: int, broken: int) -> float:
    """Two-sided exact p-value that two systems differ, from the samples on which they disagree (McNemar, 1947)."""
    total, least = fixed + broken, min(fixed, broken)
    if total == 0:
        return 1.0
    tail: float = sum(math.comb(total, count) for count in range(least + 1)) / 2**total
    return min(1.0, 2 * tail)


def shares(correct: Sequence[bool]) -> dict[str, Any]:
    """Accuracy with its interval."""
    count = sum(correct)
    return {
        "correct": count,
        "accuracy": count / len(correct) if correct else 0.0,
        "interval": list(wilson(count, len(correct))),
    }


def per_label(expected: Sequence[str], answered: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Precision, recall and F1 of each label, their plain mean, and the confusion matrix (rows: expected).

    A label never answered has precision 0, as in scikit-learn with zero_division=0.
    """
    place = {label: index for index, label in enumerate(labels)}
    confusion = [[0] * len(labels) for _label in labels]
    for truth, answer in zip(expected, answered, strict=True):
        confusion[place[truth]][place[answer]] += 1
    figures = {}
    for label, index in place.items():
        hit = confusion[index][index]
        said, there = sum(row[index] for row in confusion), sum(confusion[index])
        precision, recall = hit / said if said else 0.0, hit / there if there else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        figures[label] = {"precision": precision, "recall": recall, "f1": f1, "support": there}
    return {
        "labels": list(labels),
        "confusion": confusion,
        "per_label": figures,
        "f1_macro": sum(figure["f1"] for figure in figures.values()) / len(labels),
    }
