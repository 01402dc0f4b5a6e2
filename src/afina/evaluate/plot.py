"""The figures of a run as bytes: loss curve, accuracy bars, confusion matrix. With spread.py the door to matplotlib.

No pyplot and no figure outlives its call; rcParams, which matplotlib keeps for the whole process, are ours only inside
a lock and are put back. The same numbers give the same bytes (on the same versions), whatever matplotlibrc says. Knows
nothing of files or pages.

Colours: blue, orange and grey differ in lightness too, so that they stay apart for the colour-blind and in print
(Wong, "Points of view: Color blindness", Nature Methods 8, 2011). SVG keeps its letters as text.
"""

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from afina.evaluate.metrics import NO_SHARES
from afina.language import _

Format = Literal["png", "svg"]

PALETTE = {
    "ink": "#1c2126",
    "muted": "#5f6873",
    "line": "#d5dae0",
    "paper": "#ffffff",
    "base": "#98a1ab",
    "tuned": "#0072b2",
    "warm": "#c8560a",
    "made": "#5aa0cc",
}
"""Roles and their colours on white; the report shows the same roles on dark paper."""

SERIES = ("tuned", "warm", "made", "muted", "base")
"""The colours of several lines of like rank."""

BAR = 0.38
"""From one bar to the next, where 1 is 0.78 inches."""
WIDE, NARROW = 7.5, 3.75
"""Inches: the width of a page, and of a phone."""
DPI = 160
SMOOTH_SHARE = 50
"""The smoothed curve averages over about one 50th of the steps to either side."""
DRAWN_POINTS = 1200
"""A curve with more points than this is thinned to the extremes of each stretch: the page stays small."""
LABEL_LETTERS = 24
NUMBERED_CELLS = 12
"""A confusion matrix of more labels shows only shades."""

_LOCK = Lock()
_OURS = ("backend", "interactive", "toolbar", "webagg", "tk.", "macosx", "date.epoch", "figure.hooks")
_STYLE = {
    **{key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith(_OURS)},
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.parse_math": False,
    "text.color": PALETTE["ink"],
    "axes.edgecolor": PALETTE["line"],
    "axes.labelcolor": PALETTE["muted"],
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": PALETTE["line"],
    "grid.linewidth": 0.6,
    "xtick.color": PALETTE["line"],
    "ytick.color": PALETTE["line"],
    "xtick.labelcolor": PALETTE["muted"],
    "ytick.labelcolor": PALETTE["muted"],
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "afina",
}


def loss_curve(metrics: Sequence[Mapping[str, Any]], *, fmt: Format = "png", width: float = WIDE) -> bytes:
    """Loss against optimiser step, raw (faint) and smoothed, with the validation points; below it the learning rate.

    Between them, where tasks were asked while it trained, their figures that are shares, with 95% intervals.
    `metrics` are the records of metrics.jsonl. Values that are no finite numbers leave a gap. `width` is in inches.
    """
    asked = [
        record for record in metrics if record.get("kind") == "evaluation" and record.get("measure") not in NO_SHARES
    ]
    with styled():
        heights = [4, 2.4, 1] if asked else [4, 1]
        figure = Figure(figsize=(width, 0.74 * sum(heights)), layout="constrained")
        panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        _draw_loss(panels[0], metrics, wide=width >= WIDE)
        if asked:
            _draw_asked(panels[1], asked)
        _draw_rate(panels[-1], metrics)
        figure.align_ylabels(panels)
        return as_bytes(figure, fmt)


def accuracy_bars(tasks: Sequence[Mapping[str, Any]], *, fmt: Format = "png", width: float = WIDE) -> bytes:
    """Everyone's main figure with its 95% interval, a group of bars a task.

    `tasks` are those of evaluation.json: each a `name` and `systems` of `value` (or `accuracy`) and `interval`, shares
    of 1.
    """
    with styled():
        starts = [0.0]
        for task in tasks:
            starts.append(starts[-1] + 0.24 + BAR * max(1, len(task.get("systems", {}))))
        end = starts[-1] or 1.0
        figure = Figure(figsize=(width, 0.55 + 0.78 * end), layout="constrained")
        axes = figure.subplots()
        for start, task in zip(starts, tasks, strict=False):
            _draw_group(axes, start, task)
        axes.set_xlim(0, 1)
        axes.set_ylim(end - 0.28, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(4 if width < WIDE else 5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _place: f"{share:.0%}"))
        axes.set_xlabel(_("Right answers (share of samples; whiskers: 95% interval)"))
        axes.grid(axis="x")
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        return as_bytes(figure, fmt)


def confusion_matrix(labels: Sequence[str], counts: Sequence[Sequence[int]], *, fmt: Format = "png") -> bytes:
    """A heat map: rows what was expected, columns what was answered, shaded by the share of its row."""
    with styled():
        names = [_short(label) for label in labels]
        longest = max((len(name) for name in names), default=1)
        flat = len(names) <= 4 and longest <= 12
        cell = min(0.9, max(0.45, 0.085 * longest)) if flat else max(0.19, min(0.42, 5 / len(names)))
        side, margin = cell * len(names), 0.5 + 0.085 * longest
        figure = Figure(figsize=(side + margin, side + (0.6 if flat else margin)), layout="constrained")
        axes = figure.subplots()
        for row, line in enumerate(counts):
            _draw_row(axes, row, line, numbered=len(names) <= NUMBERED_CELLS)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.set_xticks(range(len(names)), names, rotation=0 if flat else 90)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0, labelcolor=PALETTE["ink"])
        axes.spines[:].set_visible(False)
        axes.set_xlabel(_("Answered"))
        axes.set_ylabel(_("Expected"))
        return as_bytes(figure, fmt)


def smoothed(values: Sequence[float]) -> list[float]:
    """The curve averaged to both sides with exponentially falling weights, so that it does not lag behind a fall.

    Each mean is divided by the weight it really saw, so that neither end is drawn towards zero. Values that are not
    finite stay gaps and touch nothing.
    """
    keep = 1 - 1 / max(1.0, len(values) / SMOOTH_SHARE)
    seen = [float(math.isfinite(value)) for value in values]
    known = [value if there else 0.0 for value, there in zip(values, seen, strict=True)]
    sums, weights = _both_sides(known, keep), _both_sides(seen, keep)
    return [total / weight if there else math.nan for total, weight, there in zip(sums, weights, seen, strict=True)]


def _both_sides(values: Sequence[float], keep: float) -> list[float]:
    """For each place the sum of all values, each multiplied by `keep` to the power of its distance. In linear time."""
    before: list[float] = []
    after: list[float] = []
    for sums, line in ((before, values), (after, values[::-1])):
        total = 0.0
        for value in line:
            total = total * keep + value
            sums.append(total)
    return [left + right - value for left, right, value in zip(before, after[::-1], values, strict=True)]


def _draw_loss(axes: Axes, metrics: Sequence[Mapping[str, Any]], *, wide: bool) -> None:
    steps, losses = _series(metrics, "step", "loss")
    curve = smoothed(losses)
    blue = PALETTE["tuned"]
    if curve != losses and any(map(math.isfinite, losses)):
        axes.plot(*_thinned(steps, losses), color=blue, alpha=0.4, linewidth=0.9, label=_("training, each step"))
        axes.plot(*_thinned(steps, curve), color=blue, linewidth=2.0, label=_("training, smoothed"))
    elif any(map(math.isfinite, losses)):
        axes.plot(steps, losses, color=blue, linewidth=1.6, marker="o", markersize=3, label=_("training, each step"))
    places, held_out = _series(metrics, "validation", "loss")
    if any(map(math.isfinite, held_out)):
        axes.plot(places, held_out, color=PALETTE["warm"], linewidth=1, linestyle=(0, (3, 2)), marker="D", markersize=5)
        axes.lines[-1].set_label(_("validation"))
    axes.set_ylabel(_("Loss (nats per token)"))
    axes.grid(axis="y")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    _from_zero(axes, [*losses, *held_out])
    if not axes.lines:
        axes.set_yticks([])
        axes.text(0.5, 0.5, _("No loss was recorded."), transform=axes.transAxes, ha="center", color=PALETTE["muted"])
        return
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=3 if wide else 2,
        borderaxespad=0.2,
        columnspacing=1.4,
        handlelength=1.5,
        borderpad=0,
    )


def _draw_asked(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    """A line a task, with the interval of each point."""
    names = list(dict.fromkeys(str(record.get("task", "")) for record in records))
    for number, name in enumerate(names):
        mine = [record for record in records if str(record.get("task", "")) == name]
        steps, values = _series(mine, "evaluation", "value")
        colour = PALETTE[SERIES[number % len(SERIES)]]
        for step, record in zip(steps, mine, strict=True):
            low, high = (_finite(end) for end in record.get("interval") or (None, None))
            axes.plot([step, step], [low, high], color=colour, linewidth=0.8, alpha=0.6)
        axes.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=_short(name))
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _place: f"{share:.0%}"))
    axes.set_ylabel(_("Tasks"))
    axes.grid(axis="y")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.2, handlelength=1.5, borderpad=0)


def _from_zero(axes: Axes, values: Sequence[float]) -> None:
    """Begin the axis at zero where the values come near it: a small rest of loss then looks small."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and 0 <= min(finite) < max(finite) / 2:
        axes.set_ylim(bottom=0)


def _draw_rate(axes: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    steps, rates = _series(metrics, "step", "learning_rate")
    peak = max(filter(math.isfinite, rates), default=0.0)
    axes.plot(*_thinned(steps, rates), color=PALETTE["muted"], linewidth=1.2)
    axes.set_ylim(0, peak * 1.15 or 1)
    axes.set_yticks([0, peak] if peak else [0])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _place: f"{rate:.2g}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel(_("Optimiser step"))
    axes.set_ylabel(_("Learning\nrate"))
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)


def _draw_group(axes: Axes, start: float, task: Mapping[str, Any]) -> None:
    """A bar a system, the task's name above them, the figures in a column of their own at the right."""
    axes.text(0, start - 0.3, _short(task.get("name", ""), 40), ha="left", va="center", weight="bold")
    for number, (key, figures) in enumerate(task.get("systems", {}).items()):
        place, shown = start - 0.02 + BAR * number, name_of(key)
        value = figures.get("value")
        share = _finite(figures.get("accuracy") if value is None else value)
        if not math.isfinite(share):
            continue
        axes.barh(place, share, height=0.26, color=colour_of(key))
        axes.text(-0.015, place, shown, ha="right", va="center", size=8.5, color=PALETTE["muted"])
        axes.text(1.02, place, f"{share:.1%}", ha="left", va="center", weight="bold" if key == "tuned" else "normal")
        low, high = (_finite(end) for end in figures.get("interval") or (None, None))
        if math.isfinite(low) and math.isfinite(high):
            _draw_whisker(axes, place, low, high)
    axes.set_yticks([])


def _draw_whisker(axes: Axes, place: float, low: float, high: float) -> None:
    """An interval, on a halo of paper so that it is seen on a bar of any colour."""
    x, y = [low, low, math.nan, low, high, math.nan, high, high], [place - 0.07, place + 0.07, math.nan]
    for colour, width in (("paper", 3.4), ("ink", 1.3)):
        axes.plot(x, [*y, place, place, math.nan, *y[:2]], color=PALETTE[colour], linewidth=width, clip_on=False)


def _draw_row(axes: Axes, row: int, line: Sequence[int], *, numbered: bool) -> None:
    total = sum(line)
    for column, count in enumerate(line):
        share = count / total if total else 0.0
        axes.add_patch(
            Rectangle(
                (column - 0.47, row - 0.47), 0.94, 0.94, color=PALETTE["tuned"], alpha=0.06 + 0.94 * share, linewidth=0
            )
        )
        if numbered:
            colour = PALETTE["paper" if share > 0.5 else "ink" if count else "muted"]
            axes.text(column, row, str(count), ha="center", va="center", color=colour, size=9)


def _series(metrics: Sequence[Mapping[str, Any]], kind: str, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one kind of record; a value that is no finite number becomes a gap."""
    records = [record for record in metrics if record.get("kind") == kind]
    steps = [_finite(record.get("step")) for record in records]
    places = [step if math.isfinite(step) else float(index + 1) for index, step in enumerate(steps)]
    return places, [_finite(record.get(key)) for record in records]


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most DRAWN_POINTS points: of each stretch its lowest and its highest, in their order."""
    if len(x) <= DRAWN_POINTS:
        return list(x), list(y)
    stretch = math.ceil(2 * len(x) / DRAWN_POINTS)
    kept: list[int] = []
    for start in range(0, len(x), stretch):
        places = range(start, min(start + stretch, len(x)))
        finite = [place for place in places if math.isfinite(y[place])] or [start]
        kept += sorted({min(finite, key=y.__getitem__), max(finite, key=y.__getitem__)})
    return [x[place] for place in kept], [y[place] for place in kept]


def name_of(system: object) -> str:
    """How a system is called beside its row."""
    return {"base": _("base"), "tuned": _("tuned")}.get(str(system)) or _short(system, 14)


def colour_of(system: str) -> str:
    """A system's colour: what was made of the tuned model is paler."""
    return PALETTE[system if system in ("base", "tuned") else "made"]


def _finite(value: object) -> float:
    """The value as a float, or NaN where it is none or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _short(label: object, letters: int = LABEL_LETTERS) -> str:
    """A label on one line, without characters that no font can draw."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(label)).strip()
    return text if len(text) <= letters else text[: letters - 1] + "…"


@contextmanager
def styled() -> Iterator[None]:
    """Inside the block figures are drawn in our style, one thread at a time."""
    with _LOCK, warnings.catch_warnings(), matplotlib.rc_context(_STYLE):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def as_bytes(figure: Figure, fmt: Format) -> bytes:
    """The figure as a file without date or program's name."""
    buffer = io.BytesIO()
    if fmt == "svg":
        figure.patch.set_visible(False)
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    else:
        figure.set_dpi(DPI)
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
