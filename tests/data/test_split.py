from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afina.data.conversation import Message, Sample
from afina.data.split import deal, parts_of, split
from afina.errors import DataError, RecipeError


def samples(texts: list[str]) -> list[Sample]:
    return [Sample((Message("user", text), Message("assistant", "yes")), Path("a"), n) for n, text in enumerate(texts)]


def texts_of(rows: list[Sample]) -> Counter[str]:
    return Counter(row.prompt[0].content for row in rows)


relaxed = settings(deadline=None, max_examples=40)
SEEDS = st.integers(0, 2**63 - 1)
SHARES = st.floats(0, 0.99)
FEW_TEXTS = st.lists(st.sampled_from("abcdefghijklmnop"), min_size=1, max_size=60)


@relaxed
@given(FEW_TEXTS, SHARES, SEEDS, st.randoms())
def test_a_partition_by_content_alone(texts, share, seed, random):
    rows = samples(texts)
    try:
        train, held_out = split(rows, share, seed)
    except DataError as error:
        assert "samples are too few" in error.message
        assert error.hint
        return
    assert {row.line for row in train} | {row.line for row in held_out} == set(range(len(rows)))
    assert len(train) + len(held_out) == len(rows)
    assert not texts_of(train).keys() & texts_of(held_out).keys()
    assert [row.line for row in train] == sorted(row.line for row in train)

    assert split(rows, share, seed) == (train, held_out)
    shuffled = random.sample(rows, len(rows))
    moved = [Sample(row.messages, Path("elsewhere"), row.line + 7) for row in shuffled]
    again = split(moved, share, seed)
    assert (texts_of(again[0]), texts_of(again[1])) == (texts_of(train), texts_of(held_out))


@relaxed
@given(st.integers(2, 400), st.floats(0.01, 0.9), SEEDS)
def test_the_share_is_kept_within_rounding(count, share, seed):
    rows = samples([str(number) for number in range(count)])
    wanted = max(1, round(share * count))
    if wanted == count:
        with pytest.raises(DataError):
            split(rows, share, seed)
    else:
        assert len(split(rows, share, seed)[1]) == wanted


@relaxed
@given(SEEDS)
def test_a_sample_that_fills_the_file_does_not_fill_the_validation(seed):
    rows = samples(["again"] * 90 + [str(number) for number in range(10)])
    train, held_out = split(rows, 0.05, seed)
    assert len(held_out) == 5
    assert texts_of(train)["again"] == 90


def test_no_share_keeps_nothing_back_and_seeds_differ():
    rows = samples([str(number) for number in range(50)])
    assert split(rows, 0, 1) == (rows, [])
    assert split([], 0.5, 1) == ([], [])
    assert split(rows, 0.2, 1)[1] != split(rows, 0.2, 2)[1]


def test_equal_means_role_and_text_and_where_each_begins():
    def one(*messages):
        return Sample(tuple(Message(*message) for message in messages), Path("a"), 1).digest()

    assert one(("user", "ab"), ("assistant", "c")) != one(("user", "a"), ("assistant", "bc"))
    assert one(("system", "a"), ("assistant", "b")) != one(("user", "a"), ("assistant", "b"))


def test_the_split_of_today_is_the_split_of_tomorrow():
    rows = samples([str(number) for number in range(20)])
    assert sorted(texts_of(split(rows, 0.2, 42)[1])) == ["10", "11", "12", "15"]


WORDS = [f"word{number}" for number in range(40)]


@relaxed
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([0.1, 0.3]))
def test_near_duplicates_never_lie_on_both_sides(seed, copies, share):
    random = Random(seed)
    originals = [" ".join(random.choices(WORDS, k=60)) for _number in range(30)]
    rows = samples([text + end for text in originals for end in ["", *("!" * one for one in range(1, copies + 1))]])
    train, held_out = split(rows, share, seed)
    bare = [{row.prompt[0].content.rstrip("!") for row in side} for side in (train, held_out)]
    assert not bare[0] & bare[1]
    assert len(held_out) <= max(1, round(share * len(rows))) or len(bare[1]) == 1


@relaxed
@given(st.integers(10, 120), st.integers(0, 30), st.floats(0.05, 0.5), SEEDS)
def test_rows_that_are_added_move_no_more_than_their_own_number(count, added, share, seed):
    rows = samples([str(number) for number in range(count + added)])
    before = {row.line for row in split(rows[:count], share, seed)[1]}
    after = {row.line for row in split(rows, share, seed)[1]}
    assert len(before - after) <= added


@relaxed
@given(st.integers(20, 200), st.integers(20, 200), st.sampled_from([0.1, 0.2, 0.5]), SEEDS)
def test_each_class_is_dealt_out_in_the_same_share(many, few, share, seed):
    labels = ["positive"] * many + ["negative"] * few
    rows = [
        Sample((Message("user", f"row {number}"), Message("assistant", label)), Path("a"), number)
        for number, label in enumerate(labels)
    ]
    kept = Counter(row.answer for row in split(rows, share, seed)[1])
    assert abs(kept["positive"] - share * many) <= 1
    assert abs(kept["negative"] - share * few) <= 1


def test_rows_alike_by_their_wording_are_still_split():
    """A long instruction around every row must not make one group of them all."""
    rows = samples(
        ["Say whether this review is kind, hostile, or neither of both: number " + str(n) for n in range(100)]
    )
    assert len(split(rows, 0.2, 1)[1]) == 20


@relaxed
@given(st.integers(10, 60), SEEDS)
def test_parts_are_a_partition_of_the_wanted_sizes(count, seed):
    rows = samples([f"row {number}" for number in range(count)])
    dealt = deal(rows, parts_of("train,validation=0.1,test=3"), seed)
    assert sorted(row.line for part in dealt.values() for row in part) == list(range(count))
    assert {part.name: len(found) for part, found in dealt.items() if part.name != "train"} == {
        "validation": max(1, round(0.1 * count)),
        "test": 3,
    }


SHARED_WORDS = st.lists(st.sampled_from(["a b c d", "a b c d!", "a b c d?", "e f", "g", "h"]), min_size=1, max_size=8)
AMOUNTS = st.one_of(st.integers(1, 9), st.floats(0.01, 0.99))


@settings(relaxed, max_examples=200)
@given(SHARED_WORDS, st.lists(AMOUNTS, max_size=3), SEEDS)
def test_no_part_is_empty_without_a_word(texts, amounts, seed):
    """Three rows that are nearly the same went all to validation, and the training file was empty."""
    rows = samples(texts)
    parts = parts_of(",".join(["rest", *(f"p{number}={amount}" for number, amount in enumerate(amounts))]))
    try:
        dealt = deal(rows, parts, seed)
    except DataError as error:
        assert "none is left for rest" in error.message and error.hint
    else:
        assert sorted(row.line for part in dealt.values() for row in part) == list(range(len(rows)))
        assert all(dealt.values())


def test_rows_that_are_nearly_the_same_cannot_be_parted():
    rows = samples(
        ["what is the capital of France?", "what is the capital of France", "what is the capital of France!"]
    )
    with pytest.raises(DataError, match=r"none is left for train.*there are 1 to be dealt out"):
        split(rows, 0.1, 1)
    with pytest.raises(DataError, match="none is left for train"):
        deal(rows, parts_of("train,v=1"), 1)


@pytest.mark.parametrize(
    "text",
    ["", "train", "a,b", "a=1,b=2", "a,a=1", "a,b=x", "a,b=0", "a,../b=1", "a,b=-1", "a,b=1.5", "a,b=1.0", "a,b=nan"],
)
def test_parts_that_cannot_be(text):
    if text == "train":
        assert [part.name for part in parts_of(text)] == ["train"]
    else:
        with pytest.raises(RecipeError) as raised:
            parts_of(text)
        assert raised.value.hint
