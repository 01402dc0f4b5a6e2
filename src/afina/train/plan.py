"""What one run is to do, as a session follows it: what is looked at when, and what the results rest on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from afina.data.batch import Batch
from afina.model.load import Hardware
from afina.train.best import Criterion, Measured
from afina.train.looking import Asking
from afina.train.repeats import Repeated


@dataclass(frozen=True)
class Plan:
    """What this run is to do. `work(step)`: units of progress of a step (from 0); `epoch(step)`: passes done by then.

    `held_out()`: the validation samples in groups of micro-batches, `measure(groups)` their losses, `measure_work` its
    units of progress; `again`: training samples that repeat, `learnt_again()` the same, each in micro-batches;
    `where(sample)` names a sample's line. `surroundings`: what the last bits depend on; `exact`: whether, they being
    the same, the bits are. `criterion`: by which figure the best weights are kept and taken at the end; None: the last
    ones are. `early_stop`: whether what the curves show may end the run; `held_out_samples`: how many the validation
    has. `asking`: the tasks that are asked while it trains.
    """

    steps: int
    hardware: Hardware
    epoch: Callable[[int], float]
    work: Callable[[int], int]
    held_out: Callable[[], Sequence[Sequence[Batch]]]
    measure: Callable[[Sequence[Sequence[Batch]]], Measured]
    measure_work: int
    validate_after: frozenset[int]
    where: Callable[[int], str]
    surroundings: dict[str, str]
    again: Sequence[Repeated] = ()
    learnt_again: Callable[[], Sequence[Sequence[Batch]]] = list
    exact: bool = True
    criterion: Criterion | None = None
    early_stop: bool = True
    held_out_samples: int = 0
    asking: Asking = field(default_factory=Asking)
