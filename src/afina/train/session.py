"""One sitting of a run: follows the loop, writes its log, saves and restores its state, and ends it in good order."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from afina.console import Console, Progress
from afina.data.batch import Batch
from afina.errors import Interrupted, OutputError, ResourceError
from afina.language import _
from afina.train.best import BEYOND, VALIDATION, Measured, Weights, figure_of, put_back, weights_of, why_last
from afina.train.checkpoint import Checkpoint, Damaged, listed, restore
from afina.train.keeper import Keeper
from afina.train.looking import figures_or_none, tell
from afina.train.memory import Room, peak_memory, probe, within_memory
from afina.train.plan import Plan
from afina.train.record import Record, Tally, told
from afina.train.state import Follower, State, StepReport
from afina.train.stop import Stop
from afina.train.surroundings import differences
from afina.train.trend import Finding, judge, memorised, stands_still
from afina.train.watch import PATIENCE, Diverged, Rejection, in_words

T = TypeVar("T")
SHOWN = 8
"""Samples of a rejected step that are printed; the log has all."""


@dataclass
class Session(Follower):
    """Follows one call of `train`; `tally` and `room` live on in the checkpoints."""

    plan: Plan
    console: Console
    progress: Progress
    record: Record
    keeper: Keeper
    stop: Stop
    room: Room
    tally: Tally = field(default_factory=Tally)
    saved: int | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)
    _waits: bool = False
    _torn: int = 0

    def go_on(self, state: State) -> None:
        """Take up the newest good checkpoint where there is one. Raises OutputError when it is of other weights."""
        checkpoint = self.keeper.newest()
        if checkpoint is None:
            if listed(self.keeper.folder):
                self.console.warn(_("None of the checkpoints can be used: the run begins anew."))
            self.record.cut({"bytes": 0, "sha256": ""})
            return
        self._restore(state, checkpoint)
        self.tally.resumed_after.append(state.step)
        resumed, saved = _("Resumed   after step {step} of {steps}, saved {when}"), checkpoint.facts["saved"]
        self.console.line(resumed.format(step=state.step, steps=self.plan.steps, when=saved))
        self.console.event("resumed", step=state.step, steps=self.plan.steps)
        self._advance(range(state.step))
        self.progress.advance(self._looked())
        if not self.plan.exact:
            self.console.warn(
                _(
                    "training.exact is false: from here on the numbers may differ in their last bits from those of a "
                    "run that was not stopped."
                )
            )
        if found := differences(checkpoint.facts["surroundings"], self.plan.surroundings):
            self.console.warn(
                _(
                    "Not everything is as it was when the checkpoint was made: {differences}. Training goes on from "
                    "the same weights with the same samples; its numbers may differ in their last bits."
                ).format(differences=", ".join(found))
            )

    def try_memory(self, make: Callable[[], Sequence[Batch]], compute: Callable[[Batch], object], state: State) -> None:
        """Run the largest micro-batch once, forward and backward, before the first step; nothing but `room` changes."""
        if state.step >= self.plan.steps:
            return
        try:
            lines = self.stop.compute(partial(probe, self.room, make, compute))
        finally:
            state.optimizer.zero_grad(set_to_none=True)
        self._since = time.perf_counter()
        for line in lines:
            self._log(line)
        if lines:
            self.console.warn(
                _("The memory did not hold {before} tokens at once: {after} are tried instead.").format(
                    before=lines[0]["before"], after=self.room.tokens
                )
            )

    def on_whole(self, state: State) -> None:
        self.stop.check()
        if self.keeper.due() and state.watch.in_a_row == 0 and self.saved != state.step:
            self._save(state, wait=False)

    def finish(self, state: State) -> str | None:
        """Save what the last step left; returns the hash of weights and moments, None when the disk refused them."""
        self._save(state, wait=True)
        saved = self.keeper.good[-1] if self.keeper.good else None
        self._take_best(state)
        return saved.digest if saved is not None and saved.step == state.step else None

    def offer(self, figure: str, value: float, state: State, measured: Measured | None = None) -> bool:
        """A figure was measured of these weights: remember them when it is the one that decides and none was better.

        `measured`: on what samples; then what is worse by chance at most is as good, and the later is taken.
        """
        criterion, tally = self.plan.criterion, self.tally
        if criterion is None or criterion.figure != figure or not math.isfinite(value):
            return False
        lowest = tally.lowest
        if lowest is None or criterion.prefers(value, lowest["value"]):
            tally.lowest = {"step": state.step, "value": value, "sums": list(measured.sums) if measured else []}
        elif measured is None or abs(value - lowest["value"]) > BEYOND * measured.chance(lowest["sums"]):
            return False
        held_out = tally.validation[-1] if tally.validation else None
        tally.best = {"step": state.step, "figure": figure, "value": value, "validation_loss": held_out}
        self.keeper.best = Weights(state.step, weights_of(state), {"best": tally.best})
        return True

    def _take_best(self, state: State) -> None:
        best = self.tally.best
        self.kept = {
            "step": state.step,
            "validation_loss": self.tally.validation[-1] if self.tally.validation else None,
        }
        if best is None or best["step"] == state.step:
            if told := why_last(best, self.tally.lowest, self.plan.held_out_samples):
                self.console.line(told)
            return
        weights = self.keeper.weights(best["step"])
        if weights is None or not put_back(state, weights):
            self.console.warn(
                _("The weights after step {step}, which were the best, cannot be read; the last ones are kept.").format(
                    step=best["step"]
                )
            )
            return
        self.kept = {key: best[key] for key in self.kept}
        self.console.line(
            _("Best      {figure} {value:.4f} after step {step} of {steps}: those weights are kept").format(
                steps=self.plan.steps, **best
            )
        )
        self.console.event("best", **best)

    def figures(self, state: State, digest: str | None) -> dict[str, Any]:
        """What the manifest says of the training."""
        if self.tally.first_loss is None:
            raise Diverged(_("Not one step gave a loss to learn from."), hint=_("Lower training.learning_rate."))
        return {
            "steps": state.step,
            "planned_steps": self.plan.steps,
            **self.tally.figures(),
            "peak_memory_bytes": max(self.tally.peak_memory, peak_memory(self.plan.hardware)),
            "validation_loss": self.kept["validation_loss"],
            "kept_step": self.kept["step"],
            "micro_batch_tokens": self.room.tokens,
            "out_of_memory": self.room.history,
            "rejected": [asdict(state.watch.known[step]) for step in sorted(state.watch.known)],
            "state_sha256": digest,
        }

    def interrupted(self, state: State, by: Interrupted) -> Interrupted:
        """Save and close; returns what to tell the user. A second signal ends this at once."""
        self.keeper.settle(wait=True)
        if not self.keeper.good or self.keeper.good[-1].step != state.step:
            self._save(state, wait=True)
        self.record.waiting.clear()  # what could not be written is of steps that will be done again
        step = self.keeper.good[-1].step if self.keeper.good else 0
        message = _("{stopped} All up to step {step} of {steps} is saved.").format(
            stopped=by.message, step=step, steps=self.plan.steps
        )
        hint = _("The run is not finished. Run the same command again to go on from there.")
        return Interrupted(message, signal_number=by.exit_status - 128, hint=hint)

    def compute(self, work: Callable[[], T]) -> T:
        return self.stop.compute(work)

    def on_step(self, report: StepReport, samples: Sequence[int]) -> None:
        tally = self.tally
        tally.first_loss = report.loss if tally.first_loss is None else tally.first_loss
        tally.final_loss = report.loss
        tally.tokens += report.tokens
        tally.learnt += report.learnt
        tally.since = [tally.since[0] + report.loss, tally.since[1] + 1]
        tally.learn(report.step, list(samples))
        facts = {"kind": "step", "epoch": round(self.plan.epoch(report.step), 4), **vars(report)}
        self._log(facts)
        text = _("step {step}/{steps} · loss {loss:.3f} · lr {rate:.1e} · {speed:,.0f} tokens/s · {memory:.2f} GiB")
        self.progress.advance(
            self.plan.work(report.step - 1),
            text.format(
                step=report.step,
                steps=self.plan.steps,
                loss=report.loss,
                rate=report.learning_rate,
                speed=report.tokens / report.seconds,
                memory=peak_memory(self.plan.hardware) / 2**30,
            ),
            **facts,
        )

    def on_rejection(self, rejection: Rejection) -> None:
        facts = {"kind": "rejected", **asdict(rejection), "samples": list(rejection.samples)}
        self._log(facts)
        more = [_("... and {count} more").format(count=rest)] if (rest := len(rejection.samples) - SHOWN) > 0 else []
        self.console.warn(
            _("Step {step} was not taken: {reason}. Its samples: {samples}").format(
                step=rejection.step,
                reason=in_words(rejection.reason),
                samples=", ".join([self.plan.where(sample) for sample in rejection.samples[:SHOWN]] + more),
            )
        )
        self._advance([rejection.step - 1])

    def on_validation(self, state: State) -> None:
        # Both are measured before either is noted: a run that is stopped in between does both again.
        measured = self._measured(state, self.plan.held_out) if state.step in self.plan.validate_after else None
        asking = self.plan.asking if state.step in self.plan.asking.after else None
        figures = figures_or_none(asking.ask, self.stop, self.console, state.step) if asking else None
        if measured is not None:
            self._note_loss(measured, state)
        if figures is not None:
            self._note_figures(figures, state)

    def _note_loss(self, measured: Measured, state: State) -> None:
        loss = measured.loss if math.isfinite(measured.loss) else None
        self.tally.validated(loss)
        self._log({"kind": "validation", "step": state.step, "loss": loss})
        self.progress.advance(self.plan.measure_work)
        self.console.event("validation", step=state.step, loss=loss)
        if loss is None:
            self.console.warn(_("The validation loss after step {step} is not a number.").format(step=state.step))
        self.offer(VALIDATION, measured.loss, state, measured)
        self._look(state)

    def _look(self, state: State) -> None:
        """Say what the curves show, once a kind; end the run where it is beyond doubt and the recipe lets us."""
        self._tell(judge(self.tally.trained, self.tally.validation, self.plan.held_out_samples), state)
        if self.plan.again and stands_still(self.tally.validation) and not self._told("memorised"):
            losses, epochs = self._measured(state, self.plan.learnt_again), self.plan.epoch(state.step)
            self._tell(memorised(self.plan.again, losses, self.tally.validation, epochs, self.plan.where), state)

    def _told(self, kind: str) -> bool:
        return kind in {known["kind"] for known in self.tally.findings}

    def _tell(self, finding: Finding | None, state: State) -> None:
        tally, criterion = self.tally, self.plan.criterion
        if finding is None:
            return
        by_loss = criterion is None or criterion.figure == VALIDATION
        as_good = tally.best is not None and tally.best["step"] == state.step  # as the best, or worse by chance
        ends = self.plan.early_stop and by_loss and finding.sure and not as_good and state.step < self.plan.steps
        if not ends and self._told(finding.kind):
            return
        tally.findings.append({"step": state.step, "kind": finding.kind, "ended": ends, "text": finding.text})
        self._log({"kind": "finding", "step": state.step, "finding": finding.kind, "ended": ends})
        self.console.warn(finding.text)
        if ends:
            state.last = state.step
            self.console.warn(
                _("The run ends early, after step {step} of {steps} (training.early_stop).").format(
                    step=state.step, steps=self.plan.steps
                )
            )

    def _note_figures(self, figures: list[dict[str, Any]], state: State) -> None:
        self.progress.advance(self.plan.asking.work)
        self.tally.heard(state.step, figures)
        for facts in figures:
            self._log({"kind": "evaluation", "step": state.step, **facts})
            tell(facts, self.console, state.step, self.plan.steps)
            if facts["value"] is not None:
                self.offer(figure_of(facts["task"]), facts["value"], state)

    def _looked(self) -> int:
        return self.plan.measure_work * len(self.tally.validation) + self.plan.asking.work * self.tally.asked

    def _measured(self, state: State, make: Callable[[], Sequence[Sequence[Batch]]]) -> Measured:
        while True:
            groups = make()
            found = self.stop.compute(partial(within_memory, partial(self.plan.measure, groups)))
            if found is not None:
                return found
            self.on_out_of_memory(state.step - 1, [batch for batches in groups for batch in batches])

    def on_out_of_memory(self, step: int, batches: Sequence[Batch]) -> None:
        self._log(self.room.shrink(step + 1, batches))
        self.console.warn(
            _(
                "The memory did not hold {before} tokens at once; step {step} is done again with {after}. "
                "The result stays the same, it takes longer."
            ).format(**self.room.history[-1])
        )

    def go_back(self, state: State) -> None:
        checkpoint = self.keeper.newest(lambda found: found.facts["watch"]["in_a_row"] == 0)
        if checkpoint is None or checkpoint.step >= state.step:
            raise Diverged(_("The loss is no number, and there is no good checkpoint to go back to."))
        watch = state.watch
        watch.go_back(checkpoint.facts["watch"])
        self._turn_back(state, checkpoint)
        state.watch = watch
        self.console.warn(
            _("{count} steps in a row were not taken: back to step {step}; the samples of those are left out.").format(
                count=PATIENCE, step=state.step
            )
        )
        self._save(state, wait=True)  # so that no kill makes us forget what is left out

    def on_torn(self, state: State) -> None:
        step, checkpoint = state.step + 1, self.keeper.newest()
        if checkpoint is None or step <= self._torn:  # again, with all the memory there is
            raise ResourceError(
                _("The memory does not hold what the optimiser needs for step {step}.").format(step=step),
                hint=_("Set training.optimizer to paged-adamw-8bit, lower method.rank, or close other programs."),
            )
        self._torn = step
        self._turn_back(state, checkpoint)
        self.console.warn(
            _("The memory ran out in the optimiser's step {step}: back to step {saved}, to do the same again.").format(
                step=step, saved=state.step
            )
        )

    def _turn_back(self, state: State, checkpoint: Checkpoint) -> None:
        """The state as it was; but what was learnt of the memory stays, and so does the time it took."""
        room, history, before, looked = self.room, self.room.history, self.tally, self._looked()
        tokens, steps = room.tokens, range(checkpoint.step, state.step)
        self._restore(state, checkpoint)
        self.tally.seconds, self.tally.peak_memory = before.seconds, before.peak_memory
        room.tokens, room.history = tokens, history
        for entry in (known for known in history if known["step"] > state.step):
            self._log({"kind": "memory", **entry})
        self._advance(steps, -1)
        self.progress.advance(self._looked() - looked)

    def _save(self, state: State, *, wait: bool) -> None:
        began = time.perf_counter()
        self.tally.seconds += time.perf_counter() - self._since
        self._since = time.perf_counter()
        self.tally.peak_memory = max(self.tally.peak_memory, peak_memory(self.plan.hardware))
        try:
            mark = self.record.mark()
        except OutputError as error:
            self.keeper.refused(error)
            return
        more = {
            "saved": datetime.now(UTC).isoformat(timespec="seconds"),
            "tally": self.tally.dump(),
            "best": self.tally.best["step"] if self.tally.best else None,
            "room": asdict(self.room),
            "log": mark,
            "surroundings": self.plan.surroundings,
        }
        self.keeper.save(state, more, wait=wait, first=self.record.sync)
        self.saved = state.step
        if not wait:
            self.tally.checkpoints += 1
            self.tally.checkpoint_seconds += time.perf_counter() - began

    def _restore(self, state: State, checkpoint: Checkpoint) -> None:
        try:
            restore(state, checkpoint)
        except Damaged as damage:
            raise OutputError(
                _("The checkpoint {name} cannot be gone on with: {reason}.").format(
                    name=checkpoint.place, reason=damage
                ),
                hint=_("Go on with the versions it was made with, or remove the run folder to begin anew."),
            ) from damage
        self.tally = Tally(**checkpoint.facts["tally"])
        self.keeper.best = None  # it is of steps that will be done again
        self.room.tokens, self.room.history = checkpoint.facts["room"]["tokens"], checkpoint.facts["room"]["history"]
        if not self.record.cut(checkpoint.facts["log"]):
            self.console.warn(
                _("{path} was changed or damaged; the weights are whole, but lines of the log are missing.").format(
                    path=self.record.path
                )
            )

    def _log(self, line: dict[str, Any]) -> None:
        written = self.record.add(line)
        if not written and not self._waits:
            self.console.warn(told(self.record.path))
        self._waits = not written

    def _advance(self, steps: Sequence[int], sign: int = 1) -> None:
        if done := sum(self.plan.work(step) for step in steps):
            self.progress.advance(sign * done)
