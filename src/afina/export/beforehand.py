"""What is said before training: that a base cannot become the files that its recipe exports. Reads no weights."""

from pathlib import Path

from afina.errors import ModelError
from afina.export.families import read_shape
from afina.export.gguf_vocab import read_vocabulary
from afina.language import _
from afina.model.hub import words_of
from afina.recipe.place import model_source
from afina.recipe.schema import Recipe


def check_exportable(model_folder: Path) -> None:
    """Raise ModelError when llama.cpp could not run this model as it is trained: its architecture, its figures, or its
    tokenizer, whose way of cutting text llama.cpp must know by name."""
    read_shape(model_folder)
    read_vocabulary(model_folder)


def why_no_gguf(recipe: Recipe, folder: Path) -> ModelError | None:
    """Why the recipe's base cannot become the GGUF formats that it exports, with what to do about it; None where it
    can, and where none is asked for. `folder` is where the recipe's relative paths start."""
    if not set(recipe.export.formats) - {"merged", "nf4"}:
        return None
    base = words_of(model_source(recipe.model.base, folder), recipe.model.revision)
    if base is None or not (base / "config.json").is_file():
        return None  # loading the model will say what it is that has none
    try:
        check_exportable(base)
    except ModelError as error:
        advice = _("Remove the GGUF formats from export.formats to train without them.")
        error.hint = f"{error.hint} {advice}".strip()
        return error
    return None
