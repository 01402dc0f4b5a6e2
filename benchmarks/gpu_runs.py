"""The promises of docs/durability.md on a GPU: the same bits in two processes, after kills, signals and out of memory.

    python benchmarks/gpu_runs.py                                    a 1B shape on the GPU, about five minutes
    python benchmarks/gpu_runs.py --shape tiny --kills 3             the same path on a CPU, about a minute
    python benchmarks/gpu_runs.py --parts exact,memory               some of it
    python benchmarks/gpu_runs.py --shape thin --parts kills,terms --at-once 5      20 kills and 6 signals, two minutes

Random weights of a real model's shape are drawn and saved once; then each attempt is a whole `afina train` in a process
forked from one that has imported everything and never touched the GPU. A line a part is printed and recorded; the
exit status is 1 when a promise did not hold.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE), str(HERE.parent / "tests")]

from gpu import LLAMA_1B  # noqa: E402 - found by the path above
from provenance import commit  # noqa: E402
from train.torture import digests  # noqa: E402

TINY = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=8192, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip
THIN = {**LLAMA_1B, "num_hidden_layers": 2, "vocab_size": 32768}
SHAPES = {"1b": LLAMA_1B, "thin": THIN, "tiny": TINY}
"""thin: the widths of 1b and two of its layers, for runs that are stopped dozens of times."""
STEPS, WARM = 30, 8
LONG = 90
"""Steps of a run that is stopped, so that most of it is training and not beginning."""
WAITED = 60
"""Steps in which waiting is measured."""
ANYWHERE = 0.25
"""Share of the signals that come anywhere in a process's life; the others come after the first step that it logs."""
SAMPLES, WORDS = 256, 500
OFTEN = "training.checkpoint_minutes=1e-6"
RECIPE = """\
name: gpu-runs
model: {{base: base, max_length: 2048, precision: {precision}}}
data: {{train: train.jsonl, validation: 0.05}}
method: {{rank: 16, alpha: 16}}
training: {{steps: {steps}, batch_size: 8, learning_rate: 1e-4, validations: 2, checkpoint_minutes: 1000}}
export: {{formats: []}}
"""


class Ended(NamedTuple):
    """Exit status of an attempt, seconds in all, and from the signal to the end."""

    status: int
    seconds: float
    closing: float


def prepare(folder: Path, shape: dict[str, Any], device: str) -> None:
    """Base model, samples and recipe; runs in a process of its own, for it uses the GPU."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from afina.recipe.place import BUNDLED

    if device == "cuda":
        from gpu import random_model

        model = random_model(shape)
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    model.save_pretrained(folder / "base")
    for file in (BUNDLED / "tiny").iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder / "base" / file.name)
    chance = random.Random(0)
    words = [f"w{number}" for number in range(500)]
    with (folder / "train.jsonl").open("w", encoding="utf-8") as rows:
        for _sample in range(SAMPLES):
            said = " ".join(chance.choices(words, k=chance.randint(WORDS // 4, WORDS) if device == "cuda" else 20))
            turns = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": said}]
            rows.write(json.dumps({"messages": turns}) + "\n")
    recipe = RECIPE.format(steps=STEPS, precision="bf16" if device == "cuda" else "fp32")
    (folder / "recipe.yaml").write_text(recipe, "utf-8")


def train(folder: Path, out: Path, overrides: list[str], fraction: float | None = None, free: int | None = None) -> int:
    """One sitting in this process; the exit status that `afina train` would have.

    fraction: of the GPU's memory, beyond which it runs short. free: bytes for which the engine is to plan.
    """
    import torch

    from afina import pipeline
    from afina.errors import AfinaError
    from afina.train import run as runs

    if fraction is not None:
        torch.cuda.set_per_process_memory_fraction(fraction)
    if free is not None:
        runs._free_bytes = lambda _engine, _hardware: free  # type: ignore[assignment]
    try:
        pipeline.train(folder / "recipe.yaml", out, overrides)
    except AfinaError as error:
        print(error, error.hint, file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


def forked(
    work: Callable[[], int | None], said: Path, due: Callable[[float], bool] | None = None, number: int = 9
) -> Ended:
    """`work` in a forked process, sent a signal once `due`, which gets the seconds since its begin, says so."""
    began = sent = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            with said.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            status = work() or 0
        except BaseException:  # noqa: BLE001 - whatever it is, it stands in the file
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    hit = False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        now = time.monotonic()
        if ended:
            return Ended(os.waitstatus_to_exitcode(status), now - began, now - sent if hit else 0.0)
        if due is not None and not hit and due(now - began):
            os.kill(child, number)
            sent, hit = now, True
        time.sleep(0.002)


def at_random(chance: random.Random, log: Path, life: float, training: float) -> Callable[[float], bool]:
    """When to send a signal: anywhere in a process's `life`, or so far into its `training`, which shows in the log.

    A run that goes on first cuts its log back to the checkpoint: it trains once the log grows.
    """
    if chance.random() < ANYWHERE:
        instant = chance.uniform(0.0, life)
        return lambda passed: passed >= instant
    length = log.stat().st_size if log.exists() else 0
    into, began = chance.uniform(0.0, training), None

    def due(passed: float) -> bool:
        nonlocal length, began
        now = log.stat().st_size if log.exists() else 0
        if began is None and now > length:
            began = passed
        length = now
        return began is not None and passed - began >= into

    return due


class Runs:
    """All attempts on one base. `wrong`: the promises that did not hold."""

    def __init__(self, folder: Path, device: str, budget: float, seed: int, at_once: int) -> None:
        self.folder, self.device, self.budget, self.seed, self.wrong = folder, device, budget, seed, list[str]()
        self.at_once = at_once
        self.longer = [f"training.steps={LONG}"] if device == "cuda" else []
        self.said = folder / "said.txt"

    def whole(self, name: str, *overrides: str, fraction: float | None = None) -> Path:
        """A run that nobody stops."""
        out = self.folder / name
        ended = forked(lambda: train(self.folder, out, list(overrides), fraction), self.said)
        if ended.status:
            raise SystemExit(f"{name} ended with {ended.status}:\n{self.said.read_text('utf-8')[-3000:]}")
        self.seconds = ended.seconds
        print(f"  {name}: {ended.seconds:.1f} s", flush=True)
        return out

    def compare(self, what: str, one: Path, two: Path) -> bool:
        """Whether two runs have the same bits."""
        first, second = digests(one), digests(two)
        different = [key for key in first if first[key] != second[key]]
        self.wrong += [f"{what}: {key}" for key in different]
        return not different

    def exact(self) -> dict[str, Any]:
        """The same 30 steps in two processes, one of which saves as often as it can; how long its loop waits for that.

        Beside them two processes without exactness.
        """
        runs = [self.whole("exact-1"), self.whole("exact-2", OFTEN)]
        training = json.loads((runs[1] / "manifest.json").read_text("utf-8"))["training"]
        wait = 1000 * training["checkpoint_seconds"] / max(1, training["checkpoints"])
        return {
            "equal": self.compare("two processes", *runs), "differs_from_step": parting(*runs),
            "step_ms": step_ms(runs[0]), "checkpoints": training["checkpoints"], "wait_ms": round(wait, 2),
            "share_of_a_step": round(wait / step_ms(runs[0]), 4), **about(runs[0]),
        }  # fmt: skip

    def loose(self) -> dict[str, Any]:
        """The same without exactness: whether they are equal nevertheless, and from which step on they are not."""
        runs = [self.whole(f"loose-{number}", "training.exact=false") for number in (1, 2)]
        return {"equal": digests(runs[0]) == digests(runs[1]), "differs_from_step": parting(*runs),
                "step_ms": step_ms(runs[0]), **about(runs[0])}  # fmt: skip

    def cost(self) -> dict[str, Any]:
        """Steps of one model in one process, exactly and without in turns, on samples of the recipe's lengths."""
        forked(lambda: (self.folder / "cost.json").write_text(json.dumps(time_exactness(self.folder))) and 0, self.said)
        found: dict[str, Any] = json.loads((self.folder / "cost.json").read_text())
        return found

    def stopped(self, plain: Path, times: int, number: int, seed: int) -> dict[str, Any]:
        """Signals at random instants until each run is done; the results beside that of the run left alone.

        After `budget` seconds no more are sent: what is left of the run that is under way is done in peace.
        """
        began, chance = time.monotonic(), random.Random(f"{number} {seed}")
        training, life = sum(line["seconds"] for line in steps_of(plain)), self.seconds
        hits, runs, attempts, closings, wrong = 0, 0, 0, list[float](), len(self.wrong)
        late = lambda: time.monotonic() - began > self.budget  # noqa: E731
        while hits < times and not (late() and runs):
            out, first = self.folder / f"stopped-{number}-{seed}-{runs}", attempts
            while not (out / "manifest.json").exists():
                work = lambda out=out: train(self.folder, out, [*self.longer, OFTEN])  # noqa: E731
                quiet = late() or hits >= times
                due = None if quiet else at_random(chance, out / "metrics.jsonl", life, training)
                ended = forked(work, self.said, due, number)
                attempts += 1
                if ended.closing:
                    hits += 1
                    closings.append(ended.closing)
                if ended.status == 0:
                    life = min(life, ended.seconds)  # the first one compiled what the others find
                print(f"  signal {number}, {seed}: {hits} sent, attempt {attempts}: {told(ended, out)}", flush=True)
                if ended.status not in (0, -number, 128 + number) or attempts - first > 30:
                    raise SystemExit(f"attempt ended with {ended.status}:\n{self.said.read_text('utf-8')[-3000:]}")
            same = self.compare(f"signal {number}, {seed}, run {runs}", plain, out)
            print(f"  signal {number}, {seed}: run {runs}, {hits} signals so far, is the same: {same}", flush=True)
            shutil.rmtree(out)
            runs += 1
        return {"signals": hits, "runs": runs, "attempts": attempts, "different": len(self.wrong) - wrong,
                "closing_s": [round(value, 2) for value in sorted(closings)]}  # fmt: skip

    def chains(self, times: int, number: int) -> dict[str, Any]:
        """`stopped` in several processes at once, which share the signals; their figures together."""
        plain, running, found = self.whole(f"alone-{number}", *self.longer), [], list[dict[str, Any]]()
        for chain in range(self.at_once):
            child = os.fork()
            if child == 0:
                status = 70
                try:
                    share = times // self.at_once + (chain < times % self.at_once)
                    facts = self.stopped(plain, share, number, self.seed + chain)
                    (self.folder / f"chain-{number}-{chain}.json").write_text(json.dumps(facts))
                    status = 0
                finally:
                    os._exit(status)
            running.append(child)
        for chain, child in enumerate(running):
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
                raise SystemExit(f"chain {chain} of signal {number} ended badly")
            found.append(json.loads((self.folder / f"chain-{number}-{chain}.json").read_text()))
        self.wrong += [f"signal {number}"] * sum(one["different"] for one in found)
        total = {key: sum(one[key] for one in found) for key in ("signals", "runs", "attempts", "different")}
        seconds = sorted(itertools.chain.from_iterable(one["closing_s"] for one in found))
        closing = {} if number == signal.SIGKILL else {"closing_s": seconds}
        return {"seed": self.seed, "chains": self.at_once, **total, **closing, "steps": len(steps_of(plain)),
                "alone_s": round(self.seconds, 1), **about(plain)}  # fmt: skip

    def waiting(self, spare: int | None = None) -> dict[str, Any]:
        """How long the loop waits for a checkpoint, piece by piece, and how much slower it is while one is written.

        spare: a copy is made on the GPU when so many times its size is free there.
        """
        name = "waiting" if spare is None else "tight"
        out, pieces = self.folder / name, Pieces(self.folder / f"{name}.json")

        def work() -> int:
            from afina.train import checkpoint

            checkpoint.SPARE = spare or checkpoint.SPARE
            pieces.watch()
            status = train(self.folder, out, [f"training.steps={WAITED}", "training.checkpoint_minutes=0.01"])
            pieces.dump()
            return status

        if forked(work, self.said).status:
            raise SystemExit(self.said.read_text("utf-8")[-3000:])
        return {**found_in(pieces.place), "step_ms": step_ms(out), **about(out)}

    def moved(self, free: int) -> dict[str, Any]:
        """Killed while the engine planned for so many bytes, and gone on with where there are many more: planned anew,
        rows would be cut otherwise. `equal_planned_anew`: whether the bits are the same then, too."""
        if self.device != "cuda":
            return {"skipped": "a CPU plans nothing"}
        long = ["model.max_length=16384", OFTEN]  # so that all of a step is computed at once, whatever is free
        little = lambda out: lambda: train(self.folder, out, long, free=free)  # noqa: E731
        plain, kept, anew = (self.folder / f"moved-{name}" for name in ("alone", "kept", "anew"))
        if forked(little(plain), self.said).status:
            raise SystemExit(self.said.read_text("utf-8")[-3000:])
        seconds = sum(line["seconds"] for line in steps_of(plain))
        due = at_random(random.Random(2), kept / "metrics.jsonl", 1e9, 0.6 * seconds)
        if forked(little(kept), self.said, due, signal.SIGKILL).status != -signal.SIGKILL:
            raise SystemExit(f"it was not killed:\n{self.said.read_text('utf-8')[-3000:]}")
        plan = json.loads((kept / "plan.json").read_text("utf-8"))
        shutil.copytree(kept, anew)
        (anew / "plan.json").unlink()
        found: dict[str, Any] = {"planned_for_gib": round(free / 2**30, 2)}
        for out in (kept, anew):
            if forked(lambda out=out: train(self.folder, out, long), self.said).status:
                raise SystemExit(self.said.read_text("utf-8")[-3000:])
            found |= {"equal": self.compare("more room than before", plain, out)} if out == kept else {}
            print(f"  {out.name}: the same: {digests(plain) == digests(out)}", flush=True)
        found["equal_planned_anew"] = digests(plain) == digests(anew)
        found["resumed_after"] = json.loads((kept / "manifest.json").read_text())["training"]["resumed_after"]
        rungs = Counter((" ".join(one["away"]), " ".join(one["again"])) for one in plan.pop("placements"))
        return found | {"plan": plan, "layers": [[*rung, number] for rung, number in rungs.items()]} | about(plain)

    def memory(self) -> dict[str, Any]:
        """Less memory than the plan believes there is: the micro-batch shrinks, samples and schedule stay."""
        big = "training.micro_batch_tokens=8192"
        plain = self.whole("roomy", big)
        facts = json.loads((plain / "manifest.json").read_text("utf-8"))["training"]
        if self.device != "cuda":
            return {"skipped": "a CPU has no memory fraction"}
        total = forked_total(self)
        standing = sum(file.stat().st_size for file in (self.folder / "base").glob("*.safetensors"))
        fraction = (standing + 0.55 * (facts["peak_memory_bytes"] - standing)) / total
        tight = self.whole("tight", big, fraction=fraction)
        found = json.loads((tight / "manifest.json").read_text("utf-8"))["training"]
        if found["ledger"] != facts["ledger"] or not found["out_of_memory"]:
            self.wrong.append("out of memory")
        return {
            "peak_gib": [round(run["peak_memory_bytes"] / 2**30, 2) for run in (facts, found)],
            "limit_gib": round(fraction * total / 2**30, 2), "shrunk": found["out_of_memory"],
            "same_ledger": found["ledger"] == facts["ledger"],
            "final_loss": [run["final_loss"] for run in (facts, found)],
        }  # fmt: skip


def time_exactness(folder: Path) -> dict[str, Any]:
    """Milliseconds of a forward and backward pass, exactly and without, in turns; medians."""
    import torch

    from afina.console import Console
    from afina.data.batch import micro_batches
    from afina.data.load_tokenizer import load_tokenizer
    from afina.data.template import Rendered, Renderer
    from afina.engine.engine import Engine
    from afina.model.attach import attach
    from afina.model.load import choose_hardware, load_model
    from afina.model.packed import packed_attention
    from afina.model.repeatable import same_bits
    from afina.recipe.load import load
    from afina.train.examples import prepare

    recipe = load(folder / "recipe.yaml", [])
    hardware = choose_hardware(recipe.model)
    renderer = Renderer(load_tokenizer(str(folder / "base")), recipe.data.learn)
    rows = prepare(recipe, folder, renderer, Console()).train
    model = attach(load_model(str(folder / "base"), hardware), recipe.method, seed=0).train()
    engine = Engine(model, hardware.dtype)
    longest = sorted(range(len(rows)), key=lambda n: -rows[n].ids.size)[:5]
    length, lengths = rows[longest[-1]].ids.size, {}
    rows = [*rows, *(Rendered(rows[n].ids[:length], rows[n].learnt[:length]) for n in longest)]
    for name, chosen in (
        ("samples", range(8)),
        ("one long sample", longest[:1]),
        ("five of one length", range(len(rows) - 5, len(rows))),
    ):
        (batch,) = micro_batches(rows, chosen, budget=2**20, packing=True, pad_id=0)
        batch, seconds = batch.to(hardware.device), {True: list[float](), False: list[float]()}
        with packed_attention(model):
            for turn in range(40):
                with same_bits(turn % 2 == 0):
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                    engine.summed_loss(model, batch).backward()
                    torch.cuda.synchronize()
                if turn >= WARM:
                    seconds[turn % 2 == 0].append(time.perf_counter() - began)
        ms = {on: round(1000 * statistics.median(taken), 2) for on, taken in seconds.items()}
        lengths[name] = {"tokens": batch.tokens, "ms_exact": ms[True], "ms_without": ms[False],
                         "cost": round(ms[True] / ms[False] - 1, 4)}  # fmt: skip
    return lengths


def forked_total(runs: Runs) -> int:
    """Bytes of the GPU, asked in a process of its own."""
    place = runs.folder / "total"

    def ask() -> None:
        import torch

        place.write_text(str(torch.cuda.get_device_properties(0).total_memory))

    forked(ask, runs.said)
    return int(place.read_text())


class Pieces:
    """What a save is made of, each piece with the thread it ran in, its begin and its end; measured from outside."""

    def __init__(self, place: Path) -> None:
        self.place, self.spans = place, list[tuple[str, str, float, float]]()

    def watch(self) -> None:
        """Time these from now on, in this process."""
        import torch

        from afina import durable
        from afina.train import checkpoint, keeper, record, session

        for owner, name in (
            (session.Session, "_save"), (session.Session, "on_step"), (session, "peak_memory"), (record.Record, "mark"),
            (record.Tally, "dump"), (keeper.Keeper, "save"), (keeper, "facts_of"), (session.Session, "on_validation"),
            (torch.cuda, "mem_get_info"), (checkpoint.Layout, "__init__"), (checkpoint.Layout, "holds"),
            (checkpoint.Row, "copy"), (checkpoint.Snapshot, "__init__"), (checkpoint, "_in_main_memory"),
            (checkpoint, "_is_finite"),
            (threading.Thread, "start"), (keeper.Keeper, "_write"), (checkpoint.Snapshot, "fetch"),
            (record.Record, "sync"), (checkpoint, "_save"), (checkpoint, "sha256"), (durable, "write_json"),
            (durable, "_sync_tree"), (keeper, "prune"),
        ):  # fmt: skip
            setattr(owner, name, self._timed(f"{getattr(owner, '__name__', '')}.{name}", getattr(owner, name)))

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                here = "loop" if threading.current_thread() is threading.main_thread() else "thread"
                self.spans.append((here, name, began, time.perf_counter()))

        return timed

    def dump(self) -> None:
        """Write what was measured."""
        self.place.write_text(json.dumps(self.spans))


def found_in(place: Path) -> dict[str, Any]:
    """From the spans: milliseconds of each piece for the first saves and by the median; and what a save costs in all.

    `slowed_ms`: by how much the steps that a save and its writing touch are longer than the others, all of a save
    together. Steps with a validation before them are left out.
    """
    spans = [(here, name, one, two) for here, name, one, two in json.loads(place.read_text())]
    marks = sorted(two for _here, name, _one, two in spans if name == "Session.on_step")[WARM:]
    busy = [
        (one, two)
        for here, name, one, two in spans
        if (here, name) in (("loop", "Session._save"), ("thread", "Keeper._write"))
    ]
    validations = [(one, two) for _here, name, one, two in spans if name == "Session.on_validation"]
    touched: dict[bool, list[float]] = {True: [], False: []}
    for before, after in itertools.pairwise(marks):
        if not any(one < after and two > before for one, two in validations):
            touched[any(one < after and two > before for one, two in busy)].append(1000 * (after - before))
    waits = [(one, 1000 * (two - one)) for here, name, one, two in spans if (here, name) == ("loop", "Session._save")]
    saves = [wait for one, wait in waits if marks[0] < one < marks[-1]]
    quiet = statistics.median(touched[False])
    pieces: dict[str, list[float]] = {}
    for here, name, one, two in spans:
        pieces.setdefault(f"{here}: {name}", []).append(1000 * (two - one))
    return {
        "saves": len(saves), "first_wait_ms": round(waits[0][1], 2), "wait_ms": round(statistics.median(saves), 2),
        "longest_wait_ms": round(max(saves), 2), "quiet_ms": round(quiet, 2),
        "share_of_a_step": round(statistics.median(saves) / quiet, 4),
        "slowed_ms": round((sum(touched[True]) - quiet * len(touched[True])) / len(saves), 2),
        "touched": len(touched[True]), "untouched": len(touched[False]),
        "touched_ms": [round(value, 1) for value in sorted(touched[True])],
        "pieces_ms": {
            name: {"first": [round(value, 2) for value in found[:2]], "median": round(statistics.median(found), 3),
                   "calls": len(found)} for name, found in pieces.items()
        },
    }  # fmt: skip


def told(ended: Ended, out: Path) -> str:
    """One attempt in a few words: how it ended, when, and how far the log was."""
    done = (out / "manifest.json").exists()
    lines = len((out / "metrics.jsonl").read_bytes().splitlines()) if (out / "metrics.jsonl").exists() else 0
    return f"status {ended.status}, {ended.seconds:.1f} s, closing {ended.closing:.2f} s, {lines} lines" + (
        ", finished" if done else ""
    )


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The log's lines of the steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def step_ms(run: Path) -> float:
    """Median of the steps after the warm ones, in milliseconds."""
    return round(1000 * statistics.median(line["seconds"] for line in steps_of(run)[WARM:]), 2)


def parting(one: Path, two: Path) -> list[Any] | None:
    """Step and figures at which two runs first differ, None where they never do."""
    for first, second in zip(*((run / "metrics.jsonl").read_bytes().splitlines() for run in (one, two)), strict=True):
        here, there = json.loads(first), json.loads(second)
        if different := [key for key in here if key != "seconds" and here[key] != there[key]]:
            return [here["step"], *different]
    return None


def about(run: Path) -> dict[str, Any]:
    """What ran, as its manifest says."""
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    tokens = manifest["training"]["tokens"] / manifest["training"]["steps"]
    return {"engine": manifest["engine"], "hardware": manifest["hardware"], "tokens_a_step": round(tokens)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", choices=SHAPES, default="1b")
    options.add_argument("--parts", default="exact,loose,cost,memory,moved,waiting,tight,terms,kills")
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--terms", type=int, default=6)
    options.add_argument("--seed", type=int, default=0, help="of the instants at which signals are sent")
    options.add_argument("--free-gib", type=float, default=1.0, help="for which `moved` plans at first")
    options.add_argument("--at-once", type=int, default=1, help="so many runs are stopped at once")
    options.add_argument("--budget", type=float, default=600.0, help="seconds in which signals are sent")
    options.add_argument("--results", type=Path, default=HERE / "results" / "gpu_runs.jsonl")
    options.add_argument("--commit", default="", help="where the tree has no git")
    chosen = options.parse_args()
    device = "cpu" if chosen.shape == "tiny" else "cuda"
    os.environ.setdefault("OMP_NUM_THREADS", "4" if device == "cuda" else "1")
    # A forked process cannot open the GPU once its parent has: bitsandbytes would when imported, and asking whether
    # there is one may go through NVML.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    import torch

    import afina.evaluate.report
    import afina.export.card
    import afina.train.run  # noqa: F401 - all that is imported here is not imported after the forks
    from afina.artifact import versions

    if torch.cuda.is_initialized():
        raise SystemExit("something that was imported has opened the GPU already; its import must wait for the forks")
    with tempfile.TemporaryDirectory(prefix="gpu-runs-") as name:
        runs, shape = Runs(Path(name), device, chosen.budget, chosen.seed, chosen.at_once), SHAPES[chosen.shape]
        if forked(lambda: prepare(runs.folder, shape, device), runs.said).status:
            raise SystemExit(runs.said.read_text("utf-8")[-3000:])
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "exact": runs.exact, "loose": runs.loose, "cost": runs.cost, "memory": runs.memory,
            "moved": lambda: runs.moved(int(chosen.free_gib * 2**30)),
            "waiting": runs.waiting, "tight": lambda: runs.waiting(10**9),
            "terms": lambda: runs.chains(chosen.terms, signal.SIGTERM),
            "kills": lambda: runs.chains(chosen.kills, signal.SIGKILL),
        }  # fmt: skip
        for part in chosen.parts.split(","):
            began = time.monotonic()
            line = {"part": part, "shape": chosen.shape, **parts[part](), "took_s": round(time.monotonic() - began, 1)}
            print(json.dumps(line), flush=True)
            line |= {"commit": chosen.commit or commit(), "versions": versions(),
                     "date": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
            with chosen.results.open("a", encoding="utf-8") as results:
                results.write(json.dumps(line) + "\n")
    print("promises that did not hold:", runs.wrong or "none")
    sys.exit(bool(runs.wrong))


if __name__ == "__main__":
    main()
