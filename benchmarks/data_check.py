"""How fast `afina data check` is, how much memory it takes, and whether it finds every bad row among a million.

    python benchmarks/data_check.py [ROWS] [FOLDER] [--beside]

--beside gives every row a number, a list and an object beside its messages. Writes a file of ROWS rows (a million
unless told) into a temporary folder, or into FOLDER, where it is found again. What PYTHONPATH names is measured, so
that two versions can be compared on one file. Every hundredth row is bad: one of each class of
tests/data/audit/faulty.py in turn, then duplicates, contradictions, answers in another language and answers far too
short. Audits it in a process of its own and appends what was found and measured to results/data.jsonl: rows of every
class that were found and that were not, sound rows complained of, MB/s of the clock and of the processor, and the
process's own peak of memory.
"""

import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "data" / "audit"))
RESULTS = ROOT / "benchmarks" / "results" / "data.jsonl"
BAD_EVERY = 100
ACROSS = ("duplicate", "contradiction", "other-language", "short-answer")


def make(path: Path, rows: int, beside: bool = False) -> dict[int, str]:
    """Write the file; returns line and class of every bad row."""
    import faulty

    rng = random.Random(20261120)
    classes = [*faulty.FAULTY, *ACROSS]
    bad: dict[int, str] = {}
    seen: list[bytes] = []
    with path.open("wb") as file:
        for line in range(1, rows + 1):
            if line % BAD_EVERY == 50 and line > BAD_EVERY:
                kind = bad[line] = classes[line // BAD_EVERY % len(classes)]
                raw = across(kind, rng, seen) if kind in ACROSS else faulty.FAULTY[kind](rng)
            else:
                raw = faulty.sound(rng)
                if line % BAD_EVERY == 1:
                    seen = [*seen[-50:], raw]
            if beside and raw.startswith(b'{"messages"') and raw.endswith(b"]}"):
                more = {"id": line, "tags": ["web", "short"], "meta": {"source": "a forum", "votes": [line % 7, 0.5]}}
                raw = raw[:-1] + b", " + json.dumps(more).encode()[1:]
            file.write(raw + (b"\r\n" if line % 1000 == 0 else b"\n"))
    return bad


def across(kind: str, rng: random.Random, seen: list[bytes]) -> bytes:
    """A row that is bad only beside others."""
    import faulty

    if kind == "duplicate":
        return seen.pop(0)
    if kind == "contradiction":
        messages = json.loads(seen.pop(0))["messages"]
        texts = [message["content"] for message in messages[:-1]]
        roles = tuple(message["role"] for message in messages)
        return faulty.row(*texts, faulty.sentence(rng, 25), roles=roles)
    if kind == "short-answer":
        return faulty.row(faulty.sentence(rng, 14), "No.")
    return faulty.row(faulty.sentence(rng, 14), faulty.passage(rng, 36, "es"))


def audit(path: Path, truth: Path) -> None:
    """The measured process: audit the file and print what was found of what was planted."""
    from afina.console import Console
    from afina.data.audit.finding import Finding
    from afina.data.audit.run import Audit
    from afina.recipe.schema import Data

    bad = {int(line): kind for line, kind in json.loads(truth.read_bytes()).items()}
    found: Counter[str] = Counter()
    alarms: Counter[str] = Counter()
    examples: list[str] = []

    def tell(finding: Finding) -> None:
        if bad.get(finding.line) == finding.kind:
            found[finding.kind] += 1
        elif finding.line and finding.line not in bad:
            alarms[finding.kind] += 1
            if len(examples) < 20:
                examples.append(f"{finding.line} {finding.kind} {finding.detail}")

    console = Console()
    console.json = True
    console.event = lambda *_name, **_facts: None  # type: ignore[method-assign]
    started, cpu = time.perf_counter(), time.process_time()
    report = Audit(Data(train=str(path)), Path(), tell=tell).run(console)
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    planted = Counter(bad.values())
    print(
        json.dumps(
            {
                "rows": report.rows,
                "kept": report.kept,
                "rejected": report.rejected,
                "megabytes": round(report.size / 1e6, 1),
                "seconds": round(wall, 2),
                "cpu_seconds": round(cpu, 2),
                "megabytes_per_second": round(report.size / 1e6 / wall, 1),
                "megabytes_per_cpu_second": round(report.size / 1e6 / cpu, 1),
                "peak_memory_mib": round(peak_memory() / 2**20, 1),
                "classes": len(planted),
                "planted": planted.total(),
                "found": found.total(),
                "missed": {kind: count - found[kind] for kind, count in planted.items() if found[kind] != count},
                "false_alarms": dict(alarms),
                "examples": examples,
                "load_average": os.getloadavg(),
            }
        )
    )


def peak_memory() -> int:
    """Bytes this program has held at most; getrusage counts what its parent held before it began."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--audit"]:
        audit(Path(arguments[1]), Path(arguments[2]))
        return
    if arguments[:1] == ["--make"]:
        Path(arguments[2]).write_text(json.dumps(make(Path(arguments[1]), int(arguments[3]))))
        return
    beside = "--beside" in arguments
    arguments = [word for word in arguments if word != "--beside"]
    rows = int(next((word for word in arguments if word.isdigit()), "1000000"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(next((word for word in arguments if not word.isdigit()), temporary))
        name = f"{rows}-beside" if beside else str(rows)
        path, truth = folder / f"rows-{name}.jsonl", folder / f"truth-{name}.json"
        if not truth.exists():
            truth.write_text(json.dumps(make(path, rows, beside)))
        code = os.environ.get("PYTHONPATH", str(ROOT / "src"))
        done = subprocess.run(
            [sys.executable, __file__, "--audit", str(path), str(truth)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": code},
            check=False,
        )
        said = ["git", "-C", code.split(os.pathsep)[0], "describe", "--always", "--dirty"]
        commit = subprocess.run(said, capture_output=True, text=True, check=False).stdout.strip()
    if done.returncode:
        sys.exit(done.stderr)
    measured = {
        "what": "data check, a list and an object beside the messages" if beside else "data check",
        "commit": commit,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        **json.loads(done.stdout),
    }
    print(json.dumps(measured, indent=1))
    with RESULTS.open("a", encoding="utf-8") as results:
        results.write(json.dumps(measured) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
