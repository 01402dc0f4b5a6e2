"""Batched decoding against one prompt at a time: the same ids, whoever is written beside whom."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import llama, loud_llama

from afina.errors import ModelError
from afina.model import decode, fixed
from afina.model.decode import Continuation, write_all
from afina.model.fixed import write_fixed
from afina.model.generate import generate
from afina.model.rows import Row, Settings

PROMPTS = [[5, 9, 11], [7], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [44, 2, 13], [60, 61], [17] * 25, [9, 9, 9, 1]]


def written(model, prompts, **changes) -> list[Continuation]:
    found: dict[int, Continuation] = {}
    options = {"end_ids": (2, 31), "pad_id": 0, "max_new_tokens": 20, **changes}
    write_all(model, prompts, on_answer=found.__setitem__, **options)
    return [found[place] for place in range(len(prompts))]


def one_by_one(model, prompts, end_ids=(2, 31), new=20) -> list[list[int]]:
    return [generate(model, [ids], end_ids=end_ids, pad_id=0, max_new_tokens=new)[0] for ids in prompts]


@pytest.fixture(scope="module")
def model():
    return llama(3, vocab_size=64)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(3, 63), min_size=1, max_size=12), min_size=1, max_size=9), st.integers(1, 12))
def test_any_batch_writes_what_each_prompt_would_alone(prompts, new):
    model = llama(3, vocab_size=64)
    ends = tuple(range(20, 40))  # likely enough that rows end at different steps
    found = written(model, prompts, end_ids=ends, max_new_tokens=new)
    assert [one.ids for one in found] == one_by_one(model, prompts, ends, new)
    assert all(one.ended or len(one.ids) == new for one in found)


def test_fixed_memory_writes_the_same(model):
    """The path of the GPU, its graph left out: rows leave, memory shrinks, masks hold."""
    for ends in ((2, 31), tuple(range(20, 40))):
        rows = [Row(place, list(ids), 0, room=20) for place, ids in enumerate(PROMPTS)]
        with torch.inference_mode():
            write_fixed(model, rows, Settings(frozenset(ends), 0))
        assert [row.ids for row in rows] == one_by_one(model, PROMPTS, ends)


def test_fixed_memory_under_autocast():
    """Keys are fp32 there and values bf16, where weights are fp32. Tokens are the likeliest in fp32, but for ties."""
    model, rows = loud_llama(), [Row(place, list(ids), 0, room=20) for place, ids in enumerate(PROMPTS)]
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        write_fixed(model, rows, Settings(frozenset((2,)), 0))
    for row in rows:
        with torch.inference_mode():
            logits = model(torch.tensor([row.prompt + row.ids])).logits[0, len(row.prompt) - 1 : -1]
        gaps = logits.max(-1).values - logits.gather(1, torch.tensor(row.ids)[:, None])[:, 0]
        assert gaps.max() < 0.1 * logits.std() and (gaps == 0).float().mean() > 0.8


def test_prompts_are_read_in_parts(model, monkeypatch):
    monkeypatch.setitem(fixed.READ_AT_ONCE, "cpu", 12)
    rows = [Row(place, list(ids), 0, room=20) for place, ids in enumerate(sorted(PROMPTS, key=len, reverse=True))]
    with torch.inference_mode():
        write_fixed(model, rows, Settings(frozenset((2, 31)), 0))
    assert [row.ids for row in rows] == one_by_one(model, sorted(PROMPTS, key=len, reverse=True))


def test_little_memory_means_more_batches_and_the_same_answers(model, monkeypatch):
    whole = [one.ids for one in written(model, PROMPTS)]
    monkeypatch.setitem(decode.CACHE_AT_ONCE, "cpu", 1)
    assert [one.ids for one in written(model, PROMPTS)] == whole


def test_what_is_drawn_depends_on_its_seed_alone(model):
    seeds = list(range(len(PROMPTS)))
    whole = written(model, PROMPTS, temperature=1.3, seeds=seeds)
    backwards = written(model, PROMPTS[::-1], temperature=1.3, seeds=seeds[::-1])[::-1]
    assert [one.ids for one in whole] == [one.ids for one in backwards]
    again = written(model, [PROMPTS[0]] * 20, temperature=1.3, seeds=range(20))
    assert len({tuple(one.ids) for one in again}) > 10


def test_draws_have_the_chances_the_model_says(model):
    seeds = range(3000)
    found = written(model, [PROMPTS[0]] * 3000, temperature=0.7, seeds=seeds, max_new_tokens=1, end_ids=())
    counts = torch.bincount(torch.tensor([one.ids[0] for one in found]), minlength=64) / 3000
    logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    wanted = torch.softmax(logits.detach() / 0.7, -1)
    assert (counts - wanted).abs().max() < 5 * (wanted.max() / 3000).sqrt()


def test_an_answer_ends_where_the_context_does():
    model = llama(1, max_position_embeddings=24)
    found = written(model, [[5] * 20, [6] * 3], end_ids=(), max_new_tokens=99)
    assert [len(one.ids) for one in found] == [4, 21]
    with pytest.raises(ModelError, match="24"):
        written(model, [[5] * 24])
    with pytest.raises(ModelError):
        written(model, [[]])


class _Only:
    """Allows the tokens of one text, in order, then the end."""

    def __init__(self) -> None:
        self.left = [40, 41, 42, 2]

    def allowed(self) -> torch.Tensor:
        mask = torch.zeros(64, dtype=torch.bool)
        mask[self.left[0]] = True
        return mask

    def take(self, index: int) -> None:
        assert index == self.left.pop(0)


def test_a_grammar_has_the_last_word(model):
    found = written(model, PROMPTS, grammar=_Only)
    assert all(one.ids == [40, 41, 42] and one.ended for one in found)
