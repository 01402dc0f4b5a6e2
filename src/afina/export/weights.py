"""The tensors of a model, read when asked for and only as far as asked: of a folder, from one or several safetensors
files (`Source`), or of a quantised base in memory, one layer dequantised at a time (`Held`).

The one door to safetensors' reader in this room. Knows nothing of what the tensors mean.
"""

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from afina.errors import ModelError
from afina.export.gguf_vocab import read_json
from afina.language import _
from afina.model.attach import base_of
from afina.model.quantize import layer_kind, whole

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The number types of a source tensor, as safetensors names them."""


FILE_WEIGHTS = 2**30
"""In a file that is made of what is in memory."""


class Source:
    """The tensors of a model folder by name."""

    def __init__(self, model_folder: Path) -> None:
        self._folder = model_folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._places: dict[str, list[str]] = {}
        for path in _weight_files(model_folder):
            try:
                file = self._stack.enter_context(safe_open(path, "pt"))
            except (OSError, SafetensorError) as error:
                raise ModelError(_("The weights cannot be read: {reason}.").format(reason=error), file=path) from error
            self._places[path.name] = list(file.keys())
            self._files |= dict.fromkeys(self._places[path.name], file)

    def names(self) -> set[str]:
        """The tensors there are."""
        return set(self._files)

    def by_file(self) -> dict[str, list[str]]:
        """The tensors of each file, in its order."""
        return self._places

    def is_float(self, name: str) -> bool:
        """Whether there is such a tensor and it is of floats."""
        return name in self._files and self.stored_kind(name) in FLOATS

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it. Raises ModelError when it is missing or not of floats."""
        stored = self._slice(name)
        if stored.get_dtype() not in FLOATS:
            raise ModelError(
                _("The tensor {name} holds {dtype}, not floating-point numbers.").format(
                    name=name, dtype=stored.get_dtype()
                ),
                hint=_("Export the model before it is quantised."),
                file=self._folder,
            )
        return tuple(stored.get_shape())

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """The same whatever it holds. Raises ModelError when it is missing."""
        return tuple(self._slice(name).get_shape())

    def stored_kind(self, name: str) -> str:
        """The type of its numbers, as safetensors names it. Raises ModelError when it is missing."""
        return str(self._slice(name).get_dtype())

    def width(self, name: str) -> int:
        """Bytes of each of its numbers."""
        return self.tensor(name).element_size()

    def _slice(self, name: str) -> Any:
        file = self._files.get(name)
        if file is None:
            raise ModelError(_("The weights lack the tensor {name}.").format(name=name), file=self._folder)
        return file.get_slice(name)

    def packed(self, name: str) -> bool:
        """Whether a tensor is stored in MXFP4, and is to be read by `mxfp4`."""
        return False

    def mxfp4(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some rows of a tensor stored in MXFP4, as ggml lays them out."""
        raise NotImplementedError

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as stored."""
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some rows of a tensor as stored; nothing else of it is read."""
        tensor: torch.Tensor = self._files[name].get_slice(name)[start:stop]
        return tensor

    def close(self) -> None:
        """Let go of the files."""
        self._files.clear()
        self._stack.close()


class Held:
    """The tensors of a base in memory as a folder of plain weights would hold them, an adapter upon it left out."""

    def __init__(self, model: nn.Module) -> None:
        self._layers: dict[str, nn.Module] = {}
        self._plain: dict[str, torch.Tensor] = {}
        self._last: tuple[str, torch.Tensor] | None = None
        seen = set()  # a head that is the embedding is written once
        for place, module in base_of(model).named_modules():
            if ".lora_" in f".{place}":
                continue
            for part, tensor in module.named_parameters(recurse=False):
                name = f"{place.replace('.base_layer', '')}.{part}"
                if id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                if part == "weight" and layer_kind(module) is not None:
                    self._layers[name] = module
                else:
                    self._plain[name] = tensor.detach()

    def names(self) -> set[str]:
        """The tensors there are."""
        return set(self._layers) | set(self._plain)

    def by_file(self) -> dict[str, list[str]]:
        """The tensors by the file they would stand in, some 10^9 weights in each."""
        parts: list[list[str]] = [[]]
        weights = 0
        for name in (*self._plain, *self._layers):
            weights += math.prod(self.stored_shape(name))
            if weights > FILE_WEIGHTS and parts[-1]:
                parts.append([])
                weights = 0
            parts[-1].append(name)
        if len(parts) == 1:
            return {"model.safetensors": parts[0]}
        return {f"model-{at:05d}-of-{len(parts):05d}.safetensors": names for at, names in enumerate(parts, 1)}

    def is_float(self, name: str) -> bool:
        """Whether there is such a tensor and it is of floats."""
        return name in self._layers or (name in self._plain and self._plain[name].is_floating_point())

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        layer: Any = self._layers.get(name)
        return tuple(self._plain[name].shape) if layer is None else (layer.out_features, layer.in_features)

    def stored_kind(self, name: str) -> str:
        """The type of its numbers, as safetensors names it."""
        return "F32" if name in self._layers else NAMES[self._plain[name].dtype]

    def width(self, name: str) -> int:
        """Bytes of each of its numbers."""
        return FLOATS[self.stored_kind(name)]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, as the numbers it stands for."""
        if name not in self._layers:
            return self._plain[name].cpu()
        if self._last is None or self._last[0] != name:
            self._last = (name, whole(self._layers[name]).cpu())
        return self._last[1]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some rows of it."""
        return self.tensor(name)[start:stop]

    def close(self) -> None:
        """Let go of the model."""
        self._layers.clear()
        self._plain.clear()
        self._last = None


Tensors = Source | Held


def _weight_files(model_folder: Path) -> list[Path]:
    index = model_folder / "model.safetensors.index.json"
    if not index.is_file():
        return [model_folder / "model.safetensors"]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(_("The index of the weights is damaged."), file=index)
    files = sorted(set(names.values()))
    if any(Path(name).name != name for name in files):  # an index may not point out of its folder
        raise ModelError(_("The index of the weights names a file outside its folder."), file=index)
    return [model_folder / name for name in files]


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a small safetensors file, such as an adapter's. Raises ModelError."""
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise ModelError(_("The weights cannot be read: {reason}.").format(reason=error), file=file) from error
