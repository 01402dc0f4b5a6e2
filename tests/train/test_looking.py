"""Tasks asked while a model trains: they decide which weights are kept, and leave no trace in what is learnt."""

import hashlib
import json

import pytest
import torch
from journey.tiny import RECIPE, lay_out
from train.sitting import Killed, sit

from afina import pipeline
from afina.errors import AfinaError, Interrupted, ResourceError
from afina.model.attention import attending
from afina.model.load import Hardware
from afina.train.best import Criterion, figure_of
from afina.train.looking import Looking

SCORES = {3: 0.25, 6: 0.75, 9: 0.75, 12: 0.5}
BEST = Criterion(figure_of("said"), larger=True)


def said(step):
    return [
        {
            **{"task": "said", "measure": "accuracy", "samples": 4, "answered": 4, "unanswered": 0, "reasons": []},
            **{"value": SCORES[step], "interval": [0.0, 1.0], "problems": {}, "seconds": 0.1},
        }
    ]


def asked(place, **more):
    return sit(place, ask=said, ask_after=SCORES, measured={6: 1.0, 12: 0.5}, **{"criterion": BEST, **more})


@pytest.fixture(scope="module")
def until_six(tmp_path_factory):
    return sit(tmp_path_factory.mktemp("six"), steps=6, measured={6: 1.0})


def test_the_task_says_which_weights_are_best(tmp_path, until_six):
    found = asked(tmp_path)
    assert found["kept"] == {"step": 6, "validation_loss": 1.0} and found["held"] == until_six["held"]
    lines = [line for line in found["lines"] if line["kind"] == "evaluation"]
    assert [(line["step"], line["task"], line["value"]) for line in lines] == [
        (s, "said", v) for s, v in SCORES.items()
    ]
    assert [entry["value"] for entry in found["tally"]["evaluations"]] == list(SCORES.values())


def test_a_figure_that_falls_is_the_better_the_smaller(tmp_path):
    found = asked(tmp_path, criterion=Criterion(figure_of("said")))
    assert found["kept"]["step"] == 3


@pytest.mark.parametrize("at", range(2, 12))
@pytest.mark.parametrize("saves", [(0,), (0, 4, 6), (5, 9)])
def test_a_killed_run_says_and_holds_the_same(tmp_path, at, saves):
    (tmp_path / "whole").mkdir()
    whole = asked(tmp_path / "whole", save_after=saves)
    with pytest.raises(Killed):
        asked(tmp_path, kill_at=at, save_after=saves)
    found = asked(tmp_path, save_after=saves)
    for key in ("held", "tensors", "kept", "tally", "lines"):
        assert found[key] == whole[key], key


def test_a_stop_between_asking_and_validating_does_both_again(tmp_path):
    """The validation of step 6 is stopped after the tasks were asked: neither is noted twice."""

    def stop(step, _batches):
        if step == 6:
            raise Interrupted("stopped")

    (tmp_path / "whole").mkdir()
    whole = asked(tmp_path / "whole", save_after=(0, 5))
    with pytest.raises(Interrupted):
        asked(tmp_path, save_after=(0, 5), fault_in_validation=stop)
    found = asked(tmp_path, save_after=(0, 5))
    assert found["tally"] == whole["tally"] and found["lines"] == whole["lines"]


@pytest.mark.parametrize("trouble", [ResourceError("llguidance is missing"), torch.OutOfMemoryError("out of memory")])
def test_tasks_that_cannot_be_asked_are_told_and_the_training_goes_on(tmp_path, trouble):
    def refuse(step):
        if step == 6:
            raise trouble
        return said(step)

    heard: list[str] = []
    found = sit(tmp_path, ask=refuse, ask_after=SCORES, measured={12: 1.0}, criterion=BEST, said=heard)
    assert found["kept"]["step"] == 9 and [line for line in heard if "after step 6" in line]


def test_samples_without_an_answer_are_told(tmp_path):
    def half(step):
        return [{**facts, "answered": 3, "reasons": ["too long"]} for facts in said(step)]

    heard: list[str] = []
    sit(tmp_path, ask=half, ask_after=SCORES, measured={12: 1.0}, said=heard)
    assert any("1 of 4 samples of said have no answer: too long" in line for line in heard)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    tasks = """tasks:
  - {name: surprise, kind: perplexity, data: test.jsonl}
  - {name: general, kind: forgetting}
  - {name: likeness, kind: similarity, data: test.jsonl, max_new_tokens: 4}
"""
    lay_out(folder, RECIPE.replace("tasks:\n", tasks))
    return folder


def weights(run):
    return hashlib.sha256(next((run / "adapter").glob("*.safetensors")).read_bytes()).hexdigest()


ALL = "training.evaluate=[opinion, written, surprise, general, likeness]"
FEW = ["training.steps=12", "training.keep=last", "method.dropout=0.1", "training.evaluations=3"]


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["training.engine=reference"],
        ["training.packing=false"],
        ["method={name: full}", "training.learning_rate=1e-3"],
        ["method={name: prompt-tuning}", "export.formats=[]"],
    ],
)
def test_what_is_learnt_is_the_same_to_the_bit(project, tmp_path, changes):
    few = [*FEW[:2], *FEW[3:]] if "method=" in "".join(changes) else FEW
    plain = pipeline.train(project / "recipe.yaml", tmp_path / "plain", [*few, *changes])
    looked = pipeline.train(project / "recipe.yaml", tmp_path / "looked", [*few, *changes, ALL])
    assert weights(plain) == weights(looked)
    steps = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()] for run in (plain, looked)
    ]
    kept = [[(one["step"], one["loss"]) for one in lines if one["kind"] == "step"] for lines in steps]
    assert kept[0] == kept[1]
    values = [one for one in steps[1] if one["kind"] == "evaluation"]
    assert len(values) == 15 and all(one["value"] is not None and not one["unanswered"] for one in values)


def test_the_last_figures_are_those_of_afina_eval(project, tmp_path):
    """Same weights, same samples, same marks: asked while it trains or after."""
    run = pipeline.train(project / "recipe.yaml", tmp_path / "run", [*FEW, ALL, "training.evaluate_samples=10"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    meanwhile = {one["task"]: one for one in lines if one["kind"] == "evaluation" and one["step"] == 12}
    pipeline.evaluate(run, limit=10)
    tasks = json.loads((run / "evaluation" / "evaluation.json").read_text("utf-8"))["tasks"]
    assert len(tasks) == 5
    for task in tasks:
        tuned, before = task["systems"]["tuned"], meanwhile[task["name"]]
        assert before["samples"] == task["samples"]
        assert before["value"] == pytest.approx(tuned["value"], rel=1e-5), task["name"]


def test_a_task_chooses_the_weights_of_a_real_run(project, tmp_path):
    run = pipeline.train(project / "recipe.yaml", tmp_path / "run", [ALL, "training.best_by=surprise"])
    training = json.loads((run / "manifest.json").read_text("utf-8"))["training"]
    figures = {one["step"]: one["value"] for one in training["evaluations"] if one["task"] == "surprise"}
    assert training["best"]["figure"] == "tasks.surprise" and training["best"]["value"] == min(figures.values())
    page = (run / "report.html").read_text("utf-8")
    assert "their figure of surprise was the best" in page and page.count("<td>surprise</td>") == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("training.evaluate=[nobody]", "There is no task nobody"),
        ("training.evaluate=[opinion, opinion]", "stands twice"),
        ("training.best_by=opinion", "Add it to training.evaluate"),
    ],
)
def test_what_cannot_be_asked_is_said_before_training(project, tmp_path, change, says):
    with pytest.raises(AfinaError, match=says):
        pipeline.train(project / "recipe.yaml", tmp_path / "run", [change])


def test_attention_and_places_of_weights_are_put_back(project):
    from small import llama

    model = llama()
    looked: list[str] = []

    class Asks:
        tokens, falling = 1, frozenset[str]()

        def __call__(self, model, renderer, hardware):
            torch.rand(3)
            looked.append(model.config._attn_implementation)
            raise ResourceError("no")

    looking = Looking(model, None, Hardware(torch.device("cpu"), torch.float32), Asks())  # type: ignore[arg-type]
    before = torch.get_rng_state()
    with attending(model, "eager"), pytest.raises(ResourceError):
        looking.ask()
    assert looked == ["sdpa"] and torch.equal(before, torch.get_rng_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_weights_that_wait_elsewhere_come_and_go(project, tmp_path):
    from small import llama

    model = llama().cuda()
    ends = model.get_input_embeddings().weight
    ends.data = torch.empty(ends.shape, dtype=ends.dtype, pin_memory=True).copy_(ends)
    waits = ends.data_ptr()

    class Asks:
        tokens, falling = 1, frozenset[str]()

        def __call__(self, model, renderer, hardware):
            return [{"sum": float(model(input_ids=torch.ones(1, 3, dtype=torch.long, device="cuda")).logits.sum())}]

    looking = Looking(model, None, Hardware(torch.device("cuda"), torch.float32), Asks())  # type: ignore[arg-type]
    (found,) = looking.ask()
    assert found["sum"] == found["sum"] and ends.data_ptr() == waits and not ends.is_cuda
