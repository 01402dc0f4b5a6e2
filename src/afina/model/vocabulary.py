"""Room in a model for turn tokens that its vocabulary lacks: embeddings made, begun well, and named so that they learn.

A token that no training ever saw has a random embedding or none. It begins as the mean of the pieces that its text was
cut into before, in the embedding and in the head, and learns with the adapter: only its own rows do.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afina.errors import ModelError
from afina.language import _

Pieces = Mapping[int, Sequence[int]]
"""Id of a token, and the ids its text was cut into before it was one; none where its embedding is to stay as it is."""


@torch.no_grad()
def make_room(model: nn.Module, tokens: Pieces) -> None:
    """Give `tokens` rows in the embedding and in the head. Raises ModelError where the model cannot have them."""
    if not tokens:
        return
    whole: Any = model
    grow(whole, max(tokens) + 1)
    for layer in _ends(whole).values():
        for index, pieces in tokens.items():
            if pieces:
                layer.weight[index] = layer.weight[list(pieces)].float().mean(0).to(layer.weight.dtype)


def learning_rows(model: nn.Module, tokens: Pieces) -> dict[str, list[int]] | None:
    """Which rows of which layers learn, as PEFT wants it said; None for none."""
    return {name: sorted(tokens) for name in _ends(model)} if tokens else None


def keep_bias(adapted: nn.Module) -> None:
    """Let a head whose rows learn add its bias (Phi-2's): PEFT multiplies by the weights alone, while what is merged
    has both. New tokens have the mean of the others', which no adapter needs to bring along."""
    modules: list[Any] = list(adapted.modules())
    for module in modules:
        biased = (
            hasattr(module, "trainable_tokens_delta") and getattr(module.get_base_layer(), "bias", None) is not None
        )
        if biased and _add_bias not in module._forward_hooks.values():
            module.register_forward_hook(_add_bias)


def _add_bias(layer: Any, _inputs: Any, found: torch.Tensor) -> torch.Tensor:
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return found  # the base's own layer has added it
    bias: torch.Tensor = layer.get_base_layer().bias
    return found + bias.to(found.dtype)


def fit_vocabulary(model: nn.Module, adapter: Path) -> None:
    """Make room for the tokens whose rows an adapter brings along; their values come with it."""
    try:
        told = json.loads((adapter / "adapter_config.json").read_bytes()).get("trainable_token_indices") or {}
        rows = [index for indices in (told.values() if isinstance(told, dict) else [told]) for index in indices]
    except (OSError, ValueError, AttributeError, TypeError):
        return  # loading the adapter will say what is wrong with it
    if rows and all(type(index) is int and 0 <= index < 2**22 for index in rows):
        grow(model, max(rows) + 1)


def grow(model: Any, rows: int) -> None:
    """Give the embedding and the head at least so many rows; those that are new begin as the mean of all others.

    Raises ModelError where the embedding is quantised.
    """
    embedding = model.get_input_embeddings()
    before = embedding.weight.shape[0]
    if rows <= before:
        return
    if not embedding.weight.is_floating_point():
        raise ModelError(
            _("The embeddings of this base are quantised, so turn tokens cannot be added (model.turn_tokens)."),
            hint=_("Take a base of plain weights, or a template of tokens that the model has."),
        )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model.resize_token_embeddings(rows, mean_resizing=False)
        for layer in _ends(model).values():
            layer.weight[before:] = layer.weight[:before].float().mean(0).to(layer.weight.dtype)
            if getattr(layer, "bias", None) is not None:
                layer.bias[before:] = layer.bias[:before].mean()


def _ends(model: Any) -> dict[str, Any]:
    """The embedding, and the head where it is not the same weights, by the last part of their names."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        if module is embedding or (module is head and head.weight is not embedding.weight):
            found[name.rpartition(".")[2]] = module
    return found
