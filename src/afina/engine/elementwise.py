"""What stands between the products: RMS norm, rotary positions, SwiGLU, cross-entropy; forward and backward.

Each is one pass over memory: a Triton kernel on a GPU (kernels.py), the plain twin here elsewhere. The twins are the
definition: the tests hold the kernels to them. Statistics, angles and logits are fp32 (or wider) in both. `out` may be
a part of wider rows, so that a product finds its input where it wants it.
"""

from collections.abc import Sequence

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """out = weight * x / rms(x) (Zhang & Sennrich, 2019, arXiv:1910.07467). x, out: (rows, width)."""
    if x.is_cuda:
        from afina.engine import kernels

        return kernels.rms_norm(x, weight, eps, out)
    wide = _at_least_fp32(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return out.copy_(weight * normed.to(x.dtype))


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dx: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    """dx of `rms_norm`, plus `residual` where the input also went past the norm; `y` receives the output again."""
    if x.is_cuda:
        from afina.engine import kernels

        return kernels.rms_norm_backward(dy, x, weight, eps, dx, residual, y)
    wide, scaled = _at_least_fp32(x), _at_least_fp32(dy) * weight
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * inverse
    found = inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    if residual is not None:
        found = found + residual
    if y is not None:
        y.copy_(weight * normed.to(x.dtype))
    return dx.copy_(found)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, *, backward: bool = False
) -> torch.Tensor:
    """Turn the first `heads` heads of each row by its position's angles, in place (Su et al., 2021, arXiv:2104.09864).

    x: (tokens, columns), cos, sin: (tokens, width / 2) fp32. Halves of a head are turned against each other, as
    transformers does. `backward` turns back, which is also the gradient.
    """
    if x.is_cuda:
        from afina.engine import kernels

        return kernels.rotate(x, cos, sin, heads, backward)
    half = cos.shape[1]
    turned = x[:, : heads * 2 * half].unflatten(1, (heads, 2, half))
    first, second = _at_least_fp32(turned[:, :, 0]), _at_least_fp32(turned[:, :, 1])
    c, s = cos[:, None], -sin[:, None] if backward else sin[:, None]
    turned[:, :, 0], turned[:, :, 1] = first * c - second * s, second * c + first * s
    return x


def gather_rotated(
    d_heads: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Gradients of turned queries and keys, and of values, side by side in `out` with the turn undone.

    d_heads: three of (samples, length, heads, width), any strides; out: (samples * length, columns).
    """
    if out.is_cuda:
        from afina.engine import kernels

        return kernels.gather_rotated(d_heads, cos, sin, out)
    out.copy_(torch.cat([part.flatten(0, 1).flatten(1) for part in d_heads], dim=1))
    return rotate(out, cos, sin, d_heads[0].shape[2] + d_heads[1].shape[2], backward=True)


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = silu(gate) * up (Shazeer, 2020, arXiv:2002.05202). gate_up: (rows, 2 width), out: (rows, width)."""
    if gate_up.is_cuda:
        from afina.engine import kernels

        return kernels.swiglu(gate_up, out)
    gate, up = _at_least_fp32(gate_up).chunk(2, dim=1)
    return out.copy_(torch.nn.functional.silu(gate) * up)


def swiglu_backward(d: torch.Tensor, gate_up: torch.Tensor, d_gate_up: torch.Tensor) -> torch.Tensor:
    """Write the gradient of gate and up; `d` (rows, width) then holds the forward's output again. Returns `d`."""
    if gate_up.is_cuda:
        from afina.engine import kernels

        return kernels.swiglu_backward(d, gate_up, d_gate_up)
    (gate, up), width = _at_least_fp32(gate_up).chunk(2, dim=1), d.shape[1]
    wide = _at_least_fp32(d)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    d_gate_up[:, :width] = wide * up * (sigmoid + silu * (1 - sigmoid))
    d_gate_up[:, width : 2 * width] = wide * silu
    return d.copy_(silu * up)


def wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in at least fp32, also from 16-bit factors: gradients of adapters are not rounded on their way."""
    if a.is_cuda and a.element_size() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return _at_least_fp32(torch.mm(a, b))


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, d_logits: torch.Tensor) -> torch.Tensor:
    """Loss of each row (rows,), at least fp32; `d_logits` receives softmax - one-hot, the gradient of their sum."""
    if logits.is_cuda:
        from afina.engine import kernels

        return kernels.cross_entropy(logits, targets, d_logits)
    wide = _at_least_fp32(logits)
    log_sum = torch.logsumexp(wide, dim=-1, keepdim=True)
    losses = log_sum - wide.gather(1, targets[:, None])
    gradient = torch.exp(wide - log_sum)
    gradient.scatter_add_(1, targets[:, None], torch.full_like(losses, -1))
    d_logits.copy_(gradient)
    return losses[:, 0]


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
