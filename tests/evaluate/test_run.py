"""A run, asked: base beside tuned on the same prompts, written once, sealed."""

import json
from pathlib import Path

import pytest
import torch
from journey.tiny import RECIPE, lay_out, write_rows

import afina
from afina.artifact import open_artifact, sha256
from afina.console import Console
from afina.errors import DataError, ModelError, RecipeError
from afina.evaluate.run import evaluate_run, show
from afina.train.reopen import reopen


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("place")
    lay_out(folder)
    few = ["training.steps=15", "export.formats=[]"]
    return {
        "lora": afina.train(folder / "recipe.yaml", folder / "lora", few),
        "full": afina.train(folder / "recipe.yaml", folder / "full", [*few, "method={name: full}"]),
        "none": afina.train(folder / "recipe.yaml", folder / "none", [*few, "tasks=[]"]),
    }


def quiet() -> Console:
    console = Console()
    console.json = True
    return console


@pytest.mark.parametrize("method", ["lora", "full"])
def test_figures_follow_from_the_predictions(runs, tmp_path, method):
    evaluation = evaluate_run(runs[method], tmp_path / "evaluation", quiet())
    evaluation.verify()
    tasks = json.loads((tmp_path / "evaluation/evaluation.json").read_text())["tasks"]
    rows = [json.loads(line) for line in (tmp_path / "evaluation/predictions.jsonl").open()]
    assert [task["name"] for task in tasks] == ["opinion", "written"] and len(rows) == 32
    for task in tasks:
        mine = [row for row in rows if row["task"] == task["name"]]
        for system, figures in task["systems"].items():
            assert figures["correct"] == sum(row["expected"] == row[system] for row in mine)
            assert figures["accuracy"] == figures["correct"] / 16
            low, high = figures["interval"]
            assert low <= figures["accuracy"] <= high
        assert task["fixed"] == sum(row["tuned"] == row["expected"] != row["base"] for row in mine)
        assert task["broken"] == sum(row["base"] == row["expected"] != row["tuned"] for row in mine)
    assert {Path(row["where"].rpartition(":")[0]).name for row in rows} == {"test.jsonl"}
    assert {int(row["where"].rpartition(":")[2]) for row in rows} == set(range(1, 17))


def test_base_is_the_base_whichever_way_it_was_tuned(runs, tmp_path):
    """With LoRA the adapters step aside; a full model's base is loaded beside it: the same answers."""
    answers = {}
    for method in ("lora", "full"):
        evaluate_run(runs[method], tmp_path / method, quiet())
        rows = [json.loads(line) for line in (tmp_path / method / "predictions.jsonl").open()]
        answers[method] = [row["base"] for row in rows]
    assert answers["lora"] == answers["full"]


def test_asking_changes_nothing(runs, tmp_path):
    before = {path: sha256(path) for path in runs["lora"].rglob("*") if path.is_file()}
    torch.manual_seed(1)
    first = evaluate_run(runs["lora"], tmp_path / "one", quiet())
    torch.manual_seed(2)
    second = evaluate_run(runs["lora"], tmp_path / "two", quiet())
    assert {path: sha256(path) for path in runs["lora"].rglob("*") if path.is_file()} == before
    assert (first.folder / "predictions.jsonl").read_bytes() == (second.folder / "predictions.jsonl").read_bytes()


def test_its_parents_are_the_run_and_the_questions(runs, tmp_path):
    evaluation = evaluate_run(runs["lora"], tmp_path / "evaluation", quiet())
    parents = {parent["role"]: parent["sha256"] for parent in evaluation.manifest["parents"]}
    assert parents["run"] == open_artifact(runs["lora"]).digest
    assert parents["data"] == sha256(reopen(runs["lora"]).folder / "test.jsonl")


def test_a_recipe_without_tasks_is_told_so(runs, tmp_path):
    with pytest.raises(RecipeError, match="names no tasks") as caught:
        evaluate_run(runs["none"], tmp_path / "evaluation", quiet())
    assert "tasks:" in caught.value.hint and not (tmp_path / "evaluation").exists()


def test_questions_that_are_gone_leave_nothing(tmp_path):
    lay_out(tmp_path)
    run = afina.train(tmp_path / "recipe.yaml", tmp_path / "run", ["training.steps=1", "export.formats=[]"])
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"test\.jsonl"):
        afina.evaluate(run)
    assert not (run / "evaluation").exists() and not list(run.glob(".*"))


def test_a_context_beside_the_model_limits_questions_not_memory(tmp_path):
    """A question longer than the model was made for is no wrong answer: it is counted, with the reason."""
    lay_out(tmp_path, RECIPE)
    run = afina.train(tmp_path / "recipe.yaml", tmp_path / "run", ["training.steps=1", "export.formats=[]"])
    write_rows(tmp_path / "test.jsonl", [("The soup is great.", "good"), ("The soup " * 300, "good")])
    afina.evaluate(run)
    tasks = json.loads((run / "evaluation/evaluation.json").read_text())["tasks"]
    for figures in [figures for task in tasks for figures in task["systems"].values()]:
        assert (figures["answered"], figures["unanswered"]) == (1, 1) and "256" in figures["reasons"][0]
    rows = [json.loads(line) for line in (run / "evaluation/predictions.jsonl").open()]
    assert [set(row.get("unanswered", {})) for row in rows] == [set(), {"base", "tuned"}] * 2


def test_a_label_that_training_never_showed_is_told(tmp_path, capsys):
    lay_out(tmp_path, RECIPE.replace("labels: [good, bad]", "labels: [good, bad, middling]"))
    write_rows(tmp_path / "test.jsonl", [("The soup is fair.", "middling"), ("The film is great.", "good")] * 2)
    run = afina.train(tmp_path / "recipe.yaml", tmp_path / "run", ["training.steps=2", "export.formats=[]"])
    afina.evaluate(run)
    assert "label middling never occurs in the training data; 2 samples" in " ".join(capsys.readouterr().err.split())
    task = json.loads((run / "evaluation" / "evaluation.json").read_text())["tasks"][0]
    assert task["unseen"] == {"middling": 2} and task["systems"]["tuned"]["per_label"]["middling"]["support"] == 2
    for name in ("report.html", "report.md"):
        assert "The label middling never occurs in the training data; 2 samples have it." in (run / name).read_text()


def test_samples_that_were_trained_on_are_no_test(tmp_path, capsys):
    """Told in numbers, in words and on the page, and not called held out."""
    lay_out(tmp_path)
    rows = (tmp_path / "test.jsonl").read_text("utf-8").splitlines()
    learnt = (tmp_path / "train.jsonl").read_text("utf-8").splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join([*rows, *learnt[:3]]) + "\n", "utf-8")
    run = afina.train(tmp_path / "recipe.yaml", tmp_path / "run", ["training.steps=2", "export.formats=[]"])
    afina.evaluate(run)
    heard = capsys.readouterr()
    said = f"3 of these {len(rows) + 3} samples stand in the training data: what they measure is memory."
    assert said in " ".join(heard.err.split()) and f"{len(rows) + 3} held-out" not in heard.out
    for name in ("report.html", "report.md"):
        assert said in (run / name).read_text("utf-8")
    assert "held-out samples" not in (run / "report.html").read_text("utf-8").replace("Measure it on held-out", "")
    tasks = json.loads((run / "evaluation" / "evaluation.json").read_text())["tasks"]
    assert [task["trained_on"] for task in tasks] == [3, 3]


def test_an_adapter_alone_answers_as_its_run(runs, tmp_path):
    """In PEFT's format, on the base it names, beside a merged model and the base: asked without a run."""
    place = runs["lora"]
    afina.export(place, ["merged"])
    merged = next(path.parent for path in (place / "export").rglob("config.json"))
    recipe = place.parent / "recipe.yaml"
    out = afina.evaluate(
        str(place), str(place / "adapter"), str(merged), str(place.parent / "base"), recipe=recipe, out=tmp_path / "out"
    )
    tasks = json.loads((out / "evaluation.json").read_text())["tasks"]
    for task in tasks:
        found = {name: figures["correct"] for name, figures in task["systems"].items()}
        assert list(found) == ["lora", "adapter", merged.name, "base"]
        assert found["lora"] == found["adapter"] == found[merged.name]
    assert "No difference" in tasks[0]["comparisons"][0]["verdict"]
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "Exactly what was trained" not in page and 'href="#record"' not in page  # nothing was


def test_a_run_is_asked_into_another_folder(runs, tmp_path):
    before = {path: path.read_bytes() for path in runs["lora"].rglob("*") if path.is_file()}
    out = afina.evaluate(runs["lora"], out=tmp_path / "elsewhere", limit=3)
    assert out == tmp_path / "elsewhere" / "evaluation" and (out.parent / "report.html").is_file()
    assert {path: path.read_bytes() for path in runs["lora"].rglob("*") if path.is_file()} == before


def test_an_adapter_of_no_base_is_told(runs, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="which base"):
        afina.evaluate(str(tmp_path), recipe=runs["lora"].parent / "recipe.yaml", out=tmp_path / "out")


def test_each_kind_shows_its_own_figure_beside_the_main_one(capsys):
    """JSON how many are of the schema, texts ROUGE, and a figure that nobody has no column."""

    def told(**own):
        figures = {"value": 0.5, "interval": [0.1, 0.9], "answered": 4, "unanswered": 0, "unasked": 0, "problems": {}}
        task = {"name": "t", "samples": 4, "measure": "accuracy", "comparisons": []}
        rows = {"base": {**figures, "samples_per_second": 2.0}, "tuned": {**figures, "samples_per_second": 2.0, **own}}
        show([{**task, "systems": rows}], Console())
        return " ".join(capsys.readouterr().out.split())

    assert (
        "of the schema samples/s size base 50.0% 10.0% - 90.0% - 2.0 - tuned 50.0% 10.0% - 90.0% 3 of 4 2.0 -"
        in told(parsed=4, of_schema=3)
    )
    assert "JSON objects" in told(parsed=4) and "ROUGE-L" in told(rougeL=0.25) and "0.250" in told(rougeL=0.25)
    assert "macro F1" in told(f1_macro=0.5) and "2 of 3" in told(right_steps=2, steps=3)
    assert "95% interval samples/s size" in told()
    assert "tuned 50.0% - 2.0" in told(interval=None)  # too few to say
