"""What a run tells about itself: metrics.jsonl, a line a step, and the figures that end in the manifest.

A full disk does not end the training: lines wait in memory until there is room.
"""

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from afina import durable
from afina.errors import OutputError
from afina.language import _

METRICS = "metrics.jsonl"


@dataclass
class Tally:
    """Figures gathered over all sessions of a run.

    `checkpoint_seconds`: how long the loop waited for so many `checkpoints`. `best`: the step after which the figure
    that decides was best, its name and value, and the validation loss then; `lowest`: the step, value and sums by group
    of the best value itself, from which `best` differs by chance at most. `ledger` is a hash chain over step and
    sample ids: two runs with the same one learnt the same samples in the same steps. `trained`: mean training losses
    between the validations; `since`: sum and number since the last. `findings`: what these curves showed (trend.py).
    `evaluations`: what was measured of each task asked while it trained, with the step; `asked`: how often they were.
    """

    first_loss: float | None = None
    final_loss: float | None = None
    validation: list[float | None] = field(default_factory=list)
    tokens: int = 0
    learnt: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    checkpoints: int = 0
    checkpoint_seconds: float = 0.0
    ledger: str = ""
    resumed_after: list[int] = field(default_factory=list)
    best: dict[str, Any] | None = None
    lowest: dict[str, Any] | None = None
    trained: list[float] = field(default_factory=list)
    since: list[float] = field(default_factory=lambda: [0.0, 0])
    findings: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    asked: int = 0

    def validated(self, loss: float | None) -> None:
        """A validation ends a stretch of training."""
        self.validation.append(loss)
        self.trained.append(self.since[0] / max(1, self.since[1]))
        self.since = [0.0, 0]

    def heard(self, step: int, figures: list[dict[str, Any]]) -> None:
        """Tasks were asked after this step."""
        self.asked += 1
        kept = ("task", "measure", "value", "interval", "samples", "answered")
        self.evaluations += [{"step": step, **{key: facts[key] for key in kept}} for facts in figures]

    def learn(self, step: int, samples: list[int]) -> None:
        """Add a step to the ledger."""
        self.ledger = hashlib.sha256(f"{self.ledger} {step} {samples}".encode()).hexdigest()

    def figures(self) -> dict[str, Any]:
        """What a manifest says of it."""
        kept = ("findings", "evaluations", "tokens", "seconds", "checkpoints", "checkpoint_seconds", "first_loss",
                "final_loss", "best", "resumed_after", "ledger")  # fmt: skip
        speed = self.tokens / max(self.seconds, 1e-9)
        return {"learnt_tokens": self.learnt, "tokens_per_second": speed} | {key: getattr(self, key) for key in kept}

    def dump(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return asdict(self)


class Record:
    """metrics.jsonl, open; what cannot be written yet waits."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS
        self.waiting: list[dict[str, Any]] = []
        self._log = durable.Log(self.path)
        self._sum, self._length = self._read(self.path.stat().st_size)

    def add(self, line: dict[str, Any]) -> bool:
        """Write one line, and those that wait before it; False when they must wait."""
        self.waiting.append(line)
        try:
            self._write()
        except OutputError:
            return False
        return True

    def mark(self) -> dict[str, Any]:
        """Where the log ends now; `sync` makes that last. Raises OutputError when lines still wait."""
        self._write()
        return {"bytes": self._length, "sha256": self._sum.hexdigest()}

    def sync(self) -> None:
        """Let all that was written reach the disk. Raises OutputError."""
        self._log.sync()

    def cut(self, mark: dict[str, Any]) -> bool:
        """Go back to a mark; False when the log before it is not what it was: then what is there of it is kept."""
        self.waiting = []
        length = int(mark["bytes"])
        there = self.path.stat().st_size
        self._sum, self._length = self._read(length)
        whole = there >= length and self._sum.hexdigest() == mark["sha256"]
        if not whole:
            content = self.path.read_bytes()[:length]
            length = content.rfind(b"\n") + 1
            self._sum, self._length = self._read(length)
        self._log.cut(min(length, there))
        return whole

    def close(self) -> None:
        """Write what waits and close. Raises OutputError when that cannot be."""
        try:
            self._write()
        finally:
            self._log.close()

    def _write(self) -> None:
        while self.waiting:
            line = self._log.append(self.waiting[0])
            self._sum.update(line)
            self._length += len(line)
            del self.waiting[0]

    def _read(self, length: int) -> tuple["hashlib._Hash", int]:
        """The hash of the first `length` bytes, to go on with, and how many there are."""
        digest, left = hashlib.sha256(), length
        with self.path.open("rb") as file:
            while left > 0 and (piece := file.read(min(left, 2**20))):
                digest.update(piece)
                left -= len(piece)
        return digest, length - left


def told(path: Path) -> str:
    """One sentence for a log that waits."""
    return _("{path} cannot be written for now; its lines wait in memory.").format(path=path)
