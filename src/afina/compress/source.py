"""What is to be made smaller: a run, what was made of one, or any model with a recipe that says on what data."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from afina.artifact import MANIFEST, parent, source_digest
from afina.data.load_tokenizer import load_tokenizer
from afina.data.template import Renderer
from afina.errors import ModelError, RecipeError
from afina.language import _
from afina.model.attach import merged
from afina.model.load import Hardware, choose_hardware, load_model
from afina.model.saved import load_adapter
from afina.recipe.place import model_source
from afina.recipe.schema import Recipe
from afina.train.examples import renderer_of
from afina.train.reopen import check_unchanged, learnt_in, open_tuned, recipe_of, refuse_virtual


@dataclass(frozen=True)
class Source:
    """`open` loads it whole, in fp32, adapters merged; `place` is its folder, where it lies whole in one.

    `recipe` says on what it is calibrated and judged; `folder` is where that recipe's relative paths start.
    `learnt_from`: the hashes of the data files of its training, where it had one.
    """

    name: str
    recipe: Recipe
    folder: Path
    renderer: Renderer
    hardware: Hardware
    parents: list[dict[str, str]]
    learnt_from: set[str]
    open: Callable[[], nn.Module]
    place: Path | None = None


def open_source(name: str, given: tuple[Recipe, Path] | None) -> Source:
    """A run folder, a model that `afina compress` made, a model folder or a hub name.

    `given`: a recipe and where its paths start; a run has one itself. Raises AfinaError.
    """
    place = Path(name)
    if (place / MANIFEST).is_file():
        return _of_artifact(place, given)
    if given is None:
        raise RecipeError(
            _("{model} is no run, so a recipe must say on what data it is judged.").format(model=name),
            hint=_("Name one with --recipe; afina init writes one."),
        )
    recipe, folder = given
    source = model_source(name, folder)
    hardware = choose_hardware(recipe.model)
    digest = source_digest(Path(source)) or recipe.model.revision or "main"
    wanted = recipe.model.model_copy(update={"quantization": "none"})
    load = partial(load_model, source, Hardware(hardware.device, torch.float32), wanted, plain=True)
    renderer = renderer_of(recipe, folder, source)
    parents = [parent(name, digest, "base")]
    return Source(
        Path(name).name, recipe, folder, renderer, hardware, parents, set(), partial(_checked, load), _folder(source)
    )


def _of_artifact(place: Path, given: tuple[Recipe, Path] | None) -> Source:
    record = open_tuned(place)
    check_unchanged(record)
    own, start = recipe_of(record)
    refuse_virtual(own)
    recipe, folder = given or (own, start)
    hardware = choose_hardware(recipe.model)
    plain = Hardware(hardware.device, torch.float32)
    weights = learnt_in(record)

    def load() -> nn.Module:
        if own.method.name == "full":
            return load_model(str(weights), plain)
        base = load_model(model_source(own.model.base, start), plain, own.model, plain=True)
        return merged(load_adapter(base, weights))

    renderer = Renderer(load_tokenizer(str(weights)), recipe.data.learn)
    learnt = {entry["sha256"] for entry in record.manifest["parents"] if entry["role"] == "data"}
    parents = [parent(place.name, record.digest, record.kind)]
    whole = weights if own.method.name == "full" else None
    name = place.resolve().name
    return Source(name, recipe, folder, renderer, hardware, parents, learnt, partial(_checked, load), whole)


def _folder(source: str) -> Path | None:
    return Path(source) if Path(source).is_dir() else None


def _checked(load: Callable[[], nn.Module]) -> nn.Module:
    """The model, once each of its weights is a number and each of its layers one that is known here."""
    model = load()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 2:
            raise ModelError(
                _("{name} holds a mixture's experts, which are not pruned here.").format(name=name),
                hint=_("afina export makes such a model smaller: --to q4_k_m or mxfp4."),
            )
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(_("{name} has weights that are no numbers.").format(name=name))
    return model.requires_grad_(False).eval()
