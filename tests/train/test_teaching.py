"""A run that distils: who teaches is named by hash, checked token by token; killed, it ends as if it had not been."""

import json
from pathlib import Path

import pytest
from journey.tiny import lay_out, save_base
from train.test_kill import torture

import afina
from afina.artifact import open_artifact
from afina.errors import AfinaError, RecipeError


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    lay_out(folder)
    save_base(folder / "small", seed=1, hidden_size=32, intermediate_size=48)
    return folder


@pytest.fixture(scope="module")
def teacher(world) -> Path:
    return afina.train(world / "recipe.yaml", world / "teacher")


def taught(world: Path, place: Path, *more: str) -> Path:
    overrides = ["model.base=small", "method={name: full}", "training.learning_rate=2e-3", "training.steps=12", *more]
    return afina.train(world / "recipe.yaml", place, overrides)


def test_a_run_teaches_a_smaller_model(world, teacher, tmp_path, capsys):
    run = taught(world, tmp_path / "run", f"training.distill.teacher={teacher}")
    said = capsys.readouterr().out
    assert "a teacher's distribution is learnt beside the answers" in said and "Teacher   " in said
    parents = {entry["role"]: entry["sha256"] for entry in open_artifact(run).manifest["parents"]}
    assert parents["teacher"] == open_artifact(teacher).digest
    mixed = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [line["loss"] for line in mixed if line["kind"] == "step"]
    assert len(steps) == 12 and steps[-1] < steps[0]
    alone = taught(world, tmp_path / "alone")  # the same student, the same samples: only the loss differs
    assert open_artifact(run).manifest["training"]["ledger"] == open_artifact(alone).manifest["training"]["ledger"]


def test_held_out_losses_are_plain_so_that_runs_compare(world, teacher, tmp_path):
    """With a learning rate that moves nothing, what is measured is the student itself, whoever teaches."""
    still = ["training.learning_rate=1e-30", "training.steps=1"]
    losses = [
        open_artifact(taught(world, tmp_path / name, *more, *still)).manifest["training"]["validation_loss"]
        for name, more in (("alone", []), ("taught", [f"training.distill.teacher={teacher}"]))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_teacher_of_other_tokens_is_refused_by_the_first_that_differs(world, tmp_path):
    save_base(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    words = json.loads(file.read_text("utf-8"))
    vocabulary = words["model"]["vocab"]
    first, second = (token for token, index in vocabulary.items() if index in (100, 101))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(words), "utf-8")
    with pytest.raises(RecipeError, match="other tokens: 100 is") as refused:
        taught(world, tmp_path / "run", f"training.distill.teacher={tmp_path / 'other'}")
    assert "training.distill.teacher" in refused.value.message  # the override that is meant
    assert not (tmp_path / "run").exists() or not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("distill", "said"),
    [
        ("{teacher: nowhere}", "nowhere"),
        ("{teacher: base, alpha: 1.5}", "alpha"),
        ("{teacher: base, temperature: 0}", "temperature"),
        ("{teacher: ''}", "not the name of a file or folder"),
        ("{temperature: 2}", "teacher"),
        ("{teacher: short}", "made for 64 tokens"),
    ],
)
def test_what_cannot_teach_is_refused(world, tmp_path, distill, said):
    if not (world / "short").exists():
        save_base(world / "short", max_position_embeddings=64)
    with pytest.raises(AfinaError, match=said):
        taught(world, tmp_path / "run", f"training.distill={distill}")


@pytest.mark.slow
def test_killed_it_ends_as_the_run_left_alone(world):
    found = torture(world, 3, "distilled")
    assert found["wrong"] == [] and found["kills"] >= 3
