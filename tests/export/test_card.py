"""The card is made of facts, and its code is what opens the adapter."""

import ast

import pytest
from ruamel.yaml import YAML

from afina.export.card import model_card
from afina.recipe.schema import Recipe

FACTS = {
    "seed": 42,
    "hardware": "CPU, fp32",
    "data": {"train": 540, "validation": 60, "rejected": [{"file": "x", "line": 1, "reason": "long"}]},
    "training": {
        "steps": 100,
        "samples": 540,
        "tokens": 123456,
        "learnt_tokens": 6543,
        "seconds": 65.0,
        "peak_memory_bytes": 3 * 2**29,
        "trainable_parameters": 1000,
        "parameters": 9000,
        "first_loss": 3.25,
        "final_loss": 0.125,
        "validation_loss": None,
    },
}


def card(base: str = "Qwen/Qwen3-0.6B", method: str = "lora", **training) -> str:
    recipe = Recipe.model_validate(
        {
            "name": "mine",
            "model": {"base": base},
            "data": {"train": "x.jsonl"},
            "method": {"name": method},
            "training": training,
        }
    )
    return model_card(recipe, FACTS, {"torch": "2.13", "platform": "secret-host", "python": "3.11"})


def front(text: str) -> dict:
    assert text.startswith("---\n")
    return YAML(typ="safe").load(text.split("---\n")[1])


def code(text: str) -> str:
    return text.split("```python\n")[1].split("```")[0]


def test_it_says_what_was_trained():
    text = card(steps=100)
    for said in (
        "540 samples learnt, 60 for validation, 1 rejected",
        "100 of 16 samples, 2.96 epochs",
        "123,456, of which 6,543 learnt",
        "1,000 of 9,000",
        "3.2500 at the first step, 0.1250 at the last",
        "1 min 05 s on CPU, fp32",
        "1.5 GiB",
        "| Validation loss | none |",
        "torch 2.13",
    ):
        assert said in text
    assert "secret-host" not in text
    assert "16 samples, 3 epochs" in card()


@pytest.mark.parametrize(
    "base, named", [("Qwen/Qwen3-0.6B", True), ("afina/tiny", False), ("/home/someone/model", False), ("../m", False)]
)
def test_hubs_read_its_front_matter(base, named):
    read = front(card(base))
    assert read["library_name"] == "peft" and read["tags"] == ["afina"]
    assert read.get("base_model") == (base if named else None)
    assert front(card(base, "full"))["library_name"] == "transformers"


@pytest.mark.parametrize("base", ["Qwen/Qwen3-0.6B", "afina/tiny", "a 'quoted' \\ folder"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_its_code_is_python(base, method):
    text = code(card(base, method))
    ast.parse(text)
    assert ("PeftModel" in text) == (method == "lora")


def test_the_bundled_base_is_found_where_it_lies(tmp_path):
    """The lines up to the adapter, run as they stand."""
    lines = code(card("afina/tiny")).splitlines()
    names: dict = {}
    exec("\n".join(line for line in lines if "adapter" not in line), names)  # noqa: S102
    assert names["model"].config.vocab_size > 1000


def test_every_weight_is_not_called_an_adapter():
    assert "An adapter" in card() and "every weight" in card(method="full")
    assert "full fine-tuning" in card(method="full") and "LoRA, rank 16" in card()
