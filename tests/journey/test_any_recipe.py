"""Recipes drawn by chance over every family: what the rules let pass is trained, asked, exported and talked to."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, NAMED, build
from journey.tiny import examples, save_base, write_rows
from transformers import AutoTokenizer

from afina import pipeline

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.role == 'assistant' %}<|fin|>{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IN_LLAMA_CPP = set(NAMED) - {"smollm3"}


def drawn(dice: random.Random, family: str) -> dict[str, Any]:
    """A recipe that no rule refuses."""
    often, name = dice.random, dice.choice(["lora"] * 5 + ["full", "full", "prompt-tuning", "prefix-tuning"])

    def some(chance: float, **keys: Any) -> Iterator[tuple[str, Any]]:
        for key, values in keys.items():
            if often() < chance:
                yield key, dice.choice(values)

    model = {"base": family, "max_length": 128, **dict(some(0.3, precision=["bf16"]))}
    method: dict[str, Any] = {"name": name}
    if name == "lora" and family != "gpt2":
        model |= dict(some(0.5, quantization=["nf4", "fp4", "int8"]))
    held = "quantization" in model
    if name == "lora":
        method |= {"rank": dice.choice([2, 4, 8]), "alpha": dice.choice([1, 8, 32])}
        method |= dict(some(0.3, dropout=[0.1], rslora=[True], dora=[True], lora_plus_ratio=[16], layers=[[-1]]))
        method |= dict(some(0.4, init=["loftq"] if held else ["gaussian", "orthogonal", "pissa"]))
        method |= dict(some(0.2, bias=["all", "lora_only"], modules_to_save=[["lm_head"]]))
        if family == "gpt-oss" and not {"dropout", "dora"} & method.keys() and "init" not in method:
            method |= dict(some(0.6, experts=[True], router=[True]))
    elif name == "full":
        method |= dict(some(0.4, layers=[[-1]]))
    else:
        method |= {"virtual_tokens": 5}
    if "modules_to_save" not in method and "layers" not in method and name in ("lora", "full") and often() < 0.2:
        model |= {"turn_tokens": ["<|fin|>"], "chat_template": "turns.jinja"}
    training = {"steps": 3, "batch_size": 8, "learning_rate": dice.choice([1e-3, 5e-3]), "validations": 1}
    optimizers = ["adamw-8bit", "paged-adamw-8bit", "adafactor", "lion", *(["muon"] if name == "full" else [])]
    training |= dict(some(0.5, optimizer=optimizers))
    training |= dict(some(0.3, schedule=["linear", "constant"], warmup=[0, 2], weight_decay=[0.1], keep=["last"]))
    training |= dict(some(0.2, neftune_alpha=[5], packing=[False], batch_tokens=[200], clip_norm=[None]))
    training |= dict(some(0.3, engine=["reference"]))
    if name != "prefix-tuning":
        training |= dict(some(0.2, gradient_checkpointing=[True]))
    formats = ["merged", *(["nf4"] if family != "gpt2" else []), *(["f32", "q8_0"] if family in IN_LLAMA_CPP else [])]
    return {
        "name": "drawn",
        "model": model,
        "data": {"train": "train.jsonl", "validation": "test.jsonl"},
        "method": method,
        "training": training,
        "tasks": [{"name": "written", "kind": "exact", "data": "test.jsonl", "limit": 4, "max_new_tokens": 4}],
        "export": {"formats": [] if "tuning" in name else [dice.choice(formats)]},
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_base(folder / "base")
    write_rows(folder / "train.jsonl", examples()[:40])
    write_rows(folder / "test.jsonl", examples()[40:60])
    (folder / "turns.jinja").write_text(TURNS, "utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    for family in FAMILIES:
        build(family, vocab_size=len(tokenizer), eos_token_id=2).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_what_the_rules_let_pass_can_be_done(world, tmp_path, monkeypatch, capsys, seed):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("xllamacpp")
    dice = random.Random(seed)
    recipe = drawn(dice, dice.choice(list(FAMILIES)))
    file = world / f"{seed}.yaml"
    file.write_text(json.dumps(recipe), "utf-8")  # JSON is YAML
    run = pipeline.run(file, tmp_path / "run")
    facts = json.loads((run / "manifest.json").read_text("utf-8"))["training"]
    assert facts["final_loss"] < 20, recipe
    capsys.readouterr()
    pipeline.chat(run, prompt="The soup is great.")
    assert capsys.readouterr().out.strip() or recipe["method"]["name"] != "lora", recipe
