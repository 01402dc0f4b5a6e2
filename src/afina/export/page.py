"""What an export's certificate says, as facts for machines and as a page for people: no scripts, no network.

The figures are drawn here, as SVG in the page's own colours: they are dots on a scale and squares in a grid, for which
a library would be the longer way.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from afina.console import size
from afina.export.certificate import LIMITS, TOP
from afina.language import _, chosen
from afina.model.imatrix import SAMPLES

if TYPE_CHECKING:
    from afina.export.run import Export

TEMPLATE = Path(__file__).with_name("certificate.html.jinja")
FEWEST, MOST = -7, 1
"""Powers of ten of the scale of divergences, in nats."""
WIDTH, LEFT, ROW = 720, 170, 30
"""Of the figure, of what stands before its scale, and of a file's row, in its own units."""


def certificate_of(export: "Export") -> dict[str, Any]:
    """What certificate.json says: how it was measured, the merge, and each file's figures beside its limits."""
    task = next((task for task in export.tuned.recipe.tasks if task.data is not None), None)
    keys = ("file", "format", "bytes", "certificate", "checks", "fallbacks", "notes", "failed")
    return {
        "format": 2,
        "questions": len(export.questions),
        "held_out": task is not None,
        "task": None if task is None else task.name,
        "measure": f"KL(model || file) in nats a token at the positions of the model's greedy answer; tokens beyond "
        f"llama.cpp's {TOP} likeliest count as one, so it is a lower bound",
        "reference": "base and adapter in fp32, by transformers",
        "merge": export.merge,
        "imatrix": {"samples": SAMPLES, "matrices": len(export.importance)} if export.importance else None,
        "files": [
            {key: entry[key] for key in keys if key in entry} | {"passed": _passed(entry)}
            for entry in export.entries
            if entry["format"] in LIMITS
        ],
    }


def _passed(entry: dict[str, Any]) -> bool | None:
    """None where there was no llama.cpp to ask."""
    return False if "failed" in entry else True if "certificate" in entry else None


def page(said: dict[str, Any], name: str) -> str:
    """certificate.html."""
    rooms = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    rooms.globals |= {"_": _, "language": chosen()}
    rooms.filters |= {"size": size, "small": _small}
    measured = [file for file in said["files"] if "certificate" in file]
    return rooms.from_string(TEMPLATE.read_text("utf-8")).render(
        said=said,
        name=name,
        measured=measured,
        distances=_distances(measured) if measured else "",
        changes=_changes((said["merge"] or {}).get("modules", [])),
    )


def _small(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-9 else "0"


def _place(nats: float) -> float:
    """Where a divergence stands on the logarithmic scale."""
    power = min(max(math.log10(max(nats, 1e-30)), FEWEST), MOST)
    return LEFT + (power - FEWEST) / (MOST - FEWEST) * (WIDTH - LEFT - 20)


def _distances(files: list[dict[str, Any]]) -> Markup:
    """A row a file: from the 5th to the 95th percentile of its positions a line, their mean a dot, its limit a bar."""
    height = ROW * len(files) + 34
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" xmlns="http://www.w3.org/2000/svg">']
    for power in range(FEWEST, MOST + 1):
        x, label = _place(10.0**power), f"{10.0**power:g}"
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 26}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="middle">{label}</text>')
    for row, file in enumerate(files):
        proof, y = file["certificate"], ROW * row + ROW / 2 + 2
        low, high = (_place(float(value)) for value in np.quantile(proof["each"], [0.05, 0.95]))
        mean, limit = _place(proof["divergence"]), _place(proof["limits"]["divergence"])
        passed = "" if file["passed"] else " failed"
        parts += [
            f'<text class="label" x="{LEFT - 14}" y="{y + 4:.1f}" text-anchor="end">{escape(file["format"])}</text>',
            f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<line class="limit" x1="{limit:.1f}" x2="{limit:.1f}" y1="{y - 9:.1f}" y2="{y + 9:.1f}"/>',
            f'<circle class="mean{passed}" cx="{mean:.1f}" cy="{y:.1f}" r="5"/>',
        ]
    return Markup("".join([*parts, "</svg>"]))  # numbers, and one escaped name a row


def _changes(modules: list[dict[str, Any]]) -> Markup:
    """A square for each layer and kind of module, the darker the more of its norm was added."""
    cells: dict[str, dict[int, float]] = {}
    for module in modules:
        parts = module["module"].split(".")
        layer = next((int(part) for part in parts if part.isdecimal()), 0)
        cells.setdefault(parts[-1], {})[layer] = module["change"]
    if not cells:
        return Markup("")
    layers = max(layer for row in cells.values() for layer in row) + 1
    most = max(change for row in cells.values() for change in row.values()) or 1.0
    side = min(26.0, (WIDTH - LEFT - 20) / layers)
    height = side * len(cells) + 24
    drawn = [f'<svg viewBox="0 0 {WIDTH} {height:.0f}" xmlns="http://www.w3.org/2000/svg">']
    for row, (kind, by_layer) in enumerate(cells.items()):
        y = row * side
        middle = y + side / 2 + 4
        drawn.append(f'<text class="label" x="{LEFT - 14}" y="{middle:.1f}" text-anchor="end">{escape(kind)}</text>')
        for layer, change in by_layer.items():
            x, width = LEFT + layer * side, side - 2
            drawn.append(
                f'<rect class="change" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{width:.1f}" rx="2" '
                f'fill-opacity="{0.08 + 0.92 * change / most:.2f}"><title>{layer}: {change:.3%}</title></rect>'
            )
    for layer in range(0, layers, max(1, layers // 8)):
        x = LEFT + (layer + 0.5) * side
        drawn.append(f'<text class="tick" x="{x:.1f}" y="{height - 6:.0f}" text-anchor="middle">{layer}</text>')
    return Markup("".join([*drawn, "</svg>"]))
