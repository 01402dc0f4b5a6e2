"""Near-duplicates against the plain comparison of all pairs, and whatever their order."""

import json
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afina.data import near
from afina.data.near import Near, groups

WORDS = st.lists(
    st.sampled_from(
        ["uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve", "diez", "once", "doce"]
    ),
    min_size=30,
)


@cache
def runs(text: str) -> set[bytes]:
    content = near._NOT_WORDS.sub(" ", text.casefold()).strip().encode().ljust(8)
    return {content[place : place + 8] for place in range(len(content) - 7)}


def jaccard(left: str, right: str) -> float:
    return len(runs(left) & runs(right)) / len(runs(left) | runs(right))


def of(texts: list[str]) -> list[set[int]]:
    found = groups(texts).tolist()
    return [{other for other, first in enumerate(found) if first == found[place]} for place in range(len(texts))]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(max_size=60), max_size=12), st.randoms())
def test_groups_are_of_the_texts_and_not_of_their_order(texts, random):
    texts = [*texts, *texts[:3]]
    expected = of(texts)
    order = random.sample(range(len(texts)), len(texts))
    found = of([texts[place] for place in order])
    for place, original in enumerate(order):
        assert {order[member] for member in found[place]} == expected[original]
    for left, one in enumerate(texts):
        for right, other in enumerate(texts):
            assert one != other or right in expected[left]


def test_it_finds_what_comparing_all_pairs_finds():
    random = np.random.default_rng(0)
    words = [f"word{number}" for number in range(400)]
    texts = [" ".join(random.choice(words, 60)) for _place in range(200)]
    for place in range(0, 200, 4):  # a fourth of them again, with one to six words changed
        changed = texts[place].split()
        for spot in random.choice(60, 1 + place % 6, replace=False):
            changed[spot] = str(random.choice(words))
        texts.append(" ".join(changed))
    found = groups(texts)
    sure = missed = wrong = 0
    for left in range(len(texts)):
        for right in range(left):
            likeness = jaccard(texts[left], texts[right])
            together = found[left] == found[right]
            sure += likeness > 0.88
            missed += likeness > 0.88 and not together
            wrong += likeness < 0.68 and together
    assert sure > 20
    assert (missed, wrong) == (0, 0)


def test_case_marks_and_blanks_do_not_count_and_short_texts_do():
    found = groups(["¿Cuánto es 2 + 2?", "cuánto es 2   2", "Cuánto es 3 + 3?", "a", "A.", "b", "", "?!", "?!"])
    assert found.tolist() == [0, 0, 2, 3, 3, 5, 6, 7, 7]
    assert Near().groups().tolist() == []


@given(WORDS, st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_a_block_more_or_less_changes_nothing(words, size):
    texts = [" ".join(words), " ".join(words[1:]), " ".join(reversed(words)), "x" * 50]
    expected = groups(texts).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near, "_BLOCK", size * 40)
        assert groups(texts).tolist() == expected


@pytest.mark.real
def test_gsm8k_test_questions_are_not_in_training(real_data):
    questions = [
        json.loads(line)["question"]
        for name in ("train", "test")
        for line in (real_data / f"data/gsm8k/{name}.jsonl").read_text("utf-8").splitlines()
    ]
    found = groups(questions)
    leaked = [place for place in range(7473, len(questions)) if found[place] < 7473]
    assert len(leaked) <= 2
