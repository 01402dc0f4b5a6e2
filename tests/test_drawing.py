"""What a process of its own draws is what would be drawn here, and here it is drawn where it cannot."""

import json
import sys
from pathlib import Path

import pytest

from afina import drawing
from afina.drawing import CURVE, Drawing
from afina.errors import AfinaError

COMMANDS = [("afina chat run", "Talk to it")]


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of which there is a log alone."""
    place = tmp_path / "run"
    place.mkdir()
    steps = [{"kind": "step", "step": step, "epoch": step / 9, "loss": 2 / step, "tokens": 9} for step in range(1, 9)]
    (place / "metrics.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    return place


def drawn(run: Path, *, apart: bool) -> dict[str, bytes]:
    with Drawing() as pen:
        if apart:
            pen.begin()
        pen.curve(run)
        pen.report(run, COMMANDS)
    names = (CURVE, "report.html", "report.md", "report.json")
    return {name: (run / name).read_bytes() for name in names}


def test_it_is_drawn_alike(run, monkeypatch):
    expected = drawn(run, apart=False)
    assert b"afina chat run" in expected["report.html"] and len(expected[CURVE]) > 10_000
    monkeypatch.setattr(drawing, "cores", lambda: 2)
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "draw", None)  # nothing is drawn here
        assert drawn(run, apart=True) == expected
    monkeypatch.setattr(sys, "executable", str(run / "no-python"))
    assert drawn(run, apart=True) == expected


def test_what_cannot_be_written_is_told(run, monkeypatch):
    monkeypatch.setattr(drawing, "cores", lambda: 2)
    (run / "report.html").mkdir()
    with Drawing() as pen:
        pen.begin()
        pen.curve(run)
        with pytest.raises(AfinaError, match=r"report\.html"):
            pen.report(run, COMMANDS)
