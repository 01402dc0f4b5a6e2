"""When checkpoints are saved, how many are kept, and what happens when the disk refuses one.

A save is a copy in main memory, for which the loop waits, and a thread that writes it, for which it does not. The time
between two saves is a hundred times what the last one took, so that saving costs 1% at most; no less than ten seconds,
no more than ten minutes. The best weights are written before the first checkpoint that names them, and kept as long
as one does. Knows nothing of what else a run writes.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from afina import durable
from afina.errors import OutputError
from afina.language import _
from afina.recipe.schema import Training
from afina.train.best import Weights
from afina.train.checkpoint import (
    Checkpoint,
    Layout,
    Snapshot,
    facts_of,
    listed,
    newest,
    prune,
    tensors_of,
    write,
)
from afina.train.memory import within_memory
from afina.train.state import State

BEST = "best"
"""The folder, beside the checkpoints, of the best weights."""
COST = 100
"""A save may come again after so many times what it took."""
LEAST_S, MOST_S = 10.0, 600.0
RETRY_S = 10.0
"""After a save that failed."""


class Keeper:
    """The checkpoints of one run. `tell` gets a sentence when something goes wrong, and when it is well again."""

    def __init__(self, folder: Path, run: str, training: Training, tell: Callable[[str], None]) -> None:
        self.folder, self.run = folder, run
        self.good: list[Checkpoint] = []
        self.best: Weights | None = None
        """Weights that are not on the disk yet."""
        self._keep, self._minutes, self._tell = training.keep_checkpoints, training.checkpoint_minutes, tell
        self._due_at = 0.0
        self._failing = False
        self._thread: threading.Thread | None = None
        self._outcome: Checkpoint | Exception | None = None
        self._began = 0.0
        self._writing: Weights | None = None
        self._layout: Layout | None = None
        for place in (folder.parent, folder, folder / BEST):
            durable.sweep(place)

    def newest(self, suits: Callable[[Checkpoint], bool] = lambda checkpoint: True) -> Checkpoint | None:
        """The newest good checkpoint there is, once what is being written is written; each damaged one is told."""
        self.settle(wait=True)
        found = newest(self.folder, self.run, self._tell_damage, suits)
        if found is not None and all(found.place != known.place for known in self.good):
            self.good.insert(0, found)
            self._due_at = time.monotonic() + self._interval(0.0)
        return found

    def due(self) -> bool:
        """Whether it is time for the next save, and the last one is done."""
        return self.settle() and time.monotonic() >= self._due_at

    def save(
        self, state: State, more: dict[str, Any], *, wait: bool = False, first: Callable[[], object] = lambda: None
    ) -> None:
        """Copy the state and write it, `more` beside it, in a thread; `wait` until it is on the disk or was refused.

        `more["best"]` is the step of the best weights, or None. `first` is called in the thread before it writes.
        """
        self.settle(wait=True)
        self._began = time.monotonic()
        if self._layout is None or not self._layout.holds(state):
            self._layout = Layout(state)
        copy = within_memory(partial(Snapshot, self._layout))
        if copy is None:
            self.refused(OutputError(_("The memory does not hold a copy of the weights.")))
            return
        facts, step = {**facts_of(state), **more}, state.step
        # While steps are being rejected the weights are under suspicion: then nothing older is given up.
        sound = state.watch.in_a_row == 0
        self._writing, self.best = self.best, None
        self._thread = threading.Thread(target=self._write, args=(step, copy, facts, sound, first), daemon=True)
        self._thread.start()
        if wait:
            self.settle(wait=True)

    def settle(self, *, wait: bool = False) -> bool:
        """See how the last save went; False while it is still under way."""
        if self._thread is None:
            return True
        if wait:
            self._thread.join()
        elif self._thread.is_alive():
            return False
        outcome, self._outcome, self._thread = self._outcome, None, None
        self.best = self.best or self._writing  # what was not written is written with the next one
        if isinstance(outcome, Checkpoint):
            self._due_at = time.monotonic() + self._interval(time.monotonic() - self._began)
            if self._failing:
                self._tell(_("Checkpoints are written again, from step {step} on.").format(step=outcome.step))
            self._failing = False
        elif outcome is not None:
            self.refused(outcome)
        else:
            self._due_at = time.monotonic() + RETRY_S
        return True

    def refused(self, error: Exception) -> None:
        """A save could not be: say so once, and try again soon."""
        self._due_at = time.monotonic() + min(RETRY_S, self._interval(0.0))
        if not self._failing:
            reason = error.message if isinstance(error, OutputError) else str(error)
            self._tell(
                _("No checkpoint could be written: {reason} Training goes on, and it is tried again.").format(
                    reason=reason
                )
            )
        self._failing = True

    def weights(self, step: int) -> dict[str, torch.Tensor] | None:
        """The best weights, known to be those after `step` steps; None when they cannot be read."""
        self.settle(wait=True)
        if self.best is not None and self.best.step == step:
            return self.best.tensors
        found = newest(self.folder / BEST, self.run, self._tell_damage, lambda saved: saved.step == step)
        return None if found is None else tensors_of(found)

    def _write(
        self, step: int, copy: Snapshot, facts: dict[str, Any], sound: bool, first: Callable[[], object]
    ) -> None:
        try:
            tensors = copy.fetch()
            first()
            if best := self._writing:
                write(self.folder / BEST, self.run, best.step, best.tensors, best.facts)
                self._writing = None
            if not copy.finite:
                return
            saved = write(self.folder, self.run, step, tensors, facts)
        except Exception as error:  # noqa: BLE001 - a thread that dies of it would tell nobody
            self._outcome = error
            return
        self.good.append(saved)
        self._outcome = saved
        if sound and len(self.good) > self._keep:
            self.good = self.good[-self._keep :]
            with suppress(OutputError, OSError):
                prune(self.folder, {saved.place for saved in self.good})
                named = {saved.facts.get("best") for saved in self.good}
                prune(
                    self.folder / BEST, {place for _number, step, place in listed(self.folder / BEST) if step in named}
                )

    def _interval(self, cost: float) -> float:
        return self._minutes * 60 if self._minutes is not None else min(MOST_S, max(LEAST_S, COST * cost))

    def _tell_damage(self, place: Path, reason: str) -> None:
        self._tell(
            _("The checkpoint {name} is damaged ({reason}), and is not used.").format(name=place.name, reason=reason)
        )
