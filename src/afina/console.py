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
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from afina.errors import AfinaError
from afina.language import _

PLAIN_EVERY_S = 10.0
"""Seconds between two lines of progress where the output is no terminal."""
RATE_WINDOW_S = 30.0
"""Remaining time is judged by the pace of these last seconds, so that a slow start does not haunt the estimate."""
CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Control characters are not printed: a model, a file or its name could move the cursor or rename the window."""


WIDE = 1000
"""Columns of what is no terminal."""


class Console:
    """What is printed and how: for people (default) or as JSON lines."""

    def __init__(self) -> None:
        self.json = False
        self.debug = False

    @property
    def screen(self) -> Screen:
        """Where people read. Made anew so that a redirected stdout is respected. Text is never taken for markup. A
        file or a pipe has no width, so that no name is broken in a table there."""
        live = sys.stdout.isatty()
        width = None if live else WIDE
        return Screen(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=not live, width=width)

    @property
    def side(self) -> Screen:
        """Where people read what is no result: stderr."""
        return Screen(stderr=True, highlight=False, markup=False, emoji=False)

    def line(self, text: str = "", style: str = "") -> None:
        """One line of plain text for people."""
        if not self.json:
            self.screen.print(printable(text), style=style)

    def heading(self, text: str) -> None:
        """A line that begins a part."""
        self.line(text, style="bold")

    def spans(self, parts: Sequence[tuple[str, str, bool]]) -> None:
        """Texts end to end, each in its style; where there are no colours, marked ones stand in ⟦ ⟧."""
        if not self.json:
            screen = self.screen
            text = Text()
            for part, style, marked in parts:
                plain = printable(part)
                text.append(f"⟦{plain}⟧" if marked and not screen.is_terminal else plain, style=style)
            screen.print(text)

    def stream(self, piece: str) -> None:
        """A piece of text as it arrives, with no line end."""
        if not self.json:
            sys.stdout.write(printable(piece))
            sys.stdout.flush()

    def ask(self, prompt: str) -> str:
        """One line typed by the user. Raises EOFError at the end of input."""
        return input(prompt)

    def warn(self, text: str) -> None:
        """Something the user should know, though the work goes on."""
        if self.json:
            self.event("warning", message=text)
        else:
            self.side.print(Text.assemble(("!", "yellow"), " ", printable(text)), soft_wrap=True)

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "", *, left: int = 1
    ) -> None:
        """Rows under columns; columns after the first `left` are aligned to the right."""
        if self.json:
            return
        table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, title_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index < left else "right", overflow="fold")
        for row in rows:
            table.add_row(*(printable(str(cell)) for cell in row))
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
        said = f"{error.where}: {error.message}" if error.where else error.message
        self.side.print(Text.assemble((_("Error"), "bold red"), " ", printable(said)), soft_wrap=True)
        if error.hint:
            self.side.print(f"  {printable(error.hint)}", soft_wrap=True)

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
        self._text = ""
        self._printed = time.monotonic()
        self._marks: deque[tuple[float, float]] = deque([(self._printed, 0.0)])
        self._live: Live | None = None
        if not console.json and sys.stdout.isatty():
            self._bars = Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}", markup=False),
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
        return max(self._total - self._done, 0) * (now - then) / (self._done - before)

    def advance(self, work: float, text: str = "", /, **facts: Any) -> None:
        """`work` units were done; `text`, or the last one given, is shown beside the bar; `facts` go to machines."""
        now = time.monotonic()
        if self._done == 0:
            self._marks = deque([(now, work)])  # the first unit pays for warm-up: it says nothing about the rest
        self._done += work
        self._marks.append((now, self._done))
        while len(self._marks) > 2 and now - self._marks[0][0] > RATE_WINDOW_S:
            self._marks.popleft()
        left = self.remaining_s
        self._text = shown = text or self._text
        if left is not None and self._done < self._total:
            said = _("{time} left").format(time=duration(left))
            shown = f"{shown} · {said}" if shown else said
        self._console.event(
            "progress", label=self._label, share=round(min(self._done / self._total, 1), 4), remaining_s=left, **facts
        )
        if self._live:
            self._bars.update(self._task, completed=self._done, text=shown)
        elif not self._console.json and (now - self._printed >= PLAIN_EVERY_S or self._done >= self._total):
            self._printed = now
            self._console.line(f"{self._label} {min(self._done / self._total, 1):4.0%}  {shown}".rstrip())

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._live:
            self._live.stop()


def printable(text: str) -> str:
    """The text without control characters; line ends and tabs stay."""
    return text.translate(CONTROLS)


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
