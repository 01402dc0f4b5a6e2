"""A finished run, opened again: its recipe, its model with the adapter attached, its renderer.

So is a whole model that was made of one (`afina compress`): the weights lie in its own folder, and its recipe is of
method full.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from afina.artifact import MANIFEST, Artifact, open_artifact, sha256, source_digest
from afina.data.load_tokenizer import load_tokenizer
from afina.data.template import Renderer
from afina.errors import AfinaError, ModelError, RecipeError
from afina.language import _
from afina.model.load import Hardware, choose_hardware, load_model
from afina.model.saved import load_adapter, only_adds, settings_of
from afina.model.virtual import without
from afina.recipe.place import model_source
from afina.recipe.schema import PrefixTuning, PromptTuning, Recipe


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
    with without(model):
        yield


def recipe_of(run: Artifact) -> tuple[Recipe, Path]:
    """The recipe a run was made with, and where its relative paths start. Raises AfinaError for a manifest without."""
    try:
        return Recipe.model_validate(run.manifest["recipe"]), Path(run.manifest["recipe_folder"])
    except (KeyError, TypeError, ValueError) as error:
        raise AfinaError(
            _("The manifest holds no recipe that this version reads: {reason}").format(
                reason=str(error).strip().split("\n")[0]
            ),
            file=run.folder / MANIFEST,
            hint=_("Open it with the version of afina that made it, or train again."),
        ) from error


def open_tuned(folder: Path) -> Artifact:
    """A run, or a whole model made of one. Raises AfinaError for a folder that is neither."""
    found = open_artifact(folder)
    return found if found.kind == "model" else open_artifact(folder, "run")


def learnt_in(run: Artifact) -> Path:
    """The folder with the adapter, or with the whole model, and the tokenizer."""
    return run.folder if run.kind == "model" else run.folder / "adapter"


def refuse_virtual(recipe: Recipe) -> None:
    """Raises RecipeError where what a run learnt is no part of the weights."""
    if isinstance(recipe.method, PromptTuning | PrefixTuning):
        raise RecipeError(
            _("What {method} learns lies outside the weights: neither GGUF nor a merged model can hold it.").format(
                method=recipe.method.name
            ),
            hint=_(
                "afina chat opens the run folder, and so do transformers with PEFT (adapter/). For files, take lora."
            ),
        )


def check_unchanged(run: Artifact) -> None:
    """Raises ModelError when the adapter, or a base that lies in a folder, is not what the run was made with."""
    recipe, start = recipe_of(run)
    whole = run.kind == "model"  # which needs no base
    recorded = {parent["sha256"] for parent in run.manifest["parents"] if parent["role"] == "base"}
    digest = None if whole else source_digest(Path(model_source(recipe.model.base, start)))
    if digest is not None and digest not in recorded:
        raise ModelError(
            _("The base model {base} has changed since {run} was trained on it.").format(
                base=recipe.model.base, run=run.folder
            ),
            hint=_("Put the old files back, or train again."),
        )
    for name, entry in run.manifest["files"].items():
        file = run.folder / name
        if (whole or name.startswith("adapter/")) and (not file.is_file() or sha256(file) != entry["sha256"]):
            raise ModelError(
                _("{file} was changed or damaged after training.").format(file=file),
                hint=_("Put the old file back, or train again."),
            )


def reopen(folder: Path, precision: Literal["fp32"] | None = None) -> Tuned:
    """Open a run folder, its weights held as in training; or computed in `precision`, whatever they are held in. Where
    the adapter does more than add to the base's matrices, the base is then dequantised, and held in `precision` too.

    Raises AfinaError when it is none, ModelError when base and adapter do not fit.
    """
    run = open_tuned(folder)
    recipe, start = recipe_of(run)
    hardware = choose_hardware(recipe.model.model_copy(update={"precision": precision}) if precision else recipe.model)
    adapter = learnt_in(run)
    if recipe.method.name == "full":
        model = load_model(str(adapter), hardware, held=precision is not None)
    else:
        held = precision is not None and only_adds(settings_of(adapter))
        plain = precision is not None and not held
        source = model_source(recipe.model.base, start)
        base = load_model(source, hardware, recipe.model, plain=plain, held=held)
        model = load_adapter(base, adapter)
    return Tuned(run, recipe, start, model, Renderer(load_tokenizer(str(adapter)), recipe.data.learn), hardware)
