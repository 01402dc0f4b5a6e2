"""Real trainings of the bundled base, engine beside reference, some seeds each: do they differ by more than seeds do?

    AFINA_REAL_DATA=../shared python benchmarks/curves.py --steps 300 --seeds 1,2,3

Writes benchmarks/results/curves.json and docs/curves.png. The base is a small pretrained model, the data GSM8K's
training set, the method LoRA in the precision that the device has (bf16 on a GPU).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SMOOTHED = 20


def recipe(data: Path, method: str) -> str:
    return f"""\
name: curves
model: {{base: afina/tiny, max_length: 1024}}
data:
  train: {data}
  validation: 0.05
  too_long: reject
  mapping: {{user: "{{{{ row.question }}}}", assistant: "{{{{ row.answer }}}}"}}
method: {method}
training: {{epochs: 4, batch_size: 32, learning_rate: 1e-3, validations: 1}}
export: {{formats: []}}
"""


def trained(file: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """One run in a process of its own: the losses of its steps, the last validation loss, and which engine it was."""
    out = file.parent / "-".join(str(value) for value in overrides.values())
    command = [sys.executable, "-m", "afina", "train", str(file), "--out", str(out)]
    subprocess.run([*command, *(f"{key}={value}" for key, value in overrides.items())], check=True, capture_output=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if line]
    manifest = json.loads((out / "manifest.json").read_text())
    of = {kind: [line["loss"] for line in lines if line["kind"] == kind] for kind in ("step", "validation")}
    return {
        "losses": of["step"],
        "validation": of["validation"][-1],
        "engine": manifest["engine"],
        "hardware": manifest["hardware"],
        "tokens_per_second": manifest["training"]["tokens_per_second"],
    }


def smooth(values: list[float]) -> list[float]:
    return [sum(values[max(0, at - SMOOTHED + 1) : at + 1]) / min(at + 1, SMOOTHED) for at in range(len(values))]


def draw(runs: dict[str, list[dict[str, Any]]], to: Path) -> None:
    import matplotlib

    matplotlib.use("svg" if to.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (name, several), colour in zip(runs.items(), ("#1b6ca8", "#d1495b", "#3c7a3c"), strict=False):
        for number, run in enumerate(several):
            label = name if number == 0 else None
            axes.plot(smooth(run["losses"]), color=colour, alpha=0.75, linewidth=1.2, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss, mean of {SMOOTHED} steps")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(to, dpi=120)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--seeds", default="1,2,3")
    options.add_argument("--method", default="{rank: 16, alpha: 32.0}")
    options.add_argument("--at-once", type=int, default=1, help="runs side by side: their speed then says nothing")
    options.add_argument("--out", type=Path, default=ROOT)
    chosen = options.parse_args()
    data = Path(os.environ["AFINA_REAL_DATA"]).resolve() / "data" / "gsm8k" / "train.jsonl"
    runs: dict[str, list[dict[str, Any]]] = {"engine": [], "reference": []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(recipe(data, chosen.method))
        with ThreadPoolExecutor(chosen.at_once) as several:
            begun = {
                (name, seed): several.submit(
                    trained, file, {"seed": seed, "training.engine": engine, "training.steps": chosen.steps}
                )
                for name, engine in (("engine", "auto"), ("reference", "reference"))
                for seed in chosen.seeds.split(",")
            }
            for (name, seed), run in begun.items():
                found = run.result()
                runs[name].append({"seed": int(seed), **found})
                print(name, seed, f"{found['losses'][-1]:.4f} {found['validation']:.4f} {found['engine']}", flush=True)
    finals = {name: [run["validation"] for run in several] for name, several in runs.items()}
    between_seeds = max(finals["reference"]) - min(finals["reference"])
    between_engines = max(abs(a - b) for a, b in zip(finals["engine"], finals["reference"], strict=True))
    steps = zip(runs["engine"], runs["reference"], strict=True)
    apart = max(abs(a - b) for ours, theirs in steps for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    summary = {
        "final validation": finals,
        "between seeds": between_seeds,
        "same seed, between engines": between_engines,
    }
    print(json.dumps(summary | {"largest difference of a step": apart}, indent=1))
    (chosen.out / "benchmarks" / "results").mkdir(parents=True, exist_ok=True)
    (chosen.out / "docs").mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary | {"largest difference of a step": apart, "runs": runs})
    (chosen.out / "benchmarks" / "results" / "curves.json").write_text(text + "\n")
    draw(runs, chosen.out / "docs" / "curves.png")


if __name__ == "__main__":
    main()
