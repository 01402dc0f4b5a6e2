"""What pruning costs: the bundled base on GSM8K's held-out rows, each method at 10, 30 and 50%.

    AFINA_REAL_DATA=../shared python benchmarks/compress.py prune       every method, each share
    AFINA_REAL_DATA=../shared python benchmarks/compress.py heal        half of the weights, then full fine-tuning

Appends lines to benchmarks/results/compress.jsonl: loss in nats a token on rows that nothing was chosen by, with 95%
intervals, against the whole model on the same rows.
"""

import argparse
import json
import os
import subprocess
import tempfile
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import afina
from afina import compression
from afina.artifact import open_artifact, versions

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "compress.jsonl"
SHARES = [0.1, 0.3, 0.5]
PLANS: list[dict[str, Any]] = [
    *({"method": method, "shares": SHARES} for method in ("magnitude", "magnitude-global", "wanda", "channels")),
    *({"method": method, "pattern": "2:4"} for method in ("magnitude", "wanda")),
    {"method": "layers", "shares": [0.2, 0.4]},  # one and two of five
]


def recipe(folder: Path, data: Path) -> Path:
    """GSM8K as questions and answers, a twentieth of it held out."""
    file = folder / "recipe.yaml"
    mapping = '{user: "{{ row.question }}", assistant: "{{ row.answer }}"}'
    file.write_text(f"""\
name: gsm8k
model: {{base: afina/tiny, max_length: 512}}
data: {{train: {data}, validation: 0.05, too_long: reject, mapping: {mapping}}}
training: {{batch_size: 32, learning_rate: 1e-3, validations: 1, keep: last}}
export: {{formats: []}}
""")
    return file


def prune(folder: Path, file: Path) -> None:
    """Every plan; of each model what it lost, and how small its file gets when it is packed."""
    for plan in PLANS:
        for made in compression.prune("afina/tiny", recipe=file, out=folder / "pruned", tasks=False, **plan):
            facts = open_artifact(made).manifest["pruning"]
            packed = len(zlib.compress((made / "model.safetensors").read_bytes(), 6))
            note("prune", {"model": made.name, **facts["after"], "packed_bytes": packed, "before": facts["before"]})


def heal(folder: Path, file: Path) -> None:
    """The whole model, and half of its weights by Wanda, trained for as many steps: with zeros kept, and without."""
    (pruned,) = compression.prune("afina/tiny", [0.5], recipe=file, out=folder / "pruned", tasks=False)
    for name, changes in {
        "whole, full": ["method.name=full"],
        "wanda-0.5, full, zeros kept": [f"model.base={pruned}", "method={name: full, keep_zeros: true}"],
        "wanda-0.5, LoRA": [f"model.base={pruned}"],
    }.items():
        run = afina.train(file, folder / name.replace(" ", "-"), [*changes, "training.steps=40"])
        facts = open_artifact(run).manifest["training"]
        note("heal", {"model": name, "steps": 40, "loss": facts["validation_loss"]})


def note(what: str, figures: dict[str, Any]) -> None:
    """One line of the results."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    line = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit.stdout.strip(), "what": what}
    with RESULTS.open("a") as results:
        results.write(json.dumps({**line, **figures, "versions": versions()}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prune", "heal"])
    data = Path(os.environ.get("AFINA_REAL_DATA", ROOT.parent / "shared")).resolve() / "data" / "gsm8k" / "train.jsonl"
    with tempfile.TemporaryDirectory() as place:
        {"prune": prune, "heal": heal}[parser.parse_args().what](Path(place), recipe(Path(place), data))
