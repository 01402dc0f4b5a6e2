"""Kill a real training process at random instants until it is done; says how the result compares with a run left alone.

python tests/train/torture.py FOLDER KILLS SEED VARIANT [SIGNAL]

The process imports everything once and forks, so that an attempt costs only what the run itself costs. The instant is
one of the run's own processor time, so that a busy machine neither spares a phase nor keeps a run from ever getting on.
FOLDER is laid out by tests/journey/tiny.py. Prints one JSON object.
"""

import faulthandler
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil

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
    "asked-meanwhile": [
        "method.dropout=0.1",
        "tasks=[{name: said, kind: exact, data: test.jsonl, max_new_tokens: 4},"
        " {name: label, kind: classification, data: test.jsonl, labels: [good, bad]}]",
        "training.evaluate=[label, said]",
        "training.evaluations=12",
        "training.best_by=said",
    ],
    "distilled": ["method.dropout=0.2", "training.distill={teacher: base, temperature: 1.5}"],
    "dora-noise": ["method.dora=true", "training.neftune_alpha=5", "training.gradient_checkpointing=true"],
}
HUNG_S = 180
"""An attempt that takes so long by the clock hangs: it ends with the stacks of its threads."""
STUCK = 60
"""So many attempts on one run without its end: it does not get on."""
EARLY = 0.35
"""Most kills come in this first part of what a run takes, so that many hit one run; one in five comes anywhere."""
OFTEN = ["training.checkpoint_minutes=1e-6", "training.steps=24", "tasks=[]", "export.formats=[]"]


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


class Attempt(NamedTuple):
    """How one ended: exit status, whether our signal was sent before, and the processor time it took, in seconds."""

    status: int
    hit: bool
    taken: float


class Hung(Exception):
    """An attempt that never ended, with the stacks of its threads."""


def said_by(out: Path) -> Path:
    """What the last attempt on a run printed."""
    return out.with_name(f"{out.name}.said")


def attempt(recipe: Path, out: Path, overrides: list[str], kill_after: float | None, number: int) -> Attempt:
    """Train in a forked process, and send it a signal after so many seconds of its processor time."""
    said = said_by(out)
    child = os.fork()
    if child == 0:
        status = 70
        try:
            with said.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                faulthandler.register(signal.SIGUSR2, file, all_threads=True)
                status = train(recipe, out, overrides)
        except KeyboardInterrupt:
            status = 130
        finally:
            os._exit(status)
    deadline, process, hit = time.monotonic() + HUNG_S, psutil.Process(child), False
    while True:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            return Attempt(os.waitstatus_to_exitcode(status), hit, used.ru_utime + used.ru_stime)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGUSR2)
            time.sleep(1)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise Hung(said.read_text("utf-8")[-4000:])
        if kill_after is not None and not hit and sum(process.cpu_times()[:2]) >= kill_after:
            time.sleep(random.random() / 100)  # the system counts in hundredths
            os.kill(child, number)
            hit = True
        time.sleep(0.002)


def train(recipe: Path, out: Path, overrides: list[str]) -> int:
    from afina import pipeline
    from afina.errors import AfinaError

    try:
        pipeline.train(recipe, out, overrides)
    except AfinaError as error:
        print(error, error.hint, file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:  # before the loop there is nothing to save
        return 130
    return 0


def main(folder: Path, kills: int, seed: int, variant: str, number: int) -> dict[str, object]:
    import torch

    torch.set_num_threads(1)
    recipe, chance = folder / "recipe.yaml", random.Random(seed)
    overrides = [*OFTEN, *VARIANTS[variant]]
    # Whatever is made once is made before the clock runs.
    train(recipe, folder / f"warm-up-{variant}-{seed}", overrides)
    plain = folder / f"plain-{variant}-{seed}"
    alone = attempt(recipe, plain, [*overrides, "training.checkpoint_minutes=1000"], None, number).taken
    expected, ends = digests(plain), (0, -number, 128 + number)
    hit = runs = attempts = torn = 0
    wrong: list[str] = []
    while hit < kills and not wrong:
        out, first = folder / f"killed-{variant}-{seed}-{runs}", attempts
        while not (out / "manifest.json").exists():
            after = chance.uniform(0, alone * (1.3 if attempts % 5 == 0 else EARLY))
            ended = attempt(recipe, out, overrides, after, number)
            hit, attempts = hit + ended.hit, attempts + 1
            torn += any(".partial" in path.name for path in out.rglob("*")) if out.exists() else 0
            if ended.status not in ends or attempts - first > STUCK:
                said = said_by(out).read_text("utf-8")[-2000:]
                wrong.append(f"run {runs}: attempt {attempts - first} ended with {ended.status}: {said}")
                break
        else:
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
