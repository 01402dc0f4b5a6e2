"""A finished run, opened again: its recipe, its model with the adapter attached, its renderer."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from afina.artifact import Artifact, open_artifact
from afina.data.template import Renderer
from afina.data.tokenizer import load_tokenizer
from afina.model.attach import load_adapter
from afina.model.load import Hardware, choose_hardware, load_model
from afina.recipe.place import model_source
from afina.recipe.schema import Recipe


@dataclass(frozen=True)
class Tuned:
    """What a run folder holds, ready to be asked. `folder` is where the recipe's relative paths start."""

    run: Artifact
    recipe: Recipe
    folder: Path
    model: nn.Module
    renderer: Renderer
    hardware: Hardware

    def base(self) -> AbstractContextManager[object]:
        """Inside the block the model answers as it did before training."""
        return untuned(self.model)


@contextmanager
def untuned(model: nn.Module) -> Iterator[None]:
    """Inside the block the adapter is out of the way."""
    with model.disable_adapter():  # type: ignore[operator]
        yield


def recipe_of(run: Artifact) -> tuple[Recipe, Path]:
    """The recipe a run was made with, and where its relative paths start."""
    return Recipe.model_validate(run.manifest["recipe"]), Path(run.manifest["recipe_folder"])


def reopen(folder: Path) -> Tuned:
    """Open a run folder. Raises AfinaError when it is none, ModelError when base and adapter do not fit."""
    run = open_artifact(folder, "run")
    recipe, start = recipe_of(run)
    hardware = choose_hardware(recipe.model)
    adapter = folder / "adapter"
    if recipe.method.name == "full":
        model = load_model(str(adapter), hardware)
    else:
        base = load_model(model_source(recipe.model.base, start), hardware, revision=recipe.model.revision)
        model = load_adapter(base, adapter)
    return Tuned(run, recipe, start, model, Renderer(load_tokenizer(str(adapter)), recipe.data.learn), hardware)
