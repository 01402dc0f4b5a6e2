"""Which method suits a model, a number of rows and a memory, and why: rules that can be read, and no torch.

Bytes are round numbers: what they choose is a method, not a batch; the engine measures the rest.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.console import size
from afina.errors import RecipeError
from afina.language import _

WEIGHT = {"full": 16.0, "lora": 2.0, "qlora": 0.6}
"""Bytes a parameter of the base: fp32 with gradient and two moments; bf16; NF4 with its scales and the embedding."""
CPU_WEIGHT = {"full": 16.0, "lora": 4.0}
"""On a CPU weights are fp32, and four bits gain nothing that is worth their slowness."""
LEARNT = 0.01 * 16
"""Bytes an adapter adds a parameter of the base: about a hundredth of it learns, in fp32 with gradient and moments."""
WORKING = 1.5 * 2**30
"""Activations of a step with recomputation, and what the device keeps for itself."""
USABLE = 0.9
FEW, MANY = 100, 50_000
"""Rows below which virtual tokens may do, and from which every weight may learn."""
SIZES = (0.135, 0.5, 1.0, 3.0, 8.0, 14.0, 20.0, 32.0, 70.0, 120.0)
"""Billions of parameters of the models people tune."""
SMALL = 5e7
"""Parameters below which the bundled recipes' learning rate of 1e-3 is right."""
EIGHT_BIT_FROM, EIGHT_BIT_GAIN = 1e9, 1.5
"""Parameters of a base from which products in eight bits pay, and W2 over W1 of docs/speed.md."""
KNOWN = {"afina/tiny": 3.9e6, "phi-2": 2.78e9, "phi-1_5": 1.42e9, "gpt2": 1.24e8}


@dataclass(frozen=True)
class Advice:
    """`method`: lora, qlora, full, or None where nothing fits; `overrides`: what a recipe needs for it."""

    method: str | None
    why: str
    needs: dict[str, float]
    overrides: dict[str, Any]


def parameters_of(base: str) -> float | None:
    """How many parameters a model has, by the bytes of its folder or by its name, such as Qwen3-0.6B; None: unknown."""
    folder = Path(base).expanduser()
    if folder.is_dir() and (bytes_there := sum(file.stat().st_size for file in folder.glob("*.safetensors"))):
        return bytes_there / 2
    for name, count in KNOWN.items():
        if base.lower().endswith(name):
            return count
    found = re.findall(r"(?<![\d.a-z])(\d+(?:\.\d+)?)([bm])(?![a-z])", base.lower())
    return float(found[-1][0]) * {"b": 1e9, "m": 1e6}[found[-1][1]] if found else None


def needs(parameters: float, *, gpu: bool) -> dict[str, float]:
    """Bytes each method needs at least, the cheapest last."""
    table = WEIGHT if gpu else CPU_WEIGHT
    return {
        method: parameters * (weight + (0 if method == "full" else LEARNT)) + min(WORKING, parameters * 8)
        for method, weight in table.items()
    }


def largest(memory: float, method: str, *, gpu: bool) -> float | None:
    """The largest of SIZES, in billions, that this method trains in this memory."""
    fits = [size for size in SIZES if needs(size * 1e9, gpu=gpu).get(method, float("inf")) <= USABLE * memory]
    return max(fits, default=None)


def advise(base: str, rows: int | None, memory: float, *, gpu: bool) -> Advice:
    """The method for a base, so many rows (None: not known) and so many bytes of memory.

    Raises RecipeError when neither folder nor name says how large the base is.
    """
    parameters = parameters_of(base)
    if parameters is None:
        raise RecipeError(
            _("How large {base} is cannot be told from its name.").format(base=base),
            hint=_("Name a folder that holds it, or a model whose name says its size, such as Qwen/Qwen3-0.6B."),
        )
    return choose(parameters, rows, memory, gpu=gpu)


def choose(
    parameters: float,
    rows: int | None,
    memory: float,
    *,
    gpu: bool,
    weighed: Mapping[str, float] | None = None,
    room: float | None = None,
) -> Advice:
    """The method for so many parameters. weighed: bytes that methods take, where that was counted; room: bytes that may
    be taken of the memory, where that is known."""
    guessed, room = needs(parameters, gpu=gpu), USABLE * memory if room is None else room
    wanted = {method: (weighed or {}).get(method, guess) for method, guess in guessed.items()}
    fits = [method for method, bytes_wanted in wanted.items() if bytes_wanted <= room]
    facts = {"billions": parameters / 1e9, "memory": size(memory), "rows": rows or 0}
    facts |= {method: size(bytes_wanted) for method, bytes_wanted in wanted.items()}
    if not fits:
        why = _(
            "A base of {billions:.1f} billion parameters needs {least} at least, and there are {memory}. "
            "Take a smaller base, or a machine with more memory."
        ).format(least=size(min(wanted.values())), **facts)
        return Advice(None, why, wanted, {})
    if "full" in fits and rows is not None and rows >= MANY:
        why = _("full: {rows} rows are enough to move every weight, and the {full} it needs fit into {memory}.").format(
            **facts
        )
        return Advice("full", why, wanted, {"method": {"name": "full"}, "training": {"learning_rate": 1e-5}})
    if "lora" in fits:
        why = _(
            "lora: the {lora} it needs fit into {memory}; from fewer than tens of thousands of rows it learns "
            "as well as full fine-tuning does, forgets less, and leaves a small file."
        ).format(**facts)
        return Advice("lora", why + _offer(parameters, gpu=gpu), wanted, _adapter(parameters, rows))
    why = _(
        "qlora: a base of {billions:.1f} billion parameters in bf16 needs {lora}, more than the {memory} "
        "there are; held in four bits it needs {qlora}."
    ).format(**facts)
    overrides = {"model": {"quantization": "nf4"}, **_adapter(parameters, rows)}
    return Advice("qlora", why + _offer(parameters, gpu=gpu), wanted, overrides)


def _offer(parameters: float, *, gpu: bool) -> str:
    """Products in eight bits, where a step is long enough for them to shorten it."""
    if not gpu or parameters < EIGHT_BIT_FROM:
        return ""
    return _(
        " If it must be faster: training.products: 8bit made a step of an 8-billion base {gain:.1f} times as fast on a "
        "data-centre GPU, with some noise in every product; exact is the default."
    ).format(gain=EIGHT_BIT_GAIN)


def _adapter(parameters: float, rows: int | None) -> dict[str, Any]:
    """Few rows bear a narrow adapter, or they are learnt by heart; a very small base wants larger steps."""
    few = rows is not None and rows < FEW
    return {
        "method": {"name": "lora", "rank": 8 if few else 16, "alpha": 16.0 if few else 32.0},
        "training": {"learning_rate": 1e-3 if parameters < SMALL else 2e-4},
    }
