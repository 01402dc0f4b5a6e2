"""Adapters side by side on one base answer as each does alone, and cost their own tensors alone."""

import json
from functools import partial
from pathlib import Path

import pytest
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from small import CPU, llama, perturb_adapters

from afina.errors import ModelError
from afina.model.attach import attach
from afina.model.generate import generate
from afina.model.load import load_model
from afina.model.personalities import Personalities
from afina.model.saved import load_adapter, save_adapter
from afina.recipe.schema import Lora, Model

KINDS = {
    "wide": Lora(rank=8, alpha=16),
    "narrow": Lora(rank=2, alpha=2, targets=["q_proj", "down_proj"]),
    "rooted": Lora(rank=4, alpha=8, rslora=True),
}
ASKED = {"end_ids": [2], "pad_id": 0, "max_new_tokens": 6}
PROMPTS = [[5, 9, 33], [7], [64, 3, 11, 90, 4], [8, 8], [40, 41]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    for seed, (name, method) in enumerate(KINDS.items()):
        save_adapter(perturb_adapters(attach(llama(), method, seed=seed), seed + 1), place / name, base="x")
    return {name: place / name for name in KINDS}


@pytest.fixture(scope="module")
def alone(folders) -> dict[str | None, list[list[int]]]:
    """What each answers alone, one prompt at a time; None is the base."""
    models = {name: load_adapter(llama(), folder) for name, folder in folders.items()} | {None: llama()}
    return {name: [generate(model, [prompt], **ASKED)[0] for prompt in PROMPTS] for name, model in models.items()}


@pytest.fixture(scope="module")
def crew(folders) -> Personalities:
    made = Personalities(llama())
    for name, folder in folders.items():
        made.load(name, folder)
    return made


def test_the_personalities_differ(alone):
    assert len({str(answers) for answers in alone.values()}) == 4


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([None, *KINDS]), min_size=5, max_size=5))
def test_mixed_in_one_batch_each_answers_as_alone(crew, alone, names):
    found = crew.generate(PROMPTS, names, **ASKED)
    assert found == [alone[name][place] for place, name in enumerate(names)]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([None, *KINDS]), min_size=1, max_size=6))
def test_chosen_one_after_another_each_answers_as_alone(crew, alone, names):
    for name in names:
        with crew.answering(name) as model:
            assert generate(model, PROMPTS[:1], **ASKED) == alone[name][:1]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=8))
def test_loaded_and_dropped_while_running(folders, alone, names):
    """Each name comes if it is not there and goes if it is; whoever is there answers as alone, the base always."""
    crew = Personalities(llama())
    empty = held(crew)
    for name in names:
        if name in crew.names:
            crew.drop(name)
        else:
            crew.load(name, folders[name])
        there = [None, *crew.names]
        found = crew.generate(PROMPTS[: len(there)], there, **ASKED)
        assert found == [alone[one][place] for place, one in enumerate(there)]
        assert held(crew) == empty + sum(crew.bytes_of(one) for one in crew.names)


def held(crew: Personalities) -> int:
    """Bytes of all storages of the model, each once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in crew.model.parameters()}
    return sum(storages.values())


def test_thirty_cost_thirty_adapters(folders):
    crew = Personalities(llama())
    empty = held(crew)
    for number in range(30):
        crew.load(f"person {number}. of 30", folders["wide"])
    layer = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)  # q, o; k, v; gate, up, down: rows and columns
    one = 2 * layer * KINDS["wide"].rank * 4
    assert crew.bytes_of("person 7. of 30") == one
    assert held(crew) == empty + 30 * one
    for name in crew.names:
        crew.drop(name)
    assert held(crew) == empty and crew.names == ()


def test_those_that_cannot_be_mixed_take_turns(tmp_path, monkeypatch):
    """Adapters on a parameter that is no expert's and no router's, as PEFT alone may make them."""
    for seed in range(2):
        config = LoraConfig(r=3, lora_alpha=6, target_parameters=["q_proj.weight"], target_modules=["k_proj"])
        made = perturb_adapters(get_peft_model(llama(), config), seed)
        made.save_pretrained(tmp_path / str(seed))
    crew = Personalities(llama())
    expected = [generate(llama(), PROMPTS[:1], **ASKED)[0]]
    for seed in range(2):
        crew.load(str(seed), tmp_path / str(seed))
        expected += generate(load_adapter(llama(), tmp_path / str(seed)), [PROMPTS[seed + 1]], **ASKED)
    assert crew.generate(PROMPTS[:3], [None, "0", "1"], **ASKED) == expected


def test_of_four_bits_too(tmp_path):
    pytest.importorskip("bitsandbytes")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    make = partial(load_model, str(tmp_path), CPU, Model(quantization="nf4"))
    crew, expected = Personalities(make()), []
    for seed, method in enumerate([Lora(rank=4, dora=True), Lora(rank=4), Lora(rank=2, dora=True, alpha=20)]):
        place = tmp_path / str(seed)
        save_adapter(perturb_adapters(attach(make(), method, seed=seed), seed), place, base="x")
        crew.load(str(seed), place)
        expected += generate(load_adapter(make(), place), [PROMPTS[seed]], **ASKED)
    assert len({str(found) for found in expected}) == 3
    assert crew.generate(PROMPTS[:3], ["0", "1", "2"], **ASKED) == expected


def test_other_targets_among_experts_cannot_share_a_base(tmp_path):
    for name, method in (("all", Lora(experts=True, router=True)), ("router", Lora(router=True))):
        save_adapter(attach(build("gpt-oss"), method, seed=0), tmp_path / name, base="x")
    crew = Personalities(build("gpt-oss"))
    crew.load("router", tmp_path / "router")
    with pytest.raises(
        ModelError, match=r"target_parameters are .*experts.* but mlp.router.weight of router"
    ) as caught:
        crew.load("all", tmp_path / "all")
    assert "adapter_config.json" in str(caught.value) and crew.names == ("router",)


def test_what_cannot_be_is_said_and_changes_nothing(folders, tmp_path, alone):
    crew = Personalities(llama())
    with pytest.raises(ModelError, match="no personality called x"):
        crew.generate(PROMPTS[:1], ["x"], **ASKED)
    crew.load("wide", folders["wide"])
    with pytest.raises(ModelError, match="already"):
        crew.load("wide", folders["narrow"])
    with pytest.raises(ModelError, match="holds no adapter"):
        crew.load("nobody", tmp_path)
    save_adapter(attach(llama(hidden_size=64), Lora(), seed=0), tmp_path / "other", base="x")
    with pytest.raises(ModelError, match="does not fit"):
        crew.load("other", tmp_path / "other")
    save_adapter(attach(llama(), Lora(bias="all"), seed=0), tmp_path / "biased", base="x")
    with pytest.raises(ModelError, match="cannot share its base"):
        crew.load("biased", tmp_path / "biased")
    whole = json.loads((folders["narrow"] / "adapter_config.json").read_text()) | {"modules_to_save": ["lm_head"]}
    (tmp_path / "biased" / "adapter_config.json").write_text(json.dumps(whole))
    with pytest.raises(ModelError, match="modules_to_save"):
        crew.load("biased", tmp_path / "biased")
    assert crew.names == ("wide",)
    assert held(crew) == sum(p.numel() * 4 for p in llama().parameters()) + crew.bytes_of("wide")
    assert crew.generate(PROMPTS[:2], [None, "wide"], **ASKED) == [alone[None][0], alone["wide"][1]]
