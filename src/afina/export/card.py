"""The model card of an adapter: generated from the run's facts, nothing typed by hand."""

import re
from typing import Any

from afina.console import duration, size
from afina.recipe.schema import Recipe


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
            f"{training['steps']} of {recipe.training.batch_size} samples, {_epochs(recipe, training):.3g} epochs",
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
            *_use(recipe.model.base, adapter),
            "```",
            "",
        ]
    )


def _hub_base(recipe: Recipe) -> list[str]:
    """Hubs link a base by its name; what lies in a folder has none."""
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.model.base) and not recipe.model.base.startswith(("afina/", "."))
    return [f"base_model: {recipe.model.base}"] if named else []


def _epochs(recipe: Recipe, training: dict[str, Any]) -> float:
    return (
        recipe.training.epochs
        if recipe.training.steps is None
        else (training["steps"] * recipe.training.batch_size / training["samples"])
    )


def _use(base: str, adapter: bool) -> list[str]:
    """How transformers and PEFT open it, without Afina."""
    opened = repr("adapter") if not adapter else repr(base)
    bundled = ["from importlib.resources import files", ""] if base == "afina/tiny" and adapter else []
    if bundled:
        opened = 'files("afina") / "bundled" / "tiny"'
    return [
        *bundled,
        *(["from peft import PeftModel"] if adapter else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({opened})",
        *(['model = PeftModel.from_pretrained(model, "adapter")'] if adapter else []),
        'tokenizer = AutoTokenizer.from_pretrained("adapter")',
    ]


def _method(recipe: Recipe) -> str:
    if recipe.method.name == "full":
        return "full fine-tuning"
    return f"LoRA, rank {recipe.method.rank}, alpha {recipe.method.alpha:g}, targets {recipe.method.targets}"
