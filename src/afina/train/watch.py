"""Watches loss and gradient: which steps are taken, which are rejected, and when it is time to go back.

A step is rejected when its loss or the norm of its gradient is no number, or spikes. A spike is judged as OLMo's
trainer does (z > 6 over the last 128 steps, from the 64th on), made more careful in three ways, for a fine-tune has few
steps and uneven batches: of the logarithm, whose tail is short; with a spread of 5% at least, for a loss that hardly
moves any more; and only above the highest value of the first 64 steps, so that one hard sample among learnt ones is no
spike. Knows nothing of models or files; all it remembers is in `dump()`, so a resumed run rejects the same steps.
"""

import math
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from afina.errors import AfinaError
from afina.language import _

WINDOW = 128
"""Accepted steps a new one is compared with."""
WARM = 64
"""Accepted steps before the first comparison."""
SIGMAS = 6.0
LEAST_SPREAD = 0.05
"""Of a logarithm: 5% of the value."""
PATIENCE = 3
"""So many rejected steps in a row: the weights themselves may be at fault."""


class Diverged(AfinaError):
    """Loss or gradient stopped being numbers to learn from, and going back to a checkpoint did not help."""


@dataclass(frozen=True)
class Rejection:
    """A step that was not taken. `step` counts from 1; loss and norm are None where they are no number."""

    step: int
    reason: str
    loss: float | None
    grad_norm: float | None
    samples: tuple[int, ...]


class Watch:
    """What was accepted of late, and every step that was rejected."""

    def __init__(self) -> None:
        self.windows: tuple[deque[float], deque[float]] = (deque(maxlen=WINDOW), deque(maxlen=WINDOW))
        self.ceilings = [-math.inf, -math.inf]
        self.accepted = 0
        self.in_a_row = 0
        self.known: dict[int, Rejection] = {}
        self.hope = True

    def judge(self, loss: float, norm: float, *, may_overflow: bool = False) -> str | None:
        """Why a step must not be taken; None when it may. `may_overflow`: gradients of fp16 do; its scaler knows."""
        if not math.isfinite(loss):
            return "loss is no number"
        if not math.isfinite(norm):
            return None if may_overflow else "gradient is no number"
        for name, value, window, ceiling in zip(
            ("loss", "gradient"), (loss, norm), self.windows, self.ceilings, strict=True
        ):
            if len(window) >= WARM and _log(value) > ceiling and _sigmas(_log(value), window) > SIGMAS:
                return f"{name} spikes"
        return None

    def accept(self, step: int, loss: float, norm: float) -> None:
        """A step was taken."""
        for place, value in enumerate((loss, norm)):
            if not math.isfinite(value):
                continue
            self.windows[place].append(_log(value))
            if self.accepted < WARM:
                self.ceilings[place] = max(self.ceilings[place], _log(value))
        self.accepted += 1
        self.in_a_row = 0
        self.hope = self.hope or step > max(self.known, default=0)

    def reject(self, rejection: Rejection) -> None:
        """A step was not taken."""
        self.known[rejection.step] = rejection
        self.in_a_row += 1

    def go_back(self, then: dict[str, Any]) -> None:
        """Remember what a checkpoint remembered (`dump()` of then), and what was rejected since, so that it is skipped.

        Raises Diverged when no new step was accepted since the last time: going back does not help.
        """
        if not self.hope:
            last = [self.known[step] for step in sorted(self.known)[-PATIENCE:]]
            raise Diverged(
                _("{count} steps in a row gave no loss to learn from, the last being step {step}.").format(
                    count=len(last), step=last[-1].step
                ),
                hint=_(
                    "Lower training.learning_rate, or look at the samples named above; then train under another name, "
                    "or remove the folder."
                ),
            )
        known = self.known
        self.load(then)
        self.known |= known
        self.in_a_row = 0
        self.hope = False

    def dump(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {
            "windows": [list(window) for window in self.windows],
            "ceilings": [ceiling if math.isfinite(ceiling) else None for ceiling in self.ceilings],
            "accepted": self.accepted,
            "in_a_row": self.in_a_row,
            "rejected": [asdict(self.known[step]) for step in sorted(self.known)],
            "hope": self.hope,
        }

    def load(self, dumped: dict[str, Any]) -> None:
        """Become what `dump` described."""
        losses, norms = dumped["windows"]
        self.windows = (deque(losses, maxlen=WINDOW), deque(norms, maxlen=WINDOW))
        self.ceilings = [-math.inf if ceiling is None else ceiling for ceiling in dumped["ceilings"]]
        self.accepted = dumped["accepted"]
        self.in_a_row = dumped["in_a_row"]
        self.known = {
            entry["step"]: Rejection(**{**entry, "samples": tuple(entry["samples"])}) for entry in dumped["rejected"]
        }
        self.hope = dumped["hope"]


def _log(value: float) -> float:
    return math.log(max(value, 1e-12))


def _sigmas(value: float, window: deque[float]) -> float:
    mean = sum(window) / len(window)
    spread = math.sqrt(sum((other - mean) ** 2 for other in window) / len(window))
    return (value - mean) / max(spread, LEAST_SPREAD)


def in_words(reason: str) -> str:
    """Why a step was not taken, for people."""
    return {
        "loss is no number": _("its loss is not a number"),
        "gradient is no number": _("its gradient is not a number"),
        "loss spikes": _("its loss is far above that of the steps before"),
        "gradient spikes": _("its gradient is far above that of the steps before"),
    }[reason]
