"""What a model says to held-out samples: its loss as in training, with the chance in it, its size, its speed."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from afina.compress.weights import zeros_of
from afina.data.batch import Batch, micro_batches
from afina.data.template import Rendered
from afina.model.load import Hardware
from afina.model.loss import summed_loss
from afina.model.packed import covers, packed_attention
from afina.train.best import GROUPS, Measured
from afina.train.loop import measure

AT_ONCE = {"cpu": 2048, "cuda": 16384}
"""Tokens computed together."""
Z_95 = 1.959963984540054
"""Two-sided 95% of a normal distribution."""


@dataclass(frozen=True)
class Judged:
    """One model. `held_out`: its loss on groups of samples; `speed`: tokens it reads a second; `file_bytes`: of its
    weights on the disk, where it lies there."""

    held_out: Measured
    speed: float
    parameters: int
    zero: int
    prunable: int
    file_bytes: int | None

    def facts(self, before: "Judged | None" = None) -> dict[str, Any]:
        """For the manifest and machines: loss in nats a token with its 95% interval, and, beside the model `before`,
        what it lost on the same samples."""
        loss, chance = self.held_out.loss, self.held_out.chance([0.0] * len(self.held_out.sums))
        facts = {
            "loss": loss,
            "interval": _reach(loss, chance),
            "perplexity": math.exp(min(700.0, loss)),
            "parameters": self.parameters,
            "nonzero": self.parameters - self.zero,
            "zero_share": self.zero / max(1, self.prunable),
            "tokens_per_second": self.speed,
            "file_bytes": self.file_bytes,
        }
        if before is not None:
            change = loss - before.held_out.loss
            facts |= {"change": change, "change_interval": _reach(change, self.held_out.chance(before.held_out.sums))}
        return facts


def judge(
    model: nn.Module, rows: Sequence[Rendered], hardware: Hardware, pad_id: int, folder: Path | None = None
) -> Judged:
    """Have `model`, which lies in `folder`, read the held-out `rows`."""
    packing = covers(model)
    budget = AT_ONCE.get(hardware.device.type, AT_ONCE["cpu"])

    def lay(group: Sequence[int]) -> list[Batch]:
        return micro_batches(rows, group, budget=budget, packing=packing, pad_id=pad_id)

    groups = [lay(range(group, len(rows), GROUPS)) for group in range(min(GROUPS, len(rows)))]
    with packed_attention(model, packing):
        measure(model, [groups[0][:1]], hardware, summed_loss)  # what is computed first pays for warming up
        began = time.perf_counter()
        held_out = measure(model, groups, hardware, summed_loss)
        seconds = time.perf_counter() - began
    zero, prunable = zeros_of(model)
    return Judged(
        held_out,
        sum(row.ids.size for row in rows) / seconds,
        sum(parameter.numel() for parameter in model.parameters()),
        zero,
        prunable,
        None if folder is None else sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    )


def _reach(value: float, chance: float) -> list[float] | None:
    return [value - Z_95 * chance, value + Z_95 * chance] if math.isfinite(chance) else None
