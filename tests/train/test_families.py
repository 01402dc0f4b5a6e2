"""Each family from start to end: the right layers learn, the numbers are plain PEFT's, and what is saved, loaded,
merged and generated is the same model. In fp32, tiny models of the true architectures."""

import copy

import numpy as np
import pytest
import torch
from families import FAMILIES, LINEAR, attention_of, build
from peft import LoraConfig, PeftModel, get_peft_model
from small import CPU, perturb_adapters
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from afina.data.batch import micro_batches
from afina.data.template import Rendered
from afina.errors import AfinaError
from afina.model.attach import attach, learning, merged
from afina.model.generate import generate
from afina.model.load import load_model
from afina.model.loss import summed_loss
from afina.model.packed import covers, packed_attention
from afina.model.saved import load_adapter, save_adapter, save_whole
from afina.recipe.schema import Lora
from afina.train.loop import accumulate

STEPS, RATE, CLOSE = 20, 5e-3, 1e-5
LONGEST = 24


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    place = tmp_path_factory.mktemp(family)
    build(family).save_pretrained(place)
    return place


def samples(seed: int, count: int = 4) -> list[Rendered]:
    """Random ids of odd lengths, longer than the windows, with about half of the tokens learnt."""
    random = np.random.default_rng(seed)
    made = []
    for length in random.integers(3, LONGEST, count):
        learnt = random.random(length) < 0.5
        learnt[-1] = True
        made.append(Rendered(random.integers(3, 97, length).astype(np.int32), learnt))
    return made


def plain_step(model: nn.Module, rows: list[Rendered]) -> torch.Tensor:
    """transformers and PEFT with nothing of ours: one sample at a time, labels shifted by hand."""
    total, count = torch.zeros(()), 0
    for row in rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))
        labels = torch.where(torch.from_numpy(row.learnt), ids, -100)[1:]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        count += int((labels != -100).sum())
    return total / count


def our_step(model: nn.Module, rows: list[Rendered], packing: bool) -> torch.Tensor:
    batches = micro_batches(rows, range(len(rows)), budget=64, packing=packing, pad_id=0)
    learnt = sum(batch.targets.numel() for batch in batches)
    return accumulate(model, batches, learnt, 0, 0, CPU, summed_loss)


def relative(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    apart = torch.stack([(ours[name] - theirs[name]).norm() for name in ours]).norm()
    return float(apart / torch.stack([part.norm() for part in theirs.values()]).norm())


def test_training_is_that_of_plain_peft(family, folder):
    """20 steps beside a loop of nothing but transformers, PEFT and torch: losses, first gradients, adapters."""
    ours = attach(load_model(str(folder), CPU), Lora(rank=4, alpha=8), seed=0)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention_of(family))
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    plain = get_peft_model(plain, config)
    perturb_adapters(ours)
    plain.load_state_dict(ours.state_dict())
    adapters = dict(learning(ours))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapters} == LINEAR[family]
    theirs = {name: parameter for name, parameter in plain.named_parameters() if parameter.requires_grad}
    packing = covers(ours)
    optimizers = [torch.optim.AdamW(part.values(), lr=RATE) for part in (adapters, theirs)]
    losses = []
    with packed_attention(ours, packing):
        for step in range(STEPS):
            rows = samples(step % 2)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = plain_step(plain.train(), rows)
            loss.backward()
            losses.append((our_step(ours.train(), rows, packing).item(), loss.item()))
            if step == 0:
                gradients = [{name: p.grad.clone() for name, p in part.items()} for part in (adapters, theirs)]
                assert all(gradient.norm() > 0 for gradient in gradients[1].values())
                assert relative(*gradients) < CLOSE
            for optimizer in optimizers:
                optimizer.step()
    assert max(abs(mine - plain) / plain for mine, plain in losses) < CLOSE
    assert losses[-2][0] < losses[0][0]  # it learns: these two steps had the same samples
    assert relative(adapters, theirs) < 1e-3


def test_saved_loaded_merged_and_asked(family, folder, tmp_path):
    model = perturb_adapters(attach(load_model(str(folder), CPU), Lora(rank=4), seed=0)).eval()
    prompts = [[5, 9, 33, 80], [7]]
    asked = {"end_ids": [2], "pad_id": 0, "max_new_tokens": 12}
    ids = torch.tensor([[5, 9, 33, 80, 7, 64, 3, 11, 90, 4, 5, 6]])
    with torch.inference_mode():
        before, base = model(input_ids=ids).logits, build(family)(input_ids=ids).logits
    answers = generate(model, prompts, **asked)
    assert answers == [generate(model, [prompt], **asked)[0] for prompt in prompts]
    assert (before - base).abs().max() > 1e-3

    save_adapter(model, tmp_path / "adapter", base="x")
    again = load_adapter(load_model(str(folder), CPU), tmp_path / "adapter")
    with torch.inference_mode():
        assert torch.equal(again(input_ids=ids).logits, before)
        plain = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention_of(family)), tmp_path / "adapter"
        )
        torch.testing.assert_close(plain.eval()(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)

    save_whole(merged(again), tmp_path / "merged")
    whole = load_model(str(tmp_path / "merged"), CPU)
    tied = FAMILIES[family]().tie_word_embeddings
    with torch.inference_mode():
        torch.testing.assert_close(whole(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
    assert generate(whole, prompts, **asked) == answers
    assert (whole.get_output_embeddings().weight is whole.get_input_embeddings().weight) == tied


def test_a_target_it_has_not_is_told_with_those_it_has(family):
    with pytest.raises(AfinaError, match="Wqkv") as caught:
        attach(build(family), Lora(targets=["Wqkv"]), seed=0)
    assert all(name in caught.value.hint for name in LINEAR[family])


def test_packed_is_one_sample_at_a_time(family):
    """Where packed attention covers the family; where it does not, samples are padded, and that is the same too."""
    rows = samples(5, count=6)
    model = perturb_adapters(attach(build(family), Lora(rank=2), seed=0))
    found = []
    for budget, packing in ((1, False), (10_000, covers(model))):
        batches = micro_batches(rows, range(6), budget=budget, packing=packing, pad_id=0)
        one = copy.deepcopy(model).train()
        learnt = sum(batch.targets.numel() for batch in batches)
        with packed_attention(one, packing):
            loss = accumulate(one, batches, learnt, 0, 0, CPU, summed_loss)
        found.append((loss.item(), {name: parameter.grad for name, parameter in learning(one)}))
    (alone, expected), (together, gradients) = found
    assert together == pytest.approx(alone, rel=1e-5)
    assert relative(gradients, expected) < CLOSE
