"""A run pruned: what it cost is what transformers alone finds, and what is left is a model anywhere."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from journey.conftest import COMMAND
from journey.tiny import lay_out
from small import CPU, llama
from torch.nn import functional as F
from train.test_optimizer import NAMES, go_on
from transformers import AutoModelForCausalLM, AutoTokenizer

import afina
from afina import compression
from afina.artifact import folder_digest, open_artifact
from afina.compress.prune import cuts_of
from afina.console import Console
from afina.data.load_tokenizer import load_tokenizer
from afina.data.template import Renderer
from afina.errors import AfinaError, RecipeError
from afina.export.run import export_run
from afina.model.attach import attach
from afina.recipe.load import load
from afina.recipe.schema import Full, Training
from afina.train.examples import prepare
from afina.train.state import begin


def quiet() -> Console:
    console = Console()
    console.json = True
    return console


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    lay_out(folder)
    return afina.train(folder / "recipe.yaml", folder / "run")


@pytest.fixture(scope="module")
def wanda(run) -> list[Path]:
    return compression.prune(run, [0.3, 0.6])


def held_out_loss(folder: Path, run: Path) -> float:
    """Over all learnt tokens of the samples that training kept back, sample by sample, by transformers alone."""
    recipe = load(run / "recipe.yaml")
    renderer = Renderer(load_tokenizer(str(folder)), recipe.data.learn)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for row in prepare(recipe, run.parent, renderer, quiet()).validation:
        ids, learnt = torch.tensor(row.ids)[None].long(), torch.tensor(row.learnt)[1:]
        with torch.inference_mode():
            losses = F.cross_entropy(model(input_ids=ids).logits[0, :-1].double(), ids[0, 1:], reduction="none")
        total, count = total + float(losses[learnt].sum()), count + int(learnt.sum())
    return total / count


def test_each_share_is_a_model_with_what_it_cost(run, wanda):
    assert [folder.name for folder in wanda] == ["wanda-0.3", "wanda-0.6"]
    for folder, share in zip(wanda, (0.3, 0.6), strict=True):
        made = open_artifact(folder, "model")
        made.verify()
        assert made.manifest["parents"][0]["sha256"] == open_artifact(run).digest
        facts = made.manifest["pruning"]
        assert facts["after"]["zero_share"] == pytest.approx(share, abs=0.01)
        assert facts["after"]["loss"] == pytest.approx(held_out_loss(folder, run), rel=1e-5)
        low, high = facts["after"]["interval"]
        assert low < facts["after"]["loss"] < high
        assert facts["after"]["change"] == pytest.approx(facts["after"]["loss"] - facts["before"]["loss"])
        AutoTokenizer.from_pretrained(folder)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    validated = [line["loss"] for line in lines if line["kind"] == "validation"]
    before = open_artifact(wanda[0]).manifest["pruning"]["before"]["loss"]
    assert before == pytest.approx(validated[-1], rel=1e-4)  # that of the run itself


def test_the_runs_own_tasks_are_asked_of_all(run, wanda):
    tasks = json.loads((run / "pruned" / "evaluation" / "evaluation.json").read_text("utf-8"))["tasks"]
    assert [task["name"] for task in tasks] == ["opinion", "written"]
    assert list(tasks[0]["systems"]) == ["run", "wanda-0.3", "wanda-0.6"]
    assert tasks[0]["systems"]["run"]["value"] > 0.9
    assert (run / "pruned" / "report.html").is_file()


@pytest.mark.parametrize(("method", "share"), [("layers", 0.5), ("channels", 0.3), ("wanda", 0.5)])
def test_what_is_left_is_exported_and_answers_in_llama_cpp(run, tmp_path, method, share):
    pytest.importorskip("xllamacpp", reason='install "afina[gguf-run]" to run GGUF files')
    (folder,) = compression.prune(run, [share], method=method, out=tmp_path, tasks=False)
    facts = open_artifact(folder).manifest["pruning"]["after"]
    if method != "wanda":
        assert facts["parameters"] < open_artifact(folder).manifest["pruning"]["before"]["parameters"]
        assert facts["zero_share"] == 0
    digest = folder_digest(folder)
    export = export_run(folder, folder / "export", ["f32"], quiet())
    (entry,) = export.manifest["exports"]
    assert len(entry["checks"]) >= 8 and all(check["equal"] for check in entry["checks"])
    assert folder_digest(folder) == digest  # so that it is still the base of what is trained from it


def test_a_pruned_model_is_pruned_again_and_healed(run, wanda, tmp_path):
    (again,) = compression.prune(wanda[0], [0.5], method="magnitude", out=tmp_path, tasks=False)
    assert open_artifact(again).manifest["parents"][0]["sha256"] == open_artifact(wanda[0]).digest
    overrides = [f"model.base={wanda[1]}", "method={name: full, keep_zeros: true}", "training.learning_rate=1e-3"]
    healed = afina.train(run.parent / "recipe.yaml", tmp_path / "healed", [*overrides, "training.steps=20"])
    before = AutoModelForCausalLM.from_pretrained(wanda[1], dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(healed / "adapter", dtype=torch.float32).state_dict()
    changed = 0
    for name, weight in before.items():
        if name.endswith("proj.weight"):
            assert torch.equal(after[name] == 0, weight == 0), name
            changed += int((after[name] != weight).sum())
    assert changed
    pruned = open_artifact(wanda[1]).manifest["pruning"]["after"]["loss"]
    assert open_artifact(healed).manifest["training"]["validation_loss"] < pruned


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zero_under_every_optimiser(name):
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    model = llama(hidden_size=64, intermediate_size=96)
    weight = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight[:, ::3] = 0
    method = Full(name="full", keep_zeros=True)
    attach(model, method, seed=0)
    before = weight.detach().clone()
    training = Training(optimizer=name, learning_rate=2e-3, weight_decay=0.1, schedule="constant")
    go_on(model, training, begin(model, training, CPU, method), 4)
    assert torch.equal(weight == 0, before == 0)
    assert ((weight != before) | (before == 0)).float().mean() > 0.99


def test_what_cannot_be_is_said_in_a_sentence(run, tmp_path):
    with pytest.raises(RecipeError, match="no weight that learns is zero"):
        begin(llama(), Training(), CPU, Full(name="full", keep_zeros=True))
    for method, shares, pattern, said in [
        ("magic", [0.3], None, "no method magic"),
        ("wanda", [], None, "which share"),
        ("wanda", [1.0], None, "between 0 and 1"),
        ("wanda", [float("nan")], None, "between 0 and 1"),
        ("wanda", [0.3, 0.3], None, "twice"),
        ("wanda", [], "4:2", "N:M"),
        ("wanda", [], "2/4", "N:M"),
        ("layers", [], "2:4", "wanda and magnitude"),
        ("wanda", [0.5], "2:4", "a share of its own"),
    ]:
        with pytest.raises(RecipeError, match=said):
            cuts_of(method, shares, pattern)
    with pytest.raises(RecipeError, match="no run, so a recipe"):
        compression.prune(run.parent / "base", [0.3])
    taken = tmp_path / "taken"
    (taken / "wanda-0.3").mkdir(parents=True)
    with pytest.raises(AfinaError, match="exists already"):
        compression.prune(run, [0.3], out=taken)
    with pytest.raises(AfinaError, match="no held-out samples"):
        text = (run.parent / "recipe.yaml").read_text("utf-8").replace("validation: 0.1", "validation: 0")
        (run.parent / "all.yaml").write_text(text, "utf-8")
        compression.prune(run, [0.3], recipe=run.parent / "all.yaml", out=tmp_path)
    assert [*tmp_path.rglob("*")] == [taken, taken / "wanda-0.3"]


def test_weights_that_are_no_numbers_are_refused(run, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    shutil.copytree(run.parent / "base", tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(AfinaError, match=r"layers\.1\.mlp\.up_proj\.weight has weights that are no numbers"):
        compression.prune(tmp_path / "base", [0.3], recipe=run.parent / "recipe.yaml", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_it_leaves_no_half_of_a_model(run, tmp_path):
    asked = [*COMMAND, "compress", "prune", str(run), "--share", "0.2,0.4", "--no-tasks", "--json", "--out"]
    with subprocess.Popen([*asked, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if '"pruned"' in line:
                break
        while not list((tmp_path / "out").glob(".wanda-0.4*")) and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name[0] != "."] == ["wanda-0.2"]
    open_artifact(tmp_path / "out" / "wanda-0.2", "model").verify()
    compression.prune(run, [0.4], out=tmp_path / "out", tasks=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["wanda-0.2", "wanda-0.4"]


def test_the_command_line(run, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "afina", "compress", "prune", str(run), "--share", "0.1,many"],
        capture_output=True,
        text=True,
        env={**os.environ, "AFINA_LANG": "es"},
    )
    assert done.returncode == 2 and "'0.1,many' no es una lista" in done.stderr and "Traceback" not in done.stderr
