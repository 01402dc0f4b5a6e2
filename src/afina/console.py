"""The only file that prints. Each thing shown to a person has a twin for machines: one JSON object per line (`--json`).

On a terminal progress is a live bar; elsewhere it is plain lines, so that logs stay readable. Knows nothing of what
the numbers mean.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console as Screen
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn
from rich.progress import Progress as Bars
from rich.progress import TextColumn
from rich.table import Table

from afina.errors import AfinaError
from afina.language import _

PLAIN_EVERY_S = 10.0
"""Seconds between two lines of progress where the output is no terminal."""
RATE_WINDOW_S = 30.0
"""Remaining time is judged by the pace of these last seconds, so that a slow start does not haunt the estimate."""


class Console:
    """What is printed and how: for people (default) or as JSON lines."""

    def __init__(self) -> None:
        self.json = False
        self.debug = False

    @property
    def screen(self) -> Screen:
        """Where people read. Made anew so that a redirected stdout is respected."""
        return Screen(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())

    def line(self, text: str = "", style: str = "") -> None:
        """One line of plain text for people."""
        if not self.json:
            self.screen.print(escape(text), style=style)

    def heading(self, text: str) -> None:
        """A line that begins a part."""
        self.line(text, style="bold")

    def stream(self, piece: str) -> None:
        """A piece of text as it arrives, with no line end."""
        if not self.json:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def ask(self, prompt: str) -> str:
        """One line typed by the user. Raises EOFError at the end of input."""
        return input(prompt)

    def warn(self, text: str) -> None:
        """Something the user should know, though the work goes on."""
        if self.json:
            self.event("warning", message=text)
        else:
            Screen(stderr=True, highlight=False).print(f"[yellow]![/yellow] {escape(text)}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
        """Rows under columns; columns after the first are aligned to the right."""
        if self.json:
            return
        table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, title_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*(escape(str(cell)) for cell in row))
        self.screen.print(table)

    def event(self, name: str, /, **facts: Any) -> None:
        """The twin for machines; printed only with `--json`."""
        if self.json:
            sys.stdout.write(json.dumps({"event": name, **facts}, ensure_ascii=False, default=str) + "\n")
            sys.stdout.flush()

    def error(self, error: AfinaError) -> None:
        """A failure the user can act on."""
        if self.json:
            self.event(
                "error",
                message=error.message,
                hint=error.hint,
                file=error.file,
                line=error.line,
                column=error.column,
                exit_status=error.exit_status,
            )
            return
        screen = Screen(stderr=True, highlight=False)
        where = f"{escape(error.where)}: " if error.where else ""
        screen.print(f"[bold red]{escape(_('Error'))}[/bold red] {where}{escape(error.message)}", soft_wrap=True)
        if error.hint:
            screen.print(f"  {escape(error.hint)}", soft_wrap=True)

    @contextmanager
    def progress(self, label: str, total: float) -> Iterator["Progress"]:
        """Follow `total` units of work; the yielded object is told what was done."""
        progress = Progress(self, label, total)
        try:
            yield progress
        finally:
            progress.close()


class Progress:
    """Work done so far, its pace, and an honest remaining time."""

    def __init__(self, console: Console, label: str, total: float) -> None:
        self._console = console
        self._label = label
        self._total = max(total, 1e-9)
        self._done = 0.0
        self._started = time.monotonic()
        self._printed = self._started
        self._marks: deque[tuple[float, float]] = deque([(self._started, 0.0)])
        self._live: Live | None = None
        if not console.json and sys.stdout.isatty():
            self._bars = Bars(
                TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}")
            )
            self._task = self._bars.add_task(label, total=self._total, text="")
            self._live = Live(self._bars, console=console.screen, refresh_per_second=8, transient=True)
            self._live.start()

    @property
    def remaining_s(self) -> float | None:
        """Seconds left at the pace of the last window; None before there is a pace to judge by."""
        (then, before), now = self._marks[0], time.monotonic()
        if self._done <= before or now - then < 0.2:
            return None
        return (self._total - self._done) * (now - then) / (self._done - before)

    def advance(self, work: float, text: str = "", /, **facts: Any) -> None:
        """`work` units were done; `text` is shown beside the bar, `facts` go to machines."""
        now = time.monotonic()
        if self._done == 0:
            self._marks = deque([(now, work)])  # the first unit pays for warm-up: it says nothing about the rest
        self._done += work
        self._marks.append((now, self._done))
        while len(self._marks) > 2 and now - self._marks[0][0] > RATE_WINDOW_S:
            self._marks.popleft()
        left = self.remaining_s
        shown = f"{text} · {_('{time} left').format(time=duration(left))}" if left is not None and text else text
        self._console.event(
            "progress", label=self._label, share=round(self._done / self._total, 4), remaining_s=left, **facts
        )
        if self._live:
            self._bars.update(self._task, completed=self._done, text=shown)
        elif not self._console.json and (now - self._printed >= PLAIN_EVERY_S or self._done >= self._total):
            self._printed = now
            self._console.line(f"{self._label} {self._done / self._total:4.0%}  {shown}")

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._live:
            self._live.stop()


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.4 s, 37 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def size(count: float) -> str:
    """Bytes as people say them, in powers of 1024: 512 B, 3.4 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return ""


console = Console()
"""The one console of this process."""
