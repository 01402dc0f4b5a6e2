"""Samples that stand in the training data more than once: seen so often that they are learnt by heart before the rest.

Two samples are one when the model sees the same tokens and learns the same of them. Knows nothing of losses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from afina.data.template import Rendered
from afina.language import _

WATCHED = 16
"""So many of the most repeated samples are measured at each validation."""
SHARE = 0.01
OFTEN = 10
"""Told of when a hundredth of all samples repeat others, or one will be seen so often."""


@dataclass(frozen=True)
class Repeated:
    """`sample`: the first of its kind; `times`: how often it stands in the data."""

    sample: int
    times: int


def repeated(rows: Sequence[Rendered]) -> list[Repeated]:
    """Every sample that is not alone, the most repeated first."""
    first: dict[bytes, int] = {}
    times: dict[int, int] = {}
    for place, row in enumerate(rows):
        found = first.setdefault(row.ids.tobytes() + row.learnt.tobytes(), place)
        times[found] = times.get(found, 0) + 1
    several = [Repeated(place, count) for place, count in times.items() if count > 1]
    return sorted(several, key=lambda one: (-one.times, one.sample))


def notice(found: Sequence[Repeated], samples: int, epochs: float, where: Callable[[int], str]) -> str | None:
    """What to tell before training of the repeats; None where they weigh nothing.

    samples: of all; epochs: how often each is seen; where: a sample's file and line.
    """
    extra = sum(one.times - 1 for one in found)
    if not found or (extra < SHARE * samples and found[0].times * epochs < OFTEN):
        return None
    return _(
        "{count} of {all} training samples repeat others; {where} stands there {times} times and will be seen "
        "{seen:.0f} times. What is seen so often is learnt by heart: take the repeats out (afina data check --fix)."
    ).format(
        count=extra,
        all=samples,
        where=where(found[0].sample),
        times=found[0].times,
        seen=found[0].times * epochs,
    )
