"""An adapter added to its base, some rows at a time: from file to file, with no model in memory, whatever its size.

What is read are the base's safetensors (or, of a quantised base, the layers that hold it, one at a time) and PEFT's
adapter; what is written are safetensors of the same names. Rows without an adapter are copied, in the precision asked
for; what is no float (gpt-oss's blocks of MXFP4) keeps its bits. Plain low-rank adapters are added so, rank-stabilised
ones and DoRA too, and biases that learnt; what else there is (`can_fold` says so) is merged by PEFT in memory.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from afina import durable
from afina.errors import ModelError, ProofError
from afina.export.gguf_vocab import read_json
from afina.export.weights import FLOATS, NAMES, Tensors, tensors_of
from afina.language import _
from afina.model.saved import only_adds

CHUNK_BYTES = 64 * 2**20
"""How much of a tensor, in F32, is read, added to and written at once. Some four such chunks are in memory."""
WRAPPING = "base_model.model."


@dataclass(frozen=True)
class LowRank:
    """What is added to a matrix: `scale` * `b` @ `a`. With `lengths` (DoRA) the rows of the sum get these lengths."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    lengths: torch.Tensor | None = None

    def added_to(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Rows of the base from `start`, in F32, with what belongs to them."""
        whole = torch.addmm(rows, self.b[start : start + len(rows)], self.a, alpha=self.scale)
        if self.lengths is None:
            return whole
        found: torch.Tensor = whole * (self.lengths[start : start + len(rows)] / whole.norm(dim=1))[:, None]
        return found


@dataclass
class Adapter:
    """An adapter's tensors by the base tensor they belong to: `pairs` are added, `learnt` take its place."""

    pairs: dict[str, LowRank]
    learnt: dict[str, torch.Tensor]
    tensors: int


def read_adapter(folder: Path) -> Adapter | None:
    """A PEFT folder as what is to be added to which tensor; None where it is more than that."""
    settings = read_json(folder / "adapter_config.json")
    if not only_adds(settings):
        return None
    tensors = tensors_of(folder / "adapter_model.safetensors")
    sides: dict[str, dict[str, torch.Tensor]] = {}
    learnt: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module, found, side = name.removeprefix(WRAPPING).removesuffix(".weight").rpartition(".lora_")
        if found:
            sides.setdefault(f"{module}.weight", {})[side] = tensor.float()
        else:
            learnt[name.removeprefix(WRAPPING).replace(".base_layer", "")] = tensor
    pairs = {}
    alpha, stabilised = float(settings["lora_alpha"]), settings.get("use_rslora")
    for name, parts in sides.items():
        if set(parts) - {"magnitude_vector"} != {"A", "B"} or parts["A"].ndim != 2:
            return None
        rank = parts["A"].shape[0]
        scale = alpha / (math.sqrt(rank) if stabilised else rank)
        pairs[name] = LowRank(parts["A"], parts["B"], scale, parts.get("magnitude_vector"))
    return Adapter(pairs, learnt, len(tensors))


def can_fold(source: Tensors, adapter: Adapter | None) -> bool:
    """Whether each tensor of the adapter belongs to one of the base's, by its name, and that one is of floats."""
    return adapter is not None and all(source.is_float(name) for name in (*adapter.pairs, *adapter.learnt))


@torch.no_grad()
def fold(
    source: Tensors,
    adapter: Adapter,
    out: Path,
    precision: torch.dtype,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write base (`source`) plus adapter into the folder `out`; what is not weights is the caller's.

    `on_progress` is told how many weights were written since it was last called. Returns `bytes`, and `used`, how many
    of the adapter's tensors were. Raises ProofError when one was not, ModelError when shapes do not fit.
    """
    left = set(adapter.pairs) | set(adapter.learnt)
    index: dict[str, str] = {}
    total = 0
    for file, names in source.by_file().items():
        left -= set(names)
        index |= dict.fromkeys(names, file)
        total += _write_file(out / file, source, names, adapter, precision, on_progress)
    if left:
        raise ProofError(
            _("The adapter has tensors that the merge did not use, such as {name}.").format(name=min(left)),
            hint=_("Nothing was kept. Please report this with the model's name."),
        )
    if len(set(index.values())) > 1:
        table = {"metadata": {"total_size": total}, "weight_map": index}
        durable.write_json(out / "model.safetensors.index.json", table)
    return {"bytes": total, "used": adapter.tensors}


def _write_file(
    path: Path,
    source: Tensors,
    names: list[str],
    adapter: Adapter,
    precision: torch.dtype,
    on_progress: Callable[[int], None] | None,
) -> int:
    """One safetensors file, tensor by tensor; returns the bytes of its tensors."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        shape, kind = source.stored_shape(name), source.stored_kind(name)
        width = FLOATS.get(kind)
        size = math.prod(shape) * (precision.itemsize if width else source.width(name))
        head[name] = {"dtype": NAMES[precision] if width else kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with durable.new_file(path) as temporary, temporary.open("ab") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            for rows in _merged_rows(source, name, adapter, precision):
                file.write(rows.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                if on_progress is not None:
                    on_progress(rows.numel())
    return at


def _merged_rows(source: Tensors, name: str, adapter: Adapter, precision: torch.dtype) -> Iterator[torch.Tensor]:
    shape = source.stored_shape(name)
    if not source.is_float(name):
        yield source.tensor(name)
        return
    if name in adapter.learnt:
        learnt = adapter.learnt[name]
        if tuple(learnt.shape) != shape:
            raise _misfit(name, tuple(learnt.shape), shape)
        yield learnt.to(precision)
        return
    if not shape:
        yield source.tensor(name).to(precision)
        return
    pair = adapter.pairs.get(name)
    if pair is not None and shape != (pair.b.shape[0], pair.a.shape[1]):
        raise _misfit(name, (pair.b.shape[0], pair.a.shape[1]), shape)
    step = max(1, CHUNK_BYTES // 4 // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        rows = source.rows(name, start, min(shape[0], start + step))
        yield (rows if pair is None else pair.added_to(rows.float(), start)).to(precision)


def _misfit(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> ModelError:
    return ModelError(
        _("The adapter has the shape {found} for {name}, the base {expected}.").format(
            found=found, name=name, expected=expected
        ),
        hint=_("Use the base model it was trained on."),
    )
