"""What the losses of a run say while it trains: it overfits, diverges, or hardly moves; and which knob to turn.

Judged at each validation, from two curves alone: the validation loss, and the mean training loss of the steps since the
validation before. So a resumed run is told the same at the same step. Only what is beyond doubt ends a run: the
validation loss rose twice in a row, by a tenth in all, on enough samples (Prechelt, "Early Stopping - But When?", 1998,
on why one rise means little). A run that still gets better, or stands still, is never ended.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from afina.language import _
from afina.train.best import Measured
from afina.train.repeats import Repeated

RISE = 1.10
"""A validation loss so many times the best is worse beyond the noise of one and the same set."""
FALL = 0.98
"""A loss that has not come down to this part of where it began is flat."""
GAP = 4.0
"""A validation loss so many times the training loss, and no longer falling: the samples are known by heart."""
COLLAPSE = 0.1
"""A repeated sample whose loss is below this part of the validation loss is known by heart."""
ENOUGH = 16
"""Validation samples without which nothing is ended: a few say too little."""


@dataclass(frozen=True)
class Finding:
    """`kind`: overfits, diverges, by heart, memorised or flat. `sure`: the run may end for it. `text`: what to do."""

    kind: str
    sure: bool
    text: str


def stands_still(validation: Sequence[float | None]) -> bool:
    """Whether the validation loss no longer falls."""
    held = [value for value in validation[-2:] if value is not None]
    return len(held) == 2 and held[1] > FALL * held[0]


def memorised(
    again: Sequence[Repeated],
    measured: Measured,
    validation: Sequence[float | None],
    epochs: float,
    where: Callable[[int], str],
) -> Finding | None:
    """The repeated sample whose loss has collapsed while the validation loss, in nats, stands still; None without one.

    measured: one group for each of `again`; epochs: passes over the data so far; where: a sample's file and line.
    """
    now = validation[-1]
    losses = [total / count for total, count in zip(measured.sums, measured.counts, strict=True)]
    place = min(range(len(losses)), key=losses.__getitem__)
    if now is None or not losses[place] < COLLAPSE * now:
        return None
    text = _(
        "{where}, which stands {times} times in the data and was seen {seen:.0f} times, has a loss of {loss:.4f} while "
        "the validation stays at {now:.3f}: it is learnt by heart. Take the repeats out (afina data check --fix), or "
        "lower training.epochs."
    ).format(
        where=where(again[place].sample),
        times=again[place].times,
        seen=again[place].times * epochs,
        loss=losses[place],
        now=now,
    )
    return Finding("memorised", False, text)


def judge(trained: Sequence[float], validation: Sequence[float | None], samples: int) -> Finding | None:
    """What the last validation shows, or None for a run that goes well.

    trained: mean training losses between validations; validation: losses, one for each; None where it was no number.
    samples: how many the validation has.
    """
    held = [value for value in validation if value is not None]
    if len(held) < 2 or len(held) != len(validation) or len(trained) != len(held):
        return None
    best, now = min(held), held[-1]
    place = held.index(best)
    worse = len(held) > 2 and now > RISE * best and held[-2] > best
    rising = held[-3:] == sorted(held[-3:])
    learns = trained[-1] <= trained[place]
    if worse and learns:
        text = _(
            "The validation loss has risen from {best:.3f} to {now:.3f} while the training loss fell from {before:.3f} "
            "to {after:.3f}: the model learns the samples by heart (overfitting). Fewer epochs (training.epochs), more "
            "samples, a lower method.rank or some method.dropout help."
        ).format(best=best, now=now, before=trained[place], after=trained[-1])
        return Finding("overfits", rising and samples >= ENOUGH, text)
    if worse and trained[-1] > RISE * min(trained):
        text = _(
            "Training loss and validation loss rise together, to {after:.3f} and {now:.3f}: the run diverges. A lower "
            "training.learning_rate, by a factor of three to ten, or a longer training.warmup helps."
        ).format(after=trained[-1], now=now)
        return Finding("diverges", rising and samples >= ENOUGH, text)
    if now > GAP * trained[-1] and now > FALL * held[-2]:
        text = _(
            "The validation loss stays at {now:.3f} while the training loss is {after:.3f}: what is learnt now are the "
            "samples themselves. More samples help more than more epochs (training.epochs)."
        ).format(now=now, after=trained[-1])
        return Finding("by heart", False, text)
    if now > FALL * held[0] and trained[-1] > FALL * trained[0]:
        text = _(
            "The loss hardly moves: training {before:.3f} to {after:.3f}, validation {first:.3f} to {now:.3f}. If that "
            "is not yet good enough, raise training.learning_rate by a factor of three to ten."
        ).format(before=trained[0], after=trained[-1], first=held[0], now=now)
        return Finding("flat", False, text)
    return None
