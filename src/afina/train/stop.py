"""Ctrl-C, SIGTERM and SIGHUP while training: the work is saved and closed, and a second one leaves at once.

Between steps a signal waits until the state is whole. Inside a forward or backward pass, which changes nothing that is
saved, it is raised on the spot, so that nobody waits for a long step.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from afina.errors import Interrupted
from afina.language import _

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Stop:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._open = False

    @contextmanager
    def handled(self) -> Iterator["Stop"]:
        """Inside the block the signals come here; a signal that was ignored before (nohup) stays so."""
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # the only one that may, and that signals reach
            for name in SIGNALS:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, self._on_signal)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Inside the block a signal is raised on the spot."""
        self._open = True
        try:
            self.check()
            yield
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
