"""`afina plan` as a user meets it: a real process, a recipe that fits and one that does not, JSON, Spanish, Python."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli.test_verbs import ROOT, afina
from journey.tiny import save_base
from transformers import LlamaConfig

import afina as package
from afina.cli.plan import command
from afina.errors import DataError, ModelError
from afina.forecast.device import device_of
from afina.forecast.gpus import named
from afina.forecast.weigh import Given, weigh
from afina.recipe.load import load, parse

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SHAPE = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=8, num_attention_heads=32, vocab_size=128256)


@pytest.fixture
def large(tmp_path) -> Path:
    """A base of 2.8 billion parameters: its figures and a small tokenizer, no weights."""
    save_base(tmp_path / "tiny")
    folder = tmp_path / "large"
    shutil.copytree(tmp_path / "tiny", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    LlamaConfig(**SHAPE, num_key_value_heads=8, bos_token_id=None, eos_token_id=2, pad_token_id=0).save_pretrained(
        folder
    )
    return folder


def write_recipe(folder: Path, base: Path, words: int = 4, more: str = "") -> Path:
    rows = [{"prompt": f"Say {number}.", "completion": "word " * (words + number % 5 * 4)} for number in range(25)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: r\nmodel: {{base: {base}, max_length: 256}}\ndata: {{train: rows.jsonl, validation: 0.2}}\n"
        f"export: {{formats: []}}\ntraining: {{epochs: 2, batch_size: 4}}\n{more}"
    )
    return recipe


def test_a_large_base_on_a_small_card_and_what_makes_it_fit(tmp_path, large):
    recipe = write_recipe(tmp_path, large)
    done = afina("plan", recipe, "--gpu", "RTX 3050", "--memory", "3", "--json", cwd=tmp_path)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    (plan,) = [line for line in lines if line["event"] == "plan"]
    assert done.returncode == 6 and not plan["fits"] and lines[-1]["event"] == "error"
    assert plan["memory"]["parts"]["weights"] > 3 * 2**30 and plan["device"]["memory"] == 3 * 2**30
    assert plan["steps"] == 10 and plan["data"]["samples"] == 20 and plan["engine"] == "fused"
    fitting = plan["to_fit"][0]
    assert fitting["change"] == ["model.quantization=nf4"] and fitting["memory"]["fits"] and fitting["cost"]
    assert "model.quantization=nf4" in lines[-1]["hint"]
    assert {choice["method"] for choice in plan["choices"]} >= {"full", "qlora", "prompt-tuning"}
    assert plan["advice"]["method"] == "qlora" and plan["seconds"][0] < plan["seconds"][1]


def test_in_spanish(tmp_path):
    recipe = write_recipe(tmp_path, save_base(tmp_path / "tiny"))
    done = afina("plan", recipe, "--gpu", "T4", cwd=tmp_path, AFINA_LANG="es")
    assert done.returncode == 0 and "Cabe      sí" in done.stdout and "esta receta: lora" in done.stdout
    assert "pasos del optimizador" in done.stderr and "weights" not in done.stdout


def test_in_python_on_this_machine_then_trained(tmp_path, monkeypatch):
    """The peak of tensors, steps and samples are what a training then has; what was planned changes nothing of it."""
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, save_base(tmp_path / "tiny"), more="seed: 3\n")
    plan = package.plan(recipe, ["model.device=cpu"])
    run = package.train(recipe, tmp_path / "run", ["model.device=cpu"])
    manifest = package.open_artifact(run).manifest
    assert plan["fits"] and plan["time_from"] == "trial"
    assert plan["steps"] == manifest["training"]["steps"]
    assert plan["data"]["tokens_per_epoch"] == manifest["training"]["tokens_per_epoch"]
    assert plan["learnt"] == manifest["training"]["trainable_parameters"]
    assert plan["parameters"] == manifest["training"]["parameters"]
    first = package.open_artifact(run).manifest["training"]["first_loss"]
    other = package.train(recipe, tmp_path / "other", ["model.device=cpu"])
    assert package.open_artifact(other).manifest["training"]["first_loss"] == first


@pytest.mark.parametrize(
    "arguments, status, said",
    [
        (("--gpu", "Voodoo 2"), 6, "RTX 3090"),
        (("model.no_such=1",), 2, "no_such"),
        (("--memory", "0"), 2, "memory"),
    ],
)
def test_wrong_input_is_told(tmp_path, arguments, status, said):
    done = afina("plan", write_recipe(tmp_path, Path("afina/tiny")), *arguments, cwd=tmp_path)
    assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr


def test_samples_that_are_too_long_are_counted_and_refused_as_training_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, save_base(tmp_path / "tiny"))
    with pytest.raises(DataError, match=r"longer than model\.max_length"):
        command(recipe, ["model.max_length=100"], gpu="T4")
    plan = package.plan(recipe, ["model.max_length=100", "data.too_long=reject"], gpu="T4")
    assert plan["fits"] and plan["data"]["over"] > 0 and not plan["data"]["refused"]
    assert 0 < plan["samples"] < plan["data"]["samples"]


def test_what_cannot_be_read_is_told_as_training_tells_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, Path("afina/tiny"))
    with pytest.raises(DataError, match=r"none\.jsonl"):
        package.plan(recipe, ["data.train=none.jsonl"], gpu="T4")
    with pytest.raises(ModelError, match="nowhere"):
        package.plan(recipe, ["model.base=nowhere"], gpu="T4")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_weighed(path, tmp_path, monkeypatch):
    """On a T4, with samples as long as its context; of Phi-2 the shape alone is here."""
    monkeypatch.setenv("AFINA_REAL_DATA", "/real")
    from forecast.test_weigh import samples, wanted

    recipe = load(path)
    source = str(ROOT / "src/afina/bundled/tiny")
    if recipe.model.base != "afina/tiny":
        from transformers import PhiConfig

        shape = dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32)
        if "phi-2" not in recipe.model.base:
            shape = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=5, num_attention_heads=8)
        PhiConfig(**shape, vocab_size=51200, partial_rotary_factor=0.4).save_pretrained(tmp_path)
        source = str(tmp_path)
    given = wanted(source, recipe, [])
    given = Given(recipe, source, samples([recipe.model.max_length] * 4), given.tokenizer)
    need = weigh(given, device_of(recipe, named("T4"), None))
    assert need.fits and need.unknown is None and need.parts["weights"] > 0


def test_precision_follows_the_card():
    recipe = parse("name: a\ndata: {train: x}", "r.yaml")
    assert device_of(recipe, named("T4"), None).dtype is torch.float16
    assert device_of(recipe, named("RTX 3090"), None).dtype is torch.bfloat16
    assert device_of(recipe, None, 6.0).dtype is torch.bfloat16
