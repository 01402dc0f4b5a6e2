"""Work in a process of its own, begun while this one still imports what it needs: with another core it takes no time.

The process is told by lines of JSON what to do, and says when each is done; what it made lies on disk. Nothing hangs on
it: where it could not, whoever asked does the same here, and so tells the user whatever is wrong. It ends when we do,
however that is.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from queue import SimpleQueue
from select import select
from types import TracebackType
from typing import Any, Self

from afina.beside import LISTEN_S

_BEGIN = "import sys; sys.path[:] = sys.argv[2:]; from afina.apart import serve; serve(sys.argv[1])"
_DONE, _NOT_DONE = b"+", b"-"


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Apart:
    """A process that calls `work`, "module:function", each time it is asked; a context that ends it.

    The function returns whether it did it, or raises. `needed`: modules to import beforehand.
    """

    def __init__(self, work: str, *needed: str) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        with suppress(OSError):  # no process is to be had
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-X", "utf8", "-c", _BEGIN, " ".join([work, *needed]), *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for us
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, **asked: Any) -> Self:
        """Let it call its function with these, once it has done what it was asked before."""
        if self._process is not None and self._process.stdin is not None:
            left = memoryview(json.dumps(asked).encode() + b"\n")
            with suppress(OSError):  # it is gone, as done() will see
                while left:
                    left = left[self._process.stdin.write(left) :]
        return self

    def done(self) -> bool:
        """Wait for what was begun; whether it was done. Signals come through."""
        if self._process is None or self._process.stdout is None:
            return False
        pipe = self._process.stdout.fileno()
        while not select([pipe], [], [], LISTEN_S)[0]:
            pass
        return os.read(pipe, 1) == _DONE

    def close(self) -> None:
        """End the process, whatever it is doing."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def serve(task: str) -> None:
    """The process from inside: do what is asked until one thing fails, or nobody is there to ask."""
    work, *needed = task.split()
    asked: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    module, _colon, name = work.partition(":")
    try:
        function: Callable[..., bool] = getattr(import_module(module), name)
        for one in needed:
            import_module(one)
        while True:
            done = function(**json.loads(asked.get()))
            os.write(answers, _DONE if done else _NOT_DONE)
    finally:  # at once: the thread is not to be waited for
        os._exit(1)


def _listen(asked: "SimpleQueue[bytes]") -> None:
    """Pass on what is asked; at its end there is nobody left to work for."""
    with open(0, "rb") as questions:
        for line in questions:
            asked.put(line)
    os._exit(1)
