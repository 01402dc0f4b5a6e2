"""What stands before a sample stands before each of them; noise is as large as the sample's length says."""

import numpy as np
import pytest
import torch
from small import CPU, llama
from transformers import AutoModelForCausalLM, MistralConfig

from afina.data.batch import micro_batches
from afina.data.template import Rendered
from afina.model.attach import attach
from afina.model.generate import generate
from afina.model.load import limit_of, load_model
from afina.model.loss import summed_loss, target_logits
from afina.model.packed import packed_attention
from afina.model.saved import load_adapter, save_adapter
from afina.model.virtual import lay, virtual_tokens, without
from afina.recipe.schema import Lora, PrefixTuning, PromptTuning

PROMPT, PREFIX = PromptTuning(name="prompt-tuning", virtual_tokens=4), PrefixTuning(name="prefix-tuning")
METHODS = [PROMPT, PrefixTuning(name="prefix-tuning", virtual_tokens=4)]


def rows(*lengths: int, seed: int = 0) -> list[Rendered]:
    random = np.random.default_rng(seed)
    return [
        Rendered(random.integers(3, 97, n).astype(np.int32), np.append(np.zeros(n - 1, bool), True)) for n in lengths
    ]


def batch_of(samples: list[Rendered], packing: bool):
    (batch,) = micro_batches(samples, range(len(samples)), budget=10_000, packing=packing, pad_id=0)
    return batch


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_logits_are_pefts_own_for_a_row_of_one_sample(method):
    model = attach(llama(), method, seed=0).eval()
    (sample,) = rows(9)
    with torch.inference_mode():
        theirs = model(input_ids=torch.from_numpy(sample.ids[None].astype(np.int64))).logits[0, -2]
        ours = target_logits(model, batch_of([sample], packing=False))[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_virtual_tokens_stand_before_each_packed_sample():
    model = attach(llama(), PROMPT, seed=0).eval()
    samples = rows(5, 2, 7)
    laid = lay(model, batch_of(samples, packing=True))
    order = [index for _bin in [0] for index in batch_of(samples, packing=True).samples]
    lengths = [int(samples[index].ids.size) for index in order]
    assert laid.lengths == tuple(length + 4 for length in lengths) and laid.width == sum(lengths) + 12
    assert laid.inputs["position_ids"][0].tolist() == [place for length in laid.lengths for place in range(length)]
    prompt, words = model.get_prompt(batch_size=1)[0], model.get_base_model().get_input_embeddings()
    start = 0
    for index, length in zip(order, laid.lengths, strict=True):
        row = laid.inputs["inputs_embeds"][0, start : start + length]
        assert torch.equal(row[:4], prompt)
        assert torch.equal(row[4:], words(torch.from_numpy(samples[index].ids.astype(np.int64))))
        start += length


def test_a_text_is_where_virtual_tokens_begin():
    model = attach(llama(), PROMPT, seed=0, text_ids=[5, 9, 33])
    words = model.get_base_model().get_input_embeddings().weight
    assert torch.equal(model.get_prompt(batch_size=1)[0], words[[5, 9, 33, 5]])


@pytest.mark.parametrize("method", [*METHODS, Lora(rank=2, bias="all")], ids=lambda method: method.name)
def test_switched_off_it_is_the_base(method, tmp_path):
    base = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE)).eval() if method.name == "lora" else llama()
    base.save_pretrained(tmp_path / "base")
    learnt = attach(load_model(str(tmp_path / "base"), CPU), method, seed=0)
    with torch.no_grad():
        for parameter in learnt.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    save_adapter(learnt, tmp_path / "adapter", base="x")
    model = load_adapter(load_model(str(tmp_path / "base"), CPU), tmp_path / "adapter")
    prompts, asked = [[5, 9, 33], [7]], {"end_ids": [2], "pad_id": 0, "max_new_tokens": 5}
    batch, before = batch_of(rows(5, 8), packing=False), limit_of(model)
    with torch.inference_mode():
        tuned, plain = target_logits(model, batch), target_logits(base, batch)
        with without(model):
            assert torch.equal(target_logits(model, batch), plain) and virtual_tokens(model) == 0
            assert generate(model, prompts, **asked) == generate(base, prompts, **asked)
            assert limit_of(model) == limit_of(base)
        assert torch.equal(target_logits(model, batch), tuned) and not torch.equal(tuned, plain)
    assert limit_of(model) == before == limit_of(base) - virtual_tokens(model)


SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "sliding_window": 8}  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_batch_is_written_as_each_prompt_alone(method):
    """With a sliding window too, which padding between prefix and prompt would fill."""
    torch.manual_seed(0)
    model = attach(AutoModelForCausalLM.from_config(MistralConfig(**SHAPE)), method, seed=0).eval()
    prompts, asked = (
        [[5, 9, 33, 80, 7, 64, 8, 8, 12], [7], [9, 4, 4]],
        {"end_ids": [2], "pad_id": 0, "max_new_tokens": 12},
    )
    together = generate(model, prompts, **asked)
    assert together == [generate(model, [prompt], **asked)[0] for prompt in prompts]
    heard = []
    generate(model, prompts[:1], **asked, on_token=heard.append)
    assert heard[: len(together[0])] == together[0]


@pytest.mark.parametrize("packing", [True, False])
def test_noise_is_bounded_by_each_samples_own_length_and_only_while_learning(packing):
    """Jain et al.: uniform, at most alpha / sqrt(length * width) of each sample, whatever else shares its row."""
    model = attach(llama(), Lora(rank=2), seed=0)
    samples, alpha = rows(4, 30, 11), 5.0
    batch = batch_of(samples, packing)
    words = model.get_input_embeddings()(batch.input_ids)
    torch.manual_seed(1)
    noise = (lay(model.train(), batch, alpha).inputs["inputs_embeds"] - words).detach()
    lengths = [int(samples[index].ids.size) for index in batch.samples]
    parts = noise[0].split(lengths) if packing else [row[:length] for row, length in zip(noise, lengths, strict=True)]
    for part, length in zip(parts, lengths, strict=True):
        bound = alpha / (length * 32) ** 0.5
        assert 0.8 * bound < part.abs().max() <= bound * (1 + 1e-5) and abs(part.mean()) < bound / 4
    assert "inputs_embeds" not in lay(model.eval(), batch, alpha).inputs


def test_noise_is_repeatable_and_learns():
    model = attach(llama(), Lora(rank=2), seed=0).train()
    batch, found = batch_of(rows(6, 9), packing=True), []
    with packed_attention(model):
        for seed in (7, 7, 8):
            torch.manual_seed(seed)
            found.append(summed_loss(model, batch, 5.0).item())
        plain = summed_loss(model, batch).item()
    assert found[0] == found[1] != found[2] and plain not in found
