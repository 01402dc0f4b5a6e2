"""From a recipe to a folder: what is counted, what is set aside, and that the engine trains as the reference does."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import build, pack_folder
from journey.tiny import examples, lay_out, write_rows
from safetensors.torch import load_file
from small import spread

from afina.console import Console
from afina.errors import DataError, RecipeError
from afina.recipe.load import load
from afina.train.run import train_run


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    lay_out(folder)
    write_rows(folder / "other.jsonl", examples()[:9])
    write_rows(folder / "long.jsonl", [*examples()[:20], ("The soup " * 90, "good"), *examples()[20:30]])
    return folder


def run(place: Path, out: Path, *overrides: str) -> dict:
    console = Console()
    console.json = True
    out.mkdir(parents=True)
    return train_run(load(place / "recipe.yaml", overrides), place, out, console)


def steps(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return [line for line in lines if line["kind"] == "step"]


def test_the_engine_trains_as_the_reference_does(place, tmp_path):
    """Step after step: an engine that reads stale adapters has the first loss right and no other."""
    few = ["training.steps=12", "training.validations=2"]
    fused = run(place, tmp_path / "fused", *few)
    plain = run(place, tmp_path / "plain", *few, "training.engine=reference")
    assert "fused" in fused["engine"] and "reference" in plain["engine"]
    losses = [[step["loss"] for step in steps(tmp_path / name)] for name in ("fused", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < 0.6 * losses[0][0]
    assert fused["training"]["validation_loss"] == pytest.approx(plain["training"]["validation_loss"], rel=1e-3)
    weights = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("fused", "plain")]
    error = torch.stack([(weights[0][name] - weights[1][name]).norm() for name in weights[1]]).norm()
    assert error <= 1e-2 * torch.stack([value.norm() for value in weights[1].values()]).norm()


@pytest.mark.parametrize("products", ["fp8", "int8", "8bit"])
def test_products_in_eight_bits_train_or_say_why_not(place, tmp_path, products):
    few = ["training.steps=12", "training.validations=2"]
    eight = run(place, tmp_path / "eight", *few, f"training.products={products}")
    exact = run(place, tmp_path / "exact", *few)
    losses = [[step["loss"] for step in steps(tmp_path / name)] for name in ("eight", "exact")]
    assert "exact products" in exact["engine"]
    if products != "int8":  # a CPU multiplies so only where it is named; and this model is too loud for e4m3
        assert {"8bit": "this device", "fp8": "cosines"}[products] in eight["engine"] and losses[0] == losses[1]
        return
    assert "products in eight bits" in eight["engine"], eight["engine"]
    assert losses[0] == pytest.approx(losses[1], rel=0.15) and losses[0] != losses[1]
    found = load_file(tmp_path / "eight" / "adapter" / "adapter_model.safetensors")
    assert all(value.isfinite().all() and value.norm() > 0 for value in found.values())


def test_a_mixture_trains_in_the_engine_with_its_experts_packed(place, tmp_path):
    """gpt-oss as published, adapters on attention, experts and router: packed rows, as the padded reference trains."""
    base = shutil.copytree(place / "base", tmp_path / "base")
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    spread(build("gpt-oss", vocab_size=vocabulary, eos_token_id=2), scale=0.15).save_pretrained(base)
    pack_folder(base)
    few = [f"model.base={base}", "method.experts=true", "method.router=true", "training.steps=6"]
    fused = run(place, tmp_path / "fused", *few)
    padded = run(place, tmp_path / "padded", *few, "training.packing=false")
    assert "fused" in fused["engine"] and "padded" in padded["engine"]
    losses = [[step["loss"] for step in steps(tmp_path / name)] for name in ("fused", "padded")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


def test_packed_padded_and_in_small_pieces_train_alike(place, tmp_path):
    few = ["training.steps=6", "training.engine=reference"]
    cuts = {"packed": [], "padded": ["training.packing=false"], "pieces": ["training.micro_batch_tokens=128"]}
    found = {}
    for name, overrides in cuts.items():
        run(place, tmp_path / name, *few, *overrides)
        found[name] = [step["loss"] for step in steps(tmp_path / name)]
    assert found["packed"] == pytest.approx(found["padded"], rel=1e-4)
    assert found["packed"] == pytest.approx(found["pieces"], rel=1e-4)


def test_the_same_recipe_gives_the_same_bytes(place, tmp_path):
    few = ["training.steps=4", "method.dropout=0.1"]
    for name in ("one", "two"):
        run(place, tmp_path / name, *few)
    files = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    run(place, tmp_path / "other", *few, "seed=43")
    assert (tmp_path / "other" / "adapter" / "adapter_model.safetensors").read_bytes() != files[0]


def test_what_is_counted_adds_up(place, tmp_path):
    facts = run(place, tmp_path / "run", "training.steps=7", "training.batch_size=5")
    data, training, taken = facts["data"], facts["training"], steps(tmp_path / "run")
    assert data["rows"] == data["train"] + data["validation"] == 64 and data["rejected"] == []
    assert training["steps"] == len(taken) == 7 and training["samples"] == data["train"]
    assert training["tokens"] == sum(step["tokens"] for step in taken)
    assert training["learnt_tokens"] == sum(step["learnt"] for step in taken)
    assert [training["first_loss"], training["final_loss"]] == [taken[0]["loss"], taken[-1]["loss"]]
    assert training["trainable_parameters"] < training["parameters"] and training["peak_memory_bytes"] > 2**20


def test_epochs_are_passes_over_the_data(place, tmp_path):
    facts = run(place, tmp_path / "run", "training.steps=null", "training.epochs=1.5", "data.validation=0")
    assert facts["training"]["steps"] == 6  # 64 * 1.5 / 16
    assert facts["training"]["validation_loss"] is None


def test_validation_from_a_file_of_its_own(place, tmp_path):
    facts = run(place, tmp_path / "run", "training.steps=2", "data.validation=other.jsonl")
    assert (facts["data"]["rows"], facts["data"]["train"], facts["data"]["validation"]) == (73, 64, 9)
    assert {Path(file["name"]).name for file in facts["data"]["files"]} == {"train.jsonl", "other.jsonl"}


def test_a_long_sample_is_set_aside_once_with_all_its_reasons(place, tmp_path):
    few = ["training.steps=1", "data.train=long.jsonl", "data.too_long=reject", "data.validation=0.2"]
    data = run(place, tmp_path / "run", *few)["data"]
    assert data["rows"] == 31 == data["train"] + data["validation"] + len(data["rejected"])
    (entry,) = data["rejected"]
    assert Path(entry["file"]).name == "long.jsonl" and entry["line"] == 21 and "128" in entry["reason"]


def test_a_long_sample_stops_the_run_otherwise(place, tmp_path):
    with pytest.raises(DataError, match="1 of ") as caught:
        run(place, tmp_path / "run", "data.train=long.jsonl", "data.validation=0")
    assert caught.value.line == 21 and "too_long" in caught.value.hint


def test_a_context_beyond_the_models_is_refused(place, tmp_path):
    with pytest.raises(RecipeError, match="256") as caught:
        run(place, tmp_path / "run", "model.max_length=257")
    assert "256 or less" in caught.value.hint
