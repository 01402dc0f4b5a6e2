"""gpt-oss's experts as llama.cpp wants them: gate and up apart, a row for each output, MXFP4 blocks in ggml's order.

In a model folder the experts of a layer are one tensor, gate and up in turns, in floats (a column for each output) or
in MXFP4 (blocks of 16 bytes, and their exponents apart). This shows them under the names they would have if each
projection were a tensor of its own. Blocks of MXFP4 keep every bit. Knows nothing of files in GGUF.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from afina.errors import ModelError
from afina.export.weights import Source
from afina.language import _

EXPERTS = re.compile(r"^(.*\.mlp\.experts\.)(gate_up|down)_proj(|_bias|_blocks|_scales)$")
"""What a folder has: the layer's prefix, the projection, the part."""
SHOWN = re.compile(r"^(.*\.mlp\.experts\.)(gate|up|down)_proj\.(weight|bias)$")
"""What is shown in its place."""
TURNS = {"gate": ("gate_up", slice(0, None, 2)), "up": ("gate_up", slice(1, None, 2)), "down": ("down", slice(None))}
SINKS = ".self_attn.sinks"
GROUP, GROUP_BYTES = 32, 17
"""Weights in a block of MXFP4, and its bytes in ggml: the exponent, then 16 bytes of two weights each."""


class ExpertSource(Source):
    """The tensors of a gpt-oss folder by the names of single projections."""

    def names(self) -> set[str]:
        """The tensors there are, as shown."""
        return {shown for name in self._files for shown in _shown(name)}

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape as shown: experts, outputs, inputs for a weight. Raises ModelError."""
        found = SHOWN.match(name)
        if found is None:
            return super().shape(_stored(name))
        projection, turn = TURNS[found[2]]
        stem = f"{found[1]}{projection}_proj"
        if found[3] == "bias":
            experts, outputs = super().shape(f"{stem}_bias")
        elif self.packed(name):
            experts, outputs, groups, _bytes = self.stored_shape(f"{stem}_blocks")
            return experts, len(range(outputs)[turn]), groups * GROUP
        else:
            experts, inputs, outputs = super().shape(stem)
            return experts, len(range(outputs)[turn]), inputs
        return experts, len(range(outputs)[turn])

    def packed(self, name: str) -> bool:
        """Whether a tensor is stored in MXFP4."""
        found = SHOWN.match(name)
        return found is not None and found[3] == "weight" and f"{found[1]}{TURNS[found[2]][0]}_proj" not in self._files

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some experts of a tensor, or some rows of another. Raises ModelError for what is stored in MXFP4."""
        found = SHOWN.match(name)
        if found is None:
            return super().rows(_stored(name), start, stop)
        projection, turn = TURNS[found[2]]
        stem = f"{found[1]}{projection}_proj"
        if found[3] == "bias":
            return super().rows(f"{stem}_bias", start, stop)[:, turn]
        if self.packed(name):
            raise ModelError(_("The tensor {name} is stored in MXFP4.").format(name=name), file=self._folder)
        return super().rows(stem, start, stop).transpose(1, 2)[:, turn].contiguous()

    def mxfp4(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some experts of a tensor stored in MXFP4: (experts, outputs, bytes) uint8, as ggml lays them out."""
        found = SHOWN.match(name)
        projection, turn = TURNS[found[2] if found else "down"]
        stem = f"{found[1] if found else name}{projection}_proj"
        blocks = super().rows(f"{stem}_blocks", start, stop)[:, turn]
        exponents = super().rows(f"{stem}_scales", start, stop)[:, turn]
        return ggml_mxfp4(blocks, exponents)


def ggml_mxfp4(blocks: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """(..., groups, 16) bytes of neighbours, the earlier in the low half, and (..., groups) exponents, to (..., groups
    * 17) bytes: each byte holds weight i in its low half and weight i + 16 in its high half."""
    weights = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    halves = weights[..., :16] | weights[..., 16:] << 4
    return torch.cat([exponents[..., None], halves], -1).flatten(-2)


def _shown(name: str) -> Iterator[str]:
    found = EXPERTS.match(name)
    if found is None:
        yield f"{name}.weight" if name.endswith(SINKS) else name
    elif found[3] != "_scales":
        part = "bias" if found[3] == "_bias" else "weight"
        for shown, (projection, _turn) in TURNS.items():
            if projection == found[2]:
                yield f"{found[1]}{shown}_proj.{part}"


def _stored(name: str) -> str:
    return name.removesuffix(".weight") if name.endswith(f"{SINKS}.weight") else name


def open_source(model_folder: Path, architecture: str) -> Source:
    """The tensors of a model folder of this architecture, as llama.cpp's name for it is."""
    return ExpertSource(model_folder) if architecture == "gpt-oss" else Source(model_folder)
