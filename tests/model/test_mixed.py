"""Rows of one batch under different adapters (DoRA, experts, routers), each as its adapter alone computes it."""

from typing import Any

import pytest
import small
import torch
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st
from small import llama, pack_like_a_checkpoint, perturb_adapters, spread
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from afina.model.attach import attach
from afina.model.generate import generate
from afina.model.mixed import alone, mixable, mixed
from afina.model.personalities import Personalities
from afina.model.saved import load_adapter, save_adapter
from afina.recipe.schema import Lora

SHAPE = {**small.SHAPE, "head_dim": 8}


def mixture(config: Any) -> nn.Module:
    return spread(AutoModelForCausalLM.from_config(config), scale=0.2)


def eager(model: Any) -> Any:
    """Experts one by one: grouped products know no fp64."""
    model.config._experts_implementation = "eager"
    return model


BASES = {
    "llama": llama,
    "biases": lambda: build("phi2"),
    "conv1d": lambda: build("gpt2"),
    "gpt-oss": lambda: build("gpt-oss"),
    "gpt-oss, packed": lambda: pack_like_a_checkpoint(build("gpt-oss")),
    "qwen3-moe": lambda: mixture(
        Qwen3MoeConfig(**SHAPE, moe_intermediate_size=24, num_experts=7, num_experts_per_tok=3, norm_topk_prob=True)
    ),
    "mixtral": lambda: mixture(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)),
}
DENSE = {
    "dora": Lora(rank=4, alpha=16, dora=True),
    "narrow dora": Lora(rank=2, alpha=2, dora=True, rslora=True, layers=[0]),
    "plain": Lora(rank=8, alpha=16),
}
EXPERTS = {
    "experts": Lora(rank=2, alpha=8, experts=True, router=True),
    "wider": Lora(rank=5, alpha=3, experts=True, router=True),
    "attention": Lora(rank=4, alpha=8, targets=["q_proj", "v_proj"]),
    "dora": Lora(rank=4, alpha=8, dora=True, targets=["q_proj", "o_proj"]),
}
PROMPTS = [[5, 9, 33], [7], [64, 3, 11, 90, 4], [8, 8], [40, 41, 42, 43, 44, 45, 46], [9]]
ASKED = {"end_ids": [2], "pad_id": 0, "max_new_tokens": 7}


def methods(base: str) -> dict[str, Lora]:
    return DENSE if base in ("llama", "biases", "conv1d") else EXPERTS


@pytest.fixture(scope="module", params=BASES)
def crew(request, tmp_path_factory) -> tuple[Personalities, dict[str | None, list[list[int]]], dict[Any, torch.Tensor]]:
    """All adapters on one base; what each answers alone; and what it computes alone in fp64."""
    place = tmp_path_factory.mktemp("adapters")
    make = BASES[request.param]
    ids = torch.tensor([[3 + (7 * row + place) % 90 for place in range(11)] for row in range(6)])
    together, answers, exact = Personalities(eager(make())), {}, {}
    for seed, (name, method) in enumerate(methods(request.param).items()):
        save_adapter(stirred(attach(make(), method, seed=seed), seed), place / name, base="x")
        alone = load_adapter(eager(make()), place / name)
        answers[name] = [generate(alone, [prompt], **ASKED)[0] for prompt in PROMPTS]
        with torch.no_grad():
            exact[name] = torch.cat([alone.double()(row[None]).logits for row in ids])
        together.load(name, place / name)
    answers[None] = [generate(make(), [prompt], **ASKED)[0] for prompt in PROMPTS]
    with torch.no_grad():
        exact[None] = eager(make()).double()(ids).logits
    exact["ids"] = ids
    return together, answers, exact


def stirred(model: nn.Module, seed: int) -> nn.Module:
    """B and the magnitudes of DoRA off what they begin as."""
    perturb_adapters(model, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def test_they_differ(crew):
    _together, answers, exact = crew
    assert len({str(found) for found in answers.values()}) == len(answers)
    truths = [truth for name, truth in exact.items() if name != "ids"]
    assert all((one - other).abs().max() > 1e-2 for at, one in enumerate(truths) for other in truths[:at])


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_answers_are_those_of_each_alone(crew, data):
    together, answers, _exact = crew
    names = data.draw(st.lists(st.sampled_from([None, *together.names]), min_size=1, max_size=6))
    assert mixable(together.model) >= {together._keys[name] for name in together.names}
    expected = [answers[name][place] for place, name in enumerate(names)]
    assert together.generate(PROMPTS[: len(names)], names, **ASKED) == expected


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 0], [3, 1, 1, 0, 2, 2], [1] * 6, [0, 3, 0, 3, 0, 3]], ids=str)
def test_logits_are_those_of_each_alone_in_fp64(crew, order):
    together, _answers, exact = crew
    there = [None, *together.names]
    names = [there[number % len(there)] for number in order]
    keys = [together._keys.get(name, "__base__") for name in names]
    model, ids = together.model, exact["ids"]
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    try:
        with torch.no_grad(), mixed(model.double(), keys):
            found = model(ids, adapter_names=keys).logits
    finally:
        model.float()
    assert before == {name: parameter.dtype for name, parameter in model.named_parameters()}
    for row, name in enumerate(names):
        # transformers' norms, angles and routers are fp32 even here
        assert (found[row] - exact[name][row]).abs().max() < 2e-5 * exact[name].abs().max(), name
    assert not any("forward" in vars(module) for module in model.modules())


def test_one_that_is_alone_is_computed_the_same_way(crew):
    """And is what PEFT computes, in fp64; nothing is left behind, and what is switched off stays off."""
    together, answers, exact = crew
    model, ids = together.model, exact["ids"]
    for name in together.names:
        model.set_adapter(together._keys[name])
        try:
            with torch.no_grad():
                wanted = model.double()(ids).logits
                with alone(model):
                    found = model(ids).logits
                with model.disable_adapter(), alone(model):
                    base = model(ids).logits
        finally:
            model.float()
        assert (found - wanted).abs().max() < 1e-6 * wanted.abs().max(), name
        assert (base - exact[None]).abs().max() < 1e-6 * wanted.abs().max()
        with together.answering(name) as answering:
            assert generate(answering, PROMPTS, **ASKED) == answers[name]
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("base", "method"), [("llama", "dora"), ("gpt-oss", "experts"), ("gpt-oss, packed", "experts")]
)
def test_writing_takes_that_way(base, method, monkeypatch, tmp_path):
    """Told by PEFT's own forward, which is not asked."""
    from peft.tuners.lora import layer
    from peft.tuners.lora.dora import DoraLinearLayer

    model = stirred(attach(BASES[base](), {**DENSE, **EXPERTS}[method], seed=0), 0)
    wanted = generate(model, PROMPTS, **ASKED)

    def never(*_given: Any, **_more: Any) -> None:
        raise AssertionError("PEFT's own way")

    monkeypatch.setattr(layer.ParamWrapper, "forward", never)
    monkeypatch.setattr(DoraLinearLayer, "forward", never)
    assert generate(model, PROMPTS, **ASKED) == wanted
