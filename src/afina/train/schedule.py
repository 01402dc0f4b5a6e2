"""How the learning rate rises and falls: a pure function of the step."""

import math

from afina.recipe.schema import Training


def warmup_steps(training: Training, steps: int) -> int:
    """Steps of warm-up: a share of all steps below 1, a number of steps from 1."""
    return round(training.warmup * steps) if training.warmup < 1 else int(training.warmup)


def learning_rate(training: Training, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up to the peak, then the schedule, ending near zero."""
    warm = warmup_steps(training, steps)
    if step < warm:
        return training.learning_rate * (step + 1) / (warm + 1)
    done = (step - warm) / max(1, steps - warm)
    match training.schedule:
        case "cosine":
            return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            return training.learning_rate * (1 - done)
        case _:
            return training.learning_rate
