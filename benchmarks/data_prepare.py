"""From files to packed token ids: Afina beside datasets + TRL's own preparation, on the same files and cores.

    python benchmarks/data_prepare.py --peer PYTHON [--copies 20] [--repeats 3] [--real ../shared]

PYTHON is the interpreter of an environment that holds trl, datasets and the same torch. Both read GSM8K's training
file, copied so many times, render it with the same chat template, encode it with GPT-2's tokenizer, mark what is learnt
and pack it into rows of 2,048. The cases take turns; each is a process of its own and only the work is timed, imports
and the making of models left out. Results are appended to results/data.jsonl with the machine's load before each; on a
busy machine the seconds of processor are what compares. Afina encodes equal texts once: --distinct takes that away.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from provenance import commit

HERE = Path(__file__).parent
CONTEXT = 2048
TEMPLATE = "afina/alpaca"

AFINA = """
import json, os, sys, time
from pathlib import Path
from afina.data.batch import micro_batches
from afina.data.read import read
from afina.data.template import Renderer
from afina.data.load_tokenizer import load_tokenizer
from afina.recipe.schema import Data

file, tokenizer, template = sys.argv[1:4]
renderer = Renderer(load_tokenizer(tokenizer, template=template))
started, before = time.perf_counter(), sum(os.times()[:4])
samples = read(file, Data(train=file), Path()).samples
rendered = renderer.samples(samples)
packed = micro_batches(rendered, range(len(rendered)), budget=2048, packing=True, pad_id=0)
seconds, cpu = time.perf_counter() - started, sum(os.times()[:4]) - before
print(json.dumps({
    "seconds": seconds,
    "cpu_seconds": cpu,
    "rows": len(samples),
    "tokens": sum(batch.tokens for batch in packed),
    "learnt": sum(batch.targets.numel() for batch in packed),
    "packed": len(packed),
}))
"""
"""Afina's work, timed."""

TRL = """
import json, sys, time, os
os.environ["HF_HUB_OFFLINE"] = "1"
from datasets import load_dataset, disable_progress_bars
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

file, tokenizer, template, folder, workers = sys.argv[1:6]
disable_progress_bars()
tok = AutoTokenizer.from_pretrained(tokenizer)
tok.pad_token = tok.eos_token
tok.chat_template = open(template).read()
model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                                     vocab_size=len(tok), max_position_embeddings=2048))
args = SFTConfig(output_dir=folder, packing=True, max_length=2048, dataset_num_proc=int(workers), report_to=[],
                 use_cpu=True, bf16=False)
started, before = time.perf_counter(), sum(os.times()[:4])
rows = load_dataset("json", data_files=file, cache_dir=folder, split="train")
def talk(row):
    return {"prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}]}
rows = rows.map(talk, remove_columns=rows.column_names, num_proc=int(workers))
trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tok)
seconds, cpu = time.perf_counter() - started, sum(os.times()[:4]) - before
data = trainer.train_dataset
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "rows": len(rows),
                  "tokens": sum(len(ids) for ids in data["input_ids"]), "packed": len(data)}))
"""
"""TRL's, as its trainer prepares a data set before the first step."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--peer", required=True)
    options.add_argument("--copies", type=int, default=20)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument(
        "--distinct", action="store_true", help="number the copies, so that no two questions are equal"
    )
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--real", type=Path, default=Path(os.environ.get("AFINA_REAL_DATA", "../shared")))
    chosen = options.parse_args()
    from afina.recipe.place import BUNDLED

    tokenizer = str((chosen.real / "tokenizers" / "gpt-2").resolve())
    template = str(BUNDLED / "templates" / f"{TEMPLATE.removeprefix('afina/')}.jinja")
    found: dict[str, list[dict]] = {"Afina": [], "datasets + TRL": []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.jsonl"
        content = (chosen.real / "data" / "gsm8k" / "train.jsonl").read_bytes()
        mark = b'"question": "'
        if mark not in content:
            sys.exit("GSM8K's rows begin otherwise than they did")
        for copy in range(chosen.copies):
            with file.open("ab") as out:
                out.write(content.replace(mark, b"%s%d. " % (mark, copy)) if chosen.distinct else content)
        for number in range(chosen.repeats):
            found["Afina"].append(run([sys.executable, "-c", AFINA, str(file), tokenizer, TEMPLATE]))
            cache = str(Path(folder) / f"cache-{number}")
            found["datasets + TRL"].append(
                run([chosen.peer, "-c", TRL, str(file), tokenizer, template, cache, str(chosen.workers)])
            )
    for tool, results in found.items():
        record(tool, results, chosen.copies, chosen.distinct)


def run(command: list[str]) -> dict:
    """What a case prints last, with the load of the machine before it began."""
    load = os.getloadavg()[0]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "true"})
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return {**json.loads(done.stdout.strip().split("\n")[-1]), "load": round(load, 1)}


def record(tool: str, results: list[dict], copies: int, distinct: bool) -> None:
    """Print and append one line."""
    from afina.artifact import versions

    seconds = [round(result["seconds"], 2) for result in results]
    line = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": f"python benchmarks/data_prepare.py --peer PYTHON --copies {copies} --repeats {len(results)}"
        + (" --distinct" if distinct else ""),
        "tool": tool,
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "cpu_seconds": round(statistics.median(result["cpu_seconds"] for result in results), 2),
        **{key: results[0][key] for key in ("rows", "tokens", "packed")},
        "full": round(results[0]["tokens"] / (CONTEXT * results[0]["packed"]), 4),
        "cores": os.cpu_count(),
        "load": [result["load"] for result in results],
        "versions": versions(),
    }
    print(
        f"{tool}: {line['seconds']} s, {line['cpu_seconds']} s of processor, {line['rows']} rows, "
        f"{line['tokens']} tokens, {line['full']:.1%} full"
    )
    with (HERE / "results" / "data.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
