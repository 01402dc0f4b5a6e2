"""The verbs of `afina data` as a newcomer calls them: what they print, write and refuse."""

import json

import pytest

from afina import dataset
from afina.artifact import open_artifact
from afina.console import console
from afina.data.read import read
from afina.errors import DataError, OutputError, RecipeError
from afina.recipe.schema import Data


@pytest.fixture
def events(monkeypatch):
    """What machines are told."""
    told: list[dict] = []
    monkeypatch.setattr(console, "event", lambda name, **facts: told.append({"event": name, **facts}))
    return told


def test_split_writes_what_reads_back_and_says_what_it_is(tmp_path, events):
    place = dataset.split("afina/sentiment/train", "train,validation=0.1,test=30", tmp_path / "parts")
    counts = {}
    for name in ("train", "validation", "test"):
        samples = read(f"{name}.jsonl", Data(train="x"), place).samples
        counts[name] = len(samples)
        assert {sample.answer for sample in samples} == {"positiva", "neutra", "negativa"}
    assert counts == {"train": 510, "validation": 60, "test": 30}
    made = open_artifact(place, "split")
    made.verify()
    assert made.manifest["rows"] == counts
    assert events[-1] == {"event": "split", "folder": str(place), "rows": counts}
    again = dataset.split("afina/sentiment/train", "train,validation=0.1,test=30", tmp_path / "again")
    assert (again / "test.jsonl").read_bytes() == (place / "test.jsonl").read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        dataset.split("afina/sentiment/train", "train,test=0.1", place)
    with pytest.raises(RecipeError):
        dataset.split("afina/sentiment/train", "train,test", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_stats_of_a_recipe_and_of_data_alone(tmp_path, events, capsys):
    found = dataset.stats("afina/sentiment/train", plot=tmp_path / "lengths.svg")
    assert (len(found.lengths), found.over) == (600, 0)
    assert set(found.classes) == {"positiva", "neutra", "negativa"}
    assert b"model.max_length" not in (tmp_path / "lengths.svg").read_bytes()  # far to the right of the longest
    assert b"<svg" in (tmp_path / "lengths.svg").read_bytes()
    told = events[-1]
    assert (told["event"], told["samples"], told["total_tokens"]) == ("stats", 600, int(found.lengths.sum()))
    assert [one["key"] for one in told["advice"]] == ["model.max_length", "training.epochs", "training.batch_size"]
    (tmp_path / "recipe.yaml").write_text("{name: a, data: {train: afina/maths-tutor/train}, model: {max_length: 128}}")
    cut = dataset.stats(str(tmp_path / "recipe.yaml"))
    assert cut.over == cut.losing > 0
    assert "too short" in capsys.readouterr().err
    with pytest.raises(OutputError, match="neither"):
        dataset.stats("afina/sentiment/train", plot=tmp_path / "lengths.pdf")


def test_show_prints_marks_and_writes_a_page(tmp_path, events, capsys):
    dataset.show("afina/support-chat/train", first=2)
    printed = capsys.readouterr().out
    assert "⟦" in printed and "<|im_end|>" in printed
    (told,) = [event for event in events if event["event"] == "sample"]
    assert len(told["ids"]) == len(told["learnt"]) == len(told["texts"])
    assert told["where"].endswith(":2")
    dataset.show("afina/support-chat/train", count=3, html=tmp_path / "seen.html")
    assert (tmp_path / "seen.html").read_text("utf-8").count('class="sample"') == 3
    with pytest.raises(DataError, match="There is no sample 999"):
        dataset.show("afina/support-chat/train", first=999)


def test_changes_reach_a_source_without_a_recipe(tmp_path):
    rows = [{"q": str(number), "a": "yes"} for number in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = ["data.mapping={user: '{{ row.q }}', assistant: '{{ row.a }}'}", "seed=3"]
    place = dataset.split(str(tmp_path / "a.jsonl"), "rest,held=0.25", tmp_path / "parts", changes)
    assert len((place / "held.jsonl").read_text().splitlines()) == 5
    with pytest.raises(DataError, match="unknown shape"):
        dataset.split(str(tmp_path / "a.jsonl"), "rest,held=0.25", tmp_path / "none")
    with pytest.raises(RecipeError, match="nothing is not a key of model"):
        dataset.stats("a.jsonl", ["model.nothing=1"])
