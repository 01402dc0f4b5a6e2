"""A model of 8 billion random weights to GGUF on a GPU: how long, how much memory, and whether it is what a CPU makes.

    python benchmarks/quantize_gpu.py [--shape 8b] [--formats q4_k_m,q8_0] [--place FOLDER]

The model is laid out first in bf16 (16 GB; the formats take 5 and 9 more), made on the GPU so that this is soon done;
only the conversion is timed, from safetensors on the disk to a GGUF file synced to the disk. Prints JSON lines and
appends them to results/quantize.jsonl. `same_as_cpu`: relative errors of GPU and CPU on the same weights, which search
the same scales but may round a tie in another way.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from quantize import SHAPES, Watch, lay_out, note, rmse

from afina.export import quants
from afina.export.gguf import write_gguf


def same_as_cpu() -> None:
    x = torch.randn(512, 2048) * 0.02
    for kind in quants.BLOCKS:
        there, here = quants.encode(x.cuda(), kind).cpu().numpy(), quants.encode(x, kind).numpy()
        equal = float((there == here).mean())
        note(
            what="same_as_cpu",
            kind=kind,
            bytes_equal=round(equal, 6),
            rmse_over_cpu=round(rmse(there, kind, x, None) / rmse(here, kind, x, None), 6),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--formats", default="q4_k_m,q8_0")
    parser.add_argument("--place", help="where the model is laid out; the system's temporary folder if not given")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU here.", file=sys.stderr)
        return 6
    same_as_cpu()
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        folder = Path(place) / "model"
        started = time.perf_counter()
        lay_out(folder, options.shape)
        print(json.dumps({"laid_out_s": round(time.perf_counter() - started, 1)}), flush=True)
        for kind in options.formats.split(","):
            out = Path(place) / "out.gguf"
            torch.cuda.reset_peak_memory_stats()
            watch = Watch()
            watch.start()
            started = time.perf_counter()
            facts = write_gguf(folder, out, kind, device="cuda")
            seconds, most = time.perf_counter() - started, watch.stop()
            out.unlink()
            note(
                what="speed",
                shape=options.shape,
                format=kind,
                seconds=round(seconds, 1),
                memory_gb=round(most / 1e9, 2),
                gpu_memory_gb=round(torch.cuda.max_memory_allocated() / 1e9, 2),
                bytes=facts["bytes"],
                parameters=facts["parameters"],
                device=torch.cuda.get_device_name(),
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
