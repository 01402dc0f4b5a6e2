"""How far raters agree: Krippendorff's alpha, from any number of raters, with gaps.

1 is perfect, 0 what chance would give, below 0 systematic disagreement (Krippendorff, "Computing Krippendorff's
Alpha-Reliability", 2011).
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import permutations
from typing import Literal

Scale = Literal["nominal", "ordinal", "interval"]
Units = Iterable[Sequence[int]]
"""The values that each unit was given, by however many raters."""


def alpha(units: Units, scale: Scale) -> float | None:
    """Krippendorff's alpha; None where nothing was rated twice, or only one value ever came."""
    pairable = [list(values) for values in units if len(values) > 1]
    together: Counter[tuple[int, int]] = Counter()
    for values in pairable:
        for left, right in permutations(values, 2):
            together[left, right] += 1 / (len(values) - 1)  # type: ignore[assignment]
    totals: Counter[int] = Counter()
    for (left, _right), count in together.items():
        totals[left] += count
    whole = sum(totals.values())
    if len(totals) < 2:
        return None
    apart = _distance(scale, totals)
    seen = sum(count * apart(left, right) for (left, right), count in together.items())
    by_chance = sum(
        totals[left] * totals[right] * apart(left, right) for left in totals for right in totals if left != right
    )
    return 1 - (whole - 1) * seen / by_chance if by_chance else None


def _distance(scale: Scale, totals: Mapping[int, float]) -> Callable[[int, int], float]:
    """How far two values are from each other."""

    def ordinal(left: int, right: int) -> float:
        low, high = min(left, right), max(left, right)
        between = sum(count for value, count in totals.items() if low <= value <= high)
        return (between - (totals[low] + totals[high]) / 2) ** 2

    return {
        "nominal": lambda left, right: float(left != right),
        "ordinal": ordinal,
        "interval": lambda left, right: float(left - right) ** 2,
    }[scale]


def by_unit(values: Iterable[tuple[Hashable, int]]) -> list[list[int]]:
    """Values gathered by what they were given to."""
    found: dict[Hashable, list[int]] = {}
    for unit, value in values:
        found.setdefault(unit, []).append(value)
    return list(found.values())
