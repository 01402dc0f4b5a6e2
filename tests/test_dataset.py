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


TALK = [
    {"role": "user", "content": "Is it \U0001f600 warm?"},
    {"role": "assistant", "content": "I look.", "weight": 0.25, "thinking": "Hm.", "seen": True},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Yes.", "weight": 2.0},
]
WEATHER = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}
FORMS = {
    "messages": {"messages": TALK, "tools": [WEATHER], "reasoning_effort": "low", "id": 7, "source": {"url": "x"}},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    "alpaca": {"instruction": "Add.", "input": "2 2", "output": "4", "category": "sums"},
    "prompt-completion": {"prompt": "a", "completion": "b", "score": 0.5, "system": "Be brief."},
    "question-answer": {"question": "a", "answer": "b", "id": None},
    "text": {"text": "En un lugar", "page": 1},
    "mapping": {"question": "a", "answer": "b", "messages": [], "n": 12345678901234567890123},
}


@pytest.mark.parametrize("dialect", FORMS)
@pytest.mark.parametrize("system", [None, "You are kind."])
def test_of_a_split_row_nothing_is_lost(dialect, system, tmp_path):
    """Its sample reads back equal (weights, thoughts, tools), and every value it had is still there."""
    row = FORMS[dialect]
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(row)] * 2), "utf-8")
    changes = [] if system is None else [f"data.system={system}"]
    keys: dict = {} if system is None else {"system": system}
    if dialect == "mapping":
        changes.append("data.mapping={user: '{{ row.question }}', assistant: '{{ row.answer }}'}")
        keys["mapping"] = {"user": "{{ row.question }}", "assistant": "{{ row.answer }}"}
    place = dataset.split(str(tmp_path / "a.jsonl"), "rest", tmp_path / "parts", changes)
    before = read("a.jsonl", Data(train="x", **keys), tmp_path).samples
    after = read("rest.jsonl", Data(train="x"), place).samples
    assert [(one.messages, one.tools, one.effort) for one in after] == [
        (one.messages, one.tools, one.effort) for one in before
    ]
    (line, _second) = (place / "rest.jsonl").read_text("utf-8").splitlines()

    def values(value: object) -> set[str]:
        if isinstance(value, dict):
            return {one for part in value.values() for one in values(part)}
        if isinstance(value, list):
            return {one for part in value for one in values(part)}
        return {json.dumps(value)}

    said = line.encode().decode()
    speakers = {json.dumps(name) for name in ("human", "gpt")}  # in our words: user, assistant
    assert all(one in values(json.loads(line)) or json.loads(one) in said for one in values(row) - speakers)


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
    with pytest.raises(DataError, match="unknown shape") as raised:
        dataset.split(str(tmp_path / "a.jsonl"), "rest,held=0.25", tmp_path / "none")
    advised = raised.value.hint.partition("mapping: ")[2]  # what is advised can be copied, and works
    assert advised == '{user: "{{ row.q }}", assistant: "{{ row.a }}"}'
    dataset.split(str(tmp_path / "a.jsonl"), "rest,held=0.25", tmp_path / "advised", [f"data.mapping={advised}"])
    (tmp_path / "odd.jsonl").write_text(json.dumps({"n": 1, "the 'question'": "q", "a b": "a"}))
    with pytest.raises(DataError) as raised:
        dataset.stats(str(tmp_path / "odd.jsonl"))
    advised = raised.value.hint.partition("mapping: ")[2]
    dataset.stats(str(tmp_path / "odd.jsonl"), [f"data.mapping={advised}"])
    with pytest.raises(RecipeError, match="nothing is not a key of model"):
        dataset.stats("a.jsonl", ["model.nothing=1"])
