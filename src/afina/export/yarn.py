"""By how much llama.cpp turns positions otherwise than a model does (YaRN). Knows figures, nothing of files."""

import math
from typing import Any

from afina.language import _


def turned_otherwise(rope: dict[str, Any], theta: float, head_dim: int) -> float:
    """By how many radians a token llama.cpp turns the dimension that it turns most otherwise than a YaRN which leaves
    the ends of its ramp as they are (arXiv:2309.00071, section 3.2): llama.cpp rounds them down and up."""
    if rope["rope_type"] != "yarn" or rope.get("truncate") is not False or theta == 1:
        return 0.0
    ends = [
        head_dim * math.log(rope["original"] / (rope[turns] * 2 * math.pi)) / (2 * math.log(theta))
        for turns in ("beta_fast", "beta_slow")
    ]

    def share(at: int, low: float, high: float) -> float:
        low, high = max(low, 0.0), min(high, head_dim - 1.0)
        return min(max((at - low) / max(high - low, 1e-3), 0.0), 1.0)

    moved = [
        theta ** (-2 * at / head_dim) * abs(share(at, *ends) - share(at, math.floor(ends[0]), math.ceil(ends[1])))
        for at in range(head_dim // 2)
    ]
    return max(moved, default=0.0) * abs(1 - 1 / float(rope["factor"]))


def yarn_note(turned: float) -> str:
    """That, as a user may read it."""
    return _(
        "llama.cpp rounds where the scaling of positions (YaRN) begins and ends; this model does not: two tokens that "
        "are 100 apart are turned by up to {angle:.2g} radians more or less."
    ).format(angle=100 * turned)
