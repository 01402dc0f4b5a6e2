"""From what was expected and answered to figures with intervals. Knows no model."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

NO_SHARES = ("perplexity", "score")
"""Measures that are not shares of 1."""
Z_95 = 1.959963984540054
"""Two-sided 95% of a normal distribution."""


DRAWS = 2000
"""Resamples of a bootstrap: the ends of a 95% interval are then known to about a hundredth of its width."""
FEW = 8
"""Resampling needs so many values: by trial, 95% intervals of 2 hold the true mean half of the time, of 5 71 to 83%, of
8 85 to 91%."""
FLIPS = 9999
"""Random signs of a paired test: a p-value of 0.05 is then known to 0.004."""

AT_ONCE = 2**22
"""Signs or places that are drawn at once: of 50,000 samples all together would take 8 GB."""


def wilson(correct: float, total: int) -> tuple[float, float]:
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


def resamples(count: int) -> Iterator[np.ndarray]:
    """(some, count) places drawn with replacement, DRAWS times in all; always the same ones."""
    dice, step = np.random.default_rng(0), max(1, AT_ONCE // count)
    for start in range(0, DRAWS, step):
        yield dice.integers(0, count, (min(step, DRAWS - start), count))


def spread(estimates: np.ndarray, values: np.ndarray) -> list[float] | None:
    """The 95% interval by percentiles of what resampled `values` gave (Efron, 1979).

    None where `values` cannot tell how far they spread: they are FEW, or all the same.
    """
    if len(values) < FEW or (values == values[0]).all():
        return None
    return [float(end) for end in np.quantile(estimates, [0.025, 0.975])]


def bootstrap(values: Sequence[float], bounds: tuple[float, float] | None = (0.0, 1.0)) -> list[float] | None:
    """The 95% interval of a mean, from resampled means.

    Where resampling says nothing but the values have `bounds`: no numbers spread more than as many that lie at the
    bounds, of which Wilson's interval is known, so that it is wide, but never too narrow. Else None.
    """
    if not values:
        return None
    scores = np.asarray(values, float)
    found = spread(np.concatenate([scores[places].mean(1) for places in resamples(len(scores))]), scores)
    if found is None and bounds is not None:
        least, width = bounds[0], bounds[1] - bounds[0]
        shares = (scores - least) / width
        found = [least + width * end for end in wilson(float(shares.sum()), len(scores))]
    return found


def sign_flips(before: Sequence[float], after: Sequence[float]) -> float:
    """Two-sided p-value that two systems' paired scores differ on average, by flipping the signs of the differences
    at random (Fisher's randomisation test)."""
    apart = np.asarray(after, float) - np.asarray(before, float)
    if not apart.any():
        return 1.0
    dice, reached, least = np.random.default_rng(0), 0, abs(apart.sum()) * (1 - 1e-12)
    step = max(1, AT_ONCE // len(apart))
    for start in range(0, FLIPS, step):
        signs = dice.integers(0, 2, (min(step, FLIPS - start), len(apart))) * 2 - 1
        reached += int((np.abs(signs @ apart) >= least).sum())
    return (reached + 1) / (FLIPS + 1)


def per_label(expected: Sequence[str], answered: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Precision, recall and F1 of each label, their plain and weighted means, and the confusion matrix (rows:
    expected). An answer that is no label is right for none; it is counted in the matrix's last column, `other`.

    A label never answered has precision 0, one never expected recall 0, as in scikit-learn with zero_division=0.
    """
    place = {label: index for index, label in enumerate(labels)}
    confusion = [[0] * len(labels) for _label in labels]
    other = [0] * len(labels)
    for truth, answer in zip(expected, answered, strict=True):
        if answer in place:
            confusion[place[truth]][place[answer]] += 1
        else:
            other[place[truth]] += 1
    figures = {}
    for label, index in place.items():
        hit = confusion[index][index]
        said, there = sum(row[index] for row in confusion), sum(confusion[index]) + other[index]
        precision, recall = hit / said if said else 0.0, hit / there if there else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        figures[label] = {"precision": precision, "recall": recall, "f1": f1, "support": there}
    total = len(expected)
    means = {}
    for name in ("precision", "recall", "f1"):
        means[f"{name}_macro"] = sum(figure[name] for figure in figures.values()) / max(1, len(labels))
        weighted = sum(figure[name] * figure["support"] for figure in figures.values())
        means[f"{name}_weighted"] = weighted / total if total else 0.0
    return {"labels": list(labels), "confusion": confusion, "other": other, "per_label": figures, **means}
