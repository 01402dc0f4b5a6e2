import json
import shutil
from pathlib import Path

import pytest
import torch
from journey.tiny import lay_out

import afina
from afina.artifact import open_artifact
from afina.errors import AfinaError, ModelError
from afina.train.reopen import check_unchanged, recipe_of, reopen

IDS = torch.tensor([[5, 9, 200, 33, 17]])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    lay_out(folder)
    return afina.train(folder / "recipe.yaml", folder / "run", ["training.steps=5", "tasks=[]", "export.formats=[]"])


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def test_a_run_is_opened_as_it_was_left(run):
    tuned = reopen(run)
    assert not tuned.model.training and tuned.recipe.name == "opinions"
    assert tuned.renderer.tokenizer.template == (run / "adapter" / "chat_template.jinja").read_text("utf-8")
    assert tuned.recipe == recipe_of(open_artifact(run))[0]


def test_inside_base_the_model_is_the_base_and_outside_it_is_not(run):
    tuned = reopen(run)
    whole = logits(tuned.model)
    with tuned.base():
        base = logits(tuned.model)
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(run.parent / "base").eval()
    assert torch.equal(base, logits(plain))
    assert torch.equal(whole, logits(tuned.model)) and not torch.equal(whole, base)


def test_a_precision_may_be_asked_for(run):
    assert reopen(run, "fp32").hardware.dtype == torch.float32


def test_another_place_opens_it_as_well(run, tmp_path):
    moved = Path(shutil.copytree(run, tmp_path / "elsewhere"))
    assert torch.equal(logits(reopen(moved).model), logits(reopen(run).model))


@pytest.mark.parametrize("manifest", ["recipe", "name", "method"])
def test_a_manifest_whose_recipe_is_not_read_is_one_clear_error(run, tmp_path, manifest):
    broken = Path(shutil.copytree(run, tmp_path / "broken"))
    content = json.loads((broken / "manifest.json").read_text())
    if manifest == "recipe":
        del content["recipe"]
    else:
        content["recipe"][manifest] = {"from": "the future"}
    (broken / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(AfinaError, match="no recipe that this version reads") as caught:
        reopen(broken)
    assert caught.value.file == str(broken / "manifest.json") and "\n" not in caught.value.message


def test_what_was_trained_is_told_from_what_lies_there_now(run, tmp_path):
    check_unchanged(open_artifact(run))
    broken = Path(shutil.copytree(run, tmp_path / "broken"))
    (broken / "adapter" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json was changed or damaged"):
        check_unchanged(open_artifact(broken))
    (broken / "README.md").write_text("edited by its owner, which is fine")
    shutil.copy(run / "adapter" / "tokenizer.json", broken / "adapter")
    check_unchanged(open_artifact(broken))


def test_a_base_that_is_gone_is_named(run, tmp_path):
    lost = Path(shutil.copytree(run, tmp_path / "lost"))
    content = json.loads((lost / "manifest.json").read_text())
    content["recipe"]["model"]["base"] = "gone-with-the-wind"
    (lost / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="gone-with-the-wind"):
        reopen(lost)
