"""Rates of what a mixture's layer is made of, at gpt-oss-20b's shape: grouped products, fills from MXFP4, routing.

    python benchmarks/experts.py                 4,096 tokens, balanced and skewed routing
    python benchmarks/experts.py --tokens 2048

Each call is timed by events, the median of 20; inputs are larger than the cache.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from afina.engine import experts as parts
from afina.engine import grouped as products_of
from afina.engine.experts import Gating
from afina.engine.router import Router, Routing

EXPERTS, HIDDEN, INNER, CHOSEN = 32, 2880, 2880, 4


def report(name: str, call: Callable[..., object], *given: Any, flops: float = 0, moved: float = 0) -> None:
    """Time call(*given) and print its rates."""
    for _turn in range(4):
        call(*given)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
    events[0].record()
    for event in events[1:]:
        call(*given)
        event.record()
    torch.cuda.synchronize()
    spent = 1000 * statistics.median(before.elapsed_time(after) for before, after in pairwise(events))
    rates = {"tflops": round(flops / spent / 1e6, 1)} if flops else {}
    rates |= {"gb_per_s": round(moved / spent / 1e3)} if moved else {}
    print(json.dumps({"part": name, "us": round(spent, 1), **rates}), flush=True)


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda") * scale


def products(routing: Routing) -> None:
    pairs, ends = routing.tokens.numel(), routing.ends
    for name, out, width in (("gate_up", 2 * INNER, HIDDEN), ("down", HIDDEN, INNER)):
        flops = 2.0 * pairs * out * width
        x, dy = draw(pairs, width), draw(pairs, out)
        for layout in ("out by in", "in by out"):
            weight = draw(EXPERTS, *((out, width) if layout == "out by in" else (width, out)), scale=0.02)
            weight = weight if layout == "out by in" else weight.transpose(1, 2)
            turned = weight.transpose(1, 2)
            fast = products_of._fast(x, turned), products_of._fast(dy, weight)
            report(f"{name} forward, {layout}, fast {fast[0]}", products_of.grouped, x, turned, ends, flops=flops)
            report(f"{name} dx, {layout}, fast {fast[1]}", products_of.grouped, dy, weight, ends, flops=flops)
        report(f"{name} as one product", torch.mm, x, draw(width, out, scale=0.02), flops=flops)
    low, x, a = draw(pairs, 16), draw(pairs, HIDDEN), draw(EXPERTS, 16, HIDDEN)
    moved = 2.0 * pairs * HIDDEN
    report("low-rank outer", products_of.grouped_outer, low, x, ends, moved=moved)
    report("low-rank down", products_of.grouped, x, a.transpose(1, 2), ends, moved=moved)
    report("low-rank added", products_of.grouped_add, x, low, a, ends, moved=2 * moved)


def between(n: torch.Tensor, routing: Routing) -> None:
    pairs, tokens = routing.tokens.numel(), n.shape[0]
    gate_up, d, bias = draw(pairs, 2 * INNER), draw(pairs, INNER), draw(EXPERTS, 2 * INNER)
    by, out, down_bias = Gating(1.702, 7.0, 1.0, True), torch.empty_like(n), draw(EXPERTS, HIDDEN)
    share, experts = routing.share, routing.experts
    report("gated", parts.gated, gate_up, bias, experts, by, moved=6.0 * pairs * INNER)
    report("gated backward", parts.gated_backward, d, gate_up, bias, experts, share, by, moved=12.0 * pairs * INNER)
    report("gather", n.index_select, 0, routing.tokens, moved=2.0 * (pairs + tokens) * HIDDEN)
    combined = partial(parts.combine, bias=down_bias, residual=n, weighted=True)
    report("combine", combined, d, routing, out, moved=2.0 * (pairs + 2 * tokens) * HIDDEN)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, default=4096)
    tokens = options.parse_args().tokens
    torch.manual_seed(0)
    n = draw(tokens, HIDDEN)
    for skew in (0.0, 1.0):
        bias = torch.linspace(-2, 2, EXPERTS, device="cuda") * skew
        router = Router(draw(EXPERTS, HIDDEN, scale=0.02), bias, CHOSEN)
        routing = router.route(n)
        sizes = routing.ends.diff(prepend=routing.ends.new_zeros(1)).tolist()
        print(f"skew {skew}: {min(sizes)} to {max(sizes)} rows an expert", flush=True)
        report("route", router.route, n)
        products(routing)
        between(n, routing)
    shape = (EXPERTS, 2 * INNER, HIDDEN // 32)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, device="cuda")
    scales = torch.randint(117, 121, shape, dtype=torch.uint8, device="cuda")
    place = torch.empty(EXPERTS, 2 * INNER, HIDDEN, dtype=torch.bfloat16, device="cuda")
    moved = place.numel() * (2 + 0.5 + 1 / 32)
    report("fill gate_up from MXFP4", parts.fill_mxfp4, blocks, scales, place, moved=moved)


if __name__ == "__main__":
    main()
