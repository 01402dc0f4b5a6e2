"""Does Phi-2's true shape train with QLoRA on a card of 6 GB? One sample of 2,048 tokens, the allocator capped.

    python benchmarks/phi2_6gb.py [--gib 5.5]

Random weights in NF4 with double quantisation, LoRA r16 on every linear layer, every token learnt. 5.5 GiB is what a
card of 6 GB leaves beside the CUDA context. What the engine plans is what `afina train` plans. The base is drawn in
bf16 and quantised layer by layer before the cap is set, as loading a checkpoint does on its way.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import gpu
import torch

from afina.artifact import versions

WARM_UP, TIMED = 3, 8


def measure(gib: float) -> dict[str, Any]:
    work = gpu.WORKLOADS["W8"]
    step, parameters, about = gpu.afina_step(work, {"gib": gib * 0.9})
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)
    torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, fused=True)
    ids = torch.randint(5, work["shape"]["vocab_size"] - 1, (1, work["length"])).cuda()
    seconds, losses = [], []
    for turn in range(WARM_UP + TIMED):
        torch.cuda.synchronize()
        started = time.perf_counter()
        loss = step(ids)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        if turn >= WARM_UP:
            seconds.append(time.perf_counter() - started)
        losses.append(round(loss.item(), 4))
        if not norm.item() > 0:
            raise SystemExit("no gradient")
    if not losses[-1] < losses[0]:
        raise SystemExit(f"it does not learn: {losses}")
    return {
        "workload": "phi-2 1x2048 NF4 r16",
        "tool": "afina",
        "cap_gib": gib,
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "tokens_per_second": round(work["length"] / sorted(seconds)[len(seconds) // 2]),
        "losses": losses,
        "gpu": torch.cuda.get_device_name(),
        **about,
        "versions": versions(),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gib", type=float, default=5.5)
    options.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "gpu.jsonl")
    chosen = options.parse_args()
    found = json.dumps(measure(chosen.gib))
    print(found)
    with chosen.results.open("a") as file:
        file.write(found + "\n")


if __name__ == "__main__":
    main()
