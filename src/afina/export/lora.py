"""An adapter alone as GGUF: what llama.cpp puts on a base model with --lora, and Ollama with ADAPTER.

Knows PEFT's names of tensors and settings; the file is gguf.py's.
"""

import math
from pathlib import Path
from typing import Any

import torch

from afina.errors import ModelError
from afina.export.families import read_shape
from afina.export.gguf import interleave, write_tensors
from afina.export.gguf_vocab import read_json
from afina.export.weights import tensors_of
from afina.language import _

WRAPPING = "base_model.model."


def write_lora(adapter: Path, model_folder: Path, out: Path, *, name: str) -> dict[str, Any]:
    """Write the adapter in PEFT's folder `adapter` to the GGUF file `out`; `model_folder` says what it belongs to.

    Raises ModelError for what llama.cpp cannot add to a model: other tensors than low-rank pairs of matrices, or pairs
    scaled differently.
    """
    settings = read_json(adapter / "adapter_config.json")
    shape = read_shape(model_folder)
    if settings.get("rank_pattern") or settings.get("alpha_pattern") or settings.get("use_dora"):
        raise ModelError(
            _("llama.cpp cannot add an adapter with rank_pattern, alpha_pattern or DoRA to a model."),
            hint=_("Export the merged model instead."),
            file=adapter / "adapter_config.json",
        )
    rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    tensors: dict[str, torch.Tensor] = {}
    for source, tensor in tensors_of(adapter / "adapter_model.safetensors").items():
        module, _dot, side = source.removeprefix(WRAPPING).removesuffix(".weight").rpartition(".")
        if side not in ("lora_A", "lora_B"):
            raise ModelError(
                _("llama.cpp cannot add this tensor of the adapter to a model: {name}.").format(name=source),
                hint=_("Export the merged model instead."),
                file=adapter,
            )
        heads = shape.interleaved_heads(f"{module}.weight")
        if side == "lora_B" and heads:  # its rows are the rows of the base's matrix
            tensor = interleave(tensor, heads)
        tensors[f"{module}.weight|{side.lower()}"] = tensor.float().contiguous()
    # llama.cpp multiplies by alpha / rank; rank-stabilised adapters are scaled by alpha / sqrt(rank).
    write_tensors(out, shape, tensors, alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha, name)
    return {"bytes": out.stat().st_size, "tensors": len(tensors), "alpha": alpha, "rank": rank}
