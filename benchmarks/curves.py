"""Real trainings of the bundled base, two ways or more, some seeds each: do they differ by more than seeds do?

    AFINA_REAL_DATA=../shared python benchmarks/curves.py --steps 300 --seeds 1,2,3     engine beside reference
    AFINA_REAL_DATA=../shared python benchmarks/curves.py --compare products            8-bit products beside exact
    python benchmarks/curves.py --compare products --draw                               the recorded results again

Writes benchmarks/results/curves.json and docs/curves.png, or eight-bit.json and eight-bit.png. The base is a small
pretrained model, the data GSM8K's training set, the method LoRA in the precision that the device has (bf16 on a GPU).
"""

import argparse
import json
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SMOOTHED = 20
COMPARED: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "engines": ("curves", {"engine": {"training.engine": "auto"}, "reference": {"training.engine": "reference"}}),
    "products": (
        "eight-bit",
        {
            "e4m3 products": {"training.products": "fp8"},
            "INT8 products": {"training.products": "int8"},
            "exact products": {"training.products": "exact"},
        },
    ),
}
"""File name, and overrides of each way; the last is what the others are held to."""


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


def trained(folder: Path, text: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """One run: the losses of its steps, the last validation loss, and which engine it was."""
    from afina import pipeline

    name = "-".join(str(value) for value in overrides.values())
    file, out = folder / f"{name}.yaml", folder / name
    file.write_text(text)
    pipeline.train(file, out, [f"{key}={value}" for key, value in overrides.items()])
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

    figure, (losses, apart) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    *ways, plain = runs
    exact = {run["seed"]: smooth(run["losses"]) for run in runs[plain]}
    middle = [sum(several) / len(several) for several in zip(*exact.values(), strict=True)]
    for name, colour in zip([plain, *ways], ("#3c7a3c", "#1b6ca8", "#d1495b"), strict=False):
        for number, run in enumerate(runs[name]):
            style: dict[str, Any] = dict(color=colour, alpha=0.8, linewidth=1.1, label=None if number else name)
            curve = smooth(run["losses"])
            losses.plot(curve, **style)
            beside = middle if name == plain else exact.get(run["seed"])
            if beside is not None:
                apart.plot([a - b for a, b in zip(curve, beside, strict=True)], **style)
    losses.set_ylabel(f"loss, mean of {SMOOTHED} steps")
    apart.set_ylabel(f"less {plain} of the same seed")
    apart.set_title(f"({plain}: less the mean of their seeds)", fontsize=9)
    for axes in (losses, apart):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    losses.legend(frameon=False)
    figure.savefig(to, dpi=120)


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """How far the ways lie from the last of them, seed by seed, beside how far its seeds lie from each other."""
    *ways, plain = runs
    finals = {name: {run["seed"]: run["validation"] for run in several} for name, several in runs.items()}
    steps = {name: {run["seed"]: run["losses"] for run in several} for name, several in runs.items()}
    between = max(finals[plain].values()) - min(finals[plain].values())
    found: dict[str, Any] = {"final validation": finals, "between seeds": between}
    for way in ways:
        both = finals[way].keys() & finals[plain].keys()
        apart = [abs(a - b) for seed in both for a, b in zip(steps[way][seed], steps[plain][seed], strict=True)]
        found[f"{way}, same seed"] = max((abs(finals[way][seed] - finals[plain][seed]) for seed in both), default=None)
        found[f"{way}, a step at the most"] = max(apart, default=None)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--compare", choices=COMPARED, default="engines")
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--seeds", default="1,2,3")
    options.add_argument("--method", default="{rank: 16, alpha: 32.0}")
    options.add_argument("--at-once", type=int, default=1, help="processes; on a GPU of its own many runs fit")
    options.add_argument("--ways", help="some of the ways alone, by name, with commas between")
    options.add_argument("--more", action="store_true", help="only what is not recorded yet")
    options.add_argument("--draw", action="store_true", help="only draw what is recorded")
    options.add_argument("--out", type=Path, default=ROOT)
    chosen = options.parse_args()
    name, ways = COMPARED[chosen.compare]
    results, picture = chosen.out / "benchmarks" / "results" / f"{name}.json", chosen.out / "docs" / f"{name}.png"
    if chosen.draw:
        draw(json.loads(results.read_text())["runs"], picture)
        return
    data = Path(os.environ["AFINA_REAL_DATA"]).resolve() / "data" / "gsm8k" / "train.jsonl"
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    if chosen.more and results.exists():
        runs |= json.loads(results.read_text())["runs"]
    recorded = {(way, run["seed"]) for way, several in runs.items() for run in several}
    for place in (results, picture):
        place.parent.mkdir(parents=True, exist_ok=True)
    text = recipe(data, chosen.method)
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(chosen.at_once, multiprocessing.get_context("spawn")) as several,
    ):
        jobs = {
            several.submit(trained, Path(folder), text, {"seed": seed, **given, "training.steps": chosen.steps}): (
                way,
                seed,
            )
            for seed in seeds
            for way, given in ways.items()
            if (way, seed) not in recorded and way in (chosen.ways or ",".join(ways)).split(",")
        }
        for job in as_completed(jobs):
            (way, seed), found = jobs[job], job.result()
            runs[way].append({"seed": seed, **found})
            runs[way].sort(key=lambda run: run["seed"])
            print(way, seed, f"{found['losses'][-1]:.4f} {found['validation']:.4f} {found['engine']}", flush=True)
            results.write_text(json.dumps({"runs": runs}) + "\n")
    said = summary(runs)
    print(json.dumps(said, indent=1))
    results.write_text(json.dumps(said | {"runs": runs}) + "\n")
    draw(runs, picture)


if __name__ == "__main__":
    main()
