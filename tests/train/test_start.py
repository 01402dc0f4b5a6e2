"""A new run from an adapter, which is another thing than going on with a run that was stopped."""

import shutil

import pytest
from journey.tiny import lay_out
from train.test_run import run, steps

from afina import pipeline
from afina.artifact import seal
from afina.errors import ModelError, OutputError, RecipeError
from afina.recipe.load import load
from afina.train.opening import adapter_of

FEW = ["training.steps=8", "training.learning_rate=1e-2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    lay_out(folder)
    run(folder, folder / "first", *FEW)
    return folder


def test_a_new_run_starts_where_the_adapter_stands(world, tmp_path):
    fresh = steps(world / "first")
    facts = run(world, tmp_path / "second", *FEW, "model.adapter=first/adapter")
    assert steps(tmp_path / "second")[0]["loss"] < 0.5 * fresh[0]["loss"]
    assert facts["training"]["steps"] == 8 and facts["training"]["resumed_after"] == []
    assert [file["role"] for file in facts["data"]["files"]] == ["data", "adapter"]


@pytest.mark.parametrize("other", ["method.rank=8", "method.alpha=8", "method.targets=[q_proj]", "method.rslora=true"])
def test_an_adapter_of_another_shape_or_scale_is_refused(world, tmp_path, other):
    with pytest.raises(ModelError, match="first") as raised:
        run(world, tmp_path / "second", *FEW, "model.adapter=first/adapter", other)
    key = other.partition("=")[0]
    assert key == "method.targets" or raised.value.hint == f"Set {key} to what it is there."


@pytest.mark.parametrize("method", ["method={name: full}", "method.init=orthogonal"])
def test_only_plain_lora_starts_from_one(world, method):
    with pytest.raises(RecipeError, match="starts from a LoRA"):
        adapter_of(load(world / "recipe.yaml", ["model.adapter=first/adapter", method]), world, None)


def test_an_adapter_of_another_base_is_refused(world, tmp_path):
    shutil.copytree(world / "first", tmp_path / "first")
    seal(tmp_path / "first", "run", parents=[{"role": "base", "name": "other", "sha256": "0" * 64}])
    recipe = load(world / "recipe.yaml", [f"model.adapter={tmp_path / 'first'}"])
    with pytest.raises(ModelError, match="another base"):
        adapter_of(recipe, world, {"role": "base", "name": "base", "sha256": "1" * 64})
    assert (
        adapter_of(recipe, world, {"role": "base", "name": "b", "sha256": "0" * 64}) == tmp_path / "first" / "adapter"
    )


@pytest.mark.parametrize("hostile", ["pickle", "lengths", "settings", "missing"])
def test_a_hostile_adapter_is_refused(world, tmp_path, hostile):
    place = tmp_path / "bad"
    shutil.copytree(world / "first" / "adapter", place)
    weights = place / "adapter_model.safetensors"
    match hostile:
        case "pickle":
            weights.rename(place / "adapter_model.bin")
        case "lengths":
            weights.write_bytes((2**62).to_bytes(8, "little") + b"{}")
        case "settings":
            (place / "adapter_config.json").write_text("[" * 100_000)
        case "missing":
            (place / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match="bad"):
        run(world, tmp_path / "run", *FEW, f"model.adapter={place}")


def test_resume_never_begins_a_run(world, tmp_path):
    with pytest.raises(OutputError, match="no run that was stopped"):
        pipeline.train(world / "recipe.yaml", tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()
