"""The model card of an adapter: generated from the run's facts, nothing typed by hand."""

from typing import Any

from afina.console import duration, size
from afina.recipe.schema import Recipe


def model_card(recipe: Recipe, facts: dict[str, Any], versions: dict[str, str]) -> str:
    """README.md of a run folder, with the front matter that model hubs read. `facts` are the manifest's."""
    data, training = facts["data"], facts["training"]
    front = ["---", f"base_model: {recipe.model.base}", "library_name: peft", "tags:", "- afina", "---"]
    rows = [
        ("Base model", recipe.model.base),
        ("Method", _method(recipe)),
        ("Learning parameters", f"{training['trainable_parameters']:,} of {training['parameters']:,}"),
        (
            "Data",
            f"{data['train']} samples learnt, {data['validation']} for validation, {len(data['rejected'])} rejected",
        ),
        ("Steps", f"{training['steps']} of {recipe.training.batch_size} samples, {recipe.training.epochs:g} epochs"),
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
            "An adapter trained by Afina. `adapter/` is in PEFT's format, with tokenizer and chat template.",
            "",
            table,
            "",
            "`recipe.yaml` holds every setting, `manifest.json` the hashes of the data and of every file.",
            "",
            "## Use",
            "",
            "```python",
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            "",
            'model = AutoPeftModelForCausalLM.from_pretrained("adapter")',
            'tokenizer = AutoTokenizer.from_pretrained("adapter")',
            "```",
            "",
        ]
    )


def _method(recipe: Recipe) -> str:
    if recipe.method.name == "full":
        return "full fine-tuning"
    return f"LoRA, rank {recipe.method.rank}, alpha {recipe.method.alpha:g}, targets {recipe.method.targets}"
