"""One sitting of a small run in this process, saved at chosen steps, with faults to order."""

import hashlib
import json
from contextlib import closing
from pathlib import Path

import torch
from safetensors.torch import save
from small import CPU, llama
from train.test_loop import rows

from afina.console import Console
from afina.data.batch import micro_batches
from afina.data.order import Order
from afina.model.attach import attach
from afina.model.loss import summed_loss
from afina.recipe.schema import Lora, Training
from afina.train.best import Measured, weights_of
from afina.train.checkpoint import snapshot
from afina.train.keeper import Keeper
from afina.train.looking import Asking
from afina.train.loop import train
from afina.train.memory import Room
from afina.train.plan import Plan
from afina.train.record import Record
from afina.train.session import Session
from afina.train.state import begin
from afina.train.stop import Stop

SAMPLES = rows(24, seed=5)
RUN = "run"


class Killed(BaseException):
    """Ends a sitting as SIGKILL would: nothing more is written."""


class Sitting(Session):
    """Saves after the steps of `save_after`, and only then."""

    save_after: frozenset[int] = frozenset()

    def on_whole(self, state):
        self.stop.check()
        if state.step in self.save_after and self.saved != state.step:
            self._save(state, wait=True)


def sit(
    place: Path,
    *,
    steps=12,
    save_after=(0, 5),
    fault=None,
    hardware=CPU,
    kill_at=None,
    said=None,
    training=None,
    measured=None,
    criterion=None,
    exact=True,
    fault_in_validation=lambda step, batches: None,
    prepare=lambda model, state: None,
    ask=None,
    ask_after=(),
    surroundings=None,
):
    """Train, or go on; returns what must not depend on where it was stopped. `fault(step, batch, loss)` may spoil.

    `measured`: the validation loss after each step of it, or those of four groups of samples. `ask(step)`: what the
    tasks say after steps of `ask_after`.
    """
    order, room = Order(len(SAMPLES), 4, 100.0, 7), Room(80)
    training = training or Training(learning_rate=1e-2, warmup=0, schedule="constant", checkpoint_minutes=1e-9)
    model = attach(llama(), Lora(rank=4, dropout=0.1), seed=0)
    console = Console()
    console.warn = (said if said is not None else []).append  # type: ignore[method-assign]
    console.line = lambda *_text, **_style: None  # type: ignore[method-assign]
    state = begin(model, training, hardware)
    prepare(model, state)

    def loss_fn(model, batch):
        if kill_at == state.step:
            raise Killed
        loss = summed_loss(model, batch)
        return fault(state.step, batch, loss) if fault else loss

    measured = measured or {8: 1.0}

    def validated(groups):
        fault_in_validation(state.step, [batch for batches in groups for batch in batches])
        counts = tuple(sum(batch.weight for batch in batches) for batches in groups)
        losses = measured[state.step] if isinstance(measured[state.step], list) else [measured[state.step]] * 4
        return Measured(tuple(loss * count for loss, count in zip(losses, counts, strict=True)), counts)

    plan = Plan(
        steps,
        hardware,
        order.epoch,
        lambda step: 1,
        lambda: [
            micro_batches(SAMPLES[:8], [place, place + 4], budget=room.tokens, packing=False, pad_id=0)
            for place in range(4)
        ],
        validated,
        1,
        frozenset(measured),
        str,
        surroundings or {},
        exact=exact,
        criterion=criterion,
        held_out_samples=20,
        asking=Asking(lambda: ask(state.step), 3, frozenset(ask_after)),
    )
    with closing(Record(place)) as record, console.progress("x", 1) as progress, Stop().handled() as stop:
        session = Sitting(plan, console, progress, record, Keeper(place / "c", RUN, training, console.warn), stop, room)
        session.save_after = frozenset(save_after)
        session.go_on(state)
        train(
            model,
            lambda step: micro_batches(SAMPLES, order.step(step), budget=room.tokens, packing=False, pad_id=0),
            state,
            steps=steps,
            training=training,
            seed=1,
            hardware=hardware,
            loss_fn=loss_fn,
            follower=session,
            validate_after=plan.validate_after | plan.asking.after,
        )
        last = hashlib.sha256(save(snapshot(state))).hexdigest()
        digest = session.finish(state)
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_bytes().splitlines()]
    tally = {key: value for key, value in session.tally.dump().items() if key not in FLEETING}
    return {
        "tensors": last,
        "held": hashlib.sha256(save(weights_of(state))).hexdigest(),
        "kept": session.kept,
        "saved": digest is not None,
        "finite": all(bool(torch.isfinite(parameter).all()) for parameter in state.learning.values()),
        "watch": state.watch.dump(),
        "scaler": state.scaler.state_dict(),
        "tally": tally,
        "room": vars(session.room),
        "lines": [{key: value for key, value in line.items() if key != "seconds"} for line in lines],
    }


FLEETING = ("seconds", "peak_memory", "resumed_after", "checkpoints", "checkpoint_seconds")
