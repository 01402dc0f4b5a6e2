"""Rates of what a mixture's layer is made of, at gpt-oss-20b's shape: grouped products, fills from MXFP4, routing.

    python benchmarks/experts.py                 4,096 tokens, balanced and skewed routing
    python benchmarks/experts.py --tokens 2048

Each call is timed by events, the median of 20 over inputs larger than the cache; its floor stands beside it.
"""

import argparse
import json
from collections.abc import Callable

import torch

from afina.engine import experts as parts
from afina.engine.experts import Gating, Matrix, Router
from afina.engine.products import Scratch

EXPERTS, HIDDEN, INNER, CHOSEN = 32, 2880, 2880, 4


def microseconds(call: Callable[[], object]) -> float:
    for _turn in range(4):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    spent = sorted(a.elapsed_time(b) for a, b in zip(events[:-1], events[1:], strict=True))
    return 1000 * spent[len(spent) // 2]


def report(name: str, spent: float, *, flops: float = 0, moved: float = 0) -> None:
    rates = {"tflops": round(flops / spent / 1e6, 1)} if flops else {}
    rates |= {"gb_per_s": round(moved / spent / 1e3)} if moved else {}
    print(json.dumps({"part": name, "us": round(spent, 1), **rates}), flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, default=4096)
    tokens = options.parse_args().tokens
    torch.manual_seed(0)
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")

    def draw(*shape: int, scale: float = 0.02) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda") * scale

    for skew in (0.0, 1.0):
        n = draw(tokens, HIDDEN, scale=1.0)
        bias = torch.linspace(-2, 2, EXPERTS, device="cuda") * skew
        router = Router(draw(EXPERTS, HIDDEN), bias, CHOSEN)
        routing = router.route(n)
        pairs = tokens * CHOSEN
        sizes = routing.ends.diff(prepend=routing.ends.new_zeros(1)).tolist()
        print(f"skew {skew}: {min(sizes)} to {max(sizes)} rows an expert", flush=True)
        report("route", microseconds(lambda: router.route(n)))
        for name, out, width in (("gate_up", 2 * INNER, HIDDEN), ("down", HIDDEN, INNER)):
            flops = 2.0 * pairs * out * width
            for layout in ("out by in", "in by out"):
                weight = draw(EXPERTS, out, width) if layout == "out by in" else draw(EXPERTS, width, out)
                weight = weight if layout == "out by in" else weight.transpose(1, 2)
                x, dy = draw(pairs, width, scale=1.0), draw(pairs, out, scale=1.0)
                fast = parts._fast(x, weight.transpose(1, 2)), parts._fast(dy, weight)
                ends = routing.ends
                forward = microseconds(lambda: parts.grouped(x, weight.transpose(1, 2), ends))
                report(f"{name} forward, {layout}, fast {fast[0]}", forward, flops=flops)
                report(f"{name} dx, {layout}, fast {fast[1]}", microseconds(lambda: parts.grouped(dy, weight, ends)), flops=flops)
                del weight, x, dy
        x, weight = draw(pairs, HIDDEN, scale=1.0), draw(2 * INNER, HIDDEN)
        report("one plain product of the same size", microseconds(lambda: x @ weight.t()), flops=4.0 * pairs * INNER * HIDDEN)
        gate_up, d, by = draw(pairs, 2 * INNER, scale=1.0), draw(pairs, INNER, scale=1.0), Gating(1.702, 7.0, 1.0, True)
        bias, out = draw(EXPERTS, 2 * INNER), torch.empty_like(n)
        share, experts = routing.share, routing.experts
        report("gated", microseconds(lambda: parts.gated(gate_up, bias, experts, by)), moved=6.0 * pairs * INNER)
        report(
            "gated backward", microseconds(lambda: parts.gated_backward(d, gate_up, bias, experts, share, by)),
            moved=12.0 * pairs * INNER,
        )  # fmt: skip
        report("gather", microseconds(lambda: n.index_select(0, routing.tokens)), moved=2.0 * (pairs + tokens) * HIDDEN)
        down_bias = draw(EXPERTS, HIDDEN)
        report(
            "combine", microseconds(lambda: parts.combine(d, routing, out, bias=down_bias, residual=n, weighted=True)),
            moved=2.0 * (pairs + 2 * tokens) * HIDDEN,
        )  # fmt: skip
        low = draw(pairs, 16)
        report("outer", microseconds(lambda: parts.grouped_outer(low, d, routing.ends)), moved=2.0 * pairs * HIDDEN)
        a = draw(EXPERTS, 16, HIDDEN)
        report("low-rank down", microseconds(lambda: parts.grouped(x, a.transpose(1, 2), routing.ends)), moved=2.0 * pairs * HIDDEN)
        report("low-rank up", microseconds(lambda: parts.grouped(low, a, routing.ends)), moved=2.0 * pairs * HIDDEN)
    blocks = torch.randint(0, 256, (EXPERTS, 2 * INNER, HIDDEN // 32, 16), dtype=torch.uint8, device="cuda")
    scales = torch.randint(117, 121, (EXPERTS, 2 * INNER, HIDDEN // 32), dtype=torch.uint8, device="cuda")
    matrix = Matrix(EXPERTS, 2 * INNER, HIDDEN, like, Scratch(), blocks=blocks, scales=scales)
    place = torch.empty(EXPERTS, 2 * INNER, HIDDEN, dtype=torch.bfloat16, device="cuda")
    count = place.numel()
    report("fill gate_up from MXFP4", microseconds(lambda: matrix._fill(place)), moved=count * (2 + 0.5 + 1 / 32))


if __name__ == "__main__":
    main()
