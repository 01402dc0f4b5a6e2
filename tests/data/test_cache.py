"""A second start on the same data takes what the first one made; on any other, or on a damaged entry, it does not."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afina.console import console
from afina.data import cache
from afina.data.cache import keep, kept, key_of
from afina.data.load_tokenizer import load_tokenizer
from afina.data.template import Rendered, Renderer
from afina.recipe.load import parse
from afina.recipe.place import BUNDLED
from afina.train import examples
from afina.train.examples import prepare_once

TOKENIZER = load_tokenizer(str(BUNDLED / "tiny"))
ROWS = st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=6), max_size=6)


def rendered(rows: list[list[tuple[int, bool]]]) -> list[Rendered]:
    return [
        Rendered(np.array([one for one, _l in row], np.int32), np.array([learnt for _i, learnt in row], np.bool_))
        for row in rows
    ]


def plain(rows: list[Rendered]) -> list[tuple[list[int], list[bool]]]:
    return [(row.ids.tolist(), row.learnt.tolist()) for row in rows]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(ROWS, ROWS, st.integers(0, 10**9))
def test_what_is_kept_comes_back(tmp_path, train, validation, number):
    key = f"{number}-{abs(hash((str(train), str(validation))))}"
    keep(tmp_path, key, {"train": rendered(train), "validation": rendered(validation)}, {"rows": len(train)})
    sets, facts = kept(tmp_path, key)
    assert plain(sets["train"]) == plain(rendered(train))
    assert plain(sets["validation"]) == plain(rendered(validation))
    assert facts == {"rows": len(train)}
    assert kept(tmp_path, "another") is None


@pytest.mark.parametrize("name", ["train.ids", "train.learnt.lengths", "manifest.json"])
def test_a_damaged_entry_is_removed_and_not_believed(tmp_path, name):
    keep(tmp_path, "one", {"train": rendered([[(1, True), (2, False)]])}, {})
    file = tmp_path / "one" / name
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    assert kept(tmp_path, "one") is None
    assert not (tmp_path / "one").exists()


def test_the_longest_unused_go_first(tmp_path, monkeypatch):
    import os

    for number, key in enumerate(("old", "used", "new")):
        keep(tmp_path, key, {"train": rendered([[(1, True)] * 1000])}, {})
        os.utime(tmp_path / key / "manifest.json", (number, number))
    assert kept(tmp_path, "old") is not None  # now it is the newest
    monkeypatch.setattr(cache, "MOST_BYTES", 15_000)
    keep(tmp_path, "last", {"train": rendered([[(1, True)] * 1000])}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "old"]


def test_a_place_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    keep(tmp_path / "file", "key", {"train": []}, {})
    assert kept(tmp_path / "file", "key") is None


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Prepares `tmp_path`'s data; returns the examples, and whether anything was rendered."""
    monkeypatch.setattr(examples, "WORTH_S", 0.0)
    rows = [{"question": f"What is {number}?", "answer": f"It is {number}."} for number in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made: list[int] = []
    plainly = examples.prepare
    monkeypatch.setattr(examples, "prepare", lambda *given: made.append(1) or plainly(*given))

    def run(*changes: str, learn: str = "all"):
        recipe = parse("{name: a, data: {train: a.jsonl, validation: 0.2}}", "a.yaml", changes)
        made.clear()
        found = prepare_once(recipe, tmp_path, Renderer(TOKENIZER, learn), console, tmp_path / "cache")
        return found, bool(made)

    return run


def test_a_second_start_skips_all_work_and_gives_the_same(start, tmp_path):
    first, worked = start()
    again, worked_again = start()
    assert (worked, worked_again) == (True, False)
    assert plain(again.train) == plain(first.train)
    assert plain(again.validation) == plain(first.validation)
    assert [sample.where for sample in again.origin] == [sample.where for sample in first.origin]
    assert (again.rows, again.files, again.dialects, again.encodings) == (
        first.rows,
        first.files,
        first.dialects,
        first.encodings,
    )
    for change in ("seed=7", "model.max_length=512", "data.validation=0.3", "data.system=Be brief.", "data.learn=last"):
        assert start(change)[1], change
    assert not start("training.learning_rate=1", "chat.temperature=0")[1]
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('\n{"question": "One more?", "answer": "Yes."}')
    assert start()[1]


def test_the_key_knows_the_template_and_the_tokenizer(tmp_path):
    (tmp_path / "a").write_text("x")
    other = load_tokenizer(str(BUNDLED / "tiny"), template="afina/alpaca")
    keys = {key_of([tmp_path / "a"], tokenizer, parts) for tokenizer in (TOKENIZER, other) for parts in ({}, {"a": 1})}
    assert len(keys) == 4
    assert key_of([tmp_path / "a"], TOKENIZER, {}) in keys
