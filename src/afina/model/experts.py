"""Adapters on a mixture's experts and router: PEFT's adapters of single parameters, on packed experts too.

PEFT adds B A to the whole parameter of all experts; beside packed experts the low-rank products are computed apart, on
the tokens each expert sees. Names and files are PEFT's either way. Door to PEFT.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from afina.errors import ModelError
from afina.language import _
from afina.model.mxfp4 import MATRICES, LowRank, PackedExperts, packed_experts
from afina.model.quantize import without_foreign_kernels
from afina.recipe.schema import Lora

with without_foreign_kernels():
    from peft.tuners.lora.layer import ParamWrapper

ROUTER = re.compile(r"\.(router|mlp\.gate)\.weight$")
"""gpt-oss's, and that of Qwen 3 MoE and Mixtral."""


def mixture_targets(model: nn.Module, method: Lora) -> list[str] | None:
    """The parameters that get adapters beside the linear layers, as the recipe wants them.

    Raises ModelError where the model has none, or where PEFT cannot put such adapters on them.
    """
    wanted = []
    for key, asked, found in (
        ("method.experts", method.experts, expert_parameters(model) if method.experts else []),
        ("method.router", method.router, router_parameters(model) if method.router else []),
    ):
        if asked and not found:
            raise ModelError(
                _("{key} is true, but the model has none that adapters could lie on.").format(key=key),
                hint=_("Leave it out: all-linear means every linear layer already."),
            )
        wanted += found
    if wanted and method.dropout:
        raise ModelError(_("Adapters on experts or a router know no dropout."), hint=_("Set method.dropout to 0."))
    return wanted or None


def refuse_packed(model: nn.Module) -> None:
    """Raises ModelError where experts are packed, whose weights cannot learn themselves."""
    if packed_experts(model):
        raise ModelError(
            _("Experts packed in MXFP4 cannot learn themselves: method full needs plain weights."),
            hint=_("Set model.experts to unpacked, or take method lora."),
        )


def expert_parameters(model: nn.Module) -> list[str]:
    """Ends of the names of all matrices of experts: parameters of three dimensions; empty without a mixture."""
    found = {tail_of(name) for name, parameter in model.named_parameters() if parameter.ndim == 3}
    found |= {tail_of(f"{name}.{matrix}") for name, _module in packed_experts(model) for matrix in MATRICES}
    return sorted(found)


def router_parameters(model: nn.Module) -> list[str]:
    """Ends of the names of all routers' matrices that are no linear layers (those are targets like any other)."""
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return sorted(
        {
            tail_of(name)
            for name, parameter in model.named_parameters()
            if parameter.ndim == 2 and ROUTER.search(name) and name.rpartition(".")[0] not in linear
        }
    )


def tail_of(name: str) -> str:
    """A parameter's name behind the number of its layer: of model.layers.3.mlp.router.weight, mlp.router.weight."""
    parts = name.split(".")
    numbered = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbered[-1] + 1 :]) if numbered else name


class PackedAdapter(ParamWrapper):
    """PEFT's adapter of one matrix of packed experts: hands A and B to the experts instead of adding B A."""

    def get_param(self) -> Any:
        """The matrix of all experts, unpacked for whoever asks: training does not."""
        base = self.get_base_layer()
        return base.matrix(self.parameter_name, getattr(base, f"{self.parameter_name}_bias").dtype)

    @contextmanager
    def _activate_lora(self, active_adapters: Sequence[str]) -> Iterator[None]:
        base = self.get_base_layer()
        base.low_rank[self.parameter_name] = [low_rank(self, name) for name in active_adapters if name in self.lora_A]
        try:
            yield
        finally:
            del base.low_rank[self.parameter_name]


def low_rank(wrapper: Any, name: str, owner: int | None = None) -> LowRank:
    """The adapter called `name` on a matrix of experts; PEFT's A is (experts * rank, in), B (out, rank * experts)."""
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    a = a.view(wrapper.num_experts, -1, a.shape[-1])
    b = b.view(b.shape[0], -1, wrapper.num_experts).permute(2, 0, 1)
    return LowRank(a, b, wrapper.scaling[name], owner)


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Inside the block PEFT finds a parameter, without storage, where a matrix is packed, and adapters of its own that
    it can add others to; they fit packed experts after."""
    packed = packed_experts(model)
    for wrapper in list(model.modules()):
        if isinstance(wrapper, PackedAdapter):
            wrapper.__class__ = ParamWrapper
    for _name, module in packed:
        for matrix in MATRICES:
            shape = module.shape_of(matrix)
            bias = getattr(module, f"{matrix}_bias")
            stand_in = nn.Parameter(bias.detach().new_zeros(()).expand(shape), requires_grad=False)
            module.register_parameter(matrix, stand_in)
    try:
        yield
    finally:
        for _name, module in packed:
            for matrix in MATRICES:
                delattr(module, matrix)
        for wrapper in list(model.modules()):
            if isinstance(wrapper, ParamWrapper) and isinstance(wrapper.get_base_layer(), PackedExperts):
                wrapper.__class__ = PackedAdapter


def adapts_packed(model: nn.Module) -> bool:
    """Whether adapters lie on packed experts."""
    return any(isinstance(module, PackedAdapter) for module in model.modules())


def plain_adapters(model: nn.Module) -> None:
    """After experts were unpacked: their adapters are PEFT's own again."""
    for wrapper in list(model.modules()):
        if isinstance(wrapper, PackedAdapter) and not isinstance(wrapper.get_base_layer(), PackedExperts):
            wrapper.__class__ = ParamWrapper
