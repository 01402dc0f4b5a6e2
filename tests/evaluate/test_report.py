"""The page about a run: what it says agrees with the folder, what it holds is safe, and a real browser shows it."""

import hashlib
import json
import math
import random
import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jinja2.ext import babel_extract

from afina.evaluate import report
from afina.evaluate.metrics import mcnemar, per_label, shares
from afina.recipe.schema import Recipe

LABELS = ["positiva", "neutra", "negativa"]
OPENINGS = {
    "positiva": ["El pan estaba recién hecho y el trato fue encantador.", "La batería aguanta dos días largos."],
    "neutra": ["Llegó el martes, como decía el pedido.", "Es una silla: tiene cuatro patas y un respaldo."],
    "negativa": ["Tres semanas de retraso y nadie contesta.", "Se rompió la cremallera el primer día."],
}
ENDINGS = ["Repetiré.", "Lo compré para mi madre.", "El precio era el normal.", "Pedí el modelo azul.", "Sin más."]


def sample_run(folder: Path, **changes: Any) -> Path:
    """A run folder as train, eval and export leave it, with realistic figures; `changes` go into the manifest."""
    run = folder / "runs" / "opiniones"
    for part in ("adapter", "evaluation", "export"):
        (run / part).mkdir(parents=True)
    recipe = Recipe.model_validate(
        {
            "name": "opiniones",
            "model": {"base": "Qwen/Qwen3-0.6B"},
            "data": {"train": "data/train.jsonl", "too_long": "reject"},
            "tasks": [{"name": "sentiment", "kind": "classification", "data": "data/test.jsonl", "labels": LABELS}],
        }
    ).resolved()
    records = curve()
    write_lines(run / "metrics.jsonl", records)
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    manifest = {
        "format": 1,
        "kind": "run",
        "made": "2026-03-14T15:09:26+00:00",
        "parents": [
            {"role": "base", "name": "Qwen/Qwen3-0.6B", "sha256": digest("base")},
            {"role": "data", "name": "/home/ana/secret-project/data/train.jsonl", "sha256": digest("train")},
        ],
        "versions": {"python": "3.11.2", "platform": "Linux-6.1-x86_64", "afina": "0.1.0", "torch": "2.11.0"},
        "recipe": recipe,
        "seed": 42,
        "hardware": "CPU, fp32",
        "engine": "reference (transformers + PEFT), packed attention",
        "data": {
            "rows": 1212,
            "train": 1080,
            "validation": 120,
            "rejected": [
                {"file": "/home/ana/secret-project/data/train.jsonl", "line": 17 + 31 * number, "reason": reason}
                for number, reason in enumerate(["1310 tokens, 1024 fit", "the answer is cut away"] * 6)
            ],
            "files": [{"role": "data", "name": "/home/ana/data/train.jsonl", "sha256": digest("train")}],
        },
        "training": {
            "steps": len(losses),
            "samples": 1080,
            "tokens": 118_640,
            "learnt_tokens": 8_232,
            "seconds": 187.3,
            "tokens_per_second": 633.4,
            "peak_memory_bytes": 3_492_000_000,
            "trainable_parameters": 10_092_544,
            "parameters": 606_142_464,
            "first_loss": losses[0],
            "final_loss": losses[-1],
            "validation_loss": 0.412,
        },
        "files": {
            "adapter/adapter_model.safetensors": {"sha256": digest("a"), "bytes": 40_422_208},
            "adapter/tokenizer.json": {"sha256": digest("t"), "bytes": 11_422_654},
            "metrics.jsonl": {"sha256": digest("m"), "bytes": 31_204},
        },
        **changes,
    }
    write_json(run / "manifest.json", manifest)
    result, predictions = sentiment()
    write_json(run / "evaluation" / "evaluation.json", {"tasks": [result]})
    write_lines(run / "evaluation" / "predictions.jsonl", predictions)
    write_json(run / "export" / "manifest.json", {"exports": [export("f16", 1_198_182_944, 8), export("q8_0", 639_446_688, 7)]})
    return run


def curve(steps: int = 204) -> list[dict[str, Any]]:
    """Records of metrics.jsonl: a falling loss with noise, warm-up and cosine, four validations."""
    chance = random.Random(7)
    records: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        noise = chance.gauss(0, 0.16) * math.exp(-step / 110)
        records.append(
            {
                "kind": "step",
                "step": step,
                "epoch": round(3 * step / steps, 3),
                "loss": round(max(0.05, 2.7 * math.exp(-step / 32) + 0.34 + noise), 4),
                "grad_norm": 1.1,
                "learning_rate": 2e-4 * min(1, step / 6) * (1 + math.cos(math.pi * step / steps)) / 2,
                "tokens": 581,
                "learnt": 40,
                "seconds": 0.91,
            }
        )
        if step % (steps // 4) == 0:
            held_out = {51: 0.934, 102: 0.517, 153: 0.431}.get(step, 0.412)
            records.append({"kind": "validation", "step": step, "loss": held_out})
    return records


def sentiment() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An evaluated task of 120 samples, marked by the project's own metrics, and its predictions."""
    chance = random.Random(3)
    expected = [LABELS[number % 3] for number in range(120)]
    answers = {
        "base": [chance.choice(["positiva", "positiva", "neutra", label]) for label in expected],
        "tuned": [label if chance.random() < 0.88 else chance.choice(LABELS) for label in expected],
    }
    right = {name: [a == b for a, b in zip(given, expected, strict=True)] for name, given in answers.items()}
    fixed = sum(after and not before for before, after in zip(right["base"], right["tuned"], strict=True))
    broken = sum(before and not after for before, after in zip(right["base"], right["tuned"], strict=True))
    chance_of = mcnemar(fixed, broken)
    result = {
        "name": "sentiment",
        "kind": "classification",
        "samples": 120,
        "systems": {
            name: {**shares(right[name]), "seconds": 6.2, **per_label(expected, given, LABELS)}
            for name, given in answers.items()
        },
        "fixed": fixed,
        "broken": broken,
        "p_value": chance_of,
        "verdict": f"Tuned is better: {fixed} answers fixed, {broken} broken (p = {chance_of:.2g}).",
    }
    predictions = [
        {
            "task": "sentiment",
            "sample": number,
            "where": f"/home/ana/secret-project/data/test.jsonl:{number + 1}",
            "prompt": "¿Positiva, neutra o negativa?\n"
            + OPENINGS[label][number // 3 % 2]
            + " "
            + ENDINGS[number % len(ENDINGS)],
            "expected": label,
            **{name: given[number] for name, given in answers.items()},
        }
        for number, label in enumerate(expected)
    ]
    return result, predictions


def export(kind: str, size: int, equal: int) -> dict[str, Any]:
    """An exported file, asked eight questions of which `equal` gave the model's answer."""
    checks = [
        {
            "prompt": OPENINGS["positiva"][0],
            "model": "positiva",
            "gguf": "positiva" if number < equal else "neutra",
            "equal": number < equal,
        }
        for number in range(8)
    ]
    return {"file": f"opiniones-{kind}.gguf", "format": kind, "bytes": size, "sha256": digest(kind), "checks": checks}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
