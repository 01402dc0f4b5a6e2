"""Adapters in PEFT's format and whole models in transformers': read and put on, gone on from, written."""

import copy
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afina.errors import AfinaError, ModelError
from afina.language import _
from afina.model.attach import base_of
from afina.model.beginnings import doubled_alpha, since
from afina.model.experts import stand_ins
from afina.model.quantize import without_foreign_kernels
from afina.model.virtual import BIASES
from afina.model.vocabulary import fit_vocabulary, keep_bias

with without_foreign_kernels():
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import load_peft_weights

SETTINGS_BYTES = 2**20
"""No adapter_config.json is read beyond this."""
PLAIN_BEGINNINGS = (True, False, None, "gaussian", "orthogonal")
"""How an adapter may have begun so that base plus adapter is the model."""
MORE = (
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "alpha_pattern",
    "layer_replication",
    "fan_in_fan_out",
    "lora_bias",
    "use_qalora",
    "arrow_config",
    "megatron_config",
)
"""Settings of PEFT that mean more than adding a product to a matrix."""


def only_adds(settings: Mapping[str, Any]) -> bool:
    """Whether an adapter, by its adapter_config.json, adds products to the base's matrices and no more: what these are
    held in is then no affair of its."""
    plain = settings.get("init_lora_weights", True) in PLAIN_BEGINNINGS
    return settings.get("peft_type") == "LORA" and plain and not any(settings.get(name) for name in MORE)


def settings_of(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder; empty where there is none to read, which loading it will say."""
    file = folder / "adapter_config.json"
    try:
        found: dict[str, Any] = json.loads(file.read_bytes()) if file.stat().st_size <= SETTINGS_BYTES else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def load_adapter(model: nn.Module, folder: Path, name: str = "default") -> nn.Module:
    """Attach a saved adapter in PEFT's format, beside those that are there under other names.

    Raises ModelError when it does not fit or holds no safetensors.
    """
    _check_is_there(folder)
    fit_vocabulary(model, folder)
    try:
        biases = _biases_before(model, folder)
        with stand_ins(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(model, PeftModel):
                model.load_adapter(folder, adapter_name=name)
                adapted: nn.Module = model
            else:
                adapted = PeftModel.from_pretrained(model, folder, adapter_name=name)  # type: ignore[arg-type]
        there = load_peft_weights(str(folder), device="cpu").keys()
    except AfinaError:
        raise
    except Exception as error:  # a damaged folder makes PEFT and safetensors raise anything at all
        raise _misfit(folder, str(error).strip().split("\n")[0] or type(error).__name__) from error
    wanted = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False).keys()
    # PEFT only warns of weights that have no place, and starts anew those that are not there.
    if different := (there ^ wanted) - _tied_head(model):
        text = _("{count} weights differ, such as {name}").format(count=len(different), name=min(different))
        raise _misfit(folder, text)
    if biases:
        setattr(adapted, BIASES, biases)
    keep_bias(adapted)
    return adapted.eval()


def _check_is_there(folder: Path) -> None:
    if not (folder / "adapter_model.safetensors").is_file() or not (folder / "adapter_config.json").is_file():
        raise ModelError(
            _("{folder} holds no adapter.").format(folder=folder),
            hint=_("It needs adapter_config.json and adapter_model.safetensors."),
        )


def _tied_head(model: nn.Module) -> set[str]:
    """How PEFT names the head of a model that shares the embedding's weights, which it writes once or twice."""
    base: Any = base_of(model)
    if not base.config.tie_word_embeddings:
        return set()
    return {
        f"base_model.model.{name}.weight" for name, one in base.named_modules() if one is base.get_output_embeddings()
    }


def _biases_before(model: nn.Module, folder: Path) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """The base's biases and their values, where the adapter brings others, which PEFT puts in their place."""
    if json.loads((folder / "adapter_config.json").read_bytes()).get("bias", "none") == "none":
        return []
    return [(p, p.detach().clone()) for name, p in model.named_parameters() if name.endswith(".bias")]


KEPT = {
    "r": "method.rank",
    "lora_alpha": "method.alpha",
    "use_rslora": "method.rslora",
    "use_dora": "method.dora",
}
"""Settings of PEFT that a run which starts from an adapter takes over, as the recipe calls them."""


def start_from(model: nn.Module, folder: Path) -> None:
    """Give the adapters just attached the values of a saved one in PEFT's format, to learn on from.

    Raises ModelError when it is of another shape or scale, or holds no safetensors.
    """
    _check_is_there(folder)
    settings = folder / "adapter_config.json"
    ours = model.peft_config["default"]  # type: ignore[index, union-attr, operator]
    try:
        if settings.stat().st_size > SETTINGS_BYTES:
            raise ValueError(_("the file is too large"))
        theirs = json.loads(settings.read_bytes())
        there = load_peft_weights(str(folder), device="cpu")
        for key, ours_called in KEPT.items():
            if theirs.get(key) != getattr(ours, key):
                raise _misfit(
                    folder,
                    _("{key} is {there} there and {here} here").format(
                        key=key, there=theirs.get(key), here=getattr(ours, key)
                    ),
                    _("Set {key} to what it is there.").format(key=ours_called),
                )
    except AfinaError:
        raise
    except Exception as error:  # a damaged folder makes PEFT and safetensors raise anything at all
        raise _misfit(folder, str(error).strip().split("\n")[0] or type(error).__name__) from error
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    different = {name for name in there.keys() | wanted.keys() if _shape(there, name) != _shape(wanted, name)}
    if different:
        text = _("{count} weights differ, such as {name}").format(count=len(different), name=min(different))
        raise _misfit(folder, text)
    set_peft_model_state_dict(model, there)


def _shape(tensors: dict[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def _misfit(folder: Path, reason: str, hint: str = "") -> ModelError:
    return ModelError(
        _("The adapter {folder} does not fit this model: {reason}").format(folder=folder, reason=reason),
        hint=hint or _("Use the base model it was trained on."),
    )


def save_adapter(model: nn.Module, folder: Path, base: str) -> None:
    """Write what was attached in PEFT's format, naming `base`; a fully tuned model is written whole. Raises OSError."""
    if not isinstance(model, PeftModel):
        save_whole(model, folder)
        return
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = base
    start, state = getattr(model, "afina_start", None), None
    try:
        if start is not None:  # PiSSA changed the base: what is saved is the difference to the base as it was
            model.peft_config["default"] = _doubled(config)
            state = since(start, model.state_dict())
        with _refusals_told():  # "auto" would look the base up on the hub
            model.save_pretrained(folder, save_embedding_layers=False, state_dict=state)
    finally:
        model.peft_config["default"] = config
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the run folder has a true one


def _doubled(config: Any) -> Any:
    wide = copy.deepcopy(config)
    wide.r, wide.lora_alpha = 2 * config.r, doubled_alpha(config.lora_alpha, config.use_rslora)
    wide.init_lora_weights = True
    return wide


def save_configuration(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Write what transformers reads beside the weights of the model under an adapter, held in `dtype`."""
    whole: Any = base_of(model)
    config = copy.deepcopy(whole.config)
    config.architectures, config.dtype = [type(whole).__name__], dtype
    config.__dict__.pop("quantization_config", None)  # of the base as it was held
    config.save_pretrained(folder)
    if whole.can_generate():
        whole.generation_config.save_pretrained(folder)


def save_whole(model: nn.Module, folder: Path) -> None:
    """Write a model as transformers reads it, in safetensors. Raises OSError."""
    with _refusals_told():
        model.save_pretrained(folder)  # type: ignore[operator]


@contextmanager
def _refusals_told() -> Iterator[None]:
    """safetensors hides what the operating system said (a full disk, say) in a text: make it an OSError again."""
    try:
        yield
    except Exception as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise
