"""From a file of examples to a saved adapter, from a process's start to its end: GSM8K, one epoch, LoRA on a 1B shape.

    python benchmarks/end_to_end.py --data gsm8k/train.jsonl --tokenizer gpt-2 --runs 2 --profile
    python benchmarks/end_to_end.py ... --peer end_to_end.py          the peers' own harness on the same base and rows

The base is written once, with random weights. Each run is `afina train` as a user would call it, in a process of its
own; what it says is stamped with the second in which it said it. Lines go to benchmarks/results/gpu.jsonl.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from provenance import commit

HERE = Path(__file__).parent
RECIPE = """\
name: end-to-end
model: {{base: {base}, max_length: 2048, chat_template: afina/plain}}
data:
  train: {data}
  validation: 0
  mapping: {{user: "Q", assistant: "### Question:\\n{{{{ row.question }}}}\\n\\n### Answer:\\n{{{{ row.answer }}}}"}}
method: {{rank: 16, alpha: 16}}
training: {{epochs: 1, batch_size: 101, micro_batch_tokens: 16600, learning_rate: 2e-4,
  exact: false}}  # as the peers do it
export: {{formats: []}}
"""


def prepare(base: Path, tokenizer: Path, shape: str) -> None:
    """The base, in a process of its own: Python would keep the GPU."""
    import gpu

    model = gpu.random_model(gpu.LLAMA_1B) if shape == "1b" else tiny()
    model.save_pretrained(base)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, base / file.name)


def tiny() -> Any:
    """To try the path on a CPU."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50304,
            bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
        )
    )  # fmt: skip


def run(folder: Path, number: int, overrides: list[str], profile: bool) -> dict[str, Any]:
    """One `afina train`, and when it said what."""
    out = folder / f"run-{number}"
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the rows that the run before left rendered
    command = [sys.executable, "-u"]
    if profile:
        command += ["-m", "cProfile", "-o", str(folder / "profile")]
    command += ["-m", "afina", "train", str(folder / "recipe.yaml"), "--out", str(out), *overrides]
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    began, said = time.perf_counter(), list[tuple[float, str]]()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        for line in process.stdout or ():
            said.append((round(time.perf_counter() - began, 1), line.rstrip()[:160]))
    total = time.perf_counter() - began
    if process.returncode:
        raise SystemExit("\n".join(line for _second, line in said[-30:]))
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [line for line in steps if line["kind"] == "step"]
    loop = sum(line["seconds"] for line in steps)
    training = manifest["training"]
    if profile:
        import pstats

        found = pstats.Stats(str(folder / "profile"))
        found.sort_stats("cumulative").print_stats(110)
        found.sort_stats("tottime").print_stats(40)
    return {
        "total_s": round(total, 1), "loop_s": round(loop, 1), "steps": len(steps), "real_tokens": training["tokens"],
        "tokens_per_second": round(training["tokens"] / loop), "losses": [steps[0]["loss"], steps[-1]["loss"]],
        "step_s": [round(line["seconds"], 3) for line in steps],
        "peak_gib": round(training["peak_memory_bytes"] / 2**30, 2), "engine": manifest["engine"], "said": said,
    }  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--tokenizer", type=Path, required=True, help="a folder with a real tokenizer")
    options.add_argument("--runs", type=int, default=2, help="the first fills the caches; the last counts")
    options.add_argument("--profile", action="store_true", help="one more, in which Python counts where it spends time")
    options.add_argument("--shape", choices=["1b", "tiny"], default="1b")
    options.add_argument("--peer", type=Path)
    options.add_argument("--base", type=Path, help="a folder that keeps the base; made where it is not there")
    options.add_argument("--results", type=Path, default=HERE / "results" / "gpu.jsonl")
    options.add_argument("overrides", nargs="*", help="of the recipe, for instance training.steps=3")
    chosen = options.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from afina.artifact import versions

    about = {"workload": "E1", "versions": versions(), "commit": commit(), "gpu": card(),
             "command": "python benchmarks/" + " ".join(["end_to_end.py", *sys.argv[1:]])}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="end-to-end-") as name:
        folder = Path(name)
        base = (chosen.base or folder / "base").resolve()
        if not base.is_dir():
            work = "import end_to_end, pathlib, sys; end_to_end.prepare(*map(pathlib.Path, sys.argv[1:3]), sys.argv[3])"
            given = [str(base), str(chosen.tokenizer.resolve()), chosen.shape]
            subprocess.run([sys.executable, "-c", work, *given], cwd=HERE, check=True)
        (folder / "recipe.yaml").write_text(RECIPE.format(base=base, data=chosen.data.resolve()), "utf-8")
        totals = []
        for number in range(chosen.runs + chosen.profile):
            found = run(folder, number, chosen.overrides, profile=number == chosen.runs)
            for second, line in found.pop("said"):
                print(f"{second:6.1f} s  {line}")
            print(json.dumps(found), flush=True)
            totals.append(found["total_s"])
            if number == chosen.runs - 1:
                record(chosen.results, {**about, "tool": "afina", **found, "engine": "fused", "all_totals_s": totals,
                                        "total_is": "process start to process end"})  # fmt: skip
        if chosen.peer:
            command = [sys.executable, str(chosen.peer.resolve()), "--tool", "unsloth", "--dir", str(base),
                       "--data", str(chosen.data), "--out", str(folder / "peer")]  # fmt: skip
            environment = os.environ | {"UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
            said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=folder)
            theirs = json.loads(said.stdout.split("RESULT ", 1)[1].splitlines()[0])
            print(json.dumps(theirs))
            record(chosen.results, {
                **about, "tool": "unsloth", "engine": "unsloth", "total_s": theirs["total_s"],
                "loop_s": theirs["train_s"], "real_tokens": theirs["real_tokens"], "steps": theirs["steps"],
                "tokens_per_second": theirs["real_tokens_per_s_train"], "peak_gib": theirs["peak_gib"],
                "losses": theirs["last_loss"], "total_is": "process start to adapter saved",
            })  # fmt: skip


def card() -> str:
    """The GPU's name, asked without opening it."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "none"


def record(results: Path, line: dict[str, Any]) -> None:
    """Append a line."""
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "date": datetime.now(UTC).isoformat(timespec="seconds")}) + "\n")


if __name__ == "__main__":
    main()
