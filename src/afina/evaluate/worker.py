"""Work in a process of its own, which may hang, crash or eat memory without harm: JSON lines in, JSON lines out.

The one door to `subprocess`. A process that does not answer in time is ended, and the next question starts a new one.
"""

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).parent
LINE_BYTES = 2**24


class Worker:
    """`script` lies beside this file. `seconds`: how long a question may take."""

    def __init__(self, script: str, seconds: float, *, isolated: bool = False) -> None:
        flags = ["-I", "-S"] if isolated else ["-E"]
        self._command = [sys.executable, *flags, str(HERE / script)]
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, question: Mapping[str, Any], seconds: float | None = None) -> dict[str, Any] | None:
        """The answer to one question; None when it did not come in time or the process died over it."""
        process = self._started()
        try:
            os.set_blocking(self._stdin.fileno(), True)
            self._stdin.write(json.dumps(question).encode() + b"\n")
            self._stdin.flush()
            line = self._line(process, time.monotonic() + (seconds or self._seconds))
            answer = json.loads(line) if line else None
        except (BrokenPipeError, ValueError):
            answer = None
        if not isinstance(answer, dict):
            self.close()
            return None
        return answer

    def close(self) -> None:
        """End the process."""
        process, self._process, self._rest = self._process, None, b""
        if process is not None:
            process.kill()
            process.communicate()

    @property
    def _stdin(self) -> Any:
        return self._process.stdin if self._process else None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"},
                cwd="/" if os.name == "posix" else None,
            )
        return self._process

    def _line(self, process: subprocess.Popen[bytes], until: float) -> bytes:
        """One line of the answer; nothing when time is up or the process ended."""
        if process.stdout is None:
            return b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if len(self._rest) > LINE_BYTES or not selector.select(max(0.0, until - time.monotonic())):
                    return b""
                piece = os.read(process.stdout.fileno(), 2**16)
                if not piece:
                    return b""
                self._rest += piece
        line, _newline, self._rest = self._rest.partition(b"\n")
        return line
