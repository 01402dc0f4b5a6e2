"""Answers that are texts or JSON: equal or not, field by field, alike by letters and words, and what is wrong."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afina.data.conversation import Message, Sample
from afina.errors import DataError
from afina.evaluate.measure import KINDS, prepare
from afina.evaluate.systems.asking import Answer
from afina.evaluate.tasks.json_object import same
from afina.evaluate.tasks.text import normalised
from afina.recipe.schema import Task


def marks(kind, pairs, folder=Path(), *, ended=True, **changes):
    """Marks and figures of (reference, answer) pairs."""
    samples = [
        Sample((Message("user", f"q{line}"), Message("assistant", reference)), Path("t.jsonl"), line)
        for line, (reference, _answer) in enumerate(pairs, 1)
    ]
    asked = prepare(Task(**{"name": "t", "kind": kind, "data": "t.jsonl", **changes}), samples, 0, folder)
    answers = [[Answer(answer, 5, ended)] for _reference, answer in pairs]
    found = KINDS[kind].mark(asked, range(len(pairs)), answers)
    return found, KINDS[kind].figures(asked, range(len(pairs)), found)


def test_a_text_is_equal_or_nearly():
    pairs = [("Sí.", "Sí."), ("Sí.", " Sí.\n"), ("Sí.", "si"), ("15", "1.5"), ("-3", "3"), ("Sí.", ""), ("x", "x y")]
    strict, counted = marks("exact", pairs)
    assert [mark.right for mark in strict] == [True, True, False, False, False, False, False]
    assert counted == {"strict": 2, "normalised": 3}
    loose, _counted = marks("exact", pairs, normalise=True)
    assert [mark.right for mark in loose] == [True, True, True, False, False, False, False]
    assert [mark.problem for mark in strict] == ["", "", "", "", "", "empty", ""]
    assert marks("exact", [("abc", "ab")], ended=False)[0][0].problem == "cut off"
    assert marks("exact", [("¡!", "¿?")], normalise=True)[0][0].right is False  # nothing is left of either


@given(st.text(), st.text())
def test_what_is_normalised_stays_so(one, other):
    assert normalised(normalised(one)) == normalised(one)
    assert normalised(f"{one} {other}").split() == [*normalised(one).split(), *normalised(other).split()]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([1.0, 0.0, "", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=6,
)


def kinded(value):
    """A value in which true is no 1, so that Python's own equality is JSON's."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, dict):
        return {key: kinded(part) for key, part in value.items()}
    return [kinded(part) for part in value] if isinstance(value, list) else value


@given(VALUES, VALUES)
def test_equality_is_json_s(one, other):
    assert same(one, one) and same(json.loads(json.dumps(one)), one)
    assert same(one, other) == same(other, one) == (kinded(one) == kinded(other))


REFERENCE = '{"intent": "play", "times": 1, "loud": true}'


def test_json_is_what_it_means_field_by_field(tmp_path):
    schema = {"type": "object", "required": ["intent", "times"], "properties": {"times": {"type": "integer"}}}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    answers = {
        ' {"loud":true,\n"times":1.0,"intent":"play"} ': ("", True, True),
        '{"intent": "play", "times": 1, "loud": 1}': ("", True, False),
        '{"intent": "play", "times": "1", "loud": true}': ("not of the schema", True, False),
        '{"intent": "stop"}': ("not of the schema", False, False),
        '["intent", "play"]': ("not an object", False, False),
        '"play"': ("not an object", False, False),
        '{"intent": "play", "times": NaN}': ("not JSON", False, False),
        "Sure: " + REFERENCE: ("not JSON", False, False),
        "[" * 100_000: ("not JSON", False, False),
        "  ": ("empty", False, False),
    }
    pairs = [(REFERENCE, answer) for answer in answers]
    by_field, figures = marks("json", pairs, tmp_path, field="intent", schema_file="s.json")
    assert [(mark.problem, mark.right) for mark in by_field] == [
        (problem, right) for problem, right, _w in answers.values()
    ]
    assert figures["parsed"] == 4 and figures["of_schema"] == 2
    assert {name: (one["right"], one["of"]) for name, one in figures["fields"].items()} == {
        "intent": (3, 10),
        "times": (2, 10),
        "loud": (2, 10),
    }
    whole, _figures = marks("json", pairs, tmp_path, schema_file="s.json")
    assert [mark.right for mark in whole] == [whole for _problem, _right, whole in answers.values()]
    assert marks("json", [(REFERENCE, '{"intent": "pl')], ended=False)[0][0].problem == "cut off"


def test_a_schema_of_a_bundled_set():
    answer = '{"etiqueta": "neutra", "motivo": "Ni elogia ni se queja del hotel."}'
    pairs = [(answer, answer), (answer, '{"etiqueta": "neutra"}'), (answer, '{"etiqueta": "neutra", "motivo": "sí"}')]
    found, figures = marks("json", pairs, field="etiqueta", schema_file="afina/sentiment-explained/schema.json")
    assert all(mark.right for mark in found) and figures["of_schema"] == 1  # a label without a reason is counted


@pytest.mark.parametrize("kind", ["json", "similarity"])
def test_a_reference_without_the_field_is_an_error_of_its_line(kind):
    for reference in ("prose", "[]", '{"other": "x"}'):
        with pytest.raises(DataError, match="field reason") as caught:
            marks(kind, [('{"reason": "x"}', ""), (reference, "")], field="reason")
        assert caught.value.line == 2


def chrf(wanted: str, found: str) -> float:
    """Popović's formula: the F of mean precision and recall of runs of one to six letters, recall counting double."""
    precision, recall, orders = 0.0, 0.0, 0
    for n in range(1, 7):
        runs = [
            Counter(text[at : at + n] for at in range(len(text) - n + 1))
            for text in ("".join(found.split()), "".join(wanted.split()))
        ]
        sizes = [sum(each.values()) for each in runs]
        if all(sizes):
            common = sum((runs[0] & runs[1]).values())
            precision, recall, orders = precision + common / sizes[0], recall + common / sizes[1], orders + 1
    if not orders or precision + recall == 0:
        return 0.0
    precision, recall = precision / orders, recall / orders
    return 5 * precision * recall / (4 * precision + recall)


def rouge_l(wanted: str, found: str) -> float:
    """F of the longest common subsequence of words."""
    one, other = normalised(wanted).split(), normalised(found).split()
    rows = [[0] * (len(other) + 1) for _word in range(len(one) + 1)]
    for i, word in enumerate(one, 1):
        for j, second in enumerate(other, 1):
            rows[i][j] = rows[i - 1][j - 1] + 1 if word == second else max(rows[i - 1][j], rows[i][j - 1])
    return 2 * rows[-1][-1] / (len(one) + len(other)) if one and other else 0.0


SENTENCES = st.lists(st.sampled_from(["la", "sopa", "está", "fría", "Fría,", "no", "y"]), min_size=1, max_size=8).map(
    " ".join
)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(SENTENCES, SENTENCES | st.just("")), min_size=1, max_size=4), st.booleans())
def test_likeness_follows_its_formulas_whole_or_of_a_field(pairs, in_field):
    def written(text):
        return json.dumps({"label": "x", "reason": text}) if in_field else text

    given_pairs = [(written(wanted), written(found)) for wanted, found in pairs]
    found, figures = marks("similarity", given_pairs, **({"field": "reason"} if in_field else {}))
    assert [mark.score for mark in found] == pytest.approx([chrf(*pair) for pair in pairs], abs=1e-9)
    assert [mark.more["rougeL"] for mark in found] == pytest.approx([rouge_l(*pair) for pair in pairs])
    assert figures["rougeL"] == pytest.approx(sum(rouge_l(*pair) for pair in pairs) / len(pairs))
    assert all(mark.right is None for mark in found)


def test_what_has_no_field_is_as_unlike_as_can_be():
    reference = '{"reason": "the soup is cold"}'
    answers = ["the soup is cold", '{"reason": 3}', '{"other": "the soup is cold"}', "", reference]
    found, figures = marks("similarity", [(reference, answer) for answer in answers], field="reason")
    assert [mark.score for mark in found] == [0, 0, 0, 0, pytest.approx(1)]
    assert [mark.problem for mark in found] == ["not JSON", "not JSON", "not JSON", "empty", ""]
    assert 0 < figures["chrf_corpus"] < 1
