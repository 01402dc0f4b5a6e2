import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from journey.tiny import save_base
from small import CPU, llama

from afina.data.conversation import Message, Sample
from afina.data.template import Renderer
from afina.data.tokenizer import load_tokenizer
from afina.errors import DataError
from afina.evaluate import tasks
from afina.evaluate.tasks import System, ask, mark, prepare, work
from afina.model.generate import generate
from afina.recipe.schema import Task


@pytest.fixture(scope="module")
def renderer(tmp_path_factory) -> Renderer:
    return Renderer(load_tokenizer(str(save_base(tmp_path_factory.mktemp("base")))))


def sample(question: str, answer: str, line: int = 1) -> Sample:
    return Sample((Message("user", question), Message("assistant", answer)), Path("t.jsonl"), line)


def task(kind: str, **changes) -> Task:
    return Task(**{"name": "t", "kind": kind, "data": "t.jsonl", **changes})


def model_for(renderer: Renderer, seed: int = 0, **changes):
    return llama(seed, vocab_size=len(renderer.tokenizer.hf), **changes)


def nothing(done: int) -> None:
    """Progress nobody looks at."""


QUESTIONS = ["Is it good?", "no", "¿Y esto qué es?", "A longer question, with a second clause and a third one.", "x"]
CHOICES = ["p", "q", "z", "é!"]


@pytest.mark.parametrize("packed", [True, False])
def test_label_likelihood_is_that_of_one_by_one_in_float64(renderer, packed, monkeypatch):
    """The likeliest label, end of turn included, against log-softmax averaged token by token."""
    model = model_for(renderer).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)  # so that the answer depends on the question
    if not packed:
        monkeypatch.setattr(tasks, "covers", lambda model, longest: False)
    samples = [sample(question, CHOICES[number % 4]) for number, question in enumerate(QUESTIONS)]
    wanted = []
    for one in samples:
        scores = []
        for label in CHOICES:
            row = renderer.answer(one.prompt, label)
            ids = torch.from_numpy(row.ids).long()
            logits = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
            found = [logits[at - 1, ids[at]].item() for at in range(1, len(ids)) if row.learnt[at]]
            scores.append(sum(found) / len(found))
        wanted.append(CHOICES[scores.index(max(scores))])
        gaps = sorted(scores, reverse=True)
        assert gaps[0] - gaps[1] > 1e-3  # no tie that rounding could break
    asked = prepare(task("classification", labels=CHOICES), samples, seed=0)
    hardware = dataclasses.replace(CPU, dtype=torch.float32)
    _result, rows = ask(asked, [System("base", model, nullcontext)], renderer, hardware, nothing)
    assert [row["base"] for row in rows] == wanted
    assert len(set(wanted)) > 1  # a model that always says the same would prove little


def test_two_equal_systems_do_not_differ(renderer):
    model = model_for(renderer)
    samples = [sample(question, CHOICES[number % 4]) for number, question in enumerate(QUESTIONS)]
    systems = [System("base", model, nullcontext), System("tuned", model, nullcontext)]
    for kind in ("classification", "exact"):
        asked = prepare(task(kind, max_new_tokens=4), samples, seed=0)
        result, rows = ask(asked, systems, renderer, CPU, nothing)
        assert result["fixed"] == result["broken"] == 0
        assert result["p_value"] == 1.0
        assert result["verdict"].startswith("No difference")
        assert all(row["base"] == row["tuned"] for row in rows)


def test_one_system_alone_has_no_verdict(renderer):
    asked = prepare(task("exact", max_new_tokens=2), [sample("a", "b")], seed=0)
    result, _rows = ask(asked, [System("tuned", model_for(renderer), nullcontext)], renderer, CPU, nothing)
    assert "verdict" not in result and result["samples"] == 1


def test_written_answers_do_not_depend_on_who_is_asked_beside(renderer):
    model = model_for(renderer)
    samples = [sample(question, "x") for question in QUESTIONS]
    together = ask(
        prepare(task("exact", max_new_tokens=9), samples, 0),
        [System("base", model, nullcontext)],
        renderer,
        CPU,
        nothing,
    )[1]
    for number, one in enumerate(samples):
        alone = ask(
            prepare(task("exact", max_new_tokens=9), [one], 0),
            [System("base", model, nullcontext)],
            renderer,
            CPU,
            nothing,
        )[1]
        assert alone[0]["base"] == together[number]["base"]


def test_work_is_what_progress_reports(renderer):
    model = model_for(renderer)
    for kind in ("classification", "exact"):
        asked = prepare(task(kind, max_new_tokens=2), [sample(q, "yes" if len(q) > 3 else "no") for q in QUESTIONS], 0)
        done: list[int] = []
        ask(asked, [System("base", model, nullcontext)], renderer, CPU, done.append)
        assert sum(done) == work(asked)


TRUTH = '{"intent": "PlayMusic", "slots": {"artist": "Héroes"}}'


@pytest.mark.parametrize(
    "answer, whole, intent",
    [
        (TRUTH, True, True),
        ('{"slots": {"artist": "Héroes"}, "intent": "PlayMusic"}', True, True),  # the order of keys says nothing
        ('  \n{ "intent" : "PlayMusic",\n"slots":{"artist":"H\\u00e9roes"}}\t', True, True),  # nor does white space
        ('{"intent": "PlayMusic", "slots": {}}', False, True),
        ('{"intent": "playmusic", "slots": {"artist": "Héroes"}}', False, False),
        ('{"intent": "PlayMusic", "slots": {"artist": "Hér', False, False),  # cut off
        (TRUTH + "}", False, False),
        (TRUTH + " and more", False, False),
        ("", False, False),
        ("   ", False, False),
        ("PlayMusic", False, False),
        ('"PlayMusic"', False, False),
        ("null", False, False),
        (f"[{TRUTH}]", False, False),  # a list instead of an object
        ("{}", False, False),
        ('{"intent": null}', False, False),
        ('{"intent": ["PlayMusic"]}', False, False),
        ('{"intent": NaN}', False, False),
        ('{"a":' * 5000, False, False),
        ('{"intent": ' + "9" * 5000 + "}", False, False),
    ],
)
def test_json_answers_are_marked_by_what_they_mean(answer, whole, intent):
    assert mark(task("json"), [TRUTH], [answer]) == [whole]
    assert mark(task("json", field="intent"), [TRUTH], [answer]) == [intent]


@pytest.mark.parametrize(
    "truth, answer, equal",
    [
        ('{"a": true}', '{"a": 1}', False),  # Python alone would call these equal
        ('{"a": 0}', '{"a": false}', False),
        ('{"a": [true, {"b": 1}]}', '{"a": [1, {"b": true}]}', False),
        ('{"a": 1}', '{"a": 1.0}', True),
        ('{"a": null}', '{"a": null}', True),
        ('{"a": null}', "{}", False),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', False),
        ('{"a": [1, 2]}', '{"a": [1]}', False),
        ('{"a": NaN}', '{"a": NaN}', False),
    ],
)
def test_json_values_are_compared_as_json(truth, answer, equal):
    assert mark(task("json", field="a"), [truth], [answer]) == [equal]
    assert mark(task("json"), [truth], [answer]) == [equal]


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_any_json_equals_itself_however_it_is_written(value):
    plain, spaced = json.dumps({"v": value}), json.dumps({"v": value}, indent=3, ensure_ascii=False)
    assert mark(task("json", field="v"), [plain], [spaced]) == [True]


@pytest.mark.parametrize(
    "answer, right",
    [("42", True), (" 42 \n", True), ("42.", False), ("", False), ("4 2", False), ("42\n43", False)],
)
def test_exact_answers_are_equal_but_for_space_around(answer, right):
    assert mark(task("exact"), ["42"], [answer]) == [right]


def test_a_limit_takes_the_same_samples_in_any_order():
    samples = [sample(f"q{number}", "a", number) for number in range(50)]
    chosen = prepare(task("exact", limit=7), samples, seed=3).samples
    again = prepare(task("exact", limit=7), samples[::-1], seed=3).samples
    assert [one.line for one in chosen] == [one.line for one in again]
    assert len(chosen) == 7
    assert [one.line for one in prepare(task("exact", limit=7), samples, seed=4).samples] != [s.line for s in chosen]
    assert len(prepare(task("exact", limit=99), samples, seed=3).samples) == 50


def test_an_answer_that_is_no_label_is_named():
    with pytest.raises(DataError, match="perhaps") as caught:
        prepare(task("classification", labels=["yes", "no"]), [sample("a", "yes"), sample("b", "perhaps", 7)], 0)
    assert caught.value.line == 7 and "yes, no" in caught.value.hint


@pytest.mark.parametrize("answer", ["yes", "[]", '{"other": 1}', '{"intent": NaN}', ""])
def test_a_reference_that_cannot_be_marked_is_named(answer):
    with pytest.raises(DataError, match="not JSON") as caught:
        prepare(task("json", field="intent"), [sample("a", TRUTH), sample("b", answer, 7)], 0)
    assert caught.value.line == 7


def test_a_prompt_longer_than_the_context_is_named(renderer):
    model = model_for(renderer, max_position_embeddings=64)
    for kind in ("exact", "classification"):
        asked = prepare(task(kind), [sample("short", "a", 1), sample("word " * 80, "b", 9)], 0)
        with pytest.raises(DataError, match="64") as caught:
            ask(asked, [System("base", model, nullcontext)], renderer, CPU, nothing)
        assert caught.value.line == 9


def test_an_answer_ends_where_the_context_does(renderer):
    model = model_for(renderer, max_position_embeddings=64)
    prompt = sample("word " * 8, "a")
    used = len(renderer.prompt(prompt.prompt))
    asked = prepare(task("exact", max_new_tokens=500), [prompt], 0)
    _result, rows = ask(asked, [System("base", model, nullcontext)], renderer, CPU, nothing)
    ids = renderer.prompt(prompt.prompt)
    written = generate(model, [ids], end_ids=(), pad_id=0, max_new_tokens=64 - used)
    assert rows[0]["base"] == renderer.tokenizer.decode(written[0]).strip() != ""
