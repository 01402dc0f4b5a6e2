"""The loss of distilling beside its definition on whole logits in fp64; zero of oneself; the same however it is cut."""

import pytest
import torch
from families import build
from small import llama, perturb_adapters
from torch import nn
from torch.nn import functional as F
from train.test_loop import rows

from afina.data.batch import micro_batches
from afina.model import distill
from afina.model.attach import attach
from afina.model.distill import Teacher, distilled_loss
from afina.model.loss import summed_loss, target_logits
from afina.model.packed import packed_attention
from afina.recipe.schema import Lora, PromptTuning

SAMPLES = rows(7, seed=3)


def batches(packing: bool, budget: int = 4096):
    return micro_batches(SAMPLES, range(len(SAMPLES)), budget=budget, packing=packing, pad_id=0)


def student(**changes) -> nn.Module:
    return perturb_adapters(attach(llama(**changes), Lora(rank=4), seed=0)).double()


def by_definition(model: nn.Module, teacher: Teacher) -> torch.Tensor:
    """Each sample alone, whole logits, fp64."""
    total = torch.zeros((), dtype=torch.float64)
    for row in SAMPLES:
        ids = torch.tensor(row.ids)[None].long()
        places = torch.tensor(row.learnt)[1:].nonzero()[:, 0]
        ours = model(input_ids=ids).logits[0, places]
        theirs = teacher.model(input_ids=ids).logits[0, places].detach()
        p, q = (torch.softmax(logits / teacher.temperature, -1) for logits in (ours, theirs))
        one, other = (q, p) if teacher.divergence == "forward" else (p, q)
        divergence = (one * (one / other).log()).sum()
        plain = F.cross_entropy(ours, ids[0, places + 1], reduction="sum")
        total = total + teacher.alpha * plain + (1 - teacher.alpha) * teacher.temperature**2 * divergence
    return total


def summed(model: nn.Module, teacher: Teacher, packing: bool, budget: int = 4096) -> tuple[float, list[torch.Tensor]]:
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total, gradients = 0.0, [torch.zeros_like(parameter) for parameter in learning]
    with packed_attention(model, packing):
        for batch in batches(packing, budget):
            loss = distilled_loss(model, batch, teacher)
            total += float(loss)
            for whole, part in zip(gradients, torch.autograd.grad(loss, learning), strict=True):
                whole += part
    return total, gradients


def largest(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_it_is_its_definition_in_fp64(packing, divergence):
    model = student()
    teacher = Teacher(llama(5, num_hidden_layers=3, hidden_size=48).double(), 1.7, 0.3, divergence)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    reference = by_definition(model, teacher)
    found, gradients = summed(model, teacher, packing)
    assert found == pytest.approx(float(reference), rel=1e-12)
    assert largest(gradients, list(torch.autograd.grad(reference, learning))) < 1e-12


def test_neither_chunks_nor_micro_batches_change_it(monkeypatch):
    model, teacher = student(), Teacher(llama(5).double(), 2.0, 0.5, "forward")
    whole, gradients = summed(model, teacher, True)
    for packing, budget in ((True, 40), (False, 4096), (False, 40)):
        cut, others = summed(model, teacher, packing, budget)
        assert cut == pytest.approx(whole, rel=1e-12) and largest(others, gradients) < 1e-12
    monkeypatch.setattr(distill, "LOGITS_AT_ONCE", 97 * 3)  # three rows at a time, computed again going back
    cut, others = summed(model, teacher, True)
    assert cut == pytest.approx(whole, rel=1e-12) and largest(others, gradients) < 1e-12


def test_of_oneself_there_is_nothing_to_learn():
    model = student()
    found, gradients = summed(model, Teacher(model, 2.0, 0.0, "forward"), True)
    assert abs(found) < 1e-10 and max(float(gradient.abs().max()) for gradient in gradients) < 1e-12


def test_without_the_teachers_share_it_is_the_plain_loss():
    model = student()
    with packed_attention(model):
        (batch,) = batches(True)
        plain = float(summed_loss(model, batch))
    found, _gradients = summed(model, Teacher(llama(5).double(), 2.0, 1.0, "forward"), True)
    assert found == pytest.approx(plain, rel=1e-12)


def test_the_teacher_learns_nothing_and_drops_nothing():
    model, teacher = student(), llama(5).double().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    modules = list(teacher.named_modules())
    summed(model, Teacher(teacher, 2.0, 0.5, "forward"), True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert list(teacher.named_modules()) == modules  # what stood for its layers is gone


@pytest.mark.parametrize("family", ["phi2", "phi3", "gemma2", "gpt2", "gpt-oss", "gpt-neox"])
def test_heads_of_every_family_as_their_own_code_has_them(family):
    model = build(family)
    (batch,) = batches(False)
    with torch.no_grad():
        rows_found = distill._rows(model, batch, 0.0)
        assert torch.allclose(distill._logits(model, rows_found), target_logits(model, batch), atol=1e-6)


def test_vocabularies_padded_to_different_lengths_are_compared_where_both_have_tokens():
    model, wide = student(), llama(5, vocab_size=128).double()
    found, _gradients = summed(model, Teacher(wide, 1.0, 0.0, "forward"), True)
    narrow = llama(5).double()
    narrow.load_state_dict(
        {name: tensor[:97] if tensor.shape[0] == 128 else tensor for name, tensor in wide.state_dict().items()}
    )
    same, _gradients = summed(model, Teacher(narrow, 1.0, 0.0, "forward"), True)
    assert found == pytest.approx(same, rel=1e-12)


def test_virtual_tokens_learn_from_a_teacher_too():
    model = attach(llama(), PromptTuning(name="prompt-tuning", virtual_tokens=3), seed=0).double()
    teacher = Teacher(llama(5).double(), 2.0, 0.5, "forward")
    packed, gradients = summed(model, teacher, True)
    padded, others = summed(model, teacher, False)
    assert packed == pytest.approx(padded, rel=1e-12) and largest(gradients, others) < 1e-12
    assert float(gradients[0].abs().max()) > 0
