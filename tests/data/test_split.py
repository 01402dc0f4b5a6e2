from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afina.data.conversation import Message, Sample
from afina.data.split import split
from afina.errors import DataError


def samples(texts: list[str]) -> list[Sample]:
    return [Sample((Message("user", text), Message("assistant", "yes")), Path("a"), n) for n, text in enumerate(texts)]


def texts_of(rows: list[Sample]) -> Counter[str]:
    return Counter(row.prompt[0].content for row in rows)


SEEDS = st.integers(0, 2**63 - 1)
SHARES = st.floats(0, 0.99)
FEW_TEXTS = st.lists(st.sampled_from("abcdefghijklmnop"), min_size=1, max_size=60)


@given(FEW_TEXTS, SHARES, SEEDS, st.randoms())
def test_a_partition_by_content_alone(texts, share, seed, random):
    rows = samples(texts)
    try:
        train, held_out = split(rows, share, seed)
    except DataError as error:
        assert "different samples are too few" in error.message
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


@given(st.integers(2, 400), st.floats(0.01, 0.9), SEEDS)
def test_the_share_is_kept_within_rounding(count, share, seed):
    rows = samples([str(number) for number in range(count)])
    wanted = max(1, round(share * count))
    if wanted == count:
        with pytest.raises(DataError):
            split(rows, share, seed)
    else:
        assert len(split(rows, share, seed)[1]) == wanted


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
