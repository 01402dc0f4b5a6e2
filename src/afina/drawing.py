"""What training leaves to be looked at, the curve of its loss and the report, drawn by a process of its own.

Both need matplotlib, a second to import: the process does that while the model learns. What it cannot draw, is here.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from afina import durable
from afina.apart import Apart, cores
from afina.summary import metrics_of

Commands = Sequence[Sequence[str]]
CURVE = "loss.png"


class Drawing:
    """The process; a context that ends it."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._process: Apart | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def begin(self) -> None:
        """Let it import what it needs, where there is a core for it."""
        if cores() > 1:
            self._process = self._stack.enter_context(Apart(f"{__name__}:draw", "afina.evaluate.report"))

    def curve(self, place: Path) -> None:
        """The curve of the loss, a part of the run. Raises AfinaError."""
        self._draw(place, None)

    def report(self, place: Path, commands: Commands) -> None:
        """The report anew, `commands` being what may be wanted next. Raises AfinaError."""
        self._draw(place, commands)

    def _draw(self, place: Path, commands: Commands | None) -> None:
        if self._process is None or not self._process.begin(place=str(place), commands=commands).done():
            draw(str(place), commands)


def draw(place: str, commands: Commands | None) -> bool:
    """The report of a run, with these commands; where there are none, the curve of its loss."""
    from afina.evaluate.plot import loss_curve
    from afina.evaluate.report import draw as draw_report

    run = Path(place)
    if commands is None:
        durable.write_bytes(run / CURVE, loss_curve(metrics_of(run)))
    else:
        draw_report(run, [(command, what) for command, what in commands])
    return True
