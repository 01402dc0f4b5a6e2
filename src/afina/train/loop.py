"""THE LOOP. Everything else prepares it or looks at what came out.

A step is a list of micro-batches. The loss is summed over the learnt tokens of all of them and divided by what they
count (their number, where each weighs 1), so the gradient does not depend on how the step was cut. Order, learning
rate and dropout are pure functions of the step's number; all that a step changes is in `State` (state.py). The loop
knows nothing of files, methods or models: it gets a model some of whose parameters learn, a function that makes the
micro-batches of a step, and a Follower to report to.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from afina.data.batch import Batch
from afina.data.order import derived_seed
from afina.model.load import Hardware
from afina.recipe.schema import Training
from afina.train.best import Measured
from afina.train.memory import within_memory
from afina.train.optimizer import clip
from afina.train.schedule import learning_rate
from afina.train.state import Follower, State, StepReport
from afina.train.watch import PATIENCE, Rejection

LossFunction = Callable[[nn.Module, Batch], torch.Tensor]
"""Model and batch to the sum of the loss over the batch's targets."""
MakeStep = Callable[[int], Sequence[Batch]]
"""Step (from 0) to its micro-batches."""


def train(
    model: nn.Module,
    make_step: MakeStep,
    state: State,
    *,
    steps: int,
    training: Training,
    seed: int,
    hardware: Hardware,
    loss_fn: LossFunction,
    follower: Follower,
    validate_after: frozenset[int] = frozenset(),
) -> None:
    """Run the optimiser steps that are left of `steps`. Raises Diverged when going back does not help either."""
    model.train()
    while True:
        if state.step in validate_after and state.validated < state.step:
            model.eval()
            follower.on_validation(state)
            model.train()
            state.validated = state.step
        if state.watch.in_a_row >= PATIENCE:
            follower.go_back(state)
        follower.on_whole(state)
        if state.step >= steps or state.step == state.last:
            break

        rejection = state.watch.known.get(state.step + 1)  # known after going back: its samples are left out
        if rejection is None:
            started = time.perf_counter()
            rate = learning_rate(training, state.step, steps)
            for group in state.optimizer.param_groups:
                group["lr"] = rate * group["rate"]
            batches, loss = _compute(model, make_step, state, seed, hardware, loss_fn, follower)
            state.scaler.unscale_(state.optimizer)
            norm = _clip(state, training)
            rejection = _judge(state, batches, loss.item(), norm.item())
            if rejection is None and not _learn(state, loss.item(), norm.item()):
                follower.on_torn(state)
                continue
        state.step += 1
        if rejection is not None:
            follower.on_rejection(rejection)
            continue
        learnt, tokens = (sum(count) for count in zip(*((b.targets.numel(), b.tokens) for b in batches), strict=True))
        seconds = time.perf_counter() - started
        report = StepReport(state.step, loss.item(), norm.item(), rate, tokens, learnt, seconds)
        follower.on_step(report, sorted(sample for batch in batches for sample in batch.samples))
    model.eval()


def _compute(
    model: nn.Module,
    make_step: MakeStep,
    state: State,
    seed: int,
    hardware: Hardware,
    loss_fn: LossFunction,
    follower: Follower,
) -> tuple[list[Batch], torch.Tensor]:
    """Gradients and loss of one step, in micro-batches that fit into the memory."""
    while True:
        made = make_step(state.step)
        batches = [batch.to(hardware.device) for batch in made]
        learnt = sum(batch.weight for batch in made)
        state.optimizer.zero_grad(set_to_none=True)
        work = partial(accumulate, model, batches, learnt, seed, state.step, hardware, loss_fn, state.scaler)
        loss = follower.compute(partial(within_memory, work))
        if loss is not None:
            return batches, loss
        follower.on_out_of_memory(state.step, made)


def _clip(state: State, training: Training) -> torch.Tensor:
    """Scale the gradients down to the norm that is allowed; returns the norm they had.

    Where memory runs out nothing is scaled yet; the passes' own memory is given back then, and it is tried again.
    """
    work = partial(clip, state.optimizer, state.learning, training.clip_norm or math.inf)
    norm = within_memory(work)
    return work() if norm is None else norm


def _judge(state: State, batches: Sequence[Batch], loss: float, norm: float) -> Rejection | None:
    """Why the optimiser shall not step, or None; where it shall not, weights and moments are untouched."""
    if (reason := state.watch.judge(loss, norm, may_overflow=state.scaler.is_enabled())) is None:
        return None
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    samples = tuple(sorted(sample for batch in batches for sample in batch.samples))
    first, second = (value if math.isfinite(value) else None for value in (loss, norm))
    state.watch.reject(rejection := Rejection(state.step + 1, reason, first, second, samples))
    return rejection


def _learn(state: State, loss: float, norm: float) -> bool:
    """Let the optimiser step; False where the memory ran out in it: then some weights have learnt, and others not."""
    taken = within_memory(lambda: (state.scaler.step(state.optimizer),))  # in fp16 it may skip the step
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if taken is not None:
        state.watch.accept(state.step + 1, loss, norm)
    return taken is not None


def accumulate(
    model: nn.Module,
    batches: Sequence[Batch],
    learnt: float,
    seed: int,
    step: int,
    hardware: Hardware,
    loss_fn: LossFunction,
    scaler: torch.amp.GradScaler | None = None,
) -> torch.Tensor:
    """Add the gradients of a step's mean loss to the parameters' `.grad`; returns that mean, on the device.

    Dropout of micro-step m depends on (seed, step, m) alone.
    """
    total = torch.zeros((), device=hardware.device)
    for micro_step, batch in enumerate(batches):
        torch.manual_seed(derived_seed(seed, "dropout", step, micro_step))
        with hardware.autocast():
            loss = loss_fn(model, batch) / learnt
        (scaler.scale(loss) if scaler else loss).backward()
        total += loss.detach()
    return total


@torch.no_grad()  # not inference_mode: what attention remembers of a layout must serve the training too
def measure(model: nn.Module, groups: Sequence[Sequence[Batch]], hardware: Hardware, loss_fn: LossFunction) -> Measured:
    """The loss on each group of micro-batches, without learning from them."""
    sums = []
    for batches in groups:
        total = torch.zeros((), dtype=torch.float64, device=hardware.device)
        for batch in batches:
            with hardware.autocast():
                total += loss_fn(model, batch.to(hardware.device)).double()
        sums.append(total)
    counts = tuple(sum(batch.weight for batch in batches) for batches in groups)
    return Measured(tuple(torch.stack(sums).tolist()), counts)
