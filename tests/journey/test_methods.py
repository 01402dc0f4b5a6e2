"""Every kind of method from recipe to answer by the command line; and what a recipe asks that a base has not."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from journey.test_bad_input import train

QUICK = ["training.steps=12", "training.batch_size=8", "training.learning_rate=1e-2"]
VIRTUAL = ["export.formats=[]", "training.learning_rate=0.05"]
WAYS = {
    "qlora": ["model.quantization=nf4", "training.optimizer=paged-adamw-8bit", "training.gradient_checkpointing=true"],
    "dora": ["method.dora=true", "method.dropout=0.1", "training.neftune_alpha=5"],
    "pissa": ["method.init=pissa", "method.rslora=true", "method.lora_plus_ratio=4", "method.layers=[-1]"],
    "loftq": ["model.quantization=nf4", "method.init=loftq", "training.optimizer=lion", "training.learning_rate=1e-3"],
    "whole-modules": ["method.modules_to_save=[embed_tokens]", "training.optimizer=adamw-8bit"],
    "last-layer": ["method={name: full, layers: [-1]}", "training.optimizer=muon", "training.batch_tokens=200"],
    "prompt-tuning": ["method={name: prompt-tuning, virtual_tokens: 6, text: good or bad}", *VIRTUAL],
    "prefix-tuning": ["method={name: prefix-tuning, virtual_tokens: 6}", "training.optimizer=adafactor", *VIRTUAL],
}


@pytest.fixture
def place(world, tmp_path) -> Path:
    return Path(shutil.copytree(world, tmp_path / "place"))


@pytest.mark.parametrize("way", WAYS)
def test_from_recipe_to_answer(afina, place, way):
    """Trained, evaluated, exported where it can be, and asked; the base beside it is the base."""
    if "model.quantization=nf4" in WAYS[way] or any("8bit" in word for word in WAYS[way]):
        pytest.importorskip("bitsandbytes")
    run = place / "run"
    ended = afina("run", place / "recipe.yaml", *QUICK, *WAYS[way], "--out", run)
    assert ended.status == 0, ended.out + ended.err
    facts = json.loads((run / "manifest.json").read_text())
    assert facts["training"]["final_loss"] < facts["training"]["first_loss"]
    tasks = json.loads((run / "evaluation" / "evaluation.json").read_text())["tasks"]
    assert all({"base", "tuned"} <= task["systems"].keys() for task in tasks)
    virtual = "tuning" in way
    assert virtual != (run / "export" / "certificate.json").is_file()
    if not virtual:
        exports = json.loads((run / "export" / "manifest.json").read_text())["exports"]
        assert [entry["format"] for entry in exports] == ["f32", "merged"]  # else a ProofError had ended it
        assert any(check["equal"] for check in exports[0]["checks"])
    tried = [shlex.split(line)[1:] for line in ended.out.partition("Try next")[2].splitlines() if line.strip()]
    assert "--beside-base" in tried[0] or way == "last-layer"
    for words in [words for words in tried if words[0] == "chat"]:  # what is advised works
        asked = afina(*words, "--prompt", "The soup is great.")
        assert asked.status == 0 and asked.out.strip(), asked.err
    assert not [words for words in tried if words[0] == "export"]
    if virtual:
        refused = afina("export", run, "--to", "q8_0")
        assert refused.status == 2 and "outside the weights" in refused.err and not (run / "export").exists()


@pytest.mark.parametrize(
    "override, told",
    [
        ("method.targets=[q_proj, Wqkv]", ["Wqkv", "q_proj, up_proj, v_proj"]),
        ("method.targets=[q_proj, self_attn.q_proj]", ["both match model.layers.0.self_attn.q_proj"]),
        ("method.targets=['*.nothing.*']", ["*.nothing.*"]),
        ("method.rank=33", ["method.rank is 33", "32 wide", "32 or less"]),
        ("method.layers=[2]", ["no layer 2", "from 0 to 1"]),
        ("method.modules_to_save=[heads]", ["called heads", "lm_head"]),
        ("model.max_length=257", ["257", "made for 256 tokens"]),
    ],
)
def test_what_the_base_has_not_is_told_with_its_key(afina, place, override, told):
    error = train(afina, place, override, "export.formats=[]", status=2)
    for part in told:
        assert part in error, error
    assert f"In the override {override}" in error


def test_a_fault_of_the_method_is_told_with_its_line(afina, place):
    recipe = place / "recipe.yaml"
    lines = recipe.read_text("utf-8").replace("rank: 16", "rank: 40").splitlines()
    recipe.write_text("\n".join(lines) + "\n", "utf-8")
    error = train(afina, place, status=2)
    number = next(place for place, line in enumerate(lines, 1) if "rank: 40" in line)
    assert f"recipe.yaml:{number}:3: method.rank is 40" in error


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["method={name: prompt-tuning}"], ["export.formats", "neither GGUF nor a merged model", "formats: []"]),
        (
            ["method={name: prefix-tuning}", "export.formats=[]", "training.gradient_checkpointing=true"],
            ["training.gradient_checkpointing", "keeps keys and values"],
        ),
        (["method.init=loftq"], ["method.init", "Set model.quantization to nf4"]),
        (["method.init=pissa", "model.quantization=nf4"], ["method.init", "plain weights"]),
        (["method={name: full}", "model.quantization=nf4"], ["model.quantization", "cannot learn itself"]),
        (["training.optimizer=muon"], ["training.optimizer", "for method full"]),
        (["method={name: prompt-tuning, virtual_tokens: 300}", "export.formats=[]"], ["virtual_tokens is 300", "256"]),
        (["method={name: prompt-tuning, virtual_tokens: 200}", "export.formats=[]"], ["200 virtual tokens", "56 or"]),
        (["model.quantization=int3"], ["model.quantization", "none, nf4, fp4 or int8"]),
    ],
)
def test_keys_that_do_not_go_together(afina, place, overrides, told):
    error = train(afina, place, *overrides, status=2)
    for part in told:
        assert part in error, error
