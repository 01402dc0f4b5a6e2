"""A method is surgery on the model, never a second loop: what is attached, and which parameters learn. Door to PEFT."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from afina.errors import AfinaError, ModelError
from afina.language import _
from afina.model.experts import adapts_packed, mixture_targets, plain_adapters, refuse_packed, stand_ins
from afina.model.load import unpack
from afina.model.quantize import is_quantised, without_foreign_kernels
from afina.recipe.schema import Full, Lora

with without_foreign_kernels():  # PEFT imports bitsandbytes where it is installed
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from peft.utils import load_peft_weights


def attach(model: nn.Module, method: Lora | Full, *, seed: int) -> nn.Module:
    """Make `model` ready to learn by `method`; what learns is held in fp32.

    Raises ModelError when a target names no linear layer, listing the names there are.
    """
    if isinstance(method, Full):
        if is_quantised(model):
            raise ModelError(
                _("A quantised base cannot learn itself: method full needs plain weights."),
                hint=_("Take method lora, or a checkpoint of plain weights."),
            )
        refuse_packed(model)
        return model.float().requires_grad_(True)
    targets = method.targets
    if targets != "all-linear":
        _check_targets(model, targets)
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,  # type: ignore[arg-type]
        lora_dropout=method.dropout,
        target_modules=targets,
        target_parameters=mixture_targets(model, method),
        bias=method.bias,
        use_rslora=method.rslora,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), stand_ins(model):
        torch.manual_seed(seed)
        adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=True)  # type: ignore[arg-type]
    return adapted


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """Attach a saved adapter in PEFT's format. Raises ModelError when it does not fit or holds no safetensors."""
    if not (folder / "adapter_model.safetensors").is_file() or not (folder / "adapter_config.json").is_file():
        raise ModelError(
            _("{folder} holds no adapter.").format(folder=folder),
            hint=_("It needs adapter_config.json and adapter_model.safetensors."),
        )
    try:
        with stand_ins(model):
            adapted: nn.Module = PeftModel.from_pretrained(model, folder)  # type: ignore[arg-type]
        there = load_peft_weights(str(folder), device="cpu").keys()
    except AfinaError:
        raise
    except Exception as error:  # a damaged folder makes PEFT and safetensors raise anything at all
        raise _misfit(folder, str(error).strip().split("\n")[0] or type(error).__name__) from error
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    if there != wanted:  # PEFT only warns of weights that have no place, and starts anew those that are not there
        raise _misfit(
            folder,
            _("{count} weights differ, such as {name}").format(count=len(there ^ wanted), name=min(there ^ wanted)),
        )
    return adapted.eval()


def _misfit(folder: Path, reason: str) -> ModelError:
    return ModelError(
        _("The adapter {folder} does not fit this model: {reason}").format(folder=folder, reason=reason),
        hint=_("Use the base model it was trained on."),
    )


def save_adapter(model: nn.Module, folder: Path, base: str) -> None:
    """Write what was attached in PEFT's format, naming `base`; a fully tuned model is written whole. Raises OSError."""
    if isinstance(model, PeftModel):
        model.peft_config["default"].base_model_name_or_path = base
        with _refusals_told():  # "auto" would look the base up on the hub
            model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the run folder has a true one
    else:
        save_whole(model, folder)


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


def merged(model: nn.Module) -> nn.Module:
    """The same function without adapters: base weights with the low-rank products added, in fp32.

    Experts in MXFP4 stay as they are, unless they have adapters themselves.
    """
    if not isinstance(model, PeftModel):
        return model
    if adapts_packed(model):
        unpack(model, torch.float32)
        plain_adapters(model)
    whole: nn.Module = model.float().merge_and_unload(safe_merge=True)  # type: ignore[operator]
    return whole


def learning(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and tensors of what learns."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    known = sorted({name.rpartition(".")[2] for name in linear} - {"lm_head"})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise ModelError(
                _("method.targets: the model has no linear layer called {name}.").format(name=target),
                hint=_("It has {names}.").format(names=", ".join(known)),
            )
