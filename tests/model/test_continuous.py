"""Answers that begin and end while others are written have the ids of each alone, whoever comes and goes."""

import math
from pathlib import Path

import pytest
import torch
from families import FAMILIES, build
from hypothesis import given, settings
from hypothesis import strategies as st
from small import llama, perturb_adapters

from afina.errors import ModelError
from afina.model import continuous
from afina.model.attach import attach
from afina.model.choose import choose
from afina.model.continuous import Asked, Writing
from afina.model.generate import generate
from afina.model.longrope import choose_by_sample
from afina.model.personalities import Personalities
from afina.model.rows import Row, Sampling
from afina.model.saved import load_adapter, save_adapter
from afina.recipe.schema import Lora, PrefixTuning, PromptTuning

ENDS = frozenset(range(20, 32))
PROMPTS = [[5, 9, 11], [7], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [44, 2, 13], [60, 61], [17] * 25, [9, 9, 9, 1]]


class Heard:
    """One answer as it was told."""

    def __init__(self, prompt: list[int], room: int = 12, seed: int = 0, **more: object) -> None:
        self.ids: list[int] = []
        self.likely: list[object] = []
        self.why: object = None
        self.asked = Asked(
            0, list(prompt), seed, room=room, **{"end_ids": ENDS, "on_token": self.hear, "on_end": self.end, **more}
        )

    def hear(self, index: int, likely: object) -> None:
        self.ids.append(index)
        self.likely.append(likely)

    def end(self, why: object) -> None:
        assert self.why is None, "told twice"
        self.why = why


def run(writing: Writing) -> None:
    while writing.busy:
        writing.turn()


def spoken(model, heard: list[Heard], at_once: int = 16, every: int = 2, voices=None) -> list[list[int]]:
    """All of them, one coming every so many turns."""
    writing = Writing(voices or Personalities.of(model, "tuned"), at_once)
    for one in heard:
        writing.add(one.asked)
        for _turn in range(every):
            writing.turn()
    run(writing)
    assert all(one.why in ("end", "limit") for one in heard)
    return [one.ids for one in heard]


def alone(model, prompts, new=12, ends=ENDS) -> list[list[int]]:
    return [generate(model, [ids], end_ids=sorted(ends), pad_id=0, max_new_tokens=new)[0] for ids in prompts]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(3, 63), min_size=1, max_size=30), st.integers(1, 15)), min_size=1, max_size=8
    ),
    st.integers(0, 4),
    st.integers(1, 8),
)
def test_whoever_comes_and_goes_each_answer_is_that_of_alone(asked, every, at_once):
    model = llama(3, vocab_size=64)
    heard = [Heard(prompt, room) for prompt, room in asked]
    found = spoken(model, heard, at_once, every)
    assert found == [alone(model, [prompt], room)[0] for prompt, room in asked]
    for one, (_prompt, room) in zip(heard, asked, strict=True):
        assert one.why == ("limit" if len(one.ids) == room else "end")


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family(name, monkeypatch):
    """Windows, sinks, learnt positions, and angles that look at the longest row; prompts are read in parts."""
    monkeypatch.setitem(continuous.READ_AT_ONCE, "cpu", 8)
    model = choose_by_sample(build(name))
    prompts = [[index % 60 + 3 for index in prompt] for prompt in [*PROMPTS, list(range(60)), [33, 4]]]
    assert spoken(model, [Heard(prompt) for prompt in prompts]) == alone(model, prompts)


@pytest.mark.parametrize("learnt", [False, True])
def test_rows_that_grow_beyond_longropes_original_context(learnt):
    """Each is turned by the factors of its own length, learnt tokens before it counted, its base's without them."""
    model = choose_by_sample(build("phi3"))  # 64 tokens
    if learnt:
        model = attach(model, PromptTuning(name="prompt-tuning", virtual_tokens=4), seed=0).eval()
    prompts = [[7] * 50, [5, 9], [11] * 58, [40] * 63, [41] * 64, [42] * 65, [8] * 90]
    names = ["tuned", "tuned", None, "tuned", None, "tuned", None] if learnt else [None] * 7
    none = frozenset()
    heard = [Heard(prompt, 20, end_ids=none, voice=name) for prompt, name in zip(prompts, names, strict=True)]
    found = spoken(None, heard, voices=Personalities.of(model, "tuned"))
    plain = choose_by_sample(build("phi3"))
    for prompt, name, ids in zip(prompts, names, found, strict=True):
        assert ids == alone(model if name else plain, [prompt], 20, none)[0], (len(prompt), name)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt-oss"])
def test_windows_that_have_moved_on(name):
    """Rows far beyond the window and rows within it meet, and the longest leaves first."""
    model = build(name)
    prompts, rooms = [[7] * 40, [5, 9], [11] * 5], [20, 45, 30]
    heard = [Heard(prompt, room, end_ids=frozenset()) for prompt, room in zip(prompts, rooms, strict=True)]
    found = spoken(model, heard, every=3)
    assert found == [
        generate(model, [prompt], end_ids=[], pad_id=0, max_new_tokens=room)[0]
        for prompt, room in zip(prompts, rooms, strict=True)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    place, found = tmp_path_factory.mktemp("adapters"), {}
    methods = {
        "wide": Lora(rank=8, alpha=16),
        "dora": Lora(rank=4, alpha=8, dora=True),
        "narrow": Lora(rank=2, alpha=2),
    }
    for seed, (name, method) in enumerate(methods.items()):
        save_adapter(perturb_adapters(attach(llama(), method, seed=seed), seed + 1), place / name, base="x")
        found[name] = place / name
    return found


def test_personalities_are_mixed_in_one_batch(folders):
    voices = Personalities(llama())
    for name, folder in folders.items():
        voices.load(name, folder)
    names = [None, "wide", "narrow", "dora", "wide", None, "dora"]
    ends = frozenset({31})
    heard = [Heard(prompt, voice=name, end_ids=ends) for prompt, name in zip(PROMPTS, names, strict=True)]
    found = spoken(None, heard, every=1, voices=voices)
    models = {name: load_adapter(llama(), folder) for name, folder in folders.items()} | {None: llama()}
    want = {name: alone(model, PROMPTS, ends=ends) for name, model in models.items()}
    assert found == [want[name][place] for place, name in enumerate(names)]
    assert len({str(answers) for answers in want.values()}) == 4
    assert len({voices.kind(name) for name in names}) == 1


@pytest.mark.parametrize(
    "method",
    [
        PromptTuning(name="prompt-tuning", virtual_tokens=4),
        PrefixTuning(name="prefix-tuning", virtual_tokens=4),
        Lora(rank=2, bias="all"),
        Lora(rank=4),
    ],
    ids=["prompt", "prefix", "bias", "lora"],
)
def test_a_run_and_its_base_are_asked_at_once(method, tmp_path):
    """Whatever was learnt; what cannot share a batch with its base takes turns with it."""
    learnt = attach(build("phi2"), method, seed=0)
    with torch.no_grad():
        for parameter in learnt.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_adapter(learnt, tmp_path / "adapter", base="x")
    model = load_adapter(build("phi2"), tmp_path / "adapter")
    voices = Personalities.of(model, "tuned")
    assert (voices.kind("tuned") == voices.kind(None)) == (method == Lora(rank=4))
    names = ["tuned", None, "tuned", "tuned", None, None, "tuned"]
    heard = [Heard(prompt, voice=name) for prompt, name in zip(PROMPTS, names, strict=True)]
    found = spoken(None, heard, voices=voices)
    plain = build("phi2")
    for prompt, name, ids in zip(PROMPTS, names, found, strict=True):
        assert ids == alone(model if name else plain, [prompt])[0], (prompt, name)


def test_a_newcomer_does_not_wait_for_a_long_answer():
    writing = Writing(Personalities.of(llama(), "x"), 8)
    long, short = Heard([5, 9], 200, end_ids=frozenset()), Heard([7], 3, end_ids=frozenset())
    writing.add(long.asked)
    for _turn in range(10):
        writing.turn()
    writing.add(short.asked)
    for _turn in range(3):
        writing.turn()
    assert short.why == "limit" and len(long.ids) == 14 and long.why is None


def test_a_long_prompt_holds_nobody_up(monkeypatch):
    """Each turn reads a part of it, and the others get a token."""
    monkeypatch.setitem(continuous.READ_AT_ONCE, "cpu", 16)
    writing = Writing(Personalities.of(llama(), "x"), 8)
    first, long = Heard([5, 9], 40, end_ids=frozenset()), Heard([7] * 160, 3, end_ids=frozenset())
    writing.add(first.asked)
    writing.turn()
    writing.add(long.asked)
    for _turn in range(9):
        writing.turn()
    assert len(first.ids) == 11 and not long.ids
    run(writing)
    assert long.ids == generate(llama(), [[7] * 160], end_ids=[], pad_id=0, max_new_tokens=3)[0]


def test_places_and_memory_are_bounded(monkeypatch):
    """Whoever is beyond waits its turn, in order; one alone is always let in."""
    model = llama()
    writing = Writing(Personalities.of(model, "x"), 3)
    heard = [Heard([5 + place], 10, end_ids=frozenset()) for place in range(7)]
    for one in heard:
        writing.add(one.asked)
    most, order = 0, []
    while writing.busy:
        writing.turn()
        most = max(most, len(writing.under_way))
        order += [place for place, one in enumerate(heard) if one.why and place not in order]
    assert most == 3 and order == list(range(7))
    monkeypatch.setattr(continuous, "CACHE_ON_CPU", 1)
    writing = Writing(Personalities.of(model, "x"), 3)
    heard = [Heard([5 + place], 4, end_ids=frozenset()) for place in range(2)]
    for one in heard:
        writing.add(one.asked)
    while writing.busy:
        writing.turn()
        assert len(writing.under_way) <= 1
    assert all(one.why == "limit" for one in heard)


def test_who_is_gone_and_who_had_enough_leave():
    model = llama()
    writing = Writing(Personalities.of(model, "x"), 2)
    gone, enough, late = (Heard([place], 50, end_ids=frozenset()) for place in (5, 6, 7))
    enough.asked.on_token = lambda index, _likely: enough.ids.append(index) or len(enough.ids) == 4
    for one in (gone, enough, late):
        writing.add(one.asked)
    writing.turn()
    gone.asked.gone = late.asked.gone = True
    run(writing)
    assert (gone.why, enough.why, late.why) == ("gone", "stop", "gone")
    assert len(gone.ids) <= 2 and len(enough.ids) == 4 and late.ids == []
    assert enough.ids == generate(model, [[6]], end_ids=[], pad_id=0, max_new_tokens=4)[0]


def test_what_goes_wrong_ends_those_under_way_and_nobody_else():
    model = llama()
    writing = Writing(Personalities.of(model, "x"), 1)
    first, second = Heard([5], 9), Heard([6], 9)
    for one in (first, second):
        writing.add(one.asked)
    writing.turn()
    error = RuntimeError("out of luck")
    writing.abandon(error)
    run(writing)
    assert first.why is error and second.ids == alone(model, [[6]], 9)[0]


def test_numbers_that_are_none_are_no_answer():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    heard = Heard([5, 9])
    writing = Writing(Personalities.of(model, "x"), 4)
    writing.add(heard.asked)
    run(writing)
    assert isinstance(heard.why, ModelError) and "no number" in str(heard.why) and heard.ids == []
    with pytest.raises(ModelError):
        writing.add(Heard([]).asked)
    with pytest.raises(ModelError, match="nobody"):
        writing.add(Heard([5], voice="nobody").asked)


def test_likelihoods_are_the_models(tmp_path):
    """Of the model itself: neither temperature nor bias changes them."""
    model = llama()
    heard = Heard([5, 9, 33], 6, top=3, sampling=Sampling(0.0, bias={40: 100.0}), end_ids=frozenset())
    spoken(model, [Heard([8, 8, 8, 8, 8]), heard])
    assert heard.ids == [40] * 6
    with torch.inference_mode():
        logits = model(torch.tensor([[5, 9, 33, *heard.ids]])).logits[0].log_softmax(-1)
    for place, one in enumerate(heard.likely, 2):
        values, ids = logits[place].topk(3)
        assert list(one.top) == ids.tolist()
        assert one.chosen == pytest.approx(float(logits[place, 40]), abs=1e-4)
        assert list(one.top.values()) == pytest.approx(values.tolist(), abs=1e-4)


class TestChoosing:
    """choose: penalties, biases, nucleus and temperature, by what each is defined as."""

    LOGITS = torch.tensor([2.0, 1.5, 1.0, -1.0, -3.0])

    def drawn(self, count: int = 4000, **sampling: object) -> list[float]:
        rows = [Row(0, [1], seed, sampling=Sampling(**sampling)) for seed in range(count)]
        found = choose(self.LOGITS.expand(count, -1), rows)
        return [found.count(index) / count for index in range(5)]

    @pytest.mark.parametrize(("heat", "share"), [(1.0, 1.0), (0.5, 1.0), (1.7, 0.8), (1.0, 0.5), (1.0, 1e-9)])
    def test_shares_are_those_of_temperature_and_nucleus(self, heat, share):
        chances = torch.softmax(self.LOGITS.double() / heat, -1).tolist()
        kept, total = [], 0.0
        for chance in chances:  # they are in order
            kept.append(chance if total < share else 0.0)
            total += chance
        for found, want in zip(self.drawn(temperature=heat, top_p=share), kept, strict=True):
            want /= sum(kept)
            assert abs(found - want) <= 5 * math.sqrt(max(want * (1 - want), 1e-9) / 4000)

    def test_what_was_said_becomes_less_likely(self):
        row = Row(0, [1], 0, sampling=Sampling(presence=0.6))
        row.ids = [0]
        assert choose(self.LOGITS[None], [row]) == [1]
        row = Row(0, [1], 0, sampling=Sampling(frequency=0.3))
        row.ids = [0, 0, 1]
        assert choose(self.LOGITS[None], [row]) == [0]
        row.ids = [0, 0]
        assert choose(self.LOGITS[None], [row]) == [1]
        row = Row(0, [1], 0, sampling=Sampling(bias={4: 6.0, 99: 1e9}))
        beside = Row(1, [1], 0)
        assert choose(self.LOGITS.expand(2, -1), [row, beside]) == [4, 0]

    def test_dice_are_a_rows_own(self):
        logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
        sampling = Sampling(1.3, 0.9)
        together = choose(logits, [Row(0, [1], seed, sampling=sampling) for seed in range(6)])
        one_by_one = [
            choose(logits[place : place + 1], [Row(0, [1], place, sampling=sampling)])[0] for place in range(6)
        ]
        assert together == one_by_one
