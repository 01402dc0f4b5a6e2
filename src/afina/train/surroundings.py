"""What the last bits of a result depend on beside the recipe: versions, hardware, threads, engine."""

import platform

import torch

from afina.artifact import versions


def surroundings(hardware: str, engine: str, plan: str | None = None) -> dict[str, str]:
    """What the last bits of a result depend on, beside the recipe. plan: what of the engine's they do."""
    return {
        **({} if plan is None else {"plan": plan}),
        **versions(),
        "hardware": hardware,
        "cuda": str(torch.version.cuda),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "engine": engine,
        "host": platform.node(),
    }


def differences(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """What is not as it was when a checkpoint was made; the host's name alone changes no bit."""
    names = sorted((then.keys() | now.keys()) - {"host"})
    return [f"{name} {then.get(name)} → {now.get(name)}" for name in names if then.get(name) != now.get(name)]
