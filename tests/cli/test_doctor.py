"""`afina doctor`, and the advice of `afina init --for`."""

import json

import pytest
from cli.test_verbs import afina

from afina.recipe.load import load


def test_doctor_says_what_the_machine_is_and_what_fits():
    done = afina("doctor", "Qwen/Qwen3-0.6B", "--rows", "500", "--json")
    (event,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and event["event"] == "doctor"
    assert event["machine"]["memory"] > 2**28 and event["machine"]["cores"] >= 1 and event["fits"]["lora"] is not None
    assert event["advice"]["method"] in ("lora", "qlora", None) and event["advice"]["why"]
    shown = afina("doctor")
    assert shown.returncode == 0 and "torch" in shown.stdout and "lora" in shown.stdout


def test_a_model_of_unknown_size_is_asked_for_otherwise():
    done = afina("doctor", "someone/something")
    assert done.returncode == 2 and "someone/something" in done.stderr


@pytest.mark.parametrize("base", ["HuggingFaceTB/SmolLM2-135M"])
def test_init_for_a_model_writes_the_method_that_fits(tmp_path, base):
    done = afina("init", "sentiment", "mine", "--for", base, cwd=tmp_path)
    assert done.returncode == 0 and "lora" in done.stdout
    recipe = load(tmp_path / "mine" / "recipe.yaml")
    assert recipe.model.base == base and recipe.method.name == "lora" and recipe.training.learning_rate == 2e-4


def test_init_for_a_model_that_fits_nowhere_says_what_it_needs(tmp_path):
    done = afina("init", "sentiment", "mine", "--for", "someone/huge-900b", cwd=tmp_path)
    assert done.returncode == 6 and "900.0 billion" in done.stderr and not (tmp_path / "mine").exists()
