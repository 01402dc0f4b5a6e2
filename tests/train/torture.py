"""Kill a real training process at random instants until it is done; says how the result compares with a run left alone.

python tests/train/torture.py FOLDER KILLS SEED VARIANT [SIGNAL]

The process imports everything once and forks, so that an attempt costs only what the run itself costs. FOLDER is laid
out by tests/journey/tiny.py. Prints one JSON object.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

VARIANTS = {
    "lora-packed-auto": ["method.dropout=0"],
    "lora-dropout-packed": ["method.dropout=0.2"],
    "lora-dropout-padded": ["method.dropout=0.2", "training.packing=false", "training.micro_batch_tokens=200"],
    "lora-reference": ["method.dropout=0.1", "training.engine=reference", "training.micro_batch_tokens=128"],
    "full-packed": ["method={name: full}", "training.learning_rate=1e-3"],
    "full-padded": ["method={name: full}", "training.learning_rate=1e-3", "training.packing=false"],
    "qlora-paged": ["model.quantization=nf4", "training.optimizer=paged-adamw-8bit", "method.dropout=0.1"],
    "pissa-lion": ["method.init=pissa", "training.optimizer=lion", "training.learning_rate=1e-3"],
    "prompt-adafactor": ["method={name: prompt-tuning}", "training.optimizer=adafactor", "training.learning_rate=0.05"],
    "muon-tokens": ["method={name: full}", "training.optimizer=muon", "training.batch_tokens=300"],
    "dora-noise": ["method.dora=true", "training.neftune_alpha=5", "training.gradient_checkpointing=true"],
}
OFTEN = ["training.checkpoint_minutes=1e-6", "training.steps=40", "tasks=[]", "export.formats=[]"]


def digests(run: Path) -> dict[str, str]:
    """What must not depend on whether the run was stopped: weights, optimiser, ledger, metrics without seconds."""
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    weights = next((run / "adapter").glob("*.safetensors"))
    training = manifest["training"]
    return {
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "optimiser": training["state_sha256"],
        "ledger": training["ledger"],
        "metrics": hashlib.sha256(json.dumps(lines).encode()).hexdigest(),
        "figures": json.dumps([training[key] for key in ("first_loss", "final_loss", "validation_loss", "tokens")]),
    }


def attempt(recipe: Path, out: Path, overrides: list[str], kill_after: float | None, number: int) -> tuple[int, bool]:
    """Train in a forked process, and send it a signal after some seconds; its exit status and whether it was hit."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            status = train(recipe, out, overrides)
        except KeyboardInterrupt:
            status = 130
        finally:
            os._exit(status)
    if kill_after is not None:
        deadline = time.monotonic() + kill_after
        while time.monotonic() < deadline:
            if os.waitpid(child, os.WNOHANG)[0]:
                return 0, False
            time.sleep(0.002)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), kill_after is not None


def train(recipe: Path, out: Path, overrides: list[str]) -> int:
    from afina import pipeline
    from afina.errors import AfinaError

    try:
        pipeline.train(recipe, out, overrides)
    except AfinaError as error:
        return error.exit_status
    except KeyboardInterrupt:  # before the loop there is nothing to save
        return 130
    return 0


def main(folder: Path, kills: int, seed: int, variant: str, number: int) -> dict[str, object]:
    import torch

    torch.set_num_threads(1)
    recipe, chance = folder / "recipe.yaml", random.Random(seed)
    overrides = [*OFTEN, *VARIANTS[variant]]
    plain = folder / f"plain-{variant}-{seed}"
    train(
        recipe, folder / f"warm-up-{variant}-{seed}", overrides
    )  # whatever is made once is made before the clock runs
    started = time.monotonic()
    attempt(recipe, plain, [*overrides, "training.checkpoint_minutes=1000"], None, number)
    alone = time.monotonic() - started
    expected = digests(plain)
    hit = runs = attempts = torn = 0
    wrong: list[str] = []
    while hit < kills:
        out = folder / f"killed-{variant}-{seed}-{runs}"
        while not (out / "manifest.json").exists():
            status, was_hit = attempt(recipe, out, overrides, chance.uniform(0, 1.3 * alone), number)
            hit, attempts = hit + was_hit, attempts + 1
            torn += any(".partial" in path.name for path in out.rglob("*")) if out.exists() else 0
            if status in (70, 1, 5):
                return {"wrong": [f"an attempt ended with {status}"], "kills": hit, "runs": runs, "attempts": attempts}
        attempt(recipe, out, overrides, None, number)  # of a finished run, what is left over is cleared
        found = digests(out)
        wrong += [f"run {runs}: {key}" for key in expected if found[key] != expected[key]]
        runs += 1
        shutil.rmtree(out)
    return {"wrong": wrong, "kills": hit, "runs": runs, "attempts": attempts, "torn": torn, "alone": alone}


if __name__ == "__main__":
    root = Path(__file__).parents[2]
    sys.path[:0] = [str(root / "src")]
    import afina.evaluate.report
    import afina.export.gguf
    import afina.train.run  # noqa: F401 - loaded before the forks

    place, kills, seed, variant, *rest = sys.argv[1:]
    name = rest[0] if rest else "SIGKILL"
    print(json.dumps(main(Path(place), int(kills), int(seed), variant, getattr(signal, name))))
