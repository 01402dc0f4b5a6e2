"""Packed attention against one sample at a time, in float64: forward, gradients, and where it must not be used."""

import copy

import numpy as np
import pytest
import torch
from small import CPU, llama, spread
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from afina.data.batch import micro_batches
from afina.data.template import Rendered
from afina.model.loss import summed_loss, target_logits
from afina.model.packed import _attend, _groups, attend, attend_backward, covers, packed_attention
from afina.train.loop import accumulate

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
COVERED = {
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL),
    "phi3": lambda: Phi3Config(**SMALL),
    "mistral, wide window": lambda: MistralConfig(**SMALL, sliding_window=256),
    "mistral, short window": lambda: MistralConfig(**SMALL, sliding_window=16),
    "gpt-oss: sinks": lambda: GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1, sliding_window=16),
}
LEFT = {
    "gemma2: soft-capped scores": lambda: Gemma2Config(
        **SMALL, query_pre_attn_scalar=8, sliding_window=256, attn_logit_softcapping=0.5
    ),
}
"""What `covers` refuses is padded, never packed, by whoever lays out batches."""
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LENGTHS = {
    "one token": (1,),
    "ones": (1, 1, 1),
    "odd": (7, 1, 33, 2, 129, 5),
    "alike": (31, 33, 32, 29),
    "hundreds": (347, 3, 211, 98, 350),
    "growing": tuple(range(1, 24)),
}


def built(config) -> torch.nn.Module:
    """As `load_model` builds it. In fp32, in which the reference rotates, normalises and takes softmax anyway."""
    torch.manual_seed(0)
    capped = getattr(config, "attn_logit_softcapping", None)  # transformers to 5.17 takes SDPA, which knows of no caps
    eager = "eager" if config.model_type == "gpt_oss" or capped else None
    model = AutoModelForCausalLM.from_config(config, attn_implementation=eager)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2.0)
    return spread(model)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (3, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_packed_attention_is_attention_of_each_sample(heads, kv_heads, lengths, scaling):
    torch.manual_seed(len(lengths))
    total, width = sum(lengths), 6
    parts = [torch.randn(1, count, total, width, dtype=torch.float64) for count in (heads, kv_heads, kv_heads)]
    packed = [part.clone().requires_grad_() for part in parts]
    alone = [part.clone().requires_grad_() for part in parts]
    out, weights = _attend(torch.nn.Module(), *packed, None, scaling=scaling, packed_lengths=lengths)
    assert weights is None and out.shape == (1, total, heads, width)
    pieces, start = [], 0
    for length in lengths:
        q, k, v = (part[:, :, start : start + length] for part in alone)
        scores = q @ k.repeat_interleave(heads // kv_heads, 1).transpose(-1, -2) * (scaling or width**-0.5)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        pieces.append(F.softmax(scores, -1) @ v.repeat_interleave(heads // kv_heads, 1))
        start += length
    plain = torch.cat(pieces, dim=2).transpose(1, 2)
    torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
    towards = torch.randn_like(plain)
    out.backward(towards)
    plain.backward(towards)
    for ours, theirs in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-11)


def attention_with_sinks(query, key, value, lengths, scaling, window, sinks):
    """Plain softmax over scores and the sink, one sample at a time; query: (tokens, heads, width)."""
    pieces, start = [], 0
    for length in lengths:
        q, k, v = (part[start : start + length].transpose(0, 1) for part in (query, key, value))
        k, v = (part.repeat_interleave(q.shape[0] // k.shape[0], 0) for part in (k, v))
        behind = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
        seen = (behind >= 0) & (behind < (window or length))
        scores = (q @ k.transpose(-1, -2) * scaling).masked_fill(~seen, -torch.inf)
        whole = torch.cat([scores, sinks[:, None, None].expand(-1, length, 1)], dim=-1)
        pieces.append((torch.softmax(whole, -1)[..., :-1] @ v).transpose(0, 1))
        start += length
    return torch.cat(pieces)


SINKS = {"cpu": [torch.float64], "cuda": [torch.float64, torch.bfloat16]}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", SINKS[DEVICE])
@pytest.mark.parametrize("heads, kv_heads, width", [(4, 4, 8), (8, 2, 64), (3, 1, 16), (64, 8, 64)])
@pytest.mark.parametrize("lengths", [*LENGTHS.values(), (256, 256, 256)], ids=[*LENGTHS, "equal"])
@pytest.mark.parametrize("window", [None, 1, 16])
def test_sinks_are_one_more_score_of_the_softmax(dtype, heads, kv_heads, width, lengths, window):
    """Forward and every gradient against fp64. bf16 on a GPU: the stock kernels, whose sums and outputs are amended."""
    torch.manual_seed(len(lengths))
    total = sum(lengths)
    exact = [
        torch.randn(total, count, width, device=DEVICE).to(dtype).double().requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]
    sinks = (torch.randn(heads, device=DEVICE) * 2).double().requires_grad_()
    truth = attention_with_sinks(*exact, lengths, 0.3, window, sinks)
    d_out = torch.randn(truth.shape, device=DEVICE).to(dtype)
    slopes = torch.autograd.grad(truth, [*exact, sinks], d_out.double())
    parts = [part.detach().to(dtype) for part in exact]
    learning = sinks.detach().requires_grad_()
    attended = attend(*parts, lengths, 0.3, window, learning)
    found = attend_backward(attended, d_out, *parts, lengths, 0.3, window)
    limit = 1e-12 if dtype == torch.float64 else 1.5e-2
    pairs = [(attended.out, truth), *zip([part.flatten(0, 1) for part in found[:3]], slopes, strict=False)]
    for ours, theirs in pairs:
        assert (ours.double() - theirs).norm() <= limit * theirs.norm()
    summed = (truth * d_out.double()).abs().sum((0, 2))  # a sink's gradient is a sum of both signs
    assert (found[3].double() - slopes[3]).norm() <= limit * (slopes[3].norm() + 0.1 * summed.norm())
    frozen = attend(*parts, lengths, 0.3, window, sinks.detach())
    assert torch.equal(frozen.out, attended.out)
    assert len(attend_backward(frozen, d_out, *parts, lengths, 0.3, window)) == 3


def test_lengths_that_do_not_sum_up_are_refused():
    parts = [torch.randn(1, 2, 5, 4) for _ in range(3)]
    with pytest.raises(RuntimeError, match="do not sum"):
        _attend(torch.nn.Module(), *parts, None, packed_lengths=(2, 2))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_groups_waste_little_and_return_every_token_to_its_place(lengths):
    groups, inverse = _groups(lengths, torch.device("cpu"))
    gathered = torch.cat([places.flatten()[kept] for places, kept in groups])
    assert torch.equal(gathered[inverse], torch.arange(sum(lengths)))
    assert sum(places.numel() for places, _kept in groups) <= 1.5 * sum(lengths)


def rows(lengths, vocabulary: int = 97) -> list[Rendered]:
    random = np.random.default_rng(sum(lengths))
    made = []
    for length in lengths:
        learnt = random.random(length) < 0.6
        learnt[-1] = True
        made.append(Rendered(random.integers(3, vocabulary, length).astype(np.int32), learnt))
    return made


def one_at_a_time(model, samples) -> torch.Tensor:
    logits = []
    for row in samples:
        out = model(input_ids=torch.from_numpy(row.ids).long()[None]).logits[0]
        logits.append(out[np.flatnonzero(row.learnt[1:])])
    return torch.cat(logits)


def in_order_of(batch, samples) -> list[Rendered]:
    return [samples[index] for index in batch.samples]


@pytest.mark.parametrize("name", COVERED)
def test_covered_architectures_packed_equal_one_at_a_time(name):
    model = built(COVERED[name]())
    samples = rows([61, 2, 33, 7, 18])
    assert covers(model)
    batch = micro_batches(samples, range(5), budget=1000, packing=True, pad_id=0)[0]
    with packed_attention(model):
        packed = target_logits(model, batch)
    torch.testing.assert_close(packed, one_at_a_time(model, in_order_of(batch, samples)), **CLOSE)


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_plain_causal_attention_is_left_to_the_reference(name):
    """`covers` refuses it; the reference then gives rows laid out together the results of one at a time."""
    model = built(LEFT[name]())
    samples = rows([61, 2, 33, 7, 18])
    assert not covers(model)
    batch = micro_batches(samples, range(5), budget=1000, packing=True, pad_id=0)[0]
    logits = target_logits(model, batch)
    torch.testing.assert_close(logits, one_at_a_time(model, in_order_of(batch, samples)), **CLOSE)


@pytest.mark.parametrize("name", LEFT)
def test_the_difference_would_be_seen(name):
    """Had `covers` said yes, the logits would be wrong: the two tests above can fail."""
    model = built(LEFT[name]())
    samples = rows([61, 2, 33, 7, 18])
    batch = micro_batches(samples, range(5), budget=1000, packing=True, pad_id=0)[0]
    with packed_attention(model):
        wrong = target_logits(model, batch)
    assert (wrong - one_at_a_time(model, in_order_of(batch, samples))).abs().max() > 1e-2


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", LEFT)
def test_gradients_of_the_reference_do_not_depend_on_the_layout(name, packing):
    alone, together = built(LEFT[name]()), built(LEFT[name]())
    samples = rows([61, 2, 33, 7, 18])
    found = []
    for model, budget, packed in ((alone, 1, False), (together, 1000, packing)):
        model.train()
        batches = micro_batches(samples, range(5), budget=budget, packing=packed, pad_id=0)
        accumulate(model, batches, sum(b.targets.numel() for b in batches), 0, 0, CPU, summed_loss)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()


def test_the_models_own_attention_is_put_back():
    model = llama()
    before = model.config._attn_implementation
    with pytest.raises(ValueError), packed_attention(model):
        assert model.config._attn_implementation != before
        raise ValueError
    assert model.config._attn_implementation == before
    with packed_attention(model, on=False):
        assert model.config._attn_implementation == before
    copied = copy.deepcopy(model)
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, copied(input_ids=ids).logits)


def test_what_validation_asked_for_first_serves_training_too():
    model, samples = llama(), rows([19, 8])
    batch = micro_batches(samples, range(2), budget=1000, packing=True, pad_id=0)[0]
    _groups.cache_clear()
    with packed_attention(model):
        with torch.inference_mode():
            seen = summed_loss(model, batch)
        loss = summed_loss(model, batch)
        loss.backward()
    assert loss.item() == seen.item()
