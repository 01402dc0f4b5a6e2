"""Experts whose matrices stay packed in MXFP4, four bits a weight, while adapters learn beside them (gpt-oss).

The format (OCP Microscaling 1.0): 32 neighbours of a row share one byte, the exponent of a power of two biased by 127;
each is four bits, a sign, two bits of exponent, one of mantissa. Two lie in a byte, the first in the lower half. A
product unpacks one expert's matrix, uses it and lets it go, forward and backward: what autograd keeps is the bytes
that are there anyway. Knows nothing of files, nor of PEFT.
"""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

GROUP = 32
"""Weights that share an exponent."""
BIAS = 127
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
PACKED: dict[str, Any] = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""What config.json says of a checkpoint whose experts are packed."""
MATRICES = ("gate_up_proj", "down_proj")


class LowRank(NamedTuple):
    """A low-rank term of all experts. a: (experts, rank, in), b: (experts, out, rank), the factor of B A. `owner`: of
    several who share the experts, by number, whose rows it is for; None is all of them."""

    a: torch.Tensor
    b: torch.Tensor
    factor: float
    owner: int | None = None

    def add(self, out: torch.Tensor, x: torch.Tensor, expert: int, spans: "Spans") -> torch.Tensor:
        """`out` (rows, out) with the term of `expert` and x (rows, in). Where it has an owner nothing may learn."""
        a, b = self.a[expert].to(x.dtype), self.b[expert].to(x.dtype)
        if self.owner is None:
            return out + (x @ a.t()) @ b.t() * self.factor
        rows = spans[self.owner]
        out[rows] += (x[rows] @ a.t()) @ b.t() * self.factor
        return out


Spans = list[slice]
"""Of rows that lie in their owners' order, each owner's."""


def dequantise(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers: blocks (..., groups, 16) uint8 and scales (..., groups) uint8 to (..., groups * 32) of `dtype`.

    Exact in bf16 and fp32. In fp16 what lies beyond its range overflows, as everywhere else.
    """
    pairs = torch.tensor([[VALUES[byte & 15], VALUES[byte >> 4]] for byte in range(256)], device=blocks.device)
    powers = torch.where(scales == 0, 0x00400000, scales.int() << 23).view(torch.float32)
    found = F.embedding(blocks.int(), pairs.to(dtype)).flatten(-2)
    if dtype == torch.float16:
        return (found.float() * powers[..., None]).to(dtype).flatten(-2)
    return (found * powers[..., None].to(dtype)).flatten(-2)


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales of a matrix (..., columns), rounded to the nearest, ties to even mantissas.

    The exponent is the largest weight's, less 2, so that it falls below 8; what lies above 6 becomes 6 (section 6.3 of
    the specification).
    """
    groups = weight.float().unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    exponents = torch.where(largest > 0, torch.frexp(largest).exponent - 3, -BIAS).clamp(-BIAS, BIAS)
    scaled = torch.ldexp(groups, -exponents[..., None])
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=weight.device)
    size = scaled.abs().contiguous()
    down, up = torch.bucketize(size, bounds), torch.bucketize(size, bounds, right=True)
    code = torch.where(down % 2 == 0, down, up) + 8 * torch.signbit(scaled)
    packed = (code[..., 0::2] + (code[..., 1::2] << 4)).to(torch.uint8)
    return packed, (exponents + BIAS).to(torch.uint8)


class _Product(torch.autograd.Function):
    """x W^T of one packed matrix W (out, in), which does not learn."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(blocks, scales)
        return x @ dequantise(blocks, scales, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        blocks, scales = ctx.saved_tensors
        return d_out @ dequantise(blocks, scales, d_out.dtype), None, None


def by_expert(
    hidden_states: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    experts: int,
    one: Callable[[int, torch.Tensor, Spans], torch.Tensor],
    owners: torch.Tensor | None = None,
    several: int = 1,
) -> torch.Tensor:
    """What a mixture gives: hidden_states (tokens, width); indices, weights (tokens, chosen). Returns (tokens, width).

    `one` computes what an expert, by its number, makes of its rows (rows, width). These lie in the order of their
    owners: `owners` (tokens,) are numbers below `several`.
    """
    tokens, chosen = indices.shape
    which = (indices * several + (0 if owners is None else owners[:, None])).flatten()
    order = which.argsort(stable=True)
    counts = torch.bincount(which, minlength=experts * several).view(experts, several).tolist()
    kind = hidden_states.device.type
    mixed = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if mixed else hidden_states.dtype
    rows = hidden_states.to(dtype)[order // chosen]
    outputs, start = [], 0
    with torch.autocast(kind, enabled=False) if mixed else nullcontext():
        for expert, own in enumerate(counts):
            if count := sum(own):
                ends = list(accumulate(own, initial=0))
                outputs.append(one(expert, rows[start : start + count], list(map(slice, ends, ends[1:]))))
                start += count
    weighted = torch.cat(outputs) * weights.flatten()[order, None]
    whole = torch.empty_like(weighted).index_copy(0, order, weighted)
    summed: torch.Tensor = whole.view(tokens, chosen, -1).sum(1)
    return summed.type_as(hidden_states)


class PackedExperts(nn.Module):
    """gpt-oss's experts, with what transformers' module of the same place is given and gives back.

    `NAME_blocks`: (experts, rows, columns / 32, 16), `NAME_scales`: (experts, rows, columns / 32), as checkpoints have
    them; rows are what a matrix gives, columns what it takes. While a low-rank term stands in `low_rank` under the name
    of a matrix, it is added to that matrix.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.num_experts, self.alpha, self.limit = experts.num_experts, experts.alpha, experts.limit
        self.is_transposed = True
        self.low_rank: dict[str, list[LowRank]] = {}
        for name in MATRICES:
            count, columns, rows = getattr(experts, name).shape
            device = getattr(experts, name).device
            for part, shape in (("blocks", (columns // GROUP, GROUP // 2)), ("scales", (columns // GROUP,))):
                self.register_buffer(
                    f"{name}_{part}", torch.zeros(count, rows, *shape, dtype=torch.uint8, device=device)
                )
            self.register_parameter(f"{name}_bias", getattr(experts, f"{name}_bias"))

    def shape_of(self, name: str) -> tuple[int, int, int]:
        """(experts, in, out) of a matrix, as transformers lays it out unpacked."""
        count, rows, groups = getattr(self, f"{name}_scales").shape
        return int(count), int(groups) * GROUP, int(rows)

    def matrix(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One matrix of all experts unpacked, (experts, in, out)."""
        blocks, scales = getattr(self, f"{name}_blocks"), getattr(self, f"{name}_scales")
        return dequantise(blocks, scales, dtype).transpose(1, 2).contiguous()

    def forward(
        self, hidden_states: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states (tokens, width); router_indices, routing_weights (tokens, chosen). Returns (tokens, width)."""
        return by_expert(hidden_states, router_indices, routing_weights, self.num_experts, self.one)

    def one(self, expert: int, x: torch.Tensor, spans: Spans) -> torch.Tensor:
        """What an expert makes of its rows (rows, width), see `by_expert`."""
        gate_up = self._product("gate_up_proj", expert, x, spans)
        gate = gate_up[..., ::2].clamp(max=self.limit)
        up = gate_up[..., 1::2].clamp(min=-self.limit, max=self.limit)
        return self._product("down_proj", expert, (up + 1) * gate * torch.sigmoid(gate * self.alpha), spans)

    def _product(self, name: str, expert: int, x: torch.Tensor, spans: Spans) -> torch.Tensor:
        blocks, scales = getattr(self, f"{name}_blocks")[expert], getattr(self, f"{name}_scales")[expert]
        out: torch.Tensor = _Product.apply(x, blocks, scales)  # type: ignore[no-untyped-call]
        for term in self.low_rank.get(name, ()):
            out = term.add(out, x, expert, spans)
        bias: torch.Tensor = getattr(self, f"{name}_bias")[expert]
        return out + bias.to(x.dtype)


def pack_experts(model: nn.Module) -> nn.Module:
    """Put `PackedExperts` in the place of every module of experts of a gpt-oss model, empty, to be loaded."""
    for name, module in list(model.named_modules()):
        if name.endswith(".mlp.experts"):
            model.get_submodule(name.rpartition(".")[0]).experts = PackedExperts(module)
    return model


def packed_experts(model: nn.Module) -> list[tuple[str, PackedExperts]]:
    """Where experts are held packed, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, PackedExperts)]


@torch.no_grad()
def unpack_experts(model: nn.Module, make: Callable[[], Any], dtype: torch.dtype) -> None:
    """Put plain experts in the place of packed ones, holding the same numbers; `make` gives an empty one."""
    for name, packed in packed_experts(model):
        plain = make()
        for matrix in MATRICES:
            setattr(plain, matrix, nn.Parameter(packed.matrix(matrix, dtype), requires_grad=False))
            setattr(plain, f"{matrix}_bias", getattr(packed, f"{matrix}_bias"))
        parent, _dot, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
