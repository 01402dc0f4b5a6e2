"""Training speed and memory on a CPU, side by side with TRL's SFTTrainer + PEFT, each case a process of its own.

    python benchmarks/train_cpu.py --peer PYTHON [--workload tiny] [--workload snips] [--repeats 3]

PYTHON is the interpreter of an environment that holds trl, datasets, peft and the same torch. The same samples, the
same adapters (LoRA, rank 16, all linear layers), the same threads; cases take turns, so that a machine whose speed
drifts is fair to all. Real tokens per second: padding does not count. Results are appended to results/cpu.jsonl.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from provenance import commit

from afina.artifact import versions
from afina.recipe.load import parse
from afina.recipe.place import BUNDLED

HERE = Path(__file__).parent
SETS = ("sentiment", "maths-tutor", "python-tutor", "algorithms-tutor", "bot-configurator", "support-chat")
TRL = {
    "TRL, defaults": {},
    "TRL, defaults + packing": {"packing": True},
    "TRL, tuned by us": {"gradient_checkpointing": False, "bf16": False, "per_device_train_batch_size": 16},
    "TRL, tuned by us + packing": {
        "gradient_checkpointing": False,
        "bf16": False,
        "packing": True,
        "per_device_train_batch_size": 2,
    },
}
AFINA = {"Afina": {}, "Afina, packing: false": {"training.packing": "false"}}


def bundled_rows(most: int) -> list[dict]:
    rows = []
    for name in SETS:
        lines = (BUNDLED / "data" / name / "train.jsonl").read_text("utf-8").split("\n")
        rows += [json.loads(line) for line in lines if line][:most]
    return rows


def snips_rows(real: Path, most: int) -> list[dict]:
    """The rows as recipes/snips.yaml makes them; the first of each intent."""
    from afina.data.read import read

    os.environ.setdefault("AFINA_REAL_DATA", str(real))
    recipe = parse((HERE.parent / "recipes" / "snips.yaml").read_text("utf-8"), "snips.yaml")
    kept: dict[Path, int] = {}
    rows = []
    for sample in read(recipe.data.train, recipe.data, HERE).samples:
        kept[sample.file] = kept.get(sample.file, 0) + 1
        if kept[sample.file] <= most:
            rows.append({"messages": [{"role": m.role, "content": m.content} for m in sample.messages]})
    return rows


def workload(name: str, folder: Path, real: Path, most: int) -> dict:
    tiny = name == "tiny"
    rows = bundled_rows(most) if tiny else snips_rows(real, most)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return {
        "model": str(BUNDLED / "tiny") if tiny else str(real / "models" / "stories260K"),
        "template": None if tiny else str(BUNDLED / "templates" / "plain.jinja"),
        "data": str(data),
        "epochs": 1,
        "max_length": 1024 if tiny else 512,
        "rows": len(rows),
    }


def run_trl(python: str, work: dict, settings: dict, folder: Path, threads: int) -> dict:
    case = {**work, "settings": settings, "out": str(folder / "out"), "threads": threads}
    return _last_line([python, str(HERE / "peer_trl.py"), json.dumps(case)], threads)


def run_afina(work: dict, changes: dict, folder: Path, threads: int) -> dict:
    recipe = {
        "name": "bench",
        "model": {"base": work["model"], "max_length": work["max_length"]},
        "data": {"train": work["data"], "validation": 0},
        "training": {"epochs": work["epochs"], "learning_rate": 1e-3, "schedule": "linear"},
        "export": {"formats": []},
    }
    if work["template"]:
        recipe["model"]["chat_template"] = "afina/plain"
    file = folder / "bench.yaml"
    file.write_text(json.dumps(recipe), "utf-8")
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    overrides = [f"{key}={value}" for key, value in changes.items()]
    event = _last_line(
        [sys.executable, "-m", "afina", "train", str(file), *overrides, "--out", str(out), "--json"], threads
    )
    return {
        "tokens": event["tokens"],
        "loop_s": event["seconds"],
        "steps": event["steps"],
        "first_loss": event["first_loss"],
        "last_loss": event["final_loss"],
        "peak_mib": event["peak_memory_bytes"] / 2**20,
    }


def _last_line(command: list[str], threads: int) -> dict:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[:3]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().split("\n")[-1])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--peer", help="python of TRL's environment; without it only ours is measured")
    options.add_argument("--workload", action="append", choices=["tiny", "snips"])
    options.add_argument("--rows", type=int, default=300, help="of each bundled set, or of each intent, at most")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options.add_argument(
        "--real", type=Path, default=Path(os.environ.get("AFINA_REAL_DATA", HERE.parent.parent / "shared"))
    )
    chosen = options.parse_args()
    for name in chosen.workload or ["tiny", "snips"]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            work = workload(name, folder, chosen.real.resolve(), chosen.rows)
            ours = partial(run_afina, work, folder=folder, threads=chosen.threads)
            cases = {tool: partial(ours, changes) for tool, changes in AFINA.items()}
            if chosen.peer:
                theirs = partial(run_trl, chosen.peer, work, folder=folder, threads=chosen.threads)
                cases |= {tool: partial(theirs, settings) for tool, settings in TRL.items()}
            found: dict[str, list[dict]] = {tool: [] for tool in cases}
            for _turn in range(chosen.repeats):
                for tool, case in cases.items():
                    found[tool].append(case())
                    print(
                        f"{name:6} {tool:28} {found[tool][-1]['tokens'] / found[tool][-1]['loop_s']:9,.0f} tokens/s",
                        flush=True,
                    )
            record(name, work, found, chosen.threads, chosen.rows)


def record(name: str, work: dict, found: dict[str, list[dict]], threads: int, most: int) -> None:
    print(f"\n{name}: {work['rows']} samples, {threads} threads")
    with (HERE / "results" / "cpu.jsonl").open("a", encoding="utf-8") as results:
        for tool, runs in found.items():
            speeds = sorted(run["tokens"] / run["loop_s"] for run in runs)
            line = {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "commit": commit(),
                "command": f"python benchmarks/train_cpu.py --peer PYTHON --rows {most}",
                "workload": name,
                "tool": tool,
                "tokens_per_second": round(statistics.median(speeds), 1),
                "all_speeds": [round(speed, 1) for speed in speeds],
                "peak_mib": round(max(run["peak_mib"] for run in runs), 1),
                "tokens": runs[0]["tokens"],
                "steps": runs[0]["steps"],
                "first_loss": runs[0]["first_loss"],
                "last_loss": runs[0]["last_loss"],
                "versions": runs[0].get("versions") or versions(),
                "threads": threads,
            }
            results.write(json.dumps(line) + "\n")
            print(
                f"  {tool:28} {line['tokens_per_second']:9,.0f} tokens/s  {line['peak_mib']:7,.0f} MiB"
                f"  loss {line['first_loss']:.3f} -> {line['last_loss']:.3f}"
            )


if __name__ == "__main__":
    main()
