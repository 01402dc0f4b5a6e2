"""8-bit products and the kernels around them on one GPU, at Llama-3.1-8B's widths: microseconds, bytes a second.

    python benchmarks/eight.py                        everything, about a minute and a half
    python benchmarks/eight.py products kernels       some of it

products: x W^T and dy W in bf16, e4m3 (a scale a row or one for all, fast accumulation or not, the adapters' columns
behind) and INT8. kernels: what writes and reads rows in eight bits. tiles: other tile sizes of the same. Random data
everywhere; medians.
"""

# ruff: noqa: B023 - what is timed is called before its loop goes on
import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "src")]

from afina.engine import eight, eight_kernels, eight_matrix, eight_movers  # noqa: E402 - found by the path above
from afina.engine.eight import FP8, INT8, Rows  # noqa: E402
from afina.engine.elementwise import Norm  # noqa: E402

HIDDEN, WIDE, HEADS, KEPT, HEAD, LAYERS = 4096, 14336, 32, 8, 128, 32
WIDTHS = {"qkv": ((HEADS + 2 * KEPT) * HEAD, HIDDEN, 48), "o": (HIDDEN, HIDDEN, 16),
          "gate_up": (2 * WIDE, HIDDEN, 32), "down": (HIDDEN, WIDE, 16)}  # fmt: skip
"""Outputs, inputs, and the rank of all adapters together."""
UNIT = torch.ones(1, device="cuda")
found: dict[str, dict[str, Any]] = {}


def timed(name: str, call: Callable[[], object], bytes_moved: int = 0, flops: int = 0) -> float:
    """Median microseconds of a call, kept by name."""
    from triton.testing import do_bench

    try:
        spent = 1000 * do_bench(call, warmup=3, rep=15, return_mode="median")
    except Exception as error:  # noqa: BLE001 - whatever a combination does not do is a finding
        found[name] = {"error": f"{type(error).__name__}: {str(error)[:160]}"}
        print(f"{name:44} {found[name]['error']}", flush=True)
        return float("nan")
    found[name] = {"us": round(spent, 1)}
    if bytes_moved:
        found[name]["tb_s"] = round(bytes_moved / spent / 1e6, 2)
    if flops:
        found[name]["tflops"] = round(flops / spent / 1e6)
    print(f"{name:44} " + " ".join(f"{key} {value}" for key, value in found[name].items()), flush=True)
    return spent


def rows_of(count: int, width: int, appended: int = 0, form: eight.Format = FP8) -> Rows:
    made = Rows.empty(count, width, appended, form, torch.device("cuda"))
    eight_kernels.quantise(torch.randn(count, width, device="cuda", dtype=torch.bfloat16), made, None, form.peak)
    if appended:
        made.values[:, width:] = made.values[:, :appended]
    return made


def products(tokens: int) -> None:
    one = torch.ones((), device="cuda")
    totals: dict[str, float] = {}
    for name, (n, k, r) in WIDTHS.items():
        for direction, (out, inner) in (("y", (n, k)), ("dx", (k, n))):
            flops = 2 * tokens * n * k
            a = torch.randn(tokens, inner, device="cuda", dtype=torch.bfloat16)
            b = torch.randn(out, inner, device="cuda", dtype=torch.bfloat16)
            kinds: dict[str, Callable[[], object]] = {"bf16": lambda: torch.mm(a, b.t())}
            plain, weights = rows_of(tokens, inner), rows_of(out, inner)
            wide, wide_weights = rows_of(tokens, inner, 3 * r), rows_of(out, inner, 3 * r)
            round_, round_weights = (rows_of(size, inner, -(-3 * r // 128) * 128) for size in (tokens, out))

            def scaled(x: Rows, w: Rows, fast: bool, whole: bool = False) -> Callable[[], object]:
                scales = (one, one) if whole else (x.scales[:, None], w.scales[None])
                return lambda: torch._scaled_mm(
                    x.values, w.values.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16,
                    use_fast_accum=fast,
                )  # fmt: skip

            kinds |= {
                "rows, fast": scaled(plain, weights, True), "rows": scaled(plain, weights, False),
                "whole, fast": scaled(plain, weights, True, True),
                "rows, fast, adapters behind": scaled(wide, wide_weights, True),
                "rows, fast, adapters behind, 128": scaled(round_, round_weights, True),
            }  # fmt: skip
            ia, ib = rows_of(tokens, inner, 0, INT8), rows_of(out, inner, 0, INT8)
            kinds["int8"] = lambda ia=ia, ib=ib: torch._int_mm(ia.values, ib.values.t())
            flat = ib.values.t().contiguous()
            kinds["int8, not turned"] = lambda ia=ia, flat=flat: torch._int_mm(ia.values, flat)
            for kind, call in kinds.items():
                totals[kind] = totals.get(kind, 0) + LAYERS * timed(f"{name} {direction} {kind}", call, 0, flops) / 1000
            del a, b, plain, weights, wide, wide_weights, round_, round_weights, ia, ib, flat
            torch.cuda.empty_cache()
    n = 128256
    a, b = (torch.randn(size, HIDDEN, device="cuda", dtype=torch.bfloat16) for size in (1024, n))
    timed(
        "head y bf16 to fp32, 1024 rows", lambda: torch.mm(a, b.t(), out_dtype=torch.float32), 0, 2 * 1024 * n * HIDDEN
    )
    d = torch.randn(1024, n, device="cuda", dtype=torch.bfloat16)
    timed("head dx bf16, 1024 rows", lambda: torch.mm(d, b), 0, 2 * 1024 * n * HIDDEN)
    found["ms of all layers"] = {kind: round(spent, 1) for kind, spent in totals.items()}
    print(found["ms of all layers"], flush=True)


def kernels(tokens: int) -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, past, total, d = (draw(tokens, HIDDEN) for _ in range(4))
    by = Norm(torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16), 1e-5)
    n8, d8 = rows_of(tokens, HIDDEN, 144), rows_of(tokens, HIDDEN, 48)
    fold, count = torch.rand(HIDDEN, device="cuda"), tokens * HIDDEN
    timed("norm", lambda: eight_kernels.norm_rows(x, by, n8, None, None), 3 * count)
    timed("norm of a sum", lambda: eight_kernels.norm_rows(x, by, n8, past, total), 7 * count)
    timed("quantise", lambda: eight_kernels.quantise(x, n8, None, 224.0), 3 * count)
    timed("quantise, folded", lambda: eight_kernels.quantise(x, d8, fold, 224.0), 3 * count)
    timed("norm backward", lambda: eight_kernels.norm_backward_rows(d, x, by, total, past, n8, None, None), 9 * count)
    timed("norm backward, and dy",
          lambda: eight_kernels.norm_backward_rows(d, x, by, total, past, n8, d8, fold), 10 * count)  # fmt: skip
    timed("a sum", lambda: torch.add(x, past, out=total), 6 * count)
    q, k, v = (draw(4, heads, tokens // 4, HEAD).transpose(1, 2) for heads in (HEADS, KEPT, KEPT))
    angles = torch.rand(tokens, HEAD // 2, device="cuda")
    columns = (HEADS + 2 * KEPT) * HEAD
    to, fold_qkv = rows_of(tokens, columns, 144), torch.rand(columns, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    timed("gather and turn", lambda: eight_kernels.gather_rotated_rows((q, k, v), cos, sin, fold_qkv, to),
          3 * tokens * columns)  # fmt: skip
    gate_up, act8, d_act = draw(tokens, 2 * WIDE), rows_of(tokens, WIDE, 48), draw(tokens, WIDE)
    slopes, fold_up = rows_of(tokens, 2 * WIDE, 96), torch.rand(2 * WIDE, device="cuda")
    timed("swiglu", lambda: eight_kernels.swiglu_rows(gate_up, act8), 5 * tokens * WIDE)
    known = eight_kernels.swiglu_rows(gate_up, act8)
    timed("swiglu backward", lambda: eight.swiglu_backward_rows(d_act, gate_up, fold_up, known, slopes, act8),
          9 * tokens * WIDE)  # fmt: skip
    for name, (n, k_, r) in WIDTHS.items():
        inputs, outputs = rows_of(tokens, k_, 3 * r), rows_of(tokens, n, 3 * r)
        a, b = draw(r, k_), draw(n, r)
        up, unfold = b.t(), torch.rand(n, device="cuda")
        low = eight_matrix.inward(inputs, a, None, UNIT)
        timed(f"{name} xA^T", lambda: eight_matrix.inward(inputs, a, None, UNIT), tokens * k_)
        timed(f"{name} dyB", lambda: eight_matrix.inward(outputs, up, unfold, UNIT), tokens * n)
        timed(f"{name} dA", lambda: eight_matrix.outward(inputs, low, torch.bfloat16), tokens * k_)
        timed(f"{name} dB", lambda: eight_matrix.outward(outputs, low, torch.bfloat16), tokens * n)
        weights = rows_of(n, k_, 3 * r)
        out = torch.empty(k_, n + 3 * r, dtype=FP8.dtype, device="cuda")
        timed(f"{name} B behind", lambda: eight_movers.append_up(weights, b, UNIT), 5 * n * r)
        timed(f"{name} turned", lambda: eight_movers.turn(weights, out), 2 * n * k_)
        timed(f"{name} A behind", lambda: eight_movers.append_down(out, n, a, UNIT, 448.0), 5 * k_ * r)


def tiles(tokens: int) -> None:
    """Other tile sizes; the constants in eight_kernels.py are what was best."""
    n, k, r = WIDTHS["gate_up"]
    inputs, outputs = rows_of(tokens, WIDE, 48), rows_of(tokens, n, 3 * r)
    a = torch.randn(16, WIDE, device="cuda", dtype=torch.bfloat16)
    up = torch.randn(r, n, device="cuda", dtype=torch.bfloat16)
    unfold = torch.rand(n, device="cuda")
    low, low_up = torch.randn(tokens, 16, device="cuda").bfloat16(), torch.randn(tokens, r, device="cuda").bfloat16()
    before = eight_matrix.INWARD
    for tile in ((32, 256, 4, 3), (64, 256, 4, 4), (16, 256, 4, 3), (32, 256, 4, 4), (64, 128, 4, 4), (32, 128, 4, 4)):
        eight_matrix.INWARD = dict.fromkeys(before, (*tile, 256))
        timed(f"inward {tile} down", lambda: eight_matrix.inward(inputs, a, None, UNIT), tokens * WIDE)
        timed(f"inward {tile} gate_up", lambda: eight_matrix.inward(outputs, up, unfold, UNIT), tokens * n)
    eight_matrix.INWARD, before = before, eight_matrix.OUTWARD
    for tile in ((64, 256, 4, 3), (32, 256, 4, 4), (64, 256, 4, 4), (32, 512, 4, 3)):
        eight_matrix.OUTWARD = tile
        timed(f"outward {tile} down", lambda: eight_matrix.outward(inputs, low, torch.bfloat16), tokens * WIDE)
        timed(f"outward {tile} gate_up", lambda: eight_matrix.outward(outputs, low_up, torch.bfloat16), tokens * n)
    eight_matrix.OUTWARD = before
    weights = rows_of(n, k, 96)
    out = torch.empty(k, n + 96, dtype=FP8.dtype, device="cuda")
    before = eight_movers.TURN
    for tile in ((64, 128, 4), (64, 256, 8)):
        eight_movers.TURN = tile
        timed(f"turn {tile}", lambda: eight_movers.turn(weights, out), 2 * n * k)
    eight_movers.TURN = before
    timed(
        "turn by copy_",
        lambda: out.view(torch.uint8)[:, :n].copy_(weights.values.view(torch.uint8)[:, :k].t()),
        2 * n * k,
    )
    gate_up = torch.randn(tokens, n, device="cuda").bfloat16()
    d = torch.randn(tokens, WIDE, device="cuda").bfloat16()
    known = eight_kernels.swiglu_rows(gate_up, inputs)
    before = eight_kernels.BACKWARD
    for tile in ((2048, 8), (2048, 16), (4096, 16), (4096, 32), (8192, 32), (2048, 32)):
        eight_kernels.BACKWARD = tile
        timed(f"swiglu backward {tile}",
              lambda: eight.swiglu_backward_rows(d, gate_up, unfold, known, outputs, inputs),
              9 * tokens * WIDE)  # fmt: skip
    eight_kernels.BACKWARD = before


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parts", nargs="*", default=["products", "kernels", "tiles"])
    options.add_argument("--tokens", type=int, default=8192)
    options.add_argument("--results", type=Path)
    chosen = options.parse_args()
    torch.manual_seed(0)
    for part in chosen.parts:
        {"products": products, "kernels": kernels, "tiles": tiles}[part](chosen.tokens)
    if chosen.results:
        about = {"tokens": chosen.tokens, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        chosen.results.write_text(json.dumps(about | {"found": found}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
