"""How fast a layer's products are in a run that lasts: the GPU warm and held by its power limit.

    python benchmarks/products.py       Llama-3.1-8B's layer at 8,192 tokens, forward and backward, in several layouts

Rows wider than the data by the adapters' extra columns (engine/products.py says why), rounded up to some number of
elements; cuBLASLt instead of cuBLAS; other algorithms than its first choice; copies to the computer's memory meanwhile.
"""

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from typing import Any

import torch

TOKENS, LAYERS = 8192, 32
SHAPES = {"qkv": (6144, 4096, 48), "o": (4096, 4096, 16), "gate_up": (28672, 4096, 32), "down": (4096, 14336, 16)}
"""Rows N and columns K of each product's weight, and the adapters' ranks together."""


def operands(align: int, shapes: dict[str, tuple[int, int, int]], tokens: int) -> dict[str, tuple[Any, ...]]:
    """Name and direction to (a, b, out) of torch.mm, laid out as the engine does."""
    found = {}
    for name, (n, k, rank) in shapes.items():
        r = -(-rank // align) * align if align else 0
        weight = torch.randn(n + r, k + r, device="cuda").mul_(0.02).bfloat16()
        x = torch.randn(tokens, k + r, device="cuda").bfloat16()
        dy = torch.randn(tokens, n + r, device="cuda").bfloat16()
        inner = k if name == "o" else k + r
        found[f"{name} y"] = x[:, :inner], weight[:n, :inner].t(), torch.empty_like(dy)[:, :n]
        found[f"{name} dx"] = dy, weight[:, :k], torch.empty(tokens, k, device="cuda", dtype=torch.bfloat16)
    return found


def measured(calls: dict[str, Callable[[], Any]], seconds: float = 0.7) -> dict[str, float]:
    """Milliseconds of each, called in turn for so long after as long a warm-up; `all` is a layer's sum by the clock."""
    spent = dict.fromkeys(calls, 0.0)
    rounds = 0
    for timed in (False, True):
        torch.cuda.synchronize()
        started = time.perf_counter()
        while time.perf_counter() - started < (seconds if timed else seconds / 2):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
            for _turn in range(8):
                marks[0].record()
                for mark, call in zip(marks[1:], calls.values(), strict=True):
                    call()
                    mark.record()
            torch.cuda.synchronize()
            if timed:
                rounds += 1
                for name, before, after in zip(calls, marks, marks[1:], strict=False):
                    spent[name] += before.elapsed_time(after)
    found = {name: round(value / rounds, 4) for name, value in spent.items()}
    return found | {"all": round(sum(found.values()), 4)}


def plain(parts: dict[str, tuple[Any, ...]]) -> dict[str, Callable[[], Any]]:
    return {name: (lambda a=a, b=b, out=out: torch.mm(a, b, out=out)) for name, (a, b, out) in parts.items()}


class Result(ctypes.Structure):
    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8), ("workspace", ctypes.c_size_t), ("state", ctypes.c_int),
        ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4),
    ]  # fmt: skip


class Lt:
    """cuBLASLt itself: one product by any of the algorithms it proposes."""

    def __init__(self, workspace: int = 2**26) -> None:
        self.lib = ctypes.CDLL("libcublasLt.so.13")
        self.handle = ctypes.c_void_p()
        self.lib.cublasLtCreate(ctypes.byref(self.handle))
        self.room = torch.empty(workspace, dtype=torch.uint8, device="cuda")

    def layout(self, matrix: torch.Tensor) -> tuple[Any, bool]:
        """Of a row- or column-major matrix, and whether it is to be transposed, as cuBLAS counts."""
        turned = matrix.stride(1) != 1
        stored = matrix.t() if turned else matrix
        found = ctypes.c_void_p()
        self.lib.cublasLtMatrixLayoutCreate(
            ctypes.byref(found), 14, ctypes.c_uint64(stored.shape[1]), ctypes.c_uint64(stored.shape[0]),
            ctypes.c_int64(stored.stride(0)),
        )  # fmt: skip
        return found, turned

    def calls(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, count: int = 12) -> list[Callable[[], Any]]:
        """out = a b, by each proposed algorithm, best guess first. Row-major out is b^T a^T column-major."""
        desc, preference = ctypes.c_void_p(), ctypes.c_void_p()
        self.lib.cublasLtMatmulDescCreate(ctypes.byref(desc), 68, 0)
        (of_b, b_turned), (of_a, a_turned), (of_out, _no) = self.layout(b), self.layout(a), self.layout(out)
        for attribute, turned in ((3, b_turned), (4, a_turned)):
            value = ctypes.c_int32(1 if turned else 0)
            self.lib.cublasLtMatmulDescSetAttribute(desc, attribute, ctypes.byref(value), 4)
        self.lib.cublasLtMatmulPreferenceCreate(ctypes.byref(preference))
        size = ctypes.c_uint64(self.room.numel())
        self.lib.cublasLtMatmulPreferenceSetAttribute(preference, 1, ctypes.byref(size), 8)
        results, got = (Result * count)(), ctypes.c_int()
        status = self.lib.cublasLtMatmulAlgoGetHeuristic(
            self.handle, desc, of_b, of_a, of_out, of_out, preference, count, results, ctypes.byref(got)
        )
        if status:
            raise SystemExit(f"cublasLtMatmulAlgoGetHeuristic: {status}")
        one, zero = ctypes.c_float(1), ctypes.c_float(0)

        def call(result: Any) -> Callable[[], Any]:
            def run() -> None:
                status = self.lib.cublasLtMatmul(
                    self.handle, desc, ctypes.byref(one), ctypes.c_void_p(b.data_ptr()), of_b,
                    ctypes.c_void_p(a.data_ptr()), of_a, ctypes.byref(zero), ctypes.c_void_p(out.data_ptr()), of_out,
                    ctypes.c_void_p(out.data_ptr()), of_out, ctypes.byref(result.algorithm),
                    ctypes.c_void_p(self.room.data_ptr()), ctypes.c_size_t(self.room.numel()),
                    ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
                )  # fmt: skip
                if status:
                    raise RuntimeError(f"cublasLtMatmul: {status}")

            return run

        return [call(result) for result in results[: got.value]]


def with_copies(parts: dict[str, tuple[Any, ...]], back: bool) -> dict[str, float]:
    """The same while the other engine copies to, or from, pinned memory without a pause."""
    host = torch.empty(2**29, dtype=torch.uint8, pin_memory=True)
    here, stream = torch.empty(2**29, dtype=torch.uint8, device="cuda"), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _turn in range(1000 // 4):
            (here if back else host).copy_(host if back else here, non_blocking=True)
    found = measured(plain(parts), 0.5)
    found["copies still running"] = float(not stream.query())
    torch.cuda.synchronize()
    return found


def searched(parts: dict[str, tuple[Any, ...]], base: dict[str, float]) -> dict[str, Any]:
    """By product: the first and the fastest of cuBLASLt's proposals, warm, and what all the fastest take together."""
    lt, found, best = Lt(), {}, {}
    for name, (a, b, out) in parts.items():
        candidates = {}
        for number, call in enumerate(lt.calls(a, b, out)):
            try:
                call()
                torch.cuda.synchronize()
            except RuntimeError:
                continue
            candidates[str(number)] = call
        truth = torch.mm(a, b)
        times = measured(candidates, 0.02 * len(candidates) * base[name])
        del times["all"]
        chosen = min(times, key=lambda key: times[key])
        best[name] = candidates[chosen]
        best[name]()
        error = ((out.float() - truth.float()).norm() / truth.float().norm()).item()
        found[name] = {"cublas": base[name], "best": chosen, "error": error, **times}
    return found | {"together": measured(best)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--search", action="store_true", help="also every algorithm that cuBLASLt proposes")
    chosen = options.parse_args()
    whole = sum(4 * TOKENS * n * k for n, k, _rank in SHAPES.values())

    def say(name: str, found: dict[str, Any]) -> None:
        rate = round(whole / found["all"] / 1e9) if "all" in found else None
        print(json.dumps({"layout": name, "tflops": rate, **found}), flush=True)

    with torch.inference_mode():
        say("heating", measured(plain(operands(8, SHAPES, TOKENS)), 2.0))
        for align in (8, 64, 0, 8, 64):
            parts = operands(align, SHAPES, TOKENS)
            say(f"extra columns rounded up to {align}" if align else "no extra columns", measured(plain(parts)))
        torch.backends.cuda.preferred_blas_library("cublaslt")
        say("64, cuBLASLt", measured(plain(parts)))
        torch.backends.cuda.preferred_blas_library("cublas")
        for back in (False, True):
            say("64, copies " + ("back" if back else "away"), with_copies(parts, back))
        halves = {f"{name} {half}": (a[half * 4096 :][:4096], b, out[half * 4096 :][:4096])
                  for name, (a, b, out) in parts.items() for half in (0, 1)}  # fmt: skip
        say("64, 4,096 tokens at once", measured(plain(halves)))
        n = SHAPES["gate_up"][0]
        apart = {name: part for name, part in parts.items() if not name.startswith("gate_up")}
        x, weight, out = parts["gate_up y"]
        apart |= {"gate": (x, weight[:, : n // 2], out[:, : n // 2]), "up": (x, weight[:, n // 2 :], out[:, n // 2 :])}
        apart["gate_up dx"] = parts["gate_up dx"]
        say("64, gate and up apart", measured(plain(apart)))
        if chosen.search:
            base = measured(plain(parts))
            print(json.dumps(searched(parts, base)), flush=True)
            say("64 again", measured(plain(parts)))


if __name__ == "__main__":
    main()
