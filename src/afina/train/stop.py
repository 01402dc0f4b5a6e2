"""Ctrl-C, SIGTERM and SIGHUP while training: the work is saved and closed, and a second one leaves at once.

Between steps a signal waits until the state is whole. Inside a forward or backward pass, which changes nothing that is
saved, it is raised on the spot, so that nobody waits for a long step. On a CPU one product may last for seconds, and
Python sees no signal before it ends: there a thread computes, and the main one waits, which can be interrupted.
"""

import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from types import FrameType
from typing import Any, TypeVar

from afina.beside import next_of
from afina.errors import Interrupted
from afina.language import _

T = TypeVar("T")
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Stop:
    """Whether this process was asked to stop. `aside`: whether what is computed is computed in a thread."""

    def __init__(self, *, aside: bool = True) -> None:
        self.signal: int | None = None
        self._open = False
        self._aside = aside
        self._thread: Aside | None = None

    @contextmanager
    def handled(self) -> Iterator["Stop"]:
        """Inside the block the signals come here; a signal that was ignored before (nohup) stays so."""
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # the only one that may, and that signals reach
            for name in SIGNALS:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, self._on_signal)
            if self._aside:
                self._thread = Aside()
        try:
            yield self
        finally:
            if self._thread is not None:
                self._thread.close()
                self._thread = None
            for number, handler in before.items():
                signal.signal(number, handler)

    def compute(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises; a signal that comes meanwhile is raised on the spot, and its work is lost."""
        self._open = True
        try:
            self.check()
            return work() if self._thread is None else self._thread.compute(work)
        finally:
            self._open = False

    def check(self) -> None:
        """Raise Interrupted when a signal has come."""
        if self.signal is not None:
            raise self.interrupted()

    def interrupted(self) -> Interrupted:
        """What to raise."""
        number = self.signal or signal.SIGINT
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        return Interrupted(_("Stopped by {signal}.").format(signal=name), signal_number=number)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        again, self.signal = self.signal is not None, number
        if again:
            with suppress(ValueError):
                signal.signal(number, signal.SIG_DFL)  # a third one meets no Python at all
        if again or self._open:
            raise self.interrupted()


class Aside:
    """A thread that computes what it is given, one thing after another, while whoever asks waits interruptibly.

    One for all steps: the products' own threads are started once for each thread that asks for products.
    """

    def __init__(self) -> None:
        self._asked: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._found: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._busy = False
        self._thread = threading.Thread(target=self._run, name="computing", daemon=True)
        self._thread.start()

    def compute(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises, in the other thread."""
        self._busy = True
        self._asked.put(work)
        value, error = next_of(self._found)  # a signal's handler may raise here
        self._busy = False
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame, and through it tensors
        found: T = value
        return found

    def close(self) -> None:
        """Let the thread end: at once, or at the next line of Python where it is in the middle of something."""
        self._asked.put(None)
        if not self._busy:
            self._thread.join()
        else:
            number = ctypes.c_ulong(self._thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(number, ctypes.py_object(_Left))

    def _run(self) -> None:
        with suppress(_Left):
            while (work := self._asked.get()) is not None:
                answer: tuple[Any, BaseException | None]
                try:
                    answer = work(), None
                except _Left:
                    return
                except BaseException as error:  # noqa: BLE001 - whoever waits raises it
                    answer = None, error
                self._found.put(answer)
                del work, answer  # the thread, waiting, shall hold no tensors


class _Left(BaseException):
    """Nobody waits for what is computed any more."""
