"""How long a training takes to save and close after a signal in the middle of a long step, on a CPU.

    python benchmarks/closing.py [--times 6]

A base of 21 M parameters and steps of 2,500 samples, which take the reference one forward and one backward call of
many seconds, and the fused engine hundreds of short ones. SIGTERM comes at a random instant of the run's processor
time; printed and recorded are the seconds from signal to end by the clock, and those of the processor. The promise
(docs/durability.md, P4) is 2 s.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE.parent / "tests")]

from journey.tiny import lay_out, save_base, write_rows  # noqa: E402 - found by the path above
from provenance import commit  # noqa: E402 - found by the path above

from afina.artifact import versions  # noqa: E402

SAMPLES, BATCH = 3000, 2500
LATEST_S = 12.0
"""Of processor time after the loop was entered: the first step is not over by then."""


def close(folder: Path, out: Path, engine: str, after: float) -> dict[str, float]:
    """One run, stopped after so many seconds of its processor time in the loop."""
    overrides = [f"training.engine={engine}", f"training.batch_size={BATCH}", "training.micro_batch_tokens=65536"]
    asked = [sys.executable, "-m", "afina", "train", "recipe.yaml", "tasks=[]", "export.formats=[]", *overrides]
    paths = os.pathsep.join(sys.path[:1])
    with (folder / "said").open("w") as said:
        process = psutil.Popen(
            [*asked, "--out", str(out)], cwd=folder, stdout=said, stderr=said, env={**os.environ, "PYTHONPATH": paths}
        )
        while not (out / "state.json").is_file():
            if process.poll() is not None:
                raise SystemExit((folder / "said").read_text())
            time.sleep(0.01)
        begun = sum(process.cpu_times()[:2])
        while (before := sum(process.cpu_times()[:2])) < begun + after:
            time.sleep(0.005)
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _ended, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - sent
    if os.waitstatus_to_exitcode(status) != 128 + signal.SIGTERM:
        raise SystemExit((folder / "said").read_text())
    return {"seconds": round(seconds, 2), "processor_s": round(used.ru_utime + used.ru_stime - before, 2)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--times", type=int, default=6)
    options.add_argument("--results", type=Path, default=HERE / "results" / "closing.jsonl")
    chosen = options.parse_args()
    chance = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="closing-") as name:
        folder = Path(name)
        lay_out(folder)
        save_base(folder / "base", hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
        rows = [(f"Number {number} is fine.", "good") for number in range(SAMPLES)]
        write_rows(folder / "train.jsonl", rows)
        for engine in ("auto", "reference"):
            found = [
                close(folder, folder / f"{engine}-{turn}", engine, chance.uniform(0, LATEST_S))
                for turn in range(chosen.times)
            ]
            line: dict[str, Any] = {
                "engine": engine,
                "closings": len(found),
                "longest_s": max(one["seconds"] for one in found),
                "longest_processor_s": max(one["processor_s"] for one in found),
                "each": found,
                "load": round(os.getloadavg()[0], 1),
            }
            print(json.dumps(line), flush=True)
            line |= {"commit": commit(), "versions": versions()}
            line["date"] = datetime.now(UTC).isoformat(timespec="seconds")
            with chosen.results.open("a", encoding="utf-8") as results:
                results.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
