"""The figures: right values, the same bytes each time, safe in threads, unmoved by odd numbers and by matplotlibrc."""

import math
import re
import xml.etree.ElementTree as tree
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afina.evaluate import plot

STEPS = [
    {"kind": "step", "step": step, "loss": 3 * math.exp(-step / 30) + 0.4, "learning_rate": 2e-4 * (1 - step / 101)}
    for step in range(1, 101)
]
METRICS = [*STEPS, {"kind": "validation", "step": 50, "loss": 1.1}, {"kind": "validation", "step": 100, "loss": 0.6}]
SYSTEMS = {"base": {"accuracy": 0.34, "interval": [0.26, 0.43]}, "tuned": {"accuracy": 0.858, "interval": [0.78, 0.91]}}
TASKS = [{"name": "sentiment", "systems": SYSTEMS}, {"name": "intent", "systems": SYSTEMS}]
COUNTS = [[36, 3, 1], [4, 32, 4], [0, 5, 35]]
DRAWINGS = {
    "loss": lambda fmt: plot.loss_curve(METRICS, fmt=fmt),
    "bars": lambda fmt: plot.accuracy_bars(TASKS, fmt=fmt),
    "confusion": lambda fmt: plot.confusion_matrix(["a", "b", "c"], COUNTS, fmt=fmt),
}


def words(svg: bytes) -> list[str]:
    """What is written in a figure."""
    return [(element.text or "").strip() for element in tree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("name", DRAWINGS)
@pytest.mark.parametrize("fmt", ["png", "svg"])
def test_same_numbers_same_bytes_with_no_date(name, fmt):
    first = DRAWINGS[name](fmt)
    assert DRAWINGS[name](fmt) == first
    assert first.startswith(b"\x89PNG" if fmt == "png" else b"<?xml")
    assert not re.search(rb"<dc:date>|tEXt|tIME|Matplotlib", first)


def test_threads_and_settings_of_others_do_not_meddle():
    before = dict(matplotlib.rcParams)
    alone = {(name, fmt): draw(fmt) for name, draw in DRAWINGS.items() for fmt in ("png", "svg")}
    with matplotlib.rc_context({"font.size": 31, "svg.fonttype": "path", "axes.grid": True, "lines.linewidth": 9}):
        with ThreadPoolExecutor(4) as threads:
            jobs = {(key, turn): threads.submit(DRAWINGS[key[0]], key[1]) for key in alone for turn in range(3)}
        assert all(job.result() == alone[key] for (key, _turn), job in jobs.items())
        assert matplotlib.rcParams["font.size"] == 31
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_not_loaded():
    import subprocess
    import sys

    code = (
        "import sys; from afina.evaluate import plot; plot.loss_curve([]); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loss_curve_is_labelled_with_units():
    shown = words(plot.loss_curve(METRICS, fmt="svg"))
    for text in ("Loss (nats per token)", "Optimiser step", "training, smoothed", "validation"):
        assert text in shown


def test_bars_show_each_share():
    shown = words(plot.accuracy_bars(TASKS, fmt="svg"))
    assert shown.count("34.0%") == 2 and shown.count("85.8%") == 2
    assert {"sentiment", "intent"} <= set(shown)


def test_bars_are_as_long_as_the_share():
    svg = plot.accuracy_bars(TASKS[:1], fmt="svg").decode()
    lengths = {}
    for role in ("base", "tuned"):
        path = re.search(rf'd="([^"]*)"[^>]*fill: {plot.PALETTE[role]}', svg)
        x = [float(point.split()[0]) for point in re.findall(r"[ML] ([\d. ]+)", path[1])]
        lengths[role] = max(x) - min(x)
    assert lengths["base"] / lengths["tuned"] == pytest.approx(0.34 / 0.858, rel=1e-3)


def test_confusion_shows_every_count_and_shades_by_row():
    svg = plot.confusion_matrix(["a", "b", "c"], COUNTS, fmt="svg")
    shown = words(svg)
    assert [text for text in shown if text.isdigit()] == [str(count) for line in COUNTS for count in line]
    shades = [float(alpha) for alpha in re.findall(r"opacity: ([\d.]+)", svg.decode())]
    assert shades == pytest.approx([0.06 + 0.94 * count / 40 for line in COUNTS for count in line], abs=1e-3)


def test_smoothing_neither_lags_nor_bends_the_ends():
    assert plot.smoothed([3.0] * 500) == pytest.approx([3.0] * 500)
    ramp = [1000.0 - step for step in range(1000)]
    curve = plot.smoothed(ramp)
    assert curve[300:700] == pytest.approx(ramp[300:700], abs=1e-3), "an average of the past alone would lie above"
    assert plot.smoothed([5.0, 4.0, 3.0]) == [5.0, 4.0, 3.0], "too few steps to smooth"
    assert plot.smoothed([]) == []


def test_smoothing_is_the_weighted_mean_it_says():
    values = [math.sin(step) + step / 50 for step in range(200)]
    keep = 1 - plot.SMOOTH_SHARE / len(values)
    for place in (0, 7, 100, 199):
        weights = [keep ** abs(place - other) for other in range(len(values))]
        mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        assert plot.smoothed(values)[place] == pytest.approx(mean)


def test_smoothing_steps_over_gaps():
    values = [2.0] * 50 + [math.nan, math.inf] + [2.0] * 50
    curve = plot.smoothed(values)
    assert math.isnan(curve[50]) and math.isnan(curve[51])
    assert [value for value in curve if not math.isnan(value)] == pytest.approx([2.0] * 100)


def test_a_long_run_stays_small_and_keeps_its_extremes():
    losses = [2 + 0.1 * math.sin(step) for step in range(200_000)]
    losses[123_456], losses[77] = 9.5, math.nan
    x, y = plot._thinned(range(200_000), losses)
    assert len(x) <= plot.DRAWN_POINTS + 2 and max(y) == 9.5 and x[y.index(9.5)] == 123_456
    metrics = [{"kind": "step", "step": step, "loss": loss} for step, loss in enumerate(losses)]
    assert len(plot.loss_curve(metrics, fmt="svg")) < 120_000


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"kind": "step"}],
        [{"kind": "step", "step": 1, "loss": 2.0, "learning_rate": 0.0}],
        [{"kind": "step", "step": step, "loss": math.nan, "learning_rate": math.inf} for step in range(40)],
        [{"kind": "step", "step": None, "loss": "x", "learning_rate": True}, {"kind": "validation", "loss": None}],
        [{"kind": "validation", "step": 3, "loss": 2.0}],
        [{"kind": "step", "step": 1, "loss": 10**400}, {"kind": "step", "step": 2, "loss": -1e300}],
    ],
)
def test_odd_metrics_give_a_figure(metrics):
    assert plot.loss_curve(metrics).startswith(b"\x89PNG")
    tree.fromstring(plot.loss_curve(metrics, fmt="svg"))


@pytest.mark.filterwarnings("error")
def test_nothing_measured_gives_a_figure():
    for tasks in ([], [{}], [{"name": "x", "systems": {"base": {"accuracy": math.nan, "interval": None}}}]):
        tree.fromstring(plot.accuracy_bars(tasks, fmt="svg"))
    tree.fromstring(plot.confusion_matrix(["a"], [[0]], fmt="svg"))


@pytest.mark.filterwarnings("error")
@settings(deadline=None, max_examples=40)
@given(st.text(max_size=40))
def test_any_label_can_be_drawn(label):
    svg = plot.confusion_matrix([label, "b"], [[1, 0], [0, 1]], fmt="svg")
    assert plot._short(label) in [text for text in words(svg)] or not label.isascii() or not plot._short(label)


def test_labels_are_text_not_formulas():
    assert "$x^2$ <b>&" in words(plot.confusion_matrix(["$x^2$ <b>&", "b"], [[1, 0], [0, 1]], fmt="svg"))
