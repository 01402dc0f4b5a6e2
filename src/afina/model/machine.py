"""What this machine is: processor, memory, disk, GPUs, and which optional parts are installed."""

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from afina import durable
from afina.apart import cores
from afina.console import Console, size
from afina.language import _
from afina.recipe.advice import largest, needs

OPTIONAL = ("bitsandbytes", "xllamacpp", "triton")
"""Packages that may be missing."""


@dataclass(frozen=True)
class Machine:
    """memory, disk: bytes. gpus: name, memory, whether it knows bf16, compute capability. parts: versions, or None."""

    python: str
    platform: str
    cores: int
    memory: int
    disk: int
    torch: str
    cuda: str | None
    gpus: list[dict[str, Any]]
    parts: dict[str, str | None]

    @property
    def device_memory(self) -> int:
        """Of the largest GPU, else of the computer."""
        return max((gpu["memory"] for gpu in self.gpus), default=self.memory)

    def facts(self) -> dict[str, Any]:
        """All of it, for machines."""
        return asdict(self)


def purpose_of(part: str) -> str:
    """What is missing without an optional package, and how to get it."""
    return {
        "bitsandbytes": _("missing; for QLoRA, 8-bit and paged optimisers: pip install 'afina[qlora]'"),
        "xllamacpp": _("missing; for certificates of GGUF files and chat with them: pip install 'afina[gguf-run]'"),
        "triton": _("missing; for fused kernels on a GPU: it comes with torch for CUDA"),
    }[part]


def look(folder: Path) -> Machine:
    """Look around; `folder` names the disk."""
    gpus = []
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        capability = f"{found.major}.{found.minor}"
        gpus.append({"name": found.name, "memory": found.total_memory, "bf16": found.major >= 8, "sm": capability})
    return Machine(
        python=platform.python_version(),
        platform=platform.platform(),
        cores=cores(),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        disk=durable.free_bytes(folder.absolute()),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        gpus=gpus,
        parts={name: _version(name) for name in OPTIONAL},
    )


def show(machine: Machine, console: Console) -> dict[str, float | None]:
    """Print it, and the largest base each method trains on it; returns those, in billions of parameters."""
    console.line(_("Python    {python}, torch {torch}, {platform}").format(**machine.facts()))
    console.line(
        _("Computer  {cores} cores, {memory} of memory, {disk} free on this disk").format(
            cores=machine.cores, memory=size(machine.memory), disk=size(machine.disk)
        )
    )
    for gpu in machine.gpus:
        console.line(
            _("GPU       {name}, {memory}, {precision}").format(
                name=gpu["name"], memory=size(gpu["memory"]), precision="bf16" if gpu["bf16"] else "fp16"
            )
        )
    if not machine.gpus:
        console.line(_("GPU       none that torch can use: small models train on the processor"))
    for part, version in machine.parts.items():
        console.line(f"{part:<13} {version or purpose_of(part)}")
    there = bool(machine.gpus)
    fits = {method: largest(machine.device_memory, method, gpu=there) for method in needs(1e9, gpu=there)}
    rows = [(method, f"{billions:g} B" if billions else _("none")) for method, billions in fits.items()]
    console.table((_("method"), _("largest base, in parameters")), rows)
    return fits


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
