"""Foreign templates, patterns and Parquet files are run and read in processes of their own, which the system ends when
they take too much.

A process gets `SECONDS` of processor time for each thing it is asked, and `MEMORY` bytes beyond what it began with; a
template may answer with so many characters. A thing that takes more ends it, and nobody else. One process serves all
templates and patterns of this one, another all Parquet files; each is begun when it is first asked and ends with us. It
is told everything by a pipe and has no other task: templates (sandbox.py) reach neither files nor Python's internals.
"""

import atexit
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from select import select
from typing import Any

from afina.errors import ModelError
from afina.language import _

SECONDS = 1.0
"""Processor time for one rendering; templates of real models take 20 to 60 µs."""
MEMORY = 256 * 2**20
PATIENCE = 60.0
"""Seconds without an answer after which a process counts as lost, however busy the machine is."""
AT_ONCE, AT_ONCE_BYTES = 256, 2**24
"""Items asked in one go, and how long they may be: enough that the way there and back costs little."""
TOGETHER = 2**16
"""Characters of answers that are sent together, unless that would keep the first one waiting."""
_BEGIN = "import sys; sys.path[:] = sys.argv[2:]; from afina.data.worker import serve; serve(sys.argv[1])"
_SIZE = struct.Struct("<I")
_READ = 2**16

Act = Callable[[Any], str]
"""What a definition makes of an item."""


class Overrun(ModelError):
    """What was asked took more time, memory or room than it may."""


class Worker:
    """The process from outside. `reads_parquet`: it has what that needs from the beginning."""

    def __init__(self, *, reads_parquet: bool = False) -> None:
        self._task = "parquet" if reads_parquet else ""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._told: dict[tuple[str, str], int] = {}
        self._unread = bytearray()

    def ask(self, kind: str, definition: str, items: Sequence[Any]) -> list[tuple[str, str]]:
        """What `definition` makes of each item: ("made", text), ("refused", reason) or ("invalid", reason).

        kind: template, mapping, copies, pattern or parquet; invalid is a definition that is none. Raises Overrun when
        an item, or taking in the definition, takes too much.
        """
        answers: list[tuple[str, str]] = []
        with self._lock:
            for group in _groups(items):
                answers += self._asked(kind, definition, group)
        for status, text in answers:
            if status == "overrun":
                raise Overrun(text)
        return answers

    @property
    def running(self) -> bool:
        """Whether there is a process of ours."""
        return self._process is not None and self._owner == os.getpid() and self._process.poll() is None

    def close(self) -> None:
        """End the process. One that a fork brought along is its parent's to end."""
        process, self._process = self._process, None
        if process is None:
            return
        if self._owner == os.getpid():
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def _asked(self, kind: str, definition: str, group: Sequence[str]) -> list[tuple[str, str]]:
        process = self._started()
        new = (kind, definition) not in self._told
        number = self._told.setdefault((kind, definition), len(self._told))
        try:
            head = json.dumps([kind, number, definition if new else None])
            _send(_fileno(process.stdin), f"{head[:-1]}, [{', '.join(group)}]]")
            answers: list[tuple[str, str]] = []
            while len(answers) < len(group):
                answers += self._answers(process)
            return answers
        except (OSError, EOFError) as error:
            raise self._ended() from error
        except BaseException:  # a signal in the middle: what is still to be read belongs to nobody
            self.close()
            raise

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self.running:
            return self._process
        self.close()
        self._told.clear()
        self._unread.clear()
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", "-c", _BEGIN, self._task, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for us
        )
        return self._process

    def _answers(self, process: "subprocess.Popen[bytes]") -> list[tuple[str, str]]:
        """Those that come together."""
        answers = _received(_fileno(process.stdout), self._unread, PATIENCE)
        if answers is None:
            raise EOFError
        return [(status, text) for status, text in answers]

    def _ended(self) -> Overrun:
        """Why the process is gone, or is made to go."""
        status: int | None = None
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                status = self._process.wait(timeout=1)
        self.close()
        if status == -signal.SIGPROF:
            return Overrun(_("it took more than {seconds:g} s").format(seconds=SECONDS))
        return Overrun(too_much_memory())


WORKER, READER = Worker(), Worker(reads_parquet=True)
"""The ones of this process."""
atexit.register(WORKER.close)
atexit.register(READER.close)


def _groups(items: Sequence[Any]) -> Iterator[list[str]]:
    """Items as JSON, as many together as are asked in one go. What JSON does not have is told by its text."""
    group: list[str] = []
    size = 0
    for item in items:
        text = json.dumps(item, default=str)
        if group and (len(group) == AT_ONCE or size + len(text) > AT_ONCE_BYTES):
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group


def serve(task: str) -> None:
    """The process from inside: take in requests until the pipe is closed."""
    if task == "parquet":
        from afina.data.parquet import prepare

        prepare()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # it ends us
    known: dict[int, Act] = {}
    unread = bytearray()
    _limit_memory()
    while (request := _received(0, unread)) is not None:
        kind, number, definition, items = request
        answers: list[tuple[str, str]] = []
        size, since = 0, time.monotonic()
        for item in items:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # begins anew for each
            answers.append(_answered(known, kind, number, definition, item))
            size += len(answers[-1][1])
            if size > TOGETHER or time.monotonic() > since + SECONDS:
                _send(1, json.dumps(answers))
                answers, size, since = [], 0, time.monotonic()
        signal.setitimer(signal.ITIMER_PROF, 0)
        if answers:
            _send(1, json.dumps(answers))


def _maker(kind: str) -> Callable[[str], Act]:
    """What takes in definitions of this kind: only the process itself needs it."""
    if kind == "parquet":
        from afina.data.parquet import batches

        return batches
    if kind == "pattern":
        from afina.data.patterns import cutter

        return cutter
    from afina.data import sandbox

    return {"mapping": sandbox.mapped, "copies": sandbox.copies, "template": sandbox.templated}[kind]


def _answered(known: dict[int, Act], kind: str, number: int, definition: str | None, item: Any) -> tuple[str, str]:
    from afina.data.sandbox import FAILURES, MOST, TooLong

    try:
        if number not in known:
            known[number] = _maker(kind)(definition or "")
    except MemoryError:
        return "overrun", too_much_memory()
    except FAILURES as error:
        return "invalid", str(error) or type(error).__name__
    try:
        return "made", known[number](item)
    except MemoryError:
        return "overrun", too_much_memory()
    except TooLong:
        return "overrun", _("it wrote more than {size} characters").format(size=MOST)
    except FAILURES as error:
        return "refused", str(error) or type(error).__name__


def too_much_memory() -> str:
    """What is said of it, here and there."""
    return _("it took more than {size} MiB of memory, or never ended").format(size=MEMORY >> 20)


def _limit_memory() -> None:
    """MEMORY beyond what we have: more is a MemoryError, or the end of the process where Rust asks for it."""
    import resource

    with suppress(OSError):  # elsewhere than on Linux nobody says
        now = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def _send(pipe: int, text: str) -> None:
    content = text.encode()
    left = memoryview(_SIZE.pack(len(content)) + content)
    while left:
        left = left[os.write(pipe, left) :]


def _received(pipe: int, unread: bytearray, patience: float | None = None) -> Any:
    """The next value, once it is whole; None when the pipe is closed, or nothing came for `patience` seconds."""
    while len(unread) < _SIZE.size or len(unread) < _SIZE.size + _SIZE.unpack_from(unread)[0]:
        if patience is not None and not select([pipe], [], [], patience)[0]:
            return None
        part = os.read(pipe, _READ)
        if not part:
            return None
        unread += part
    end = _SIZE.size + _SIZE.unpack_from(unread)[0]
    value = json.loads(bytes(unread[_SIZE.size : end]))
    del unread[:end]
    return value


def _fileno(pipe: Any) -> int:
    return int(pipe.fileno())
