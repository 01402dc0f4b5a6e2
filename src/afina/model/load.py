"""The one door to transformers' models: loads one, chooses device and precision, never runs foreign code."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afina.errors import AfinaError, ModelError, ResourceError
from afina.gguf_file import GgufFile
from afina.language import _
from afina.model.as_stored import compute_in_fp32
from afina.model.foreign import check_weights, checked_config, quantised_as, read_config
from afina.model.gguf_start import figures, is_packed, kind_of, read_tensors
from afina.model.longrope import choose_by_sample
from afina.model.mxfp4 import PACKED, pack_experts, packed_experts, unpack_experts
from afina.model.quantize import HELD, UNNEEDED, absent, check_layers, dequantised, held_in, made_portable, settings
from afina.model.virtual import virtual_tokens
from afina.recipe.schema import Model

PLAIN = Model()
"""Weights as they are, of the main revision."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Hardware:
    """Where the model runs and in which arithmetic."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """Mixed precision where weights are held in 16 bits; nothing in fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        return f"{name}, {next(key for key, dtype in DTYPES.items() if dtype == self.dtype)}"


def choose_hardware(model: Model) -> Hardware:
    """Turn `auto` into what this machine has. Raises ResourceError when a device was asked for that is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind, there in available.items() if there) if model.device == "auto" else model.device
    if not available[name]:
        raise ResourceError(
            _("There is no {device} device here.").format(device=name),
            hint=_("Set model.device to auto or cpu, or install a PyTorch build for this device."),
        )
    device = torch.device(name)
    precision: str = model.precision
    if precision == "auto":
        if name == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            precision = "fp32"
    if precision == "fp16" and name == "cpu":
        raise ResourceError(_("A CPU does not train in fp16."), hint=_("Set model.precision to auto, fp32 or bf16."))
    return Hardware(device, DTYPES[precision])


def spare_imports() -> None:
    """Before anything of transformers is used: let it find, for good, that what we do not need is not there."""
    with absent(*UNNEEDED):
        from transformers.utils import import_utils

        for package in UNNEEDED:
            getattr(import_utils, f"is_{package}_available")()  # remembered as long as the process lives


def load_model(
    source: str, hardware: Hardware, wanted: Model = PLAIN, *, plain: bool = False, held: bool = False
) -> nn.Module:
    """Load a causal language model in evaluation mode, its base quantised as `wanted` says; `plain`: and dequantised.
    `held`: its weights as they are stored, or as quantised, and computed in fp32 (see as_stored.py).

    Raises ModelError for a folder or name that is none, and what `quantize.settings` raises.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, BitsAndBytesConfig
    from transformers.utils import logging

    from afina.model.attention import NAME as CAREFUL

    logging.disable_progress_bar()
    where: dict[str, Any] = {"revision": wanted.revision or "main", "trust_remote_code": False}
    try:
        file = GgufFile(source) if source.endswith(".gguf") else None
        config = _configuration(source, wanted.revision, file)
        family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        stated = _take_experts(config)
        if Path(source).is_dir():
            check_weights(Path(source))
        # Said aloud, because a config may ask for a kernel from the hub, which is code. Soft-capped scores and sinks
        # (Gemma 2, gpt-oss) are beyond sdpa, which older transformers lets Gemma 2 have nevertheless.
        dtype = hardware.dtype
        found = settings(wanted, config, hardware.device, dtype)
        quantised = found is not None or held_in(config) in HELD
        if quantised:  # while it is loaded, so that the plain weights are never there all at once
            dtype = choose_hardware(wanted).dtype if plain or held else dtype  # the numbers of training
            where["device_map"] = {"": hardware.device.index or 0 if hardware.device.type == "cuda" else "cpu"}
        if file is not None:
            where["state_dict"] = read_tensors(file, dtype, packed=bool(stated))
        model, loading = (_with_packed(family) if stated else family).from_pretrained(
            source if file is None else None,
            config=config,
            dtype="auto" if held and not quantised and file is None else dtype,
            attn_implementation="sdpa" if _knows_sdpa(family, config) else CAREFUL,
            use_safetensors=True,
            output_loading_info=True,
            quantization_config=None if found is None else BitsAndBytesConfig(**found),
            **where,
        )
    except AfinaError:
        raise
    except Exception as error:  # a damaged folder makes transformers and safetensors raise anything at all
        raise _unloadable(source, str(error).strip().split("\n")[0] or type(error).__name__) from error
    if missing := sorted(loading["missing_keys"]):  # transformers fills them with random numbers
        shown = ", ".join([*missing[:3], *(["..."] if len(missing) > 3 else [])])
        reason = _("{count} of its weights are missing: {names}").format(count=len(missing), names=shown)
        raise _unloadable(source, reason)
    if stated:
        model.__class__, model.config.quantization_config = family, stated
        if plain or wanted.experts == "unpacked":
            unpack(model, hardware.dtype)
    if quantised:
        check_layers(model)
        model = dequantised(model, hardware.dtype) if plain else made_portable(model)
    loaded = choose_by_sample((model if quantised else model.to(hardware.device)).eval())
    return compute_in_fp32(loaded) if held else loaded


def without_dropout(model: nn.Module) -> float:
    """Turn the base's own dropout off (Phi-2's is 0.1), so that the recipe alone says what is dropped while tuning.

    Returns the largest share it had.
    """
    modules: list[Any] = list(model.modules())
    largest = 0.0
    for module in modules:
        if isinstance(module, nn.Dropout):
            largest, module.p = max(largest, module.p), 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            largest, module.attention_dropout = max(largest, module.attention_dropout), 0.0
    return largest


def _configuration(source: str, revision: str | None, file: GgufFile | None) -> Any:
    """The model's figures, by allow-list, as transformers' object. Raises ModelError; of a hub name, anything."""
    from dataclasses import fields

    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

    folder = Path(source)
    if file is not None:
        given = {**figures(file), "model_type": kind_of(file)}
        if is_packed(file):
            given["quantization_config"] = dict(PACKED)
    elif folder.is_dir():
        given = read_config(folder)
    else:
        given = PreTrainedConfig.get_config_dict(source, revision=revision)[0]
    kind = str(given.get("model_type"))
    known: Any = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else None  # noqa: SIM401 (its get does not load)
    if known is None or known not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            _("The architecture {name} is no causal language model of this transformers.").format(name=kind),
            hint=_("A newer transformers may know it. Code that comes with a model is never run."),
            file=folder / "config.json" if folder.is_dir() else None,
        )
    names = {field.name for field in fields(known)} | set(known.attribute_map)
    config = known(**checked_config(given, names, source))
    if (quantised := quantised_as(given, source)) is not None:
        config.quantization_config = quantised
    return config


def _knows_sdpa(family: Any, config: Any) -> bool:
    """Whether PyTorch's own attention is exact for this model: scores without caps or sinks."""
    return bool(family._supports_sdpa) and not getattr(config, "attn_logit_softcapping", None)


def _take_experts(config: Any) -> dict[str, Any] | None:
    """What the configuration says of experts in MXFP4, taken out of it: transformers would unpack them, or fetch
    kernels from the hub. Raises ModelError for an architecture whose experts are not known here."""
    if held_in(config) != "mxfp4":
        return None
    if config.model_type != "gpt_oss":
        raise ModelError(_("MXFP4 is read of gpt-oss only, not of {name}.").format(name=config.model_type))
    stated: dict[str, Any] = config.quantization_config
    del config.quantization_config
    return stated


def _with_packed(family: Any) -> Any:
    """The same class, whose experts are made packed, to be filled by what the checkpoint holds."""

    def start(self: Any, config: Any) -> None:
        family.__init__(self, config)
        pack_experts(self)

    return type(family.__name__, (family,), {"__init__": start})


def unpack(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Put transformers' own experts in the place of packed ones, holding the same numbers in `dtype`."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    if packed_experts(model):
        config: Any = model.config
        with torch.device("meta"):
            unpack_experts(model, lambda: GptOssExperts(config), dtype)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    return model


def _unloadable(source: str, reason: str) -> ModelError:
    return ModelError(
        _("The model {source} cannot be loaded: {reason}").format(source=source, reason=reason),
        hint=_("Check the folder or the hub name, and that this machine reaches the hub."),
    )


def limit_of(model: nn.Module) -> int | None:
    """The longest context the model was made for, in tokens, virtual ones left out."""
    limit: Any = getattr(model.config, "max_position_embeddings", None)
    return int(limit) - virtual_tokens(model) if limit else None


def cache_bytes(model: nn.Module) -> int:
    """Bytes that one token's keys and values take while the model writes."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    held = next(model.parameters()).element_size()
    return int(2 * config.num_hidden_layers * heads * width * held)
