"""Values of files that may be damaged, coerced and written out: what is no number is none, and never an exception."""

import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from afina.console import duration, size
from afina.evaluate.metrics import NO_SHARES

SHOWN_LETTERS = 1200
"""Of a prompt or an answer."""
NOTHING = "–"
"""Stands where there is no number."""

Facts = dict[str, Any]


def mapping(value: object) -> Facts:
    """The value where it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def sequence(value: object) -> list[Any]:
    """The value where it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def mappings(value: object) -> list[Facts]:
    """The objects of a list."""
    return [entry for entry in sequence(value) if isinstance(entry, dict)]


def text(value: object) -> str:
    """The value as text; empty where there is none."""
    return "" if value is None else str(value)


def number(value: object) -> float | None:
    """The value where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or math.isnan(value):
        return None
    return value


def date(value: object) -> str:
    """An ISO time to the minute, in the zone it was written in; what is none stays as it is."""
    try:
        made = datetime.fromisoformat(str(value))
    except ValueError:
        return str(value) if value else ""
    return f"{made:%Y-%m-%d %H:%M} {made.tzname() or ''}".strip()


def count(value: float | None) -> str:
    """A whole number with narrow spaces between thousands, which every language reads alike (SI Brochure, 5.4.4)."""
    return NOTHING if value is None else f"{round(value):,}".replace(",", "\u202f")


def percent(share: float | None) -> str:
    """A share as percent."""
    return NOTHING if share is None else f"{share:.1%}"


def points(share: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    return NOTHING if share is None else f"{100 * share:+.1f}".replace("-", "−")


def interval(ends: Sequence[float]) -> str:
    """An interval of shares as percent."""
    return f"{100 * ends[0]:.1f}–{100 * ends[1]:.1f}%"


def lasting(seconds: float | None) -> str:
    """Seconds as people say them."""
    return NOTHING if seconds is None else duration(seconds)


def bytes_said(count: float | None) -> str:
    """Bytes as people say them."""
    return NOTHING if count is None else size(count)


def decimal(value: float | None, digits: int = 3) -> str:
    """A number with so many digits after the point."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def chance(value: float | None) -> str:
    """A p-value: two digits, however small it is."""
    return NOTHING if value is None else f"{value:.2g}"


def cut(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= SHOWN_LETTERS else text[:SHOWN_LETTERS].rstrip() + " …"


def tail(path: object) -> str:
    """The end of a long path: a report that is sent to others need not tell where its maker's home lies."""
    parts = Path(str(path)).parts
    return str(path) if len(parts) <= 3 and not str(path).startswith("/") else "…/" + "/".join(parts[-2:])


def figure(value: float | None, measure: str = "accuracy") -> str:
    """A main figure as people say it: a share in percent, a perplexity or a score as a number."""
    if value is None:
        return NOTHING
    return f"{value:.2f}" if measure in NO_SHARES else f"{value:.1%}"


def span(ends: Sequence[float | None] | None, measure: str = "accuracy") -> str:
    """An interval of such figures."""
    if ends is None or len(ends) != 2 or ends[0] is None or ends[1] is None:
        return NOTHING
    return f"{ends[0]:.2f}–{ends[1]:.2f}" if measure in NO_SHARES else interval([ends[0], ends[1]])
