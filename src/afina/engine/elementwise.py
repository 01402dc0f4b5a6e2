"""What stands between the products: norms, rotary positions, SwiGLU, cross-entropy; forward and backward.

Each is one pass over memory: a Triton kernel on a GPU (kernels.py), the plain twin here elsewhere.
The twins are the definition: the tests hold the kernels to them. Statistics, angles and logits are fp32 (or wider) in
both. `out` may be a part of wider rows, so that a product finds its input where it wants it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from importlib import import_module
from itertools import accumulate
from typing import Any, TypeVar

import torch

Twin = TypeVar("Twin", bound=Callable[..., Any])
Copy = tuple[torch.Tensor, torch.Tensor, float]
"""From a matrix, to a matrix, times a factor."""


@dataclass
class Norm:
    """A layer norm (Ba et al., 2016, arXiv:1607.06450), or an RMS norm (Zhang & Sennrich, 2019, arXiv:1910.07467).

    weight, bias: (width,) in the dtype that is computed in; an RMS norm has no bias, and takes no mean away. `learnt`
    are the parameters behind them, where they learn.
    """

    weight: torch.Tensor
    eps: float
    bias: torch.Tensor | None = None
    learnt: tuple[torch.nn.Parameter, ...] = ()

    def copies(self) -> list[Copy]:
        """What must be copied whenever what learns has changed: all that learns in another precision."""
        pairs = zip(self.learnt, [part for part in (self.weight, self.bias) if part is not None], strict=False)
        return [(there.detach()[None], here[None], 1.0) for there, here in pairs if there.data_ptr() != here.data_ptr()]


def twin_of(kernels: str) -> Callable[[Twin], Twin]:
    """Of a plain function: where its first tensor lies on a GPU, the kernel of the same name in this module runs."""

    def with_kernel(plain: Twin) -> Twin:
        @cache
        def kernel() -> Any:
            return getattr(import_module(f"afina.engine.{kernels}"), plain.__name__)  # imports Triton

        @wraps(plain)
        def run(first: torch.Tensor, *rest: Any, **named: Any) -> Any:
            return (kernel() if first.is_cuda else plain)(first, *rest, **named)

        return run  # type: ignore[return-value]

    return with_kernel


on_gpu = twin_of("kernels")


@on_gpu
def norm(x: torch.Tensor, by: Norm, out: torch.Tensor) -> torch.Tensor:
    """out = weight * (x - mean) / deviation + bias. x, out: (rows, width)."""
    normed, _inverse = _normed(x, by)
    return out.copy_(_scaled(normed, by, x.dtype))


@on_gpu
def norm_backward(
    dy: torch.Tensor, x: torch.Tensor, by: Norm, dx: torch.Tensor, *,
    residual: torch.Tensor | None = None, y: torch.Tensor | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """dx of `norm`, plus `residual` where the input also went past it; `y` receives the output again.

    Returns the gradients of what learns in the norm, (width,) at least fp32.
    """
    normed, inverse = _normed(x, by)
    wide = _at_least_fp32(dy)
    scaled = wide * by.weight
    found = scaled - normed * (scaled * normed).mean(-1, keepdim=True)
    if by.bias is not None:
        found = found - scaled.mean(-1, keepdim=True)
    found = found * inverse
    if residual is not None:
        found = found + residual
    if y is not None:
        y.copy_(_scaled(normed, by, x.dtype))
    dx.copy_(found)
    return [(wide * normed).sum(0), wide.sum(0)][: len(by.learnt)]


def _normed(x: torch.Tensor, by: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    wide = _at_least_fp32(x)
    if by.bias is not None:
        wide = wide - wide.mean(-1, keepdim=True)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + by.eps)
    return wide * inverse, inverse


def _scaled(normed: torch.Tensor, by: Norm, dtype: torch.dtype) -> torch.Tensor:
    """As transformers rounds: an RMS norm before its weight, a layer norm after weight and bias."""
    if by.bias is None:
        return by.weight * normed.to(dtype)
    return normed * by.weight + by.bias


@on_gpu
def head_norms(x: torch.Tensor, norms: Sequence[Norm], heads: Sequence[int], out: torch.Tensor) -> torch.Tensor:
    """Norm each head of queries and keys (Qwen 3) into `out`; values are copied. x, out: (tokens, columns).

    heads: how many heads queries and keys have; norms: one for each.
    """
    out.copy_(x)
    for by, place, of_head in _by_head(norms, heads):
        out[:, place] = _scaled(_normed(x[:, place].unflatten(1, of_head), by)[0], by, x.dtype).flatten(1)
    return out


@on_gpu
def head_norms_backward(d: torch.Tensor, x: torch.Tensor, norms: Sequence[Norm], heads: Sequence[int]) -> torch.Tensor:
    """Turn x, the input of `head_norms`, into its gradient in place; d: of the output. d, x: (tokens, columns)."""
    slopes = d.clone()
    for by, place, of_head in _by_head(norms, heads):
        part, slope = (rows[:, place].unflatten(1, of_head).flatten(0, 1) for rows in (x, d))
        norm_backward(slope, part, by, part)
        slopes[:, place] = part.view(d.shape[0], -1)
    return x.copy_(slopes)


def _by_head(norms: Sequence[Norm], heads: Sequence[int]) -> Iterator[tuple[Norm, slice, tuple[int, int]]]:
    """Each norm with the columns it is for, and with how many heads there are in them, how wide."""
    width, ends = norms[0].weight.numel(), accumulate(heads)
    for by, count, end in zip(norms, heads, ends, strict=True):
        yield by, slice((end - count) * width, end * width), (count, width)


@on_gpu
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    """Turn the first `heads` heads of each row by its position's angles, in place (Su et al., 2021, arXiv:2104.09864).

    x: (tokens, columns), cos, sin: (tokens, half) fp32, where the first 2 half of a head's `width` are turned, its
    halves against each other, as transformers does. With -sin it turns back, which is also the gradient.
    """
    half = cos.shape[1]
    turned = x[:, : heads * width].unflatten(1, (heads, width))
    first, second = _at_least_fp32(turned[:, :, :half]), _at_least_fp32(turned[:, :, half : 2 * half])
    c, s = cos[:, None], sin[:, None]
    turned[:, :, :half], turned[:, :, half : 2 * half] = first * c - second * s, second * c + first * s
    return x


@on_gpu
def gather_rotated(
    out: torch.Tensor, d_heads: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Gradients of turned queries and keys, and of values, side by side in `out` with the turn undone.

    d_heads: three of (samples, length, heads, width), any strides; out: (samples * length, columns).
    """
    out.copy_(torch.cat([part.flatten(0, 1).flatten(1) for part in d_heads], dim=1))
    heads, width = d_heads[0].shape[2:]
    return rotate(out, cos, -sin, heads + d_heads[1].shape[2], width)


@on_gpu
def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = silu(gate) * up (Shazeer, 2020, arXiv:2002.05202). gate_up: (rows, 2 width), out: (rows, width)."""
    gate, up = _at_least_fp32(gate_up).chunk(2, dim=1)
    return out.copy_(torch.nn.functional.silu(gate) * up)


@on_gpu
def swiglu_backward(d: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """Turn gate_up into its gradient in place, and `d` (rows, width) into the forward's output. Returns `d`."""
    gate, up = _at_least_fp32(gate_up).chunk(2, dim=1)
    wide = _at_least_fp32(d)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    again = silu * up
    gate_up.copy_(torch.cat([wide * up * (sigmoid + silu * (1 - sigmoid)), wide * silu], dim=1))
    return d.copy_(again)


def wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in at least fp32, also from 16-bit factors: gradients of adapters are not rounded on their way."""
    if a.is_cuda and a.element_size() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return _at_least_fp32(torch.mm(a, b))


@on_gpu
def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each row (rows,), at least fp32, and softmax - one-hot in `dtype`: the gradient of their sum.

    The gradient lies where the logits were: a chunk of them is the largest tensor there is.
    """
    slopes = logits.view(dtype)[:, : logits.shape[1]]
    log_sum = torch.logsumexp(logits, dim=-1, keepdim=True)
    losses = log_sum - logits.gather(1, targets[:, None])
    gradient = logits.sub_(log_sum).exp_().scatter_add_(1, targets[:, None], torch.full_like(losses, -1))
    return losses[:, 0], slopes.copy_(gradient if dtype == logits.dtype else gradient.to(dtype))


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
