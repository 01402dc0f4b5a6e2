"""PyTorch's own attention inside `exact`: the same numbers, and the order asked for around it alone."""

import pytest
import torch
from small import llama, perturb_adapters

from afina.model.attach import attach, learning
from afina.model.attention import attending
from afina.model.packed import packed_attention
from afina.model.repeatable import same_bits
from afina.recipe.schema import Lora


@pytest.fixture(scope="module")
def model():
    return perturb_adapters(attach(llama(), Lora(rank=4, targets=["q_proj", "v_proj"]), seed=0)).train()


def gradients(model, mask):
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return torch.autograd.grad(found.square().sum(), [parameter for _name, parameter in learning(model)])


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("again", [True, False], ids=["recomputed", "kept"])
def test_the_numbers_are_those_of_plain_attention(model, padded, again):
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0 if padded else 1
    plain = gradients(model, mask)
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        with same_bits(), packed_attention(model, False):
            assert model.config._attn_implementation == "afina_padded"
            found = gradients(model, mask)
    finally:
        model.gradient_checkpointing_disable()
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(one, two) for one, two in zip(plain, found, strict=True))


def test_the_order_is_asked_for_around_attention_alone(model, monkeypatch):
    """Forward and backward of attention are strict, once a layer each; whatever else runs is not."""
    seen, real = [], torch.use_deterministic_algorithms

    def noted(on, *, warn_only=False):
        seen.append("strict" if on and not warn_only else "loose" if on else "off")
        real(on, warn_only=warn_only)

    with same_bits(), packed_attention(model, False):
        monkeypatch.setattr(torch, "use_deterministic_algorithms", noted)
        gradients(model, None)
        assert seen == ["strict", "loose"] * 4
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert seen[-1] == "off"


def test_outside_exact_and_for_other_attention_nothing_changes(model):
    with packed_attention(model, False):
        assert model.config._attn_implementation == "sdpa"
    with same_bits(), attending(model, "eager"), packed_attention(model, False):
        assert model.config._attn_implementation == "eager"
