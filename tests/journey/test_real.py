"""Real inputs: a pretrained model decoded to the character, SNIPS and GSM8K by their recipes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from journey.conftest import Finished
from small import CPU

from afina.data.load_tokenizer import load_tokenizer
from afina.data.read import read
from afina.model.generate import generate
from afina.model.load import load_model
from afina.pipeline import artifact
from afina.recipe.load import load

RECIPES = Path(__file__).parents[2] / "recipes"
pytestmark = pytest.mark.real


@pytest.fixture
def variables(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the recipes' ${AFINA_REAL_DATA} stands for."""
    monkeypatch.setenv("AFINA_REAL_DATA", str(real_data))


def test_stories_are_told_to_the_character_before_any_training(real_data):
    folder = real_data / "models" / "stories260K"
    model, tokenizer = load_model(str(folder), CPU), load_tokenizer(str(folder))
    written = generate(model, [[tokenizer.bos_id]], end_ids=(), pad_id=0, max_new_tokens=200)[0]
    assert len(written) == 200
    assert tokenizer.decode(written).strip() == (folder / "expected_stdout.txt").read_text("utf-8").strip()


def test_snips_is_read_whole(variables):
    recipe = load(RECIPES / "snips.yaml")
    rows = read(recipe.data.train, recipe.data, RECIPES).samples
    held_out = read(recipe.tasks[0].data, recipe.data, RECIPES).samples
    assert (len(rows), len(held_out)) == (13_784, 700)
    assert len({json.loads(sample.answer)["intent"] for sample in rows}) == 7
    assert all(json.loads(sample.answer).keys() == {"intent", "slots"} for sample in held_out)


@pytest.mark.slow
def test_snips_end_to_end(variables, tmp_path, afina: Callable[..., Finished]):
    """The recipe as it is but for its length: 40 steps teach the form of an answer, 846 the intents."""
    less = ["training.epochs=1", "training.steps=40", "training.validations=1", "tasks.0.limit=64"]
    ended = afina("run", RECIPES / "snips.yaml", *less, "--out", tmp_path / "snips")
    assert ended.status == 0, ended.err
    assert "13784 rows = 13508 to learn + 276 for validation + 0 rejected" in ended.out
    assert "latin-1" in ended.err
    run = artifact(tmp_path / "snips")
    assert run.manifest["data"]["encodings"] == {"utf-8": 6, "latin-1": 1}
    assert run.manifest["training"]["final_loss"] < 1.5 < run.manifest["training"]["first_loss"]
    task = json.loads((tmp_path / "snips/evaluation/evaluation.json").read_text())["tasks"][0]
    assert task["samples"] == 64 and task["systems"]["base"]["correct"] == 0
    answers = [json.loads(line)["tuned"] for line in (tmp_path / "snips/evaluation/predictions.jsonl").open()]
    assert sum(answer.startswith('{"intent": "') for answer in answers) >= 60  # the form, which comes first
    for entry in artifact(tmp_path / "snips" / "export").manifest["exports"]:
        assert sum(check["equal"] for check in entry["checks"]) >= len(entry["checks"]) - 2  # 8 bits may break a tie


@pytest.mark.slow
def test_gsm8k_accounts_for_every_row(variables, tmp_path, real_data, afina: Callable[..., Finished]):
    less = ["training.steps=1", "training.batch_size=2", "export.formats=[]", "training.validations=0"]
    ended = afina("run", RECIPES / "gsm8k.yaml", *less, "--out", tmp_path / "gsm8k")
    assert ended.status == 0, ended.err
    data = artifact(tmp_path / "gsm8k").manifest["data"]
    assert data["rows"] == 7473 == data["train"] + data["validation"] + len(data["rejected"])
    said = (
        f"7473 rows = {data['train']} to learn + {data['validation']} for validation + {len(data['rejected'])} rejected"
    )
    assert said in ended.out
    file = (real_data / "data/gsm8k/train.jsonl").resolve()
    lines = file.read_text("utf-8").split("\n")
    for entry in data["rejected"]:
        assert Path(entry["file"]) == file and "512" in entry["reason"]
        assert len(json.loads(lines[entry["line"] - 1])["answer"]) > 200
    for entry in data["rejected"][:20]:
        assert f"{file}:{entry['line']}: " in ended.out
