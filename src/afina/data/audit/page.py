"""The findings of an audit as one page: no script, no network, every value of a file escaped."""

from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from afina.console import duration, printable, size
from afina.data.audit.finding import Report
from afina.data.audit.kind import Severity
from afina.data.audit.kinds import kinds
from afina.data.problem import place
from afina.language import _, chosen

TEMPLATE = Path(__file__).with_name("page.html.jinja")
BINS, WIDTH, HEIGHT = 48, 720, 150
CUT, TAIL = 300, 60


def page(report: Report, source: str) -> str:
    """The page, whole."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.globals["_"] = _
    environment.filters.update(
        count=lambda number: f"{number:,}",
        bytes=size,
        time=duration,
        cut=lambda text: printable(text)[:CUT] + ("…" if len(text) > CUT else ""),
        tail=lambda text: ("…" if len(str(text)) > TAIL else "") + printable(str(text))[-TAIL:],
    )
    lengths, marks = _histogram(report.facts.get("lengths", np.zeros(0)))
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        report=report,
        source=source,
        language=chosen(),
        warnings=report.of(Severity.WARNING),
        kinds=_kinds(report),
        lengths=lengths,
        marks=marks,
        shares=[
            (title, _shares(report.facts[key]))
            for title, key in ((_("Language of answers"), "languages"), (_("Classes of answers"), "classes"))
            if len(report.facts.get(key, ())) > (key == "languages")
        ],
        files=[
            {
                "name": str(file),
                "about": " · ".join(str(facts[key]) for key in ("form", "dialect", "encoding") if facts[key]),
                "rows": facts["rows"],
                "kept": facts["rows"] - facts["rejected"],
                "rejected": facts["rejected"],
            }
            for file, facts in report.files.items()
        ],
    )


def _kinds(report: Report) -> list[dict[str, Any]]:
    table = kinds()
    rank = list(Severity).index
    order = sorted(report.counts, key=lambda kind: (rank(table[kind].severity), -report.counts[kind], kind))
    most = max(report.counts.values(), default=1)
    return [
        {
            **table[kind]._asdict(),
            "severity": table[kind].severity.value,
            "count": report.counts[kind],
            "share": round(100 * report.counts[kind] / most, 1),
            "examples": [
                {"place": place(one.file.name, one.line, one.row), "detail": one.detail}
                for one in report.examples[kind]
            ],
        }
        for kind in order
    ]


def _shares(counts: dict[str, int]) -> list[dict[str, Any]]:
    most = max(counts.values())
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return [{"name": name or "–", "count": count, "share": round(100 * count / most, 1)} for name, count in ordered]


def _histogram(lengths: np.ndarray) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Bars and labels of a histogram over 99.5% of the values; the rest stands in the last bar."""
    if lengths.size < 2 or lengths.max() == lengths.min():
        return [], []
    top = max(float(np.quantile(lengths, 0.995)), float(lengths.min()) + 1)
    counts, edges = np.histogram(np.minimum(lengths, top), BINS, range=(0, top))
    step = WIDTH / BINS
    bars = [
        {
            "x": round(at * step + 1, 1),
            "width": round(step - 2, 1),
            "height": round(HEIGHT * count / counts.max(), 1),
            "low": round(edges[at]),
            "high": round(edges[at + 1]),
            "count": int(count),
        }
        for at, count in enumerate(counts)
    ]
    anchors = ("start", "middle", "middle", "middle", "end")
    marks = [
        {
            "x": round(WIDTH * at / 4),
            "anchor": anchor,
            "text": _("{count} characters").format(count=round(top * at / 4)),
        }
        for at, anchor in enumerate(anchors)
    ]
    return bars, marks
