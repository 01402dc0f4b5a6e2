"""GPUs by name: what they have by their makers' data sheets. Knows nothing of this machine, and imports no torch.

GeForce cards sum 16-bit products in fp32 at half of the rate that is advertised, which is the one given here.
"""

import re
from dataclasses import dataclass

from afina.errors import ResourceError
from afina.language import _

GIB = 2**30
SHARE, MOVED = 0.68, 0.8
"""Of a data sheet's rates, what products in bf16 and passes over memory reach (docs/speed.md, on an H200)."""


@dataclass(frozen=True)
class Gpu:
    """memory: GiB that the driver shows. rate: TFLOP/s of dense 16-bit products summed in fp32. bandwidth: GB/s of its
    memory. link: GB/s to the computer's memory, from pinned places. bf16: whether it multiplies that; else fp16.
    sm: compute capability, times ten."""

    name: str
    memory: float
    rate: float
    bandwidth: float
    link: float
    sm: int

    @property
    def bf16(self) -> bool:
        """From Ampere on."""
        return self.sm >= 80

    @property
    def bytes(self) -> int:
        """Of its memory."""
        return int(self.memory * GIB)


GPUS = (
    Gpu("Tesla T4", 14.6, 65, 320, 11, 75),
    Gpu("Tesla V100 16 GB", 15.8, 112, 900, 11, 70),
    Gpu("Tesla V100 32 GB", 31.7, 112, 900, 11, 70),
    Gpu("L4", 22.0, 121, 300, 22, 89),
    Gpu("A10", 22.0, 125, 600, 22, 86),
    Gpu("A10G", 22.0, 70, 600, 22, 86),
    Gpu("L40S", 44.4, 362, 864, 22, 89),
    Gpu("A100 40 GB", 39.4, 312, 1555, 22, 80),
    Gpu("A100 80 GB", 79.2, 312, 1935, 22, 80),
    Gpu("H100 PCIe", 79.2, 756, 2000, 45, 90),
    Gpu("H100", 79.2, 989, 3350, 45, 90),
    Gpu("H200", 139.8, 989, 4800, 45, 90),
    Gpu("B200", 178.4, 2250, 8000, 45, 100),
    Gpu("RTX A4000", 15.7, 76.7, 448, 22, 86),
    Gpu("RTX A5000", 23.6, 111, 768, 22, 86),
    Gpu("RTX A6000", 47.5, 155, 768, 22, 86),
    Gpu("RTX 6000 Ada", 47.5, 364, 960, 22, 89),
    Gpu("GTX 1660 Ti", 5.8, 10.9, 288, 11, 75),
    Gpu("RTX 2060", 5.8, 25.8, 336, 11, 75),
    Gpu("RTX 2070", 7.8, 29.9, 448, 11, 75),
    Gpu("RTX 2080", 7.8, 40.3, 448, 11, 75),
    Gpu("RTX 2080 Ti", 10.8, 53.8, 616, 11, 75),
    Gpu("RTX 3050 Laptop 4 GB", 3.8, 12, 192, 11, 86),
    Gpu("RTX 3050 Laptop 6 GB", 5.8, 12, 168, 11, 86),
    Gpu("RTX 3050 6 GB", 5.8, 13.5, 168, 11, 86),
    Gpu("RTX 3050 8 GB", 7.8, 18.2, 224, 11, 86),
    Gpu("RTX 3060", 11.6, 25.5, 360, 22, 86),
    Gpu("RTX 3060 Ti", 7.7, 32.4, 448, 22, 86),
    Gpu("RTX 3070", 7.7, 40.6, 448, 22, 86),
    Gpu("RTX 3080", 9.7, 59.5, 760, 22, 86),
    Gpu("RTX 3090", 23.6, 71, 936, 22, 86),
    Gpu("RTX 4060", 7.6, 30.2, 272, 11, 89),
    Gpu("RTX 4060 Ti 16 GB", 15.7, 44.1, 288, 11, 89),
    Gpu("RTX 4060 Ti", 7.6, 44.1, 288, 11, 89),
    Gpu("RTX 4070", 11.6, 58.3, 504, 22, 89),
    Gpu("RTX 4070 Ti", 11.6, 80.2, 504, 22, 89),
    Gpu("RTX 4080", 15.7, 97.5, 717, 22, 89),
    Gpu("RTX 4090", 23.5, 165, 1008, 22, 89),
    Gpu("RTX 5060 Ti 16 GB", 15.5, 47.4, 448, 22, 120),
    Gpu("RTX 5070", 11.6, 61.7, 672, 45, 120),
    Gpu("RTX 5070 Ti", 15.5, 87.9, 896, 45, 120),
    Gpu("RTX 5080", 15.5, 112.6, 960, 45, 120),
    Gpu("RTX 5090", 31.4, 209.5, 1792, 45, 120),
)
"""Memory as a driver reports it, a little less than on the box; where a card comes in sizes, each."""
VARIANTS = {"ti", "super", "laptop", "mobile", "max", "pcie", "nvl", "ada", "d"}
"""Words that make another card of a name."""
SIZE = re.compile(r"(\d+)\s*gi?b\b")
NEAR = 0.15
"""How far from its own memory a card's may be told."""


def find(name: str, memory: float | None = None) -> Gpu | None:
    """The GPU that a name means, as a person writes it or a driver: `3090`, `NVIDIA A100-SXM4-80GB`. memory: GiB, which
    tells sizes apart. None where the table has none."""
    text = re.sub(r"\b([rg]tx)(\d{4})", r"\1 \2", re.sub(r"(\d)(ti|super)\b", r"\1 \2", name.lower()))
    if memory is None and (said := SIZE.search(text)):
        memory = float(said[1])
    asked = _words(text)
    known = [gpu for gpu in GPUS if _key(gpu) in asked and _words(gpu.name) & VARIANTS == asked & VARIANTS]
    known = [gpu for gpu in known if memory is None or abs(gpu.memory - memory) <= NEAR * memory]
    return min(known, key=lambda gpu: gpu.memory, default=None)


def named(name: str) -> Gpu:
    """As `find`. Raises ResourceError with the names that there are."""
    if (found := find(name)) is not None:
        return found
    raise ResourceError(
        _("No GPU called {name} is known here.").format(name=name),
        hint=_("These are: {names}. Of any other, say --memory: how many GiB it has.").format(
            names=", ".join(gpu.name for gpu in GPUS)
        ),
    )


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", SIZE.sub("", name.lower())))


def _key(gpu: Gpu) -> str:
    """The word that no other series has: its number."""
    words: list[str] = re.findall(r"[a-z0-9]+", gpu.name.lower())
    return next(word for word in words if any(sign.isdigit() for sign in word))
