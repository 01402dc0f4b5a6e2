"""Taken out is as if it had never been: the smaller model says what the whole one says with these parts silent."""

import copy

import pytest
import torch
from families import build
from small import llama
from torch import nn
from transformers import AutoModelForCausalLM

from afina.compress.parts import (
    channels_left,
    channels_of,
    channels_to_keep,
    influences,
    keep_channels,
    keep_layers,
    layers_of,
    layers_to_keep,
)
from afina.errors import ModelError
from afina.model.imatrix import collect

IDS = [[1, 5, 9, 33, 80, 7, 2, 64], [3, 3, 17, 90, 41]]
FAMILIES = ["llama3.2", "qwen2", "phi2", "phi3", "gpt2"]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in IDS])


def reloaded(model: nn.Module, folder) -> nn.Module:
    """As plain transformers opens what was saved."""
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_influence_is_how_far_a_layer_turns_its_input():
    model = llama(num_hidden_layers=4)
    sums, tokens = torch.zeros(4, dtype=torch.float64), 0
    norm = model.model.norm
    model.model.norm = nn.Identity()  # else the last hidden states are normed
    with torch.inference_mode():
        for ids in IDS:
            states = model.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
            for place in range(4):
                before, after = states[place][0].double(), states[place + 1][0].double()
                sums[place] += (1 - (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)).sum()
            tokens += len(ids)
    model.model.norm = norm
    assert influences(model, IDS) == pytest.approx((sums / tokens).tolist(), abs=1e-6)


def test_the_layers_of_least_influence_go():
    assert layers_to_keep([0.5, 0.1, 0.3, 0.1, 0.9], 0.4) == [0, 2, 4]
    assert layers_to_keep([0.5, 0.1, 0.3, 0.1, 0.9], 0.2) == [0, 2, 3, 4]  # of equals the first
    for share in (0.05, 0.95):
        with pytest.raises(ModelError, match="5 layers"):
            layers_to_keep([0.5, 0.1, 0.3, 0.1, 0.9], share)


class Silent(nn.Module):
    """A layer that hands on what enters it."""

    def forward(self, hidden_states, *_more, **_named):
        return hidden_states


@pytest.mark.parametrize("family", FAMILIES)
def test_without_layers_the_model_is_what_it_is_with_silent_ones(family, tmp_path):
    more = {"layer_types": ["full_attention"] * 4} if family == "qwen2" else {}
    model = build(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 4}, **more)
    silent = copy.deepcopy(model)
    _parent, _name, layers = layers_of(silent)
    layers[1], layers[2] = Silent(), Silent()
    keep_layers(model, [0, 3])
    assert torch.equal(logits(model), logits(silent))
    again = reloaded(model, tmp_path)
    assert again.config.num_hidden_layers == 2
    assert torch.allclose(logits(again), logits(silent), atol=1e-6)
    prompt = torch.tensor([IDS[0]])
    for one in (model, again):  # with a cache, in which each layer has its place
        told = one.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
        plain = one.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=False)
        assert torch.equal(told, plain)


def test_layers_that_take_turns_are_refused():
    with pytest.raises(ModelError, match="take turns"):
        keep_layers(build("gemma2"), [0])


@pytest.mark.parametrize("family", FAMILIES)
def test_without_channels_the_model_is_what_it_is_with_empty_columns(family, tmp_path):
    model = build(family)
    empty = copy.deepcopy(model)
    kept = channels_to_keep(model, collect(model, IDS), 0.25)
    for name, parts in channels_of(empty).items():
        last = empty.get_submodule(f"{name}.{parts[-1]}")
        weight = last.weight if isinstance(last, nn.Linear) else last.weight.t()
        gone = torch.ones(weight.shape[1], dtype=torch.bool)
        gone[kept[name]] = False
        assert gone.sum() == round(0.25 * weight.shape[1])
        with torch.no_grad():
            weight[:, gone] = 0
    keep_channels(model, kept)
    assert torch.allclose(logits(model), logits(empty), atol=2e-5)
    again = reloaded(model, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in empty.parameters())


def test_the_channels_that_add_least_go():
    model = llama(num_hidden_layers=1)
    seen = []
    down = model.model.layers[0].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0].detach()[0].double()))
    logits(model)
    handle.remove()
    inputs = torch.cat(seen)
    added = torch.stack([(inputs[:, [c]] * down.weight[:, c].double()).square().sum() for c in range(48)])
    (kept,) = channels_to_keep(model, collect(model, IDS), 0.5).values()
    assert kept.tolist() == sorted(added.argsort(descending=True)[:24].tolist())


def test_channels_go_in_blocks_that_kernels_and_quants_like():
    assert channels_left(8192, 0.3) == 5632 == 22 * 256
    assert channels_left(512, 0.3) == 352 == 11 * 32
    assert channels_left(100, 0.3) == 70
    for share in (0.01, 0.99):
        with pytest.raises(ModelError, match="512 channels"):
            channels_left(512, share)


def test_a_mixture_has_no_such_channels():
    with pytest.raises(ModelError, match="not of a form"):
        channels_of(build("gpt-oss"))
