"""Where a recipe is to train: a GPU by its data sheet, or what this machine has; how much it holds, how fast it is."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from afina.console import size
from afina.engine.eight import Format
from afina.engine.eight_gate import FORMATS
from afina.engine.engine import Engine
from afina.engine.mixture import Mixture
from afina.engine.plan import Rates
from afina.forecast.gpus import GIB, MOVED, SHARE, Gpu, find
from afina.language import _
from afina.model.load import DTYPES, choose_hardware
from afina.model.machine import look
from afina.recipe.schema import Recipe
from afina.train.memory import USABLE

CONTEXT = int(0.45 * 2**30)
"""Bytes of a GPU that CUDA and its libraries take before the first tensor."""
RUNNING = int(0.7 * 2**30)
"""Bytes of the computer's memory that Python, torch and transformers take."""
EIGHT_BIT_RATE = {"fp8": 2.0, "int8": 1.0}
"""Times that products in eight bits are as fast: on an H200, steps of W2 and W2i against W1's."""


@dataclass(frozen=True)
class Device:
    """Where it is to train. memory: bytes there are; dtype: what is computed in; gpu: what its data sheet says, where
    that is known."""

    kind: str
    name: str
    memory: int
    dtype: torch.dtype
    gpu: Gpu | None = None

    @property
    def taken(self) -> int:
        """Bytes that go to no tensor."""
        return CONTEXT if self.kind == "cuda" else RUNNING

    def limit(self, held: int) -> int:
        """Bytes that may be taken in all, where `held` are the model's."""
        free = self.memory - self.taken - held
        return held + int(min(free, USABLE * free))

    @property
    def rates(self) -> Rates:
        """For the planner; of a GPU that is not known those of a middling one, as they only choose between places."""
        gpu = self.gpu or Gpu("", 0, 50, 500, 11, 80)
        exact = SHARE * gpu.rate * 1e6 / 2
        return Rates(exact, gpu.link * 1e3, MOVED * gpu.bandwidth * 1e3, exact)

    def eight_bits(self, asked: str) -> Format | None:
        """What training.products means here; None for exact ones."""
        if asked == "exact" or self.gpu is None:
            return None
        able = {"fp8": self.gpu.sm >= 89 and self.dtype == torch.bfloat16, "int8": self.gpu.sm >= 75}
        wanted = ["fp8", "int8"] if asked == "8bit" else [asked]
        return next((FORMATS[name] for name in wanted if able[name]), None)


def in_eight_bits(rates: Rates, engine: Engine, form: Format) -> Rates:
    """Rates of an engine whose products are in eight bits; a mixture's experts are multiplied exactly."""
    times = 1.0 if isinstance(engine.blocks[0], Mixture) else EIGHT_BIT_RATE[form.name]
    return replace(rates, products=rates.products * times)


def device_of(recipe: Recipe, gpu: Gpu | None, memory: float | None) -> Device:
    """Where it would train: the GPU that was named, or what this machine has, as training chooses it."""
    asked = recipe.model.precision
    if gpu is not None or memory is not None:
        bf16 = gpu is None or gpu.bf16
        dtype = DTYPES[("bf16" if bf16 else "fp16") if asked == "auto" else asked]
        room = int(memory * GIB) if memory is not None else gpu.bytes if gpu is not None else 0
        return Device("cuda", gpu.name if gpu else _("a GPU of {memory}").format(memory=size(room)), room, dtype, gpu)
    hardware, machine = choose_hardware(recipe.model), look(Path())
    if hardware.device.type != "cuda":
        return Device(hardware.device.type, str(hardware).partition(",")[0], machine.memory, hardware.dtype)
    here = torch.cuda.get_device_properties(hardware.device)
    return Device("cuda", here.name, here.total_memory, hardware.dtype, find(here.name, here.total_memory / GIB))
