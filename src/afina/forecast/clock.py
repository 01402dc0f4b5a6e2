"""How long a training takes: by the micro-batches that it really has and a GPU's data sheet, or a short trial here.

An estimate, told as a range. Of what it was held to, docs/speed.md and tests/forecast have the figures.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from afina.data.batch import Batch
from afina.data.order import order_of
from afina.engine.engine import Engine
from afina.engine.plan import LAYER_US, count_up
from afina.forecast.device import Device
from afina.forecast.weigh import Given, Need, batches_of, opened
from afina.model.load import Hardware
from afina.model.loss import summed_loss
from afina.model.packed import packed_attention
from afina.model.skeleton import on_cpu
from afina.train.loop import LossFunction, accumulate

LEAST, MOST = 0.7, 1.25
"""Measured over predicted by a data sheet: 65,536 tokens at once, and gpt-oss's short samples, of 13 workloads on H200
and H100 (benchmarks/results/gpu.jsonl); eight of them lie between 0.88 and 1.0."""
REFERENCE_SHARE = 0.36
"""Of a data sheet's rate, what the reference reaches: W1's shape at 725 ms a step on an H200."""
ON_A_PROCESSOR = 0.8, 1.4
"""What a trial of a few seconds may be off by: other programs, caches, longer samples."""
STEPS_LOOKED_AT = 12
FORWARD = 1 / 3
"""Of a pass, what measuring a loss without learning takes."""
OPTIMIZER = 7
"""Numbers of four bytes that a step reads and writes for each that learns."""
TRIAL_TOKENS, TRIAL_LAYERS, TRIAL_TURNS = 1024, 2, 2
TRIAL_SHARE = 0.25
"""Of what the device may take, the most that a trial may."""


@dataclass(frozen=True)
class Time:
    """seconds: least and most, of all steps and validations; speed: tokens a second, least and most; steps: of the
    optimiser. measured: here, by a trial; else by the data sheet."""

    seconds: tuple[float, float]
    speed: tuple[float, float]
    steps: int
    measured: bool


def steps_of(given: Given) -> int:
    """Optimiser steps of the recipe."""
    training = given.recipe.training
    return training.steps or order_of([row.ids.size for row in given.rows], training, given.recipe.seed).steps


def clock(given: Given, device: Device, need: Need, held_out: int, rate: float | None = None) -> Time | None:
    """The time of all steps; held_out: tokens of the validation. rate: operations a second, where a trial said so.

    None where nothing says how fast the device is.
    """
    training, order = (
        given.recipe.training,
        order_of([row.ids.size for row in given.rows], given.recipe.training, given.recipe.seed),
    )
    steps = training.steps or order.steps
    looked = sorted({round(number * (steps - 1) / max(1, STEPS_LOOKED_AT - 1)) for number in range(STEPS_LOOKED_AT)})
    looked = [step for step in looked if step < steps]
    cut = [batches_of(given, order.step(step), need.budget, packing=need.packing, extra=need.extra) for step in looked]
    passes = [_seconds(batch, device, need, rate) for batches in cut for batch in batches]
    known = [seconds for seconds in passes if seconds is not None]
    if len(known) < len(passes):
        return None
    tokens = sum(batch.tokens for batches in cut for batch in batches)
    a_token = sum(known) / max(tokens, 1)
    learning = steps * (sum(known) / len(looked) + _stepping(need, device))
    validating = FORWARD * a_token * held_out * training.validations
    total, every = learning + validating, tokens / len(looked) * steps
    least, most = ON_A_PROCESSOR if rate is not None else (LEAST, MOST)
    return Time(
        (total * least, total * most), (every / (learning * most), every / (learning * least)), steps, rate is not None
    )


def _seconds(batch: Batch, device: Device, need: Need, rate: float | None) -> float | None:
    """Of one micro-batch, forward and backward."""
    tokens = batch.input_ids.numel() + need.extra * len(batch.samples)
    if rate is not None:
        return need.flops / need.tokens * tokens / rate if need.flops else None
    if device.gpu is None:
        return None
    if need.fused is not None and need.plan is not None:
        whole = count_up(need.fused, replace(need.plan, tokens=tokens), need.rates, max(batch.lengths or (tokens,)))
        return (whole.microseconds - need.plan.held * need.fused.blocks[0].moved / need.rates.memory) / 1e6
    if not need.flops:
        return None
    launching = 2 * LAYER_US * need.layers / 1e6
    return max(launching, need.flops / need.tokens * tokens / (REFERENCE_SHARE * device.gpu.rate * 1e12))


def _stepping(need: Need, device: Device) -> float:
    """The optimiser's own time, and that of clipping."""
    return OPTIMIZER * 4 * need.learnt / (device.rates.memory * 1e6)


def trial(given: Given, device: Device, need: Need) -> float | None:
    """Operations a second of this processor, measured on the first layers of the model with random weights and a real
    micro-batch. None where they would take too much memory."""
    cut = replace(given, layers=TRIAL_LAYERS)
    model, kind = opened(cut, device)
    if kind is not None or need.flops == 0:
        return None
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if size > TRIAL_SHARE * need.limit:
        return None
    _filled(on_cpu(model)).train()
    batches = batches_of(given, _few(given), TRIAL_TOKENS, packing=need.packing, extra=need.extra)
    loss_fn: LossFunction = Engine(model, device.dtype).summed_loss if need.reason is None else summed_loss
    hardware = Hardware(torch.device("cpu"), device.dtype)
    with torch.random.fork_rng(devices=[]), packed_attention(model, need.packing):
        with FlopCounterMode(display=False) as counter:
            accumulate(model, batches[:1], 1.0, 0, 0, hardware, loss_fn)
        began = time.perf_counter()
        for _turn in range(TRIAL_TURNS):
            accumulate(model, batches[:1], 1.0, 0, 0, hardware, loss_fn)
        spent = (time.perf_counter() - began) / TRIAL_TURNS
    return float(counter.get_total_flops()) / spent


def _few(given: Given) -> Sequence[int]:
    """The first samples, as many as a trial takes at once; one at least."""
    tokens, chosen = 0, list[int]()
    for index, row in enumerate(given.rows):
        tokens += row.ids.size
        if chosen and tokens > TRIAL_TOKENS:
            break
        chosen.append(index)
    return chosen


@torch.no_grad()
def _filled(model: nn.Module) -> nn.Module:
    """Random numbers: what lies in new memory may be slow to compute with."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.normal_(0, 0.02)
    return model
