"""Phi-3's two sets of factors: a sample is computed the same beside any other, longer ones too."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from families import LONG, SIZES
from hypothesis import given, settings
from hypothesis import strategies as st
from small import CPU, spread
from torch import nn
from transformers import AutoModelForCausalLM, Phi3Config

from afina.data.batch import micro_batches
from afina.engine.engine import Engine
from afina.model.attach import attach
from afina.model.decode import write_all
from afina.model.generate import generate
from afina.model.load import load_model
from afina.model.longrope import _lengths, choose_by_sample, original_context
from afina.model.loss import summed_loss, target_logits
from afina.model.packed import packed_attention
from afina.model.personalities import Personalities
from afina.model.saved import save_adapter
from afina.recipe.schema import Lora, PrefixTuning, PromptTuning

ORIGINAL, NEW = 64, 12
LENGTHS = (20, 63, 64, 65, 90, 60)
"""On both sides of the original context and at it."""
ROPE = {**LONG, "long_factor": [1.0, 3.0, 9.0, 27.0], "short_factor": [1.0, 1.0, 1.1, 1.2]}
"""Far enough apart that a wrong set shows in any figure."""
METHODS = [
    PromptTuning(name="prompt-tuning", virtual_tokens=5),
    PrefixTuning(name="prefix-tuning", virtual_tokens=5),
]


def plain(rope=ROPE) -> nn.Module:
    """As transformers has it: right for one sample at a time, read as a whole."""
    sizes = {**SIZES, "num_key_value_heads": 2, "eos_token_id": None}
    config = Phi3Config(**sizes, rope_parameters=dict(rope), original_max_position_embeddings=ORIGINAL)
    return spread(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), scale=0.3)


def ours() -> nn.Module:
    return choose_by_sample(plain())


def texts(lengths=LENGTHS) -> list[list[int]]:
    chance = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (length,), generator=chance).tolist() for length in lengths]


def batch_of(indices, *, packing: bool):
    ids = [torch.tensor(text).numpy() for text in texts()]
    rendered = [SimpleNamespace(ids=one, learnt=one > 0, weights=None) for one in ids]
    (batch,) = micro_batches(rendered, indices, budget=10**6, packing=packing, pad_id=0)
    return batch


def stepped(loss_fn, net, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradient of all that learns."""
    net.zero_grad()
    loss = loss_fn(net, batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def learning(net: nn.Module) -> nn.Module:
    """With LoRA, in fp64, B away from zero."""
    adapted = attach(net.double(), Lora(rank=4), seed=1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return adapted


@pytest.mark.parametrize("way", ["packed", "padded", "engine"])
def test_each_sample_counts_as_it_does_alone(way):
    """Loss and gradients of a micro-batch are the sums of those that transformers computes sample by sample."""
    net, alone = learning(ours()), learning(plain())
    loss_fn = Engine(net, torch.float64).summed_loss if way == "engine" else summed_loss
    with packed_attention(net, on=way != "padded"):
        loss, gradients = stepped(loss_fn, net, batch_of(range(len(LENGTHS)), packing=way != "padded"))
    singles = [stepped(summed_loss, alone, batch_of([index], packing=False)) for index in range(len(LENGTHS))]
    assert torch.allclose(loss, sum(one for one, _found in singles), rtol=1e-6)  # angles are fp32
    assert len(gradients) == len(singles[0][1]) > 0
    for name, gradient in gradients.items():
        expected = sum(found[name] for _one, found in singles)
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name


def test_it_was_otherwise():
    """A test of this test: transformers' own has short samples turned by long factors beside a longer one."""
    net = plain().double()
    with torch.no_grad():
        together = target_logits(net, batch_of(range(len(LENGTHS)), packing=False))
        alone = torch.cat([target_logits(net, batch_of([one], packing=False)) for one in range(len(LENGTHS))])
    assert (together - alone).abs().max() > 0.01


@pytest.mark.parametrize("method", METHODS, ids=["prompt", "prefix"])
def test_learnt_prompts_count_as_part_of_each_sample(method):
    net = attach(ours().double(), method, seed=1)
    packing = isinstance(method, PromptTuning)
    with packed_attention(net, on=packing), torch.no_grad():
        whole = batch_of(range(len(LENGTHS)), packing=packing)
        together = target_logits(net, whole)
        alone = [target_logits(net, batch_of([one], packing=packing)) for one in whole.samples]
    assert (together - torch.cat(alone)).abs().max() < 1e-5
    assert original_context(net) == ORIGINAL - 5


def continued(net: nn.Module, text: list[int], new: int = NEW) -> list[int]:
    """By reading all anew for each token: no cache, no neighbour."""
    ids = list(text)
    with torch.no_grad():
        for _token in range(new):
            ids.append(int(net(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(text) :]


def written(net: nn.Module, prompts: list[list[int]], **more) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    settings = {"end_ids": [], "pad_id": 0, "max_new_tokens": NEW, **more}
    write_all(net, prompts, on_answer=lambda place, answer: found.__setitem__(place, answer.ids), **settings)
    return [found[place] for place in range(len(prompts))]


@pytest.mark.parametrize("method", METHODS, ids=["prompt", "prefix"])
def test_answers_after_learnt_prompts_too(method):
    """transformers' own Phi-3 drops the cache where the ids reach the original context: the prefix lies in it."""
    net, expected = attach(ours(), method, seed=1), []
    for text in texts((56, 59, 60, 80)):
        ids = list(text)
        for _token in range(NEW):
            one = torch.tensor([ids])
            row = SimpleNamespace(
                input_ids=one, position_ids=torch.arange(len(ids))[None], attention_mask=torch.ones_like(one).bool(),
                lengths=None, predicting=torch.tensor([len(ids) - 1]),
            )  # fmt: skip
            with torch.no_grad():
                ids.append(int(target_logits(net, row)[0].argmax()))
        expected.append(ids[len(text) :])
    prompts = texts((56, 59, 60, 80))
    assert generate(net, prompts, end_ids=[], pad_id=0, max_new_tokens=NEW) == expected
    assert written(net, prompts) == expected


class Anything:
    """A grammar that allows every token, and knows what was written."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        MADE.append(self)

    def allowed(self) -> torch.Tensor:
        return torch.ones(97, dtype=torch.bool)

    def take(self, index: int) -> None:
        self.taken.append(index)


MADE: list[Anything] = []


def test_answers_that_grow_beyond_the_original_context_are_those_of_reading_all_anew():
    """Fixed memory, a growing cache, transformers' own generation: each in one batch."""
    expected = [continued(plain(), text) for text in texts()]
    net = ours()
    assert written(net, texts()) == expected
    MADE.clear()
    assert written(net, texts(), grammar=Anything) == expected
    assert [one.taken for one in MADE if len(one.taken) == NEW]  # of what was read again, all
    assert generate(net, texts(), end_ids=[], pad_id=0, max_new_tokens=NEW) == expected
    end = expected[1][5]  # soon after the turn
    ends = [ids[: ids.index(end)] if end in ids else ids for ids in expected]
    assert written(net, texts(), end_ids=[end]) == ends
    assert generate(net, texts(), end_ids=[end], pad_id=0, max_new_tokens=NEW) == ends


def test_chance_goes_on_where_it_was():
    net, seeds = ours(), list(range(len(LENGTHS)))
    together = written(net, texts(), temperature=1.0, seeds=seeds)
    for place, text in enumerate(texts()):
        assert written(net, [text], temperature=1.0, seeds=[place]) == [together[place]]
    assert len({tuple(ids) for ids in together}) == len(together)


def test_who_listens_hears_each_token_once_and_may_stop_at_the_turn():
    net, text = ours(), texts()[1]
    expected, heard = continued(plain(), text), list[int]()
    asked = {"end_ids": [], "pad_id": 0, "max_new_tokens": NEW}
    assert generate(net, [text], on_token=heard.append, **asked) == [expected] == [heard]
    for stop in (1, 2, 3):
        left = iter([False] * (stop - 1) + [True])
        assert generate(net, [text], on_token=lambda _index, left=left: next(left), **asked) == [expected[:stop]]


def test_adapters_that_share_a_base_take_turns_there(tmp_path):
    crew = Personalities(ours())
    for name in "ab":
        adapted = learning(plain()).float()
        save_adapter(adapted, tmp_path / name, base="x")
        crew.load(name, tmp_path / name)
    prompts = texts((60, 20, 64))
    asked = {"end_ids": [], "pad_id": 0, "max_new_tokens": NEW}
    found = crew.generate(prompts, ["a", None, "b"], **asked)
    assert found == [
        crew.generate([text], [name], **asked)[0] for text, name in zip(prompts, ["a", None, "b"], strict=True)
    ]


def test_a_model_that_is_loaded_has_it_and_others_stay_as_they_are(tmp_path):
    plain().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), CPU)
    assert original_context(loaded) == ORIGINAL
    assert written(loaded, texts((63, 90))) == [continued(plain(), text) for text in texts((63, 90))]
    other = plain({"rope_type": "default", "rope_theta": 1e4})
    assert original_context(other) is None
    assert "forward" not in vars(choose_by_sample(other).model.rotary_emb)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=6), st.integers(0, 4))
def test_the_length_of_each_place(samples, padding):
    """Of rows that lie end to end, whatever position each begins with; padding is nobody's."""
    row = [0] * padding + [position for first, length in samples for position in range(first, first + length)]
    reached = [1] * padding + [first + length for first, length in samples for _place in range(length)]
    for (first, length), (after, _length) in pairwise(samples):
        if after == first + length:
            return  # no end is to be seen there
    if padding and samples[0][0] == 1:
        return
    assert _lengths(torch.tensor([row]))[0].tolist() == reached
