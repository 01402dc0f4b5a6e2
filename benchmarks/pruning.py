"""What pruning costs and distilling gains: the bundled base on GSM8K's held-out rows.

    AFINA_REAL_DATA=../shared python benchmarks/pruning.py prune       every method, each share
    AFINA_REAL_DATA=../shared python benchmarks/pruning.py heal        half of the weights, then full fine-tuning
    AFINA_REAL_DATA=../shared python benchmarks/pruning.py distill     three of five layers, alone and taught by five
    AFINA_REAL_DATA=../shared python benchmarks/pruning.py few         the same, the students with 400 rows

Appends lines to benchmarks/results/compress.jsonl: loss in nats a token on rows that nothing was chosen by, with 95%
intervals, against the whole model on the same rows.
"""

import argparse
import json
import os
import subprocess
import tempfile
import zlib
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import afina
from afina import compression
from afina.artifact import open_artifact, versions
from afina.recipe.load import load

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
        note("heal", {"model": name, "steps": 40, "loss": loss_of(run)})


TAUGHT: dict[str, str] = {
    "alone": "",
    "alpha 0.5, T 2": "",
    "alpha 0.5, T 1": "temperature: 1.0",
    "alpha 0.1, T 1": "temperature: 1.0, alpha: 0.1",
}
"""Students, and what their recipe says of the teacher beside its name."""


def distill(folder: Path, file: Path, *, rows: int | None = None) -> None:
    """A teacher of five layers; students of three, trained as long alone and with it. What is there stays.

    rows: the students learn from so few alone, as of a task with few examples; held out are rows of GSM8K's test set.
    """
    full, teacher, small = ["method.name=full"], folder / "teacher", folder / "pruned" / "layers-0.4"
    if not teacher.exists():
        afina.train(file, teacher, [*full, "training.steps=80"])
        note("distill", {"model": "teacher", "steps": 80, "loss": loss_of(teacher)})
    if not small.exists():
        compression.prune("afina/tiny", [0.4], method="layers", recipe=file, out=small.parent, tasks=False)
    data = [] if rows is None else few(file, folder, rows)
    for seed in (1, 2):
        for name, said in TAUGHT.items():
            place = folder / f"{name}-{seed}-{rows or 'all'}".replace(" ", "-").replace(",", "")
            if (place / "manifest.json").exists():
                continue
            taught = [] if name == "alone" else [f"training.distill={{teacher: {teacher}, {said}}}"]
            changes = [*full, f"model.base={small}", "training.steps=40", f"seed={seed}", *data, *taught]
            loss = loss_of(afina.train(file, place, changes))
            note("distill", {"model": name, "layers": 3, "rows": rows, "seed": seed, "steps": 40, "loss": loss})


def few(file: Path, folder: Path, rows: int) -> list[str]:
    """Overrides: the first rows of the training set, and 300 of the test set held out."""
    source = Path(load(file).data.train)
    for name, place, count in (("few.jsonl", source, rows), ("held.jsonl", source.with_name("test.jsonl"), 300)):
        lines = place.read_text("utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:count]), "utf-8")
    return [f"data.train={folder / 'few.jsonl'}", f"data.validation={folder / 'held.jsonl'}"]


def loss_of(run: Path) -> float:
    """Plain loss on the held-out rows, in nats a token, after the last step."""
    loss: float = open_artifact(run).manifest["training"]["validation_loss"]
    return loss


def note(what: str, figures: dict[str, Any]) -> None:
    """One line of the results."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    line = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit.stdout.strip(), "what": what}
    with RESULTS.open("a") as results:
        results.write(json.dumps({**line, **figures, "versions": versions()}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prune", "heal", "distill", "few"])
    data = Path(os.environ.get("AFINA_REAL_DATA", ROOT.parent / "shared")).resolve() / "data" / "gsm8k" / "train.jsonl"
    parser.add_argument("--folder", type=Path, help="where runs are kept, and found again; else in no place for good")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() if given.folder is None else nullcontext(given.folder) as place:
        {"prune": prune, "heal": heal, "distill": distill, "few": partial(distill, rows=400)}[parser.parse_args().what](
            Path(place), recipe(Path(place), data)
        )
