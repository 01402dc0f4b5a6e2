"""How things are spread, drawn: tokens of samples and of answers, and what people thought. In the manner of plot.py."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from afina.evaluate.plot import BAR, PALETTE, WIDE, Format, as_bytes, colour_of, name_of, styled
from afina.language import _

BINS = 40
RATED = ("warm", "warm", "base", "tuned", "tuned")
"""Colours of 1 to 5; those of 2 and 4 are paler."""
PALE = {2: 0.45, 4: 0.5}


def lengths(tokens: Any, learnt: Any, context: int, *, fmt: Format = "png", width: float = WIDE) -> bytes:
    """How many samples have how many tokens, and how many of these are learnt; a line where the context ends.

    `tokens`, `learnt`: (samples,) counts.
    """
    with styled():
        figure = Figure(figsize=(width, 2.6), layout="constrained")
        axes = figure.subplots()
        end = max(int(max(tokens)), 1)
        edges = [end * place / 60 for place in range(61)]
        for values, colour, name in (
            (tokens, PALETTE["base"], _("tokens")),
            (learnt, PALETTE["tuned"], _("learnt tokens")),
        ):
            axes.hist(values, bins=edges, color=colour, alpha=0.75, label=name)
        if context <= 1.5 * end:
            axes.axvline(context, color=PALETTE["warm"], linewidth=1.2, label=f"model.max_length ({context})")
        axes.set_xlabel(_("Tokens of a sample"))
        axes.set_ylabel(_("Samples"))
        axes.grid(axis="y")
        axes.legend(loc="upper right")
        return as_bytes(figure, fmt)


def answer_lengths(tokens: Mapping[str, Sequence[int]], *, fmt: Format = "png", width: float = WIDE) -> bytes:
    """How many tokens everyone's answers have, a row each: the higher, the more answers; a stroke at the median.

    tokens: of each system, one count an answer. All rows share one axis, which ends at the longest answer.
    """
    with styled():
        figure = Figure(figsize=(width, 0.6 + 0.42 * max(1, len(tokens))), layout="constrained")
        axes = figure.subplots()
        longest = max((max(counts) for counts in tokens.values() if counts), default=1)
        step = max(1, -(-(longest + 1) // BINS))
        for row, (name, counts) in enumerate(tokens.items()):
            _draw_ridge(axes, row, counts, step, colour_of(name))
        axes.set_yticks([row - 0.4 for row in range(len(tokens))], [name_of(name) for name in tokens])
        axes.set_ylim(len(tokens) - 0.9, -0.95)
        axes.set_xlim(0, longest + step)
        axes.xaxis.set_major_locator(MaxNLocator(5 if width < WIDE else 8, integer=True))
        axes.set_xlabel(_("Tokens of an answer (stroke: median)"))
        axes.grid(axis="x")
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        return as_bytes(figure, fmt)


def _draw_ridge(axes: Axes, row: int, counts: Sequence[int], step: int, colour: str) -> None:
    """A histogram standing on its row, as high as the row allows."""
    if not counts:
        return
    heights = [0] * (max(counts) // step + 1)
    for count in counts:
        heights[count // step] += 1
    top = max(heights)
    for place, height in enumerate(heights):
        if height:
            axes.bar(place * step, -0.8 * height / top, width=step, bottom=row, align="edge", color=colour, linewidth=0)
    middle = sorted(counts)[len(counts) // 2]
    axes.plot([middle + step / 2] * 2, [row + 0.06, row - 0.86], color=PALETTE["ink"], linewidth=1.3)


def ratings(
    scores: Mapping[str, Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
    *,
    fmt: Format = "png",
    width: float = WIDE,
) -> bytes:
    """What people said: of each system the shares of 1 to 5 and the mean with its 95% interval; of each pair who won.

    scores: system to `counts` (of 1 to 5), `mean` and `interval`. pairs: `left`, `right`, `left_preferred`,
    `right_preferred`, `ties`.
    """
    with styled():
        rows = len(scores) + len(pairs)
        figure = Figure(figsize=(width, 0.7 + 0.78 * BAR * 1.25 * max(1, rows)), layout="constrained")
        axes = figure.subplots()
        for row, (name, one) in enumerate(scores.items()):
            parts = [
                (count, RATED[value - 1], 1 - PALE.get(value, 0.0), str(value))
                for value, count in enumerate(one["counts"], 1)
            ]
            low, high = one["interval"]
            _draw_parts(axes, row, name_of(name), parts, f"{one['mean']:.2f}  ({low:.2f}–{high:.2f})")
        for row, pair in enumerate(pairs, len(scores)):
            left, right = name_of(pair["left"]), name_of(pair["right"])
            shares = [
                (pair["left_preferred"], "warm", 1.0, left),
                (pair["ties"], "base", 1.0, "="),
                (pair["right_preferred"], "tuned", 1.0, right),
            ]
            won = f"{pair['left_preferred']:.0f} : {pair['right_preferred']:.0f}"
            _draw_parts(axes, row, "A/B", shares, won)
        axes.set_xlim(0, 1)
        axes.set_ylim(rows - 0.4, -0.6)
        axes.set_yticks([])
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.set_xlabel(_("Share of ratings from 1 (useless) to 5 (excellent); right: mean and 95% interval"))
        return as_bytes(figure, fmt)


def _draw_parts(axes: Axes, row: int, name: str, parts: Sequence[tuple[float, str, float, str]], told: str) -> None:
    """One bar of several parts, each (count, colour, strength, what it is)."""
    total, start = sum(count for count, *_rest in parts) or 1, 0.0
    axes.text(-0.015, row, name, ha="right", va="center", size=8.5, color=PALETTE["muted"])
    axes.text(1.02, row, told, ha="left", va="center", size=8.5)
    for count, colour, strength, what in parts:
        share = count / total
        axes.barh(row, share, left=start, height=0.62, color=PALETTE[colour], alpha=strength, linewidth=0)
        if share > 0.04 + 0.012 * len(what):
            axes.text(start + share / 2, row, what, ha="center", va="center", size=8, color=PALETTE["paper"])
        start += share
