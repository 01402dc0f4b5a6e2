"""A method is surgery on the model, never a second loop: what is attached, and which parameters learn. Door to PEFT."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from afina.errors import ModelError, RecipeError
from afina.language import _
from afina.model.beginnings import begin_with_loss, start_of
from afina.model.experts import adapts_packed, mixture_targets, plain_adapters, refuse_packed, stand_ins
from afina.model.load import unpack
from afina.model.quantize import absent, is_quantised, without_foreign_kernels
from afina.model.targets import check_modules, chosen, in_layers, layer_numbers
from afina.model.vocabulary import Pieces, keep_bias, learning_rows, make_room
from afina.recipe.schema import Full, Lora, Method, PrefixTuning, PromptTuning

with without_foreign_kernels():  # PEFT imports bitsandbytes where it is installed
    from peft import (
        LoraConfig,
        PeftModel,
        PrefixTuningConfig,
        PromptTuningConfig,
        PromptTuningInit,
        get_peft_model,
    )
    from peft.import_utils import is_torchao_available
with absent("torchao"):  # PEFT remembers that it is not there; it would be loaded to look whether layers are its
    is_torchao_available()

BEGINNINGS = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal", "pissa": "pissa", "loftq": True}
"""What PEFT calls them; LoftQ's own is not used, as it takes every adapter's scale for 1."""
PlainBase = Callable[[], nn.Module]


def attach(
    model: nn.Module,
    method: Method,
    *,
    seed: int,
    text_ids: Sequence[int] = (),
    plain: PlainBase | None = None,
    tokens: Pieces | None = None,
) -> nn.Module:
    """Make `model` ready to learn by `method`; what learns is held in fp32.

    `text_ids`: the tokens that virtual ones begin as; `plain` loads the base unquantised, which loftq compares with.
    `tokens`: turn tokens that learn, see vocabulary.py. Raises RecipeError where the method names what the model has
    not, listing what there is, or cannot teach the model tokens.
    """
    if tokens:
        _check_tokens(method)
        make_room(model, tokens)
    if isinstance(method, Full):
        return _attach_full(model, method)
    if isinstance(method, Lora):
        _check_beginning(model, method.init)
    config = _lora(model, method, tokens or {}) if isinstance(method, Lora) else _virtual(method)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), stand_ins(model):
        warnings.simplefilter("ignore")  # of tied weights that learn, and of what transformers deprecates
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(model, config, autocast_adapter_dtype=True)  # type: ignore[arg-type]
    keep_bias(adapted)
    if isinstance(method, PromptTuning) and text_ids:
        _begin_as(adapted, text_ids)
    if isinstance(method, Lora) and method.init == "pissa":
        adapted.afina_start = start_of(adapted)
    if isinstance(method, Lora) and method.init == "loftq" and plain is not None:
        begin_with_loss(adapted, plain)
    found: nn.Module = adapted
    return found


def _attach_full(model: nn.Module, method: Full) -> nn.Module:
    if is_quantised(model):
        raise ModelError(
            _("A quantised base cannot learn itself: method full needs plain weights."),
            hint=_("Take method lora, or a checkpoint of plain weights."),
        )
    refuse_packed(model)
    if method.layers is None:
        model.float().requires_grad_(True)
    else:
        model.requires_grad_(False)
        for parameter in in_layers(model, layer_numbers(model, method.layers)):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    return model


def _check_beginning(model: nn.Module, init: str) -> None:
    if init == "pissa" and is_quantised(model):
        raise RecipeError(
            _("method.init: pissa takes its adapters out of plain weights, and this base is quantised."),
            hint=_("Take loftq, or a base of plain weights."),
            key=("method", "init"),
        )
    if init == "orthogonal" and is_quantised(model):
        raise RecipeError(
            _("method.init: orthogonal begins beside plain weights, and this base is quantised."),
            hint=_("Take default or loftq, or a base of plain weights."),
            key=("method", "init"),
        )
    if init == "loftq" and not is_quantised(model):
        raise RecipeError(
            _("method.init: loftq begins with what quantising the base loses, and this base is not quantised."),
            hint=_("Set model.quantization to nf4, or take another init."),
            key=("method", "init"),
        )


def _check_tokens(method: Method) -> None:
    saves = isinstance(method, Lora) and method.modules_to_save
    if saves or not (isinstance(method, Lora) or (isinstance(method, Full) and method.layers is None)):
        raise RecipeError(
            _("method {name} leaves the embeddings of new turn tokens as they are, so they would mean nothing.").format(
                name=method.name
            )
            if not saves
            else _("Turn tokens learn by rows of their own, which does not go together with method.modules_to_save."),
            hint=_("Take method lora, or full with all layers, or a template of tokens that the model has."),
            key=("model", "turn_tokens"),
        )


def _lora(model: nn.Module, method: Lora, tokens: Pieces) -> LoraConfig:
    check_modules(model, method.modules_to_save)
    config: Any = model.config
    return LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,  # type: ignore[arg-type]
        lora_dropout=method.dropout,
        target_modules=chosen(model, method),
        target_parameters=mixture_targets(model, method),
        bias=method.bias,
        use_rslora=method.rslora,
        use_dora=method.dora,
        init_lora_weights=BEGINNINGS[method.init],  # type: ignore[arg-type]
        modules_to_save=method.modules_to_save or None,
        trainable_token_indices=learning_rows(model, tokens),
        ensure_weight_tying=bool(method.modules_to_save and config.tie_word_embeddings),
        task_type="CAUSAL_LM",
    )


def _virtual(method: PromptTuning | PrefixTuning) -> PromptTuningConfig | PrefixTuningConfig:
    count = method.virtual_tokens
    if isinstance(method, PrefixTuning):
        return PrefixTuningConfig(num_virtual_tokens=count, task_type="CAUSAL_LM")
    return PromptTuningConfig(
        num_virtual_tokens=count, prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB, task_type="CAUSAL_LM"
    )


@torch.no_grad()
def _begin_as(model: Any, ids: Sequence[int]) -> None:
    """The virtual tokens' embeddings are those of `ids`, repeated or cut to their number."""
    weight = model.prompt_encoder["default"].embedding.weight
    repeated = [ids[place % len(ids)] for place in range(weight.shape[0])]
    weight.copy_(model.get_base_model().get_input_embeddings()(torch.tensor(repeated, device=weight.device)))


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model under an adapter, whose layers the adapter has wrapped; a model without one is itself."""
    found: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base: nn.Module = found
    return base


def merged(model: nn.Module) -> nn.Module:
    """The same function without adapters: base weights with the low-rank products added, in fp32.

    Experts in MXFP4 stay as they are, unless they have adapters themselves.
    """
    if not isinstance(model, PeftModel):
        return model
    if is_quantised(model):
        raise RuntimeError("a quantised base is dequantised before adapters are merged into it")
    if adapts_packed(model):
        unpack(model, torch.float32)
        plain_adapters(model)
    whole: nn.Module = model.float().merge_and_unload(safe_merge=True)  # type: ignore[operator]
    return whole


def recompute(model: nn.Module) -> None:
    """Keep only what enters each layer while learning, and compute the rest again in the backward."""
    whole: Any = base_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 calls it otherwise, 5.16 does not yet
        whole.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def learning(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and tensors of what learns."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
