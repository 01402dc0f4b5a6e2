"""Rows of one batch answered by different adapters where PEFT mixes none: DoRA, and a mixture's router and experts.

A frozen DoRA layer is a LoRA layer whose outputs have a factor each, which does not depend on what goes in: it is
computed once, and the base's product then serves all rows. Experts see their rows together, whosever they are: the
base's product once for each, the low-rank terms on the rows of their adapter. A router is small: it answers one adapter
after another. Door to PEFT's layers; all else is left to PEFT's own `adapter_names`.

The same serves an adapter that is alone: PEFT makes the norms of DoRA, and B A of all experts, anew at every token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from afina.model.experts import ROUTER, low_rank
from afina.model.mxfp4 import MATRICES, LowRank, PackedExperts, Spans, by_expert
from afina.model.quantize import without_foreign_kernels

with without_foreign_kernels():
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.utils.integrations import dequantize_module_weight

BASE = "__base__"
"""PEFT's name for no adapter."""
TOLD = ("has_bias", "is_transposed", "_apply_gate", *MATRICES)
"""What transformers' experts say of themselves, by which their products can be computed apart."""


def mixable(model: Any) -> set[str]:
    """The adapters, by PEFT's names, that can answer rows of one batch, BASE among them; empty where none can."""
    layers: dict[str, Any] = {place: one for place, one in model.named_modules() if isinstance(one, LoraLayer)}
    if not all(_is_known(place, layer) for place, layer in layers.items() if isinstance(layer, ParamWrapper)):
        return set()
    others = {
        name
        for layer in layers.values()
        for name in layer.lora_variant
        if name not in layer.lora_magnitude_vector or not _is_linear(layer.get_base_layer())
    }
    return {BASE, *model.peft_config} - others


def _is_linear(base: nn.Module) -> bool:
    return isinstance(base, nn.Linear) or hasattr(base, "nf")  # transformers' Conv1D, a linear layer turned over


def _is_known(place: str, wrapper: Any) -> bool:
    base = wrapper.get_base_layer()
    if wrapper.parameter_name in MATRICES:
        return isinstance(base, PackedExperts) or all(hasattr(base, said) for said in TOLD)
    return ROUTER.search(f"{place}.{wrapper.parameter_name}") is not None


@dataclass
class Asked:
    """Whose the rows of a batch are: for each of `names`, by number, where they are. A single one has all."""

    names: list[str]
    places: list[torch.Tensor]

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(map(len, self.places))


@contextmanager
def mixed(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside the block `model` may be called with these `adapter_names`, one a row, where all of them are `mixable`."""
    device = next(model.parameters()).device
    different = list(dict.fromkeys(names))
    places = [torch.tensor([row for row, name in enumerate(names) if name == one], device=device) for one in different]
    with _computing(model, Asked(different, places)):
        yield


@contextmanager
def alone(model: Any) -> Iterator[None]:
    """Inside the block the one adapter that is active is computed this way, for all rows; weights stay as they are.

    Others stay as PEFT has them, and so do experts on a GPU, where one launch for each would be slower than B A.
    """
    names = list(model.active_adapters) if hasattr(model, "peft_config") else []
    layers = [one for one in model.modules() if isinstance(one, LoraLayer)]
    idle = any(layer.disable_adapters or layer.merged for layer in layers)
    experts = any(isinstance(layer, ParamWrapper) for layer in layers)
    device = next(model.parameters()).device
    if len(names) != 1 or idle or (experts and device.type != "cpu") or names[0] not in mixable(model):
        yield
        return
    with _computing(model, Asked(names, [torch.zeros(1, dtype=torch.long, device=device)])):
        yield


@contextmanager
def _computing(model: nn.Module, asked: Asked) -> Iterator[None]:
    changed: list[nn.Module] = []
    try:
        for module in model.modules():
            if (forward := _forward_of(module, asked)) is not None:
                module.forward = forward
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _forward_of(module: Any, asked: Asked) -> Callable[..., Any] | None:
    if isinstance(module, ParamWrapper):
        return partial(_experts if module.parameter_name in MATRICES else _router, module, asked)
    if not isinstance(module, LoraLayer):
        return None
    factors = {name: _factor(module, name) for name in asked.names if name in module.lora_magnitude_vector}
    return partial(_linear, module, asked, factors) if factors else None


@torch.no_grad()
def _factor(layer: Any, name: str) -> torch.Tensor:
    """What DoRA multiplies each output with, (out,): the magnitude over the norm of its row (arXiv:2402.09353)."""
    a, b, dora = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_magnitude_vector[name]
    weight = dequantize_module_weight(layer.get_base_layer()).to(a.dtype)
    found: torch.Tensor = dora.weight / dora.get_weight_norm(weight, b @ a, layer.scaling[name])
    return found


def _linear(layer: Any, asked: Asked, factors: dict[str, torch.Tensor], x: torch.Tensor, **_told: Any) -> torch.Tensor:
    """x (rows, ..., in) to (rows, ..., out)."""
    base = layer.get_base_layer()
    result: torch.Tensor = base(x)
    for name, places in zip(asked.names, asked.places, strict=True):
        if name in layer.lora_A:
            rows = places if len(asked.names) > 1 else slice(None)
            a, b = layer.lora_A[name], layer.lora_B[name]
            low = b(a(x[rows].to(a.weight.dtype))) * layer.scaling[name]
            own = result[rows].to(low.dtype)
            if name in factors:
                bias = 0.0 if base.bias is None else base.bias.to(low.dtype)
                own = (own - bias + low) * factors[name] + bias
            else:
                own = own + low
            result[rows] = own.to(result.dtype)
    return result


def _router(wrapper: Any, asked: Asked, x: torch.Tensor, **_told: Any) -> tuple[torch.Tensor, ...]:
    """x (rows * tokens, width), or with tokens apart; what comes out has the rows in front too."""
    base, parameter = wrapper.base_layer, wrapper.parameter_name
    weight, by_row = getattr(base, parameter), x.unflatten(0, (asked.rows, -1))
    found = []
    for name, rows in zip(asked.names, asked.places, strict=True):
        own = weight + wrapper.get_delta_weight(name) if name in wrapper.lora_A else weight
        parts = functional_call(base, {parameter: own}, (by_row[rows].flatten(0, 1),))
        found.append([part.unflatten(0, (len(rows), -1)) for part in parts])
    back = torch.cat(asked.places).argsort()
    return tuple(torch.cat(parts)[back].flatten(0, 1) for parts in zip(*found, strict=True))


def _experts(
    outermost: Any, asked: Asked, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, **_told: Any
) -> torch.Tensor:
    """As `by_expert`. The wrappers of an experts' matrices lie one in another; `outermost` is called for all."""
    owners = torch.cat([torch.full_like(rows, number) for number, rows in enumerate(asked.places)])
    owners = owners[torch.cat(asked.places).argsort()].repeat_interleave(len(hidden) // asked.rows)
    terms: dict[str, list[LowRank]] = {}
    experts = outermost
    while isinstance(experts, ParamWrapper):
        own = [low_rank(experts, name, number) for number, name in enumerate(asked.names) if name in experts.lora_A]
        terms[experts.parameter_name] = own
        experts = experts.base_layer
    whole = partial(by_expert, hidden, indices, weights, experts.num_experts, owners=owners, several=len(asked.names))
    if not isinstance(experts, PackedExperts):
        return whole(partial(_one, experts, terms))
    experts.low_rank = terms
    try:
        return whole(experts.one)
    finally:
        experts.low_rank = {}


def _one(experts: Any, terms: dict[str, list[LowRank]], expert: int, x: torch.Tensor, spans: Spans) -> torch.Tensor:
    """What an expert of transformers makes of its rows (rows, width), `terms` added to its products."""

    def product(matrix: str, x: torch.Tensor) -> torch.Tensor:
        weight = getattr(experts, matrix)[expert]
        out: torch.Tensor = x @ (weight if experts.is_transposed else weight.t())
        for term in terms.get(matrix, ()):
            out = term.add(out, x, expert, spans)
        return out + getattr(experts, f"{matrix}_bias")[expert] if experts.has_bias else out

    return product("down_proj", experts._apply_gate(product("gate_up_proj", x)))
