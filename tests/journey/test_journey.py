"""The whole path with a very small model: train, evaluate, export, chat; by the Python API and by the command line."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from journey.conftest import COMMAND
from journey.tiny import write_rows
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import afina as api
from afina import durable
from afina.artifact import open_artifact
from afina.errors import ModelError, OutputError
from afina.pipeline import artifact

RUN_FILES = {
    "README.md",
    "adapter",
    "answers.jsonl",
    "evaluation",
    "export",
    "loss.png",
    "manifest.json",
    "metrics.jsonl",
    "recipe.yaml",
    "report.html",
    "report.json",
    "report.md",
}
ADAPTER_FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def done(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made by the Python API, verb by verb."""
    run = tmp_path_factory.mktemp("runs") / "by-api"
    assert api.train(world / "recipe.yaml", run) == run
    assert not (run / "evaluation").exists() and not (run / "export").exists()
    assert api.evaluate(run) == run / "evaluation"
    assert api.export(run) == run / "export"
    return run


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def evaluation(run: Path) -> dict:
    return {
        task["name"]: task["systems"] for task in json.loads((run / "evaluation/evaluation.json").read_text())["tasks"]
    }


def test_a_run_folder_holds_what_it_should_and_nothing_else(done):
    assert names(done) == RUN_FILES
    assert names(done / "adapter") == ADAPTER_FILES
    assert names(done / "evaluation") == {"evaluation.json", "manifest.json", "predictions.jsonl"}
    assert {"manifest.json", "merged", "opinions-f32.gguf"} <= names(done / "export")
    assert not list(done.parent.glob(".*"))


def test_the_model_has_learnt(done):
    found = evaluation(done)
    assert found["opinion"]["base"]["accuracy"] <= 0.7
    assert found["opinion"]["tuned"]["accuracy"] >= 0.9
    assert found["written"]["base"]["accuracy"] <= 0.1
    assert found["written"]["tuned"]["accuracy"] >= 0.9


def test_every_artifact_is_what_its_manifest_says(done, world):
    for folder, kind in ((done, "run"), (done / "evaluation", "evaluation"), (done / "export", "export")):
        assert artifact(folder).kind == kind
    manifest = open_artifact(done, "run").manifest
    assert manifest["recipe"]["training"]["steps"] == 40 and manifest["seed"] == 42
    assert manifest["data"]["rows"] == 64 == manifest["data"]["train"] + manifest["data"]["validation"]
    assert {parent["role"] for parent in manifest["parents"]} == {"base", "data"}
    assert {"torch", "transformers", "peft", "python", "afina"} <= manifest["versions"].keys()
    run_digest = open_artifact(done).digest
    for child in ("evaluation", "export"):
        assert run_digest in [parent["sha256"] for parent in open_artifact(done / child).manifest["parents"]]


def test_the_recipe_in_the_run_folder_makes_the_same_run(done, world, tmp_path):
    """As resolved, every default written out; moved to another folder only its relative paths are to be minded."""
    shutil.copy(done / "recipe.yaml", world / "again.yaml")
    api.train(world / "again.yaml", tmp_path / "again")
    first, second = (
        [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in path.open()]
        for path in (done / "metrics.jsonl", tmp_path / "again" / "metrics.jsonl")
    )
    assert first == second
    weights = "adapter/adapter_model.safetensors"
    assert (done / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()


def test_the_adapter_is_opened_by_plain_peft_and_answers_as_the_merged_model(done, world):
    base = AutoModelForCausalLM.from_pretrained(world / "base")
    adapted = PeftModel.from_pretrained(base, done / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(done / "adapter")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The soup is great."}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    answer = adapted.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == "good"
    merged = AutoModelForCausalLM.from_pretrained(done / "export" / "merged").eval()
    with torch.inference_mode():
        torch.testing.assert_close(
            merged(input_ids=prompt).logits, adapted(input_ids=prompt).logits, rtol=1e-4, atol=1e-4
        )


def test_real_llama_cpp_answered_as_the_model(done):
    pytest.importorskip("xllamacpp")
    exports = {entry["format"]: entry for entry in open_artifact(done / "export").manifest["exports"]}
    assert len(exports["f32"]["checks"]) >= 8 and all(check["equal"] for check in exports["f32"]["checks"])
    assert {check["gguf"].strip() for check in exports["f32"]["checks"]} == {"good", "bad"}
    assert exports["merged"]["checks"] == []


def test_run_again_skips_what_is_done(done, world, afina):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    again = afina("run", world / "recipe.yaml", "--out", done)
    assert again.status == 0
    assert "is trained already" in again.out and "Done: opinions" in again.out
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == before


def test_run_finishes_what_is_missing(done, world, afina, tmp_path):
    half = Path(shutil.copytree(done, tmp_path / "half"))
    shutil.rmtree(half / "export")
    left = durable._partial_prefix(half / "export").replace(f"-{os.getpid()}-", "-999999999-")
    (half / left).mkdir()  # what a killed process leaves
    assert afina("run", world / "recipe.yaml", "--out", half).status == 0
    assert names(half) == RUN_FILES
    artifact(half / "export")


def test_another_recipe_in_the_same_place_is_refused(done, world, afina):
    refused = afina("run", world / "recipe.yaml", "training.learning_rate=1e-3", "--out", done)
    assert refused.status == 5
    assert "holds a run of another recipe" in refused.err and "--out" in refused.err


def test_data_that_has_changed_since_is_noticed(done, world, afina):
    kept = (world / "train.jsonl").read_bytes()
    try:
        write_rows(world / "train.jsonl", [("The soup is cold.", "bad")] * 20)
        refused = afina("run", world / "recipe.yaml", "--out", done)
    finally:
        (world / "train.jsonl").write_bytes(kept)
    assert refused.status == 5 and "train.jsonl was changed" in refused.err


def test_a_verb_whose_work_is_done_says_so(done, world, afina):
    assert "exists already" in afina("train", world / "recipe.yaml", "--out", done).err
    refused = afina("export", done)
    assert refused.status == 5 and "exists already" in refused.err and "Remove the folder" in refused.err
    assert afina("eval", done).status == 0  # the exported file is asked too
    known = (done / "answers.jsonl").read_bytes()
    assert afina("eval", done).status == 0
    assert (done / "answers.jsonl").read_bytes() == known, "what was answered is not asked again"


def test_a_damaged_adapter_is_noticed_before_it_is_asked(done, tmp_path):
    broken = Path(shutil.copytree(done, tmp_path / "broken"))
    for child in ("evaluation", "export"):
        shutil.rmtree(broken / child)
    weights = broken / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(OutputError, match="adapter_model"):
        artifact(broken)
    for verb in (api.evaluate, api.export):
        with pytest.raises(ModelError, match="changed or damaged"):
            verb(broken)
    assert not list(broken.glob("*.partial*")) and not (broken / "export").exists()


def test_a_base_that_has_changed_since_is_noticed(done, world):
    kept = (world / "base" / "generation_config.json").read_bytes()
    try:
        (world / "base" / "generation_config.json").write_bytes(kept + b"\n")
        shutil.rmtree(done / "evaluation", ignore_errors=True)
        with pytest.raises(ModelError, match="has changed since"):
            api.evaluate(done)
    finally:
        (world / "base" / "generation_config.json").write_bytes(kept)
        api.evaluate(done)


def test_chat_answers_from_run_model_folder_and_gguf(done, world, afina):
    for source in (done, done / "export" / "merged", done / "export" / "opinions-f32.gguf"):
        if source.suffix == ".gguf":
            pytest.importorskip("xllamacpp")
        for thing, verdict in (("The soup is great.", "good"), ("The lamp is broken.", "bad")):
            said = afina("chat", source, "--prompt", thing, "--temperature", 0)
            assert said.status == 0, said.err
            assert verdict in said.out.split()


def test_chat_shows_the_base_beside_the_tuned_model(done, afina):
    said = afina("chat", done, "--beside-base", "--prompt", "The soup is great.")
    assert said.status == 0
    assert said.out.index("base") < said.out.index("tuned") and "good" in said.out


def test_json_lines_are_parsed_and_end_with_the_run(world, afina, tmp_path):
    finished = afina("run", world / "recipe.yaml", "training.steps=3", "--out", tmp_path / "run", "--json")
    assert finished.status == 0
    events = [event["event"] for event in finished.events]
    assert [event for event in dict.fromkeys(events)] == [
        "data",
        "progress",
        "validation",
        "trained",
        "export",
        "task",
        "done",
    ]
    data = finished.events[0]
    assert data["rows"] == data["train"] + data["validation"] + len(data["rejected"])
    assert finished.events[-1]["run"] == str(tmp_path / "run")
    failed = afina("run", world / "nowhere.yaml", "--json")
    assert failed.status == 2 and failed.events[-1]["event"] == "error" and failed.events[-1]["exit_status"] == 2


def test_full_fine_tuning_goes_the_same_way(world, tmp_path):
    run = api.run(
        world / "recipe.yaml", tmp_path / "full", ["method={name: full}", "training.steps=25", "training.keep=last"]
    )
    assert evaluation(run)["written"]["tuned"]["accuracy"] >= 0.9
    assert "model.safetensors" in names(run / "adapter")
    assert "library_name: transformers" in (run / "README.md").read_text("utf-8")


def test_spanish_where_the_locale_is(world, afina, monkeypatch, tmp_path):
    monkeypatch.delenv("AFINA_LANG", raising=False)
    for variable in ("LC_ALL", "LC_MESSAGES", "LANG", "LANGUAGE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("LANG", "es_ES.UTF-8")
    finished = afina("train", world / "recipe.yaml", "training.steps=2", "--out", tmp_path / "es")
    assert finished.status == 0, finished.err
    assert "Entrenando opinions" in finished.out or "Entrenamiento" in finished.out
    assert "Trained" not in finished.out and "Data " not in finished.out
    failed = afina("train", world / "recipe.yaml", "--out", tmp_path / "es")
    assert failed.status == 5 and "ya existe" in failed.err


@pytest.mark.slow
def test_the_two_minutes_of_a_newcomer(tmp_path):
    """init, put your rows in, run, chat: as processes, in a folder far from the checkout."""

    def afina(*arguments: str) -> str:
        finished = subprocess.run(
            [*COMMAND, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    afina("init", "custom", "mine")
    write_rows(tmp_path / "mine/data/train.jsonl", [(f"What is {n}?", f"It is {n}.") for n in range(20)])
    afina("run", "mine/recipe.yaml", "training.steps=2", "export.formats=[merged]", "--out", "mine/runs/first")
    assert (tmp_path / "mine/runs/first/report.html").stat().st_size > 10_000
    assert afina("chat", "mine/runs/first", "--prompt", "What is 3?", "--temperature", "0").strip()
