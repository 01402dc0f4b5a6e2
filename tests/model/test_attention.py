"""Careful attention is transformers' eager one, whatever the cut, and stays finite in fp16 where that one does not."""

import pytest
import torch
from families import build
from small import spread
from torch import nn

from afina.model import attention
from afina.model.attention import NAME

IDS = torch.tensor([[5, 9, 33, 80, 7, 64, 3, 11, 90, 4, 5, 6], [8, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
SEEN = IDS != 0


def run(name: str, implementation: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = build(name)
    model.set_attn_implementation(implementation)
    logits = model(input_ids=IDS, attention_mask=SEEN, use_cache=False).logits[SEEN]
    (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
    return logits.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "llama3"])
@pytest.mark.parametrize("at_once", [2**25, 2 * 4 * 12 * 5, 1], ids=["whole", "five queries", "one query"])
def test_it_is_the_eager_one(name, at_once, monkeypatch):
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", at_once)
    logits, gradients = run(name, NAME)
    expected, slopes = run(name, "eager")
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == slopes.keys()
    for key, slope in slopes.items():
        assert (gradients[key] - slope).norm() <= 1e-5 * slope.norm() + 1e-9, key


def loud(name: str) -> nn.Module:
    """Queries and keys so large that their products exceed fp16's 65,504, while all else stays in range."""
    model = spread(build(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(2000)
    return model.half()


@pytest.mark.parametrize("name", ["phi2", "llama3", "gemma2", "gpt-oss"])
def test_logits_are_finite_in_fp16(name):
    model = loud(name)
    model.set_attn_implementation(NAME if name in ("gemma2", "gpt-oss") else "sdpa")
    with torch.inference_mode():
        found = model(input_ids=IDS, attention_mask=SEEN).logits
        expected = model.float()(input_ids=IDS, attention_mask=SEEN).logits
    assert torch.isfinite(found).all()
    if name != "gpt-oss":  # whose experts are others where a score is rounded
        assert (found.float() - expected)[SEEN].abs().mean() < 0.1 * expected[SEEN].abs().mean()


def test_the_eager_one_is_not_finite_there():
    """What makes the test above one that can fail."""
    model = loud("phi2")
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        assert not torch.isfinite(model(input_ids=IDS, attention_mask=SEEN).logits).all()
