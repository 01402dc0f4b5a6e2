"""The model a recipe trains: loaded, checked against the recipe's context, the method attached."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from afina.artifact import MANIFEST, open_artifact
from afina.console import Console
from afina.data.tokenizer import Tokenizer
from afina.errors import ModelError, RecipeError
from afina.language import _
from afina.model.attach import attach, learning, recompute
from afina.model.load import Hardware, limit_of, load_model, without_dropout
from afina.model.quantize import quantisation, weights_in
from afina.model.saved import start_from
from afina.model.virtual import is_prefix, virtual_tokens
from afina.recipe.schema import PromptTuning, Recipe


def open_model(
    recipe: Recipe,
    loaded: nn.Module,
    source: str,
    hardware: Hardware,
    tokenizer: Tokenizer,
    console: Console,
    adapter: Path | None = None,
) -> tuple[nn.Module, dict[str, int]]:
    """The model as `load_model` gave it, made ready to learn, and how many parameters it has and how many learn.

    Raises RecipeError naming the key where recipe and base do not fit.
    """

    def plain() -> nn.Module:
        unquantised = recipe.model.model_copy(update={"quantization": "none"})
        return load_model(source, Hardware(torch.device("cpu"), hardware.dtype), unquantised)

    method = recipe.method
    text = method.text if isinstance(method, PromptTuning) else None
    dropped = without_dropout(loaded)
    begin = tokenizer.encode([text])[0] if text else ()
    model = attach(loaded, method, seed=recipe.seed, text_ids=begin, plain=plain, tokens=tokenizer.turn_tokens)
    if adapter is not None:
        start_from(model, adapter)
    _check_context(model, recipe)
    if recipe.training.gradient_checkpointing:
        recompute(model)
    counts = {
        "trainable_parameters": sum(parameter.numel() for _name, parameter in learning(model)),
        "parameters": sum(weights_in(parameter) for parameter in model.parameters()),
    }
    kind = quantisation(model)
    console.line(
        _("Model     {base}, {total:.1f} M parameters, {trainable:.2f} M learn ({method}), on {hardware}").format(
            base=recipe.model.base,
            total=counts["parameters"] / 1e6,
            trainable=counts["trainable_parameters"] / 1e6,
            method=method.name if kind is None else _("{method} on {kind}").format(method=method.name, kind=kind),
            hardware=hardware,
        )
    )
    if dropped:
        console.line(
            _("Dropout   the base's own ({share:g}) is off; method.dropout alone says what is dropped").format(
                share=dropped
            )
        )
    return model, counts


def adapter_of(recipe: Recipe, folder: Path, base: dict[str, str] | None) -> Path | None:
    """The adapter folder that `model.adapter` means. Raises RecipeError, and ModelError when it is of another base."""
    if recipe.model.adapter is None:
        return None
    if recipe.method.name != "lora" or recipe.method.init != "default":
        raise RecipeError(
            _("model.adapter starts from a LoRA adapter, so method.name must be lora and method.init default."),
            key=("model", "adapter"),
        )
    place = folder / Path(recipe.model.adapter).expanduser()
    if (place / MANIFEST).is_file():
        place = place / "adapter"
    if (place.parent / MANIFEST).is_file() and base is not None:
        known = {
            entry["sha256"] for entry in open_artifact(place.parent).manifest["parents"] if entry["role"] == "base"
        }
        if base["sha256"] not in known:
            raise ModelError(
                _("The adapter {adapter} was trained on another base than {base}.").format(
                    adapter=place, base=recipe.model.base
                ),
                hint=_("Take the base that its run names, or another adapter."),
            )
    return place


def why_reference(model: nn.Module, recipe: Recipe) -> str | None:
    """What the recipe asks for that only the reference does; None where the engine may be asked."""
    if virtual_tokens(model):
        return _("virtual tokens stand before each sample")
    if recipe.training.distill is not None:
        return _("a teacher's distribution is learnt beside the answers")
    if recipe.training.neftune_alpha is not None:
        return _("noise is added to the embeddings")
    return None


def why_padded(model: nn.Module) -> str:
    """Why the samples of this model lie in rows of their own, though the recipe would pack them."""
    if is_prefix(model):
        return _("prefix tuning puts keys before each row, so a row holds one sample")
    return _("packed attention would not be exact for this model")


def _check_context(model: nn.Module, recipe: Recipe) -> None:
    limit, wanted, count = limit_of(model), recipe.model.max_length, virtual_tokens(model)
    if limit is None or wanted <= limit:
        return
    values: dict[str, Any] = {"wanted": wanted, "limit": limit + count, "count": count, "room": limit}
    message = _("model.max_length is {wanted}, but the model was made for {limit} tokens.")
    if count:
        message = _(
            "model.max_length is {wanted} and {count} virtual tokens, but the model was made for {limit} tokens."
        )
    if limit <= 0:
        raise RecipeError(
            _("method.virtual_tokens is {count}, but the model was made for {limit} tokens.").format(**values),
            hint=_("Take fewer virtual tokens."),
            key=("method", "virtual_tokens"),
        )
    raise RecipeError(
        message.format(**values),
        hint=_("Set model.max_length to {limit} or less.").format(limit=limit),
        key=("model", "max_length"),
    )
