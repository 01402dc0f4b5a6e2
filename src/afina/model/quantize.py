"""A base held in four or eight bits: QLoRA's base (Dettmers et al., 2023, arXiv:2305.14314). Door to bitsandbytes.

Linear layers but the head become bitsandbytes' own while the model is loaded; or are such layers already, in a
checkpoint that was saved so. `dequantised` turns them back into plain ones that hold the same numbers, for what can
only be done to plain weights: merging, and writing files for other programs.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from afina.errors import ModelError, RecipeError, ResourceError
from afina.language import _
from afina.recipe.schema import Model

HELD = ("nf4", "fp4", "int8")


UNNEEDED = ("scipy", "sklearn", "torchao", "torchvision")
"""What transformers and PEFT load where it is installed, for images, for assisted decoding and for another way of
quantising: seconds of a run's start."""


@contextmanager
def absent(*packages: str) -> Iterator[None]:
    """Within, these packages are not found, as if they were not installed."""
    before = {name: sys.modules[name] for name in packages if name in sys.modules}
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]
        sys.modules.update(before)


@contextmanager
def without_foreign_kernels() -> Iterator[None]:
    """Around the first import of bitsandbytes, also by PEFT: on some CPUs it would fetch compiled code from the hub
    (package `kernels`), and print a line where it cannot. The import finds no such package instead.

    Nor does it compile four functions for CPUs while it is imported, which would load torch's compiler: 2 s of a run's
    start. They run as they are written.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if "bitsandbytes" in sys.modules:
        yield
        return
    compiler, torch.compile = torch.compile, _as_written  # type: ignore[assignment]
    try:
        with absent("kernels"):
            yield
    finally:
        torch.compile = compiler


def _as_written(function: Any = None, **_how: Any) -> Any:
    return function if function is not None else _as_written


def bitsandbytes() -> ModuleType:
    """The package. Raises ResourceError where it is not installed."""
    try:
        with without_foreign_kernels():
            import bitsandbytes as found
    except ImportError as error:
        raise ResourceError(
            _("Weights of four or eight bits and optimisers of eight need the package bitsandbytes."),
            hint=_('Run: pip install "afina[qlora]"'),
        ) from error
    package: ModuleType = found
    return package


def held_in(config: Any) -> str | None:
    """How a checkpoint says its weights are held: nf4, fp4, int8, or another method's name; None for plain weights."""
    stated = getattr(config, "quantization_config", None)
    if stated is None:
        return None
    stated = stated if isinstance(stated, dict) else stated.to_dict()
    if stated.get("quant_method") not in (None, "bitsandbytes"):
        return str(stated["quant_method"])
    if stated.get("load_in_8bit"):
        return "int8"
    return str(stated.get("bnb_4bit_quant_type", "fp4")) if stated.get("load_in_4bit") else None


def how_held(wanted: Model, config: Any) -> str | None:
    """nf4, fp4 or int8 where the base's layers are to be held so, as the recipe wants or the checkpoint is; else None.

    Raises RecipeError where the two disagree, ModelError for a quantisation that is not bitsandbytes'.
    """
    there, kind = held_in(config), wanted.quantization
    if there is not None and there not in HELD:
        if kind == "none":
            return None
        raise ModelError(
            _("model.quantization: the checkpoint is quantised already, by {method}.").format(method=there),
            hint=_("Name a checkpoint of plain weights, or leave model.quantization out."),
        )
    if there is not None and kind not in ("none", there):
        raise RecipeError(
            _("model.quantization is {wanted}, but the checkpoint is held in {there} already.").format(
                wanted=kind, there=there
            ),
            hint=_("Leave model.quantization out, or name a checkpoint of plain weights."),
        )
    return there or (None if kind == "none" else kind)


def settings(wanted: Model, config: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any] | None:
    """What BitsAndBytesConfig takes, None for a model that needs none: plain, or quantised in its checkpoint.

    Raises what `how_held` raises, and ResourceError where bitsandbytes is missing or does not serve the device.
    """
    kind = how_held(wanted, config)
    if kind is None:
        return None
    bitsandbytes()
    if device.type not in ("cpu", "cuda"):
        raise ResourceError(
            _("model.quantization: bitsandbytes does not serve {device} devices.").format(device=device.type),
            hint=_("Set model.device to cpu, or model.quantization to none."),
        )
    if held_in(config) is not None:
        return None
    if kind == "int8":
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": wanted.double_quantization,
        "bnb_4bit_compute_dtype": dtype,
    }


def is_quantised(model: nn.Module) -> bool:
    """Whether any layer's weights are bitsandbytes'."""
    return any(layer_kind(module) is not None for module in model.modules())


def quantisation(model: nn.Module) -> str | None:
    """nf4, fp4 or int8 where layers are held so."""
    return next((kind for module in model.modules() if (kind := layer_kind(module)) is not None), None)


def weights_in(parameter: torch.Tensor) -> int:
    """How many weights a parameter holds: packed, four bits a weight, there are more than elements."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def check_layers(model: nn.Module) -> None:
    """Raises RecipeError for quantised layers whose plain weights lie the other way round (GPT-2's): what is merged of
    them could not be loaded again."""
    for module in model.modules():
        if layer_kind(module) is not None and getattr(module, "source_cls", nn.Linear).__name__ == "Conv1D":
            kind: Any = model.config
            raise RecipeError(
                _(
                    "model.quantization: the weights of {family} lie the other way round, and cannot be quantised."
                ).format(family=kind.model_type),
                hint=_("Set model.quantization to none, or take another base."),
                key=("model", "quantization"),
            )


def made_portable(model: nn.Module) -> nn.Module:
    """Quantised layers compute on a CPU as they do on a GPU.

    With bf16 instructions bitsandbytes would lay four-bit weights out anew at the first evaluation, and multiply in
    bf16, whatever the precision asked for. And of eight-bit weights, which PEFT's DoRA moves to the CPU where they
    are already, it would take a second time the scales that it took before, and find none.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if layer_kind(module) == "int8":
            module.register_forward_pre_hook(_keep_scales)
    return model


def _keep_scales(layer: Any, _inputs: Any) -> None:
    if layer.weight.CB is not None and layer.weight.SCB is None:
        layer.weight.SCB = layer.state.SCB


@torch.no_grad()
def dequantised(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same model with plain linear layers, holding the numbers that the quantised ones stand for, in `dtype`."""
    for name, module in list(model.named_modules()):
        if layer_kind(module) is None:
            continue
        weight = whole(module).to(dtype)
        bias: Any = module.bias
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        parent, _dot, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    _forget(model)
    return model.to(dtype)


def weight_of(layer: Any) -> torch.Tensor:
    """A layer's weight (rows, columns): the numbers it stands for where it is quantised, else as it is held."""
    weight: torch.Tensor = layer.weight.detach()
    return weight if layer_kind(layer) is None else whole(layer)


def whole(layer: Any) -> torch.Tensor:
    """A quantised layer's weight (rows, columns) as the numbers it stands for, fp32 for int8."""
    if layer_kind(layer) == "int8":
        weight = layer.weight
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        eight: torch.Tensor = weight.data.float() * (scales.float() / 127.0)[:, None]
        return eight
    found: torch.Tensor = bitsandbytes().functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return found


def layer_kind(module: nn.Module) -> str | None:
    """nf4, fp4 or int8 of one of bitsandbytes' layers; None for any other, PEFT's wrappers around them too."""
    if type(module).__module__.partition(".")[0] != "bitsandbytes":
        return None
    weight: Any = getattr(module, "weight", None)
    if getattr(weight, "quant_state", None) is not None:
        return str(weight.quant_state.quant_type)
    return "int8" if getattr(weight, "dtype", None) == torch.int8 else None


def _forget(model: Any) -> None:
    """transformers notes on model and config that it is quantised, and would treat it so when it is saved."""
    for place, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(place, name):
            delattr(place, name)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        if getattr(model, name, False):
            setattr(model, name, False)
