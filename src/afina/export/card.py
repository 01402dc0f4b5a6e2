"""The model card of an adapter: generated from the run's facts, nothing typed by hand."""

import re
from typing import Any

from afina.console import duration, size
from afina.recipe.schema import Full, Lora, Recipe


def model_card(recipe: Recipe, facts: dict[str, Any], versions: dict[str, str]) -> str:
    """README.md of a run folder, with the front matter that model hubs read. `facts` are the manifest's."""
    data, training = facts["data"], facts["training"]
    adapter = recipe.method.name != "full"
    front = [
        "---",
        *_hub_base(recipe),
        f"library_name: {'peft' if adapter else 'transformers'}",
        "tags:",
        "- afina",
        "---",
    ]
    rows = [
        ("Base model", recipe.model.base),
        ("Method", _method(recipe)),
        ("Learning parameters", f"{training['trainable_parameters']:,} of {training['parameters']:,}"),
        (
            "Data",
            f"{data['train']} samples learnt, {data['validation']} for validation, {len(data['rejected'])} rejected",
        ),
        (
            "Steps",
            f"{training['steps']} of {_batch(recipe)}, {_epochs(recipe, training):.3g} epochs",
        ),
        ("Tokens", f"{training['tokens']:,}, of which {training['learnt_tokens']:,} learnt"),
        ("Learning rate", f"{recipe.training.learning_rate:g}, {recipe.training.schedule}"),
        ("Loss", f"{training['first_loss']:.4f} at the first step, {training['final_loss']:.4f} at the last"),
        ("Validation loss", "none" if training["validation_loss"] is None else f"{training['validation_loss']:.4f}"),
        ("Time", f"{duration(training['seconds'])} on {facts['hardware']}"),
        ("Peak memory", size(training["peak_memory_bytes"])),
        ("Seed", str(facts["seed"])),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if name != "platform")),
    ]
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    return "\n".join(
        [
            *front,
            "",
            f"# {recipe.name}",
            "",
            "An adapter trained by Afina. `adapter/` is in PEFT's format, with tokenizer and chat template."
            if adapter
            else "A model trained by Afina, every weight of it. `adapter/` holds it, with tokenizer and template.",
            "",
            table,
            "",
            "`recipe.yaml` holds every setting, `manifest.json` the hashes of the data and of every file.",
            "",
            "## Use",
            "",
            "```python",
            *_use(recipe, adapter),
            "```",
            "",
            "## Licence",
            "",
            f"Made from {recipe.model.base}. That model's licence goes on to hold for this one, and for every file",
            "made of it: read it before you hand these on. The licence of the training data may say more.",
            "",
        ]
    )


def _hub_base(recipe: Recipe) -> list[str]:
    """Hubs link a base by its name; what lies in a folder has none."""
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.model.base) and not recipe.model.base.startswith(("afina/", "."))
    return [f"base_model: {recipe.model.base}"] if named else []


def _batch(recipe: Recipe) -> str:
    training = recipe.training
    return f"{training.batch_size} samples" if training.batch_tokens is None else f"{training.batch_tokens:,} tokens"


def _epochs(recipe: Recipe, training: dict[str, Any]) -> float:
    """Passes over the data."""
    if recipe.training.steps is None:
        return recipe.training.epochs
    if recipe.training.batch_tokens is None:
        return float(training["steps"] * recipe.training.batch_size / training["samples"])
    return float(training["tokens"] / max(1, training["tokens_per_epoch"]))


def _use(recipe: Recipe, adapter: bool) -> list[str]:
    """How transformers and PEFT open it, without Afina."""
    base, held = recipe.model.base, recipe.model.quantization if adapter else "none"
    opened = repr("adapter") if not adapter else repr(base)
    bundled = ["from importlib.resources import files", ""] if base == "afina/tiny" and adapter else []
    if bundled:
        opened = 'files("afina") / "bundled" / "tiny"'
    quantised = {
        "int8": "BitsAndBytesConfig(load_in_8bit=True)",
        "none": "",
    }.get(
        held,
        f'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{held}", '
        f"bnb_4bit_use_double_quant={recipe.model.double_quantization})",
    )
    names = ["AutoModelForCausalLM", "AutoTokenizer", *(["BitsAndBytesConfig"] if quantised else [])]
    return [
        *bundled,
        *(["from peft import PeftModel"] if adapter else []),
        f"from transformers import {', '.join(names)}",
        "",
        *([f"held = {quantised}"] if quantised else []),
        f"model = AutoModelForCausalLM.from_pretrained({opened}{', quantization_config=held' if quantised else ''})",
        *(['model = PeftModel.from_pretrained(model, "adapter")'] if adapter else []),
        'tokenizer = AutoTokenizer.from_pretrained("adapter")',
    ]


def _method(recipe: Recipe) -> str:
    method, held = recipe.method, recipe.model.quantization
    if isinstance(method, Full):
        return "full fine-tuning" if method.layers is None else f"full fine-tuning of layers {method.layers}"
    if not isinstance(method, Lora):
        return f"{method.name}, {method.virtual_tokens} virtual tokens"
    kinds = [name for name, on in (("rsLoRA", method.rslora), ("DoRA", method.dora)) if on]
    kinds += [] if method.init == "default" else [f"{method.init} start"]
    kinds += [] if held == "none" else [f"base in {held}"]
    said = "".join(f", {kind}" for kind in kinds)
    return f"LoRA, rank {method.rank}, alpha {method.alpha:g}, targets {method.targets}{said}"
