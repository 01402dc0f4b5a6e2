"""Weights as blocks of few bits: the k-quants of GGUF, IQ4 and Q8_0, encoded in torch on whatever device holds them.

Knows the layout of bytes in a block; which numbers stand in it is rounding.py's, tensors and files are gguf.py's.
Quants that need no search are the `gguf` package's.
"""

import math
from collections.abc import Callable

import torch

from afina.export.rounding import codebook, fields

CPU_CHUNK, GPU_CHUNK = 2**17, 2**24
"""Weights encoded at once. 2^17 (0.5 MB in F32) stay in the caches of a core while some 15 scales are tried; 2^24 keep
a GPU busy in 1 GB."""

Bytes = torch.Tensor
Encoder = Callable[[torch.Tensor, torch.Tensor | None], Bytes]


def encode(weights: torch.Tensor, kind: str, importance: torch.Tensor | None = None) -> Bytes:
    """(rows, columns) floats to (rows, bytes) uint8, on the weights' device.

    `importance` (columns,) says how much each column's error matters (the mean square of what it is multiplied with);
    without it, errors of large weights count more. `columns` must be a multiple of the type's block. Raises NotFinite.
    """
    block, _size = BLOCKS[kind]
    columns = weights.shape[1]
    if columns % block:
        raise ValueError(f"{columns} columns are no multiple of {block}")
    step = max(1, (GPU_CHUNK if weights.is_cuda else CPU_CHUNK) // columns)

    def one(part: torch.Tensor) -> Bytes:
        part = part.float()
        if not is_finite(part):
            raise NotFinite
        cost = None if importance is None else _cost(part, importance, block)
        return ENCODERS[kind](part.reshape(-1, block), cost).reshape(part.shape[0], -1)

    return torch.cat([one(part) for part in weights.split(step)])


class NotFinite(ValueError):
    """A weight is infinite or not a number."""


def is_finite(x: torch.Tensor) -> bool:
    """Whether all values are. Their sum says so in one pass, unless finite values overflow it."""
    return math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all())


def _cost(part: torch.Tensor, importance: torch.Tensor, block: int) -> torch.Tensor:
    """The price of a squared error, weight by weight: the column's importance, and more for large weights."""
    spread = part.square().mean(-1, keepdim=True)
    return (importance.to(part) * (spread + part.square()).sqrt()).reshape(-1, block)


def _packed(*parts: torch.Tensor) -> Bytes:
    return torch.cat([part if part.dtype == torch.uint8 else _f16(part) for part in parts], dim=1)


def _f16(x: torch.Tensor) -> Bytes:
    return x.to(torch.float16).contiguous().view(torch.uint8)


def _u8(x: torch.Tensor) -> Bytes:
    return x.to(torch.int16).to(torch.uint8)


def _nibbles(q: torch.Tensor, half: int) -> Bytes:
    """(n, 256) of 0..15: in runs of 2 * half, the first half in the low bits, the second in the high."""
    runs = q.reshape(q.shape[0], -1, 2, half)
    return (runs[:, :, 0] | (runs[:, :, 1] << 4)).reshape(q.shape[0], -1)


def _quarters(q: torch.Tensor) -> Bytes:
    """(n, 256) of 0..3: in each half, the four runs of 32 side by side in a byte."""
    runs = q.reshape(-1, 2, 4, 32)
    return (runs[:, :, 0] | (runs[:, :, 1] << 2) | (runs[:, :, 2] << 4) | (runs[:, :, 3] << 6)).reshape(-1, 64)


def _bits(q: torch.Tensor) -> Bytes:
    """(n, 256) of 0..1: bit i of a byte is of the i-th run of 32."""
    runs = q.reshape(-1, 8, 32)
    return sum((runs[:, i] << i for i in range(1, 8)), start=runs[:, 0])


def _six_bit_pairs(scales: torch.Tensor, minima: torch.Tensor) -> Bytes:
    """8 scales and 8 minima of 6 bits in 12 bytes: the first four whole, the high bits of the last four above them."""
    s, m = _u8(scales), _u8(minima)
    return torch.cat(
        [s[:, :4] | (s[:, 4:] >> 4 << 6), m[:, :4] | (m[:, 4:] >> 4 << 6), (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], 1
    )


def _q8_0(x: torch.Tensor, _cost: torch.Tensor | None) -> Bytes:
    """No search: the largest of 32 weights is 127. The bytes are those of ggml, which rounds halves away from zero."""
    d = x.abs().amax(1, keepdim=True) / 127
    q = x * torch.where(d == 0, 0.0, 1 / d)
    whole = q.round()  # halves to even
    rest = q.sub_(whole)
    least, most = rest.aminmax()
    if float(most) == 0.5 or float(least) == -0.5:
        whole += torch.where((rest.abs() == 0.5) & ((rest > 0) == (whole + rest > 0)), 2 * rest, 0.0)
    block = torch.empty(len(x), 34, dtype=torch.int8, device=x.device)
    block[:, :2] = d.to(torch.float16).view(torch.int8)
    block[:, 2:] = whole
    return block.view(torch.uint8)


def _q2_k(x: torch.Tensor, cost: torch.Tensor | None) -> Bytes:
    f = fields(x, "q2_k", cost)
    return _packed(_u8(f.scales) | (_u8(f.minima) << 4), _quarters(_u8(f.q)), f.d, f.least)


def _q3_k(x: torch.Tensor, cost: torch.Tensor | None) -> Bytes:
    f = fields(x, "q3_k", cost)
    q, scales = _u8(f.q + 4), _u8(f.scales + 32)
    low = (scales[:, :8] & 15) | ((scales[:, 8:] & 15) << 4)
    runs = (scales >> 4).reshape(-1, 4, 4)
    high = runs[:, 0] | (runs[:, 1] << 2) | (runs[:, 2] << 4) | (runs[:, 3] << 6)
    return _packed(_bits(q >> 2), _quarters(q & 3), low, high, f.d)


def _q4_k(x: torch.Tensor, cost: torch.Tensor | None) -> Bytes:
    f = fields(x, "q4_k", cost)
    return _packed(f.d, f.least, _six_bit_pairs(f.scales, f.minima), _nibbles(_u8(f.q), 32))


def _q5_k(x: torch.Tensor, cost: torch.Tensor | None) -> Bytes:
    f = fields(x, "q5_k", cost)
    q = _u8(f.q)
    return _packed(f.d, f.least, _six_bit_pairs(f.scales, f.minima), _bits(q >> 4), _nibbles(q & 15, 32))


def _q6_k(x: torch.Tensor, cost: torch.Tensor | None) -> Bytes:
    f = fields(x, "q6_k", cost)
    q = _u8(f.q + 32)
    return _packed(_nibbles(q & 15, 64), _quarters(q >> 4), f.scales.to(torch.int8).view(torch.uint8), f.d)


def _iq4_nl(x: torch.Tensor, cost: torch.Tensor | None) -> Bytes:
    f, index = codebook(x, cost, 0)
    return _packed(f.d, _nibbles(_u8(index), 16))


def _iq4_xs(x: torch.Tensor, cost: torch.Tensor | None) -> Bytes:
    f, index = codebook(x, cost, 32)
    scales = _u8(f.scales + 32)
    runs = (scales >> 4).reshape(-1, 2, 4)
    high = runs[:, :, 0] | (runs[:, :, 1] << 2) | (runs[:, :, 2] << 4) | (runs[:, :, 3] << 6)
    low = (scales[:, ::2] & 15) | ((scales[:, 1::2] & 15) << 4)
    return _packed(f.d, high, low, _nibbles(_u8(index), 16))


ENCODERS: dict[str, Encoder] = dict(
    q8_0=_q8_0, q2_k=_q2_k, q3_k=_q3_k, q4_k=_q4_k, q5_k=_q5_k, q6_k=_q6_k, iq4_nl=_iq4_nl, iq4_xs=_iq4_xs
)
_SIZES = ((32, 34), (256, 84), (256, 110), (256, 144), (256, 176), (256, 210), (32, 18), (256, 136))
BLOCKS = dict(zip(ENCODERS, _SIZES, strict=True))
"""Weights and bytes of a block."""
