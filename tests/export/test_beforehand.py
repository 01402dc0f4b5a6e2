"""What cannot be exported is said before training; a base named as hubs name it is as good as one in a folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from journey.tiny import RECIPE, lay_out

import afina
from afina.errors import ModelError
from afina.export.beforehand import why_no_gguf
from afina.recipe.load import load

NAME = "acme/opinions"


def unknown_splitter(base: Path) -> None:
    definition = json.loads((base / "tokenizer.json").read_text("utf-8"))
    cut = {"type": "Split", "pattern": {"Regex": "[a-f]+|[^a-f]"}, "behavior": "Isolated", "invert": False}
    bytes_of = definition["pre_tokenizer"] | {"use_regex": False}
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [cut, bytes_of]}
    (base / "tokenizer.json").write_text(json.dumps(definition), "utf-8")


def in_the_cache(root: Path, base: Path) -> Path:
    """The folder `base` as the hub's cache holds the model NAME."""
    commit, place = "0" * 40, root / f"models--{NAME.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit, "utf-8")
    (place / "snapshots").mkdir()
    return base.rename(place / "snapshots" / commit)


def by_command(cache: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line, for which the hub is its cache: where that lies is read once a process."""
    there = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "LANG": "C"}
    command = [sys.executable, "-m", "afina", *words]
    return subprocess.run(command, cwd=folder, env=there, capture_output=True, text=True, check=False)


def test_a_splitter_that_llamacpp_does_not_know_is_said_before_training(tmp_path: Path) -> None:
    recipe = lay_out(tmp_path)
    wanted = load(recipe, [])
    assert why_no_gguf(wanted, tmp_path) is None
    unknown_splitter(tmp_path / "base")
    error = why_no_gguf(wanted, tmp_path)
    assert error is not None and "pre-tokenizer" in error.message and "[a-f]+" in error.message
    with pytest.raises(ModelError, match="pre-tokenizer"):
        afina.train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    afina.train(recipe, tmp_path / "run", ["export.formats=[merged]", "training.steps=2"])  # these need no llama.cpp


def test_a_base_of_the_hub_is_looked_at_and_merged_as_one_in_a_folder(tmp_path: Path) -> None:
    recipe = lay_out(tmp_path, RECIPE.replace("base: base", f"base: {NAME}"))
    base = in_the_cache(tmp_path / "cache", tmp_path / "base")
    done = by_command(tmp_path / "cache", tmp_path, "train", str(recipe), "--out", "run", "training.steps=12")
    assert done.returncode == 0, done.stdout + done.stderr
    done = by_command(tmp_path / "cache", tmp_path, "export", "run", "--to", "f32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of the disk" in done.stdout  # what it takes was counted before
    said = json.loads((tmp_path / "run" / "export" / "certificate.json").read_text("utf-8"))
    assert said["merge"]["streamed"]
    unknown_splitter(base)
    refused = by_command(tmp_path / "cache", tmp_path, "train", str(recipe), "--out", "another")
    assert refused.returncode != 0 and "pre-tokenizer" in refused.stdout + refused.stderr
    assert not (tmp_path / "another").exists()


def test_a_name_the_hub_does_not_have_is_for_the_training_to_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    recipe = lay_out(tmp_path, RECIPE.replace("base: base", "base: acme/nothing"))
    assert why_no_gguf(load(recipe, []), tmp_path) is None
