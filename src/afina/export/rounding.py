"""Which whole numbers say floats best: the searches behind the k-quants of GGUF and IQ4, in torch on any device.

A super-block of 256 weights holds groups of 16 or 32. Each group has a scale (and, in some types, a minimum) of 4 to 8
bits, in units that the super-block keeps in F16. Three searches find them: `_affine` (x = scale * q - minimum),
`_symmetric` (x = scale * q) and `codebook` (x = scale * level of a fixed table). Each tries a row of scales, solves
for the best one given the rounding (weighted least squares), keeps the best, and rounds once more with the scale as
stored. Knows nothing of bytes.

The groups lie along the last axis of (size, groups) tensors, so that a sum over a group is a sum of long rows.
"""

from dataclasses import dataclass

import torch

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The table of IQ4: dense around zero, as weights are."""


@dataclass(frozen=True)
class Fields:
    """What a block says, before it is packed. Per super-block: `d`, `least` (F16 values in F32). Per group: `scales`,
    `minima`. Per weight: `q`. Integers are stored as they are meant, without offsets."""

    d: torch.Tensor
    scales: torch.Tensor
    q: torch.Tensor
    least: torch.Tensor
    minima: torch.Tensor

    def values(self) -> torch.Tensor:
        """The weights that a reader of the block will see: (super-blocks, groups, size)."""
        return (self.d * self.scales)[..., None] * self.q - (self.least * self.minima)[..., None]


def fields(x: torch.Tensor, kind: str, cost: torch.Tensor | None = None) -> Fields:
    """The fields of (super-blocks, 256) weights. IQ4's table is searched too."""
    match kind:
        case "q2_k":
            return _affine(x, cost, 16, 3, 15, STEPS["q2_k"])
        case "q3_k":
            return _symmetric(x, cost, 16, 4, 32, STEPS["q3_k"])
        case "q4_k":
            return _affine(x, cost, 32, 15, 63, STEPS["q4_k"])
        case "q5_k":
            return _affine(x, cost, 32, 31, 63, STEPS["q5_k"])
        case "q6_k":
            return _symmetric(x, cost, 16, 32, 128, STEPS["q6_k"])
        case _:
            return codebook(x, cost, 32 if kind == "iq4_xs" else 0)[0]


def _grid(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(first + (last - first) * i / (count - 1) for i in range(count))


STEPS = {
    "q2_k": _grid(-0.8, 1.0, 13),
    "q3_k": (*_grid(-1.2, 1.2, 9), *_grid(-9.2, -6.8, 5)),
    "q4_k": _grid(-1.6, 1.0, 11),
    "q5_k": _grid(-1.2, 0.8, 9),
    "q6_k": _grid(-0.9, 0.9, 7),
}


def _affine(
    x: torch.Tensor, cost: torch.Tensor | None, size: int, top: int, stored: int, steps: tuple[float, ...]
) -> Fields:
    """x = scale * q - minimum, q in 0..top, minimum not negative; scales and minima in 0..stored.

    `steps` are added to `top` in the scales tried: the range is stretched or its ends are cut.
    """
    blocks, groups = x.shape[0], x.shape[1] // size
    x = x.reshape(-1, size).t().contiguous()
    w = (cost.reshape(-1, size).t() if cost is not None else _usual_cost(x, top)).contiguous()
    low, high = x.amin(0).clamp_(max=0), x.amax(0)
    width = (high - low).clamp_(min=1e-30)
    sum_w, weighted = w.sum(0), w * x
    sum_x = weighted.sum(0)
    shifted = x - low
    best = torch.full_like(low, -torch.inf)
    scale, least = torch.zeros_like(low), -low
    q, wq = torch.empty_like(x), torch.empty_like(x)
    for step in steps:
        torch.mul(shifted, (top + step) / width, out=q)
        q.round_().clamp_(0, top)
        found = _solve(q, w, weighted, sum_w, sum_x, wq)
        better = found[0] > best
        best = torch.where(better, found[0], best)
        scale, least = torch.where(better, found[1], scale), torch.where(better, found[2], least)
    for _again in range(REFINED):
        torch.mul(x + least, (1 / scale.clamp(min=1e-30)), out=q)
        q.round_().clamp_(0, top)
        found = _solve(q, w, weighted, sum_w, sum_x, wq)
        better = found[0] > best
        best = torch.where(better, found[0], best)
        scale, least = torch.where(better, found[1], scale), torch.where(better, found[2], least)
    scale, least = scale.clamp_(min=0).reshape(blocks, groups), least.clamp_(min=0).reshape(blocks, groups)
    unit = _unit(least, sum_w.reshape(blocks, groups), stored)
    minima = _ratio(least, unit).round_().clamp_(0, stored)
    offset = (unit * minima).reshape(-1)
    # The minimum is now what is stored; the scale that is best beside it.
    x += offset
    torch.mul(x, 1 / scale.reshape(-1).clamp(min=1e-30), out=q)
    q.round_().clamp_(0, top)
    torch.mul(w, q, out=wq)
    sum_qx, sum_qq = (wq * x).sum(0).reshape(blocks, groups), (wq * q).sum(0).reshape(blocks, groups)
    scale = torch.where(scale > 0, _ratio(sum_qx, sum_qq).clamp_(min=0), scale)
    d = _unit(scale, sum_qq, stored)
    scales = _ratio(scale, d).round_().clamp_(0, stored)
    q = _ratio(x, (d * scales).reshape(-1)).round_().clamp_(0, top)
    return Fields(d, scales, q.t().reshape(blocks, groups, size), unit, minima)


REFINED = 1
"""Times the weights are rounded again with the best scale found."""


def _without_minimum(d: torch.Tensor, scales: torch.Tensor, q: torch.Tensor) -> Fields:
    return Fields(d, scales, q, torch.zeros_like(d), torch.zeros_like(scales))


def _unit(values: torch.Tensor, cost: torch.Tensor, stored: int) -> torch.Tensor:
    """The F16 unit in which whole numbers up to `stored` say each super-block's `values` best."""
    units = _half(values.amax(1, keepdim=True) / stored)
    if stored > 15:  # finer than what it measures: a search gains less than 0.1%
        return units
    best = torch.full_like(units, torch.inf)
    found = units
    for step in UNITS:
        unit = _half(values.amax(1, keepdim=True) / (stored + step))
        error = (cost * (values - unit * _ratio(values, unit).round_().clamp_(0, stored)).square()).sum(1, keepdim=True)
        found, best = torch.where(error < best, unit, found), torch.minimum(error, best)
    return found


UNITS = (-2.0, -1.5, -1.0, -0.6, -0.3, 0.0, 0.3, 0.6, 1.0, 1.5)


def _solve(
    q: torch.Tensor, w: torch.Tensor, weighted: torch.Tensor, sum_w: torch.Tensor, sum_x: torch.Tensor, wq: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For fixed q: the scale and minimum of least squares, and how much of the squares they explain."""
    torch.mul(w, q, out=wq)
    sum_q = wq.sum(0)
    sum_qq = wq.mul_(q).sum(0)
    sum_qx = torch.mul(weighted, q, out=wq).sum(0)
    det = sum_w * sum_qq - sum_q * sum_q
    scale = (sum_w * sum_qx - sum_x * sum_q) / det
    shift = (sum_qq * sum_x - sum_q * sum_qx) / det
    alone = ~(shift <= 0)  # the minimum may not be negative: then a scale alone
    scale = torch.where(alone, sum_qx / sum_qq, scale)
    shift = torch.where(alone, 0.0, shift)
    gain = 2 * (scale * sum_qx + shift * sum_x) - scale * (scale * sum_qq + 2 * shift * sum_q) - shift * shift * sum_w
    return torch.nan_to_num(gain, nan=-torch.inf), scale.nan_to_num_(0.0, 0.0, 0.0), -shift


def _usual_cost(x: torch.Tensor, top: int) -> torch.Tensor:
    """Without an importance matrix: errors of large weights count more, the fewer the bits the more."""
    if top == 63:
        return x.square()
    size = x.abs()
    return size + 1e-30 if top == 3 else size + x.square().mean(0).sqrt()


def _symmetric(
    x: torch.Tensor, cost: torch.Tensor | None, size: int, top: int, stored: int, steps: tuple[float, ...]
) -> Fields:
    """x = scale * q, q in -top..top - 1; the scale, of either sign, in -stored..stored - 1."""
    blocks, groups = x.shape[0], x.shape[1] // size
    x = x.reshape(-1, size).t().contiguous()
    w = (cost.reshape(-1, size).t() if cost is not None else _usual_cost(x, 2 * top - 1)).contiguous()
    weighted = w * x
    peak = _peak(x)
    best, scale = torch.zeros_like(peak), torch.zeros_like(peak)
    q = torch.empty_like(x)
    for step in steps:
        torch.mul(x, _ratio(torch.full_like(peak, -top - step), peak), out=q)
        q.round_().clamp_(-top, top - 1)
        best, scale = _keep(q, w, weighted, best, scale)
    for _again in range(REFINED):
        torch.mul(x, _ratio(torch.ones_like(scale), scale), out=q)
        q.round_().clamp_(-top, top - 1)
        best, scale = _keep(q, w, weighted, best, scale)
    scale = scale.reshape(blocks, groups)
    d = _half(-_peak(scale.t())[:, None] / stored)
    scales = _ratio(scale, d).round_().clamp_(-stored, stored - 1)
    q = _ratio(x, (d * scales).reshape(-1)).round_().clamp_(-top, top - 1)
    return _without_minimum(d, scales, q.t().reshape(blocks, groups, size))


def _keep(
    q: torch.Tensor, w: torch.Tensor, weighted: torch.Tensor, best: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For fixed q the scale of least squares, where it explains more of the squares than the best so far."""
    sum_qx = (weighted * q).sum(0)
    sum_qq = (w * q).mul_(q).sum(0)
    found = _ratio(sum_qx, sum_qq)
    gain = found * sum_qx
    better = gain > best
    return torch.where(better, gain, best), torch.where(better, found, scale)


def codebook(x: torch.Tensor, cost: torch.Tensor | None, stored: int) -> tuple[Fields, torch.Tensor]:
    """x = scale * LEVELS[index] in groups of 32, and the indices. `stored` 0: one group a block, its scale is `d`."""
    blocks, groups = x.shape[0], x.shape[1] // 32
    x = x.reshape(-1, 32).t().contiguous()
    w = (cost.reshape(-1, 32).t() if cost is not None else _usual_cost(x, len(LEVELS) - 1)).contiguous()
    weighted = w * x
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=x.device)
    peak = _peak(x)
    best, scale = torch.zeros_like(peak), torch.zeros_like(peak)
    for step in (*range(-7, 8), 240):  # 240 - 127 = 113: the largest weight at the other end of the table
        q = levels[_nearest(x * _ratio(torch.full_like(peak, LEVELS[0] + step), peak))]
        best, scale = _keep(q, w, weighted, best, scale)
    for _again in range(REFINED):
        q = levels[_nearest(x * _ratio(torch.ones_like(scale), scale))]
        best, scale = _keep(q, w, weighted, best, scale)
    scale = scale.reshape(blocks, groups)
    d = _half(-_peak(scale.t())[:, None] / stored) if stored else _half(scale)
    scales = _ratio(scale, d).round_().clamp_(-stored, stored - 1) if stored else torch.ones_like(d)
    index = _nearest(_ratio(x, (d * scales).reshape(-1))).t().reshape(blocks, groups, 32)
    return _without_minimum(d, scales, levels[index]), index


def _nearest(x: torch.Tensor) -> torch.Tensor:
    """Indices into LEVELS. The midpoints between levels are multiples of 1/2, so a table over 2x decides."""
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    middles = (levels[1:] + levels[:-1]) / 2
    table = torch.bucketize(torch.arange(-256, 256) / 2, middles, right=True).to(x.device)
    return table[(x * 2).floor_().clamp_(-256, 255).to(torch.int32) + 256]


def _peak(x: torch.Tensor) -> torch.Tensor:
    """The value of the largest size along the first axis, with its sign."""
    low, high = x.amin(0), x.amax(0)
    return torch.where(-low > high, low, high)


def _ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a / b, and 0 where b is 0 or so small that the quotient is not finite."""
    return (a / b).nan_to_num_(0.0, 0.0, 0.0)


def _half(x: torch.Tensor) -> torch.Tensor:
    """As F16 will hold it."""
    return x.to(torch.float16).float()
