"""Which layers a method means: names, patterns and numbers of the recipe against the modules there are."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from afina.errors import RecipeError
from afina.language import _
from afina.recipe.schema import Lora

PATTERN = re.compile(r"[*?\[]")
SHOWN = 12
"""Names listed in an error."""


def chosen(model: nn.Module, method: Lora) -> str | list[str]:
    """What PEFT is told to target: all-linear, or names.

    Raises RecipeError for an entry that matches nothing or what another has matched, listing what there is, and for a
    rank that a layer cannot have.
    """
    layers = _linear(model)
    if method.targets == "all-linear":
        wanted = set(body_of(model))
        found: str | list[str] = "all-linear"
    else:
        wanted = _matched(layers, method.targets, _head(model))
        plain = not any(PATTERN.search(target) for target in method.targets)
        found = list(method.targets) if plain else sorted(wanted)
    if method.layers is not None:
        numbers = set(layer_numbers(model, method.layers))
        wanted = {name for name in wanted if _number(model, name) in numbers}
        found = sorted(wanted)
        if not found:
            raise RecipeError(_("method.layers: none of the targets lies in these layers."), key=("method", "layers"))
    _check_rank({name: module for name, module in layers.items() if name in wanted}, method.rank)
    return found


def layer_numbers(model: nn.Module, wanted: Sequence[int]) -> list[int]:
    """Numbers from 0 of decoder layers, where negative ones count from the end. Raises RecipeError for one beyond."""
    config: Any = model.config
    count = int(config.get_text_config().num_hidden_layers)
    for number in wanted:
        if not -count <= number < count:
            raise RecipeError(
                _("method.layers: there is no layer {number}; the model has {count}, from 0 to {last}.").format(
                    number=number, count=count, last=count - 1
                ),
                key=("method", "layers"),
            )
    return sorted({number % count for number in wanted})


def in_layers(model: nn.Module, numbers: Iterable[int]) -> list[nn.Parameter]:
    """The parameters of some decoder layers."""
    wanted = set(numbers)
    return [parameter for name, parameter in model.named_parameters() if _number(model, name) in wanted]


def check_modules(model: nn.Module, names: Sequence[str]) -> None:
    """Raises RecipeError for one of `modules_to_save` that there is not."""
    known = {name for name, _module in model.named_modules() if name}
    for number, wanted in enumerate(names):
        if not any(name == wanted or name.endswith(f".{wanted}") for name in known):
            tails = sorted({name.rpartition(".")[2] for name in known} - {str(count) for count in range(1000)})
            raise RecipeError(
                _("method.modules_to_save: the model has no module called {name}.").format(name=wanted),
                hint=_("It has {names}.").format(names=", ".join(tails)),
                key=("method", "modules_to_save", number),
            )


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: torch's, a quantised one, or transformers' Conv1D, which is one."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def body_of(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers but the head, by their names."""
    head = _head(model)
    return {name: module for name, module in _linear(model).items() if module is not head}


def _linear(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def _head(model: Any) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head


def _matched(layers: dict[str, nn.Module], targets: Sequence[str], head: nn.Module | None) -> set[str]:
    by: dict[str, str] = {}
    for number, target in enumerate(targets):
        found = {name for name, module in layers.items() if _means(target, name, module is head)}
        if not found:
            tails = sorted({name.rpartition(".")[2] for name, module in layers.items() if module is not head})
            raise RecipeError(
                _("method.targets: the model has no linear layer called {name}.").format(name=target),
                hint=_("It has {names}.").format(names=", ".join(tails[:SHOWN])),
                key=("method", "targets", number),
            )
        if twice := sorted(found & by.keys()):
            raise RecipeError(
                _("method.targets: {first} and {second} both match {layer}.").format(
                    first=by[twice[0]], second=target, layer=twice[0]
                ),
                hint=_("Keep one of them."),
                key=("method", "targets", number),
            )
        by |= dict.fromkeys(found, target)
    return set(by)


def _means(target: str, name: str, head: bool) -> bool:
    """Whether an entry names a layer, by the end of its name or as a pattern; a pattern never means the head."""
    if PATTERN.search(target):
        return not head and (fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}"))
    return name == target or name.endswith(f".{target}")


def _number(model: nn.Module, name: str) -> int | None:
    """Which decoder layer a module or parameter lies in: the first number of its name that counts a list's entries."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit() and isinstance(model.get_submodule(".".join(parts[:place])), nn.ModuleList):
            return int(part)
    return None


def _check_rank(layers: dict[str, nn.Module], rank: int) -> None:
    sides = {name: _narrow(module) for name, module in layers.items()}
    name = min(sides, key=lambda name: sides[name], default=None)
    if name is not None and rank > sides[name]:
        raise RecipeError(
            _("method.rank is {rank}, but {layer} is only {side} wide.").format(
                rank=rank, layer=name, side=sides[name]
            ),
            hint=_("Set method.rank to {side} or less, or leave this layer out of method.targets.").format(
                side=sides[name]
            ),
            key=("method", "rank"),
        )


def _narrow(module: Any) -> int:
    """The smaller side of a layer's matrix; packed weights do not show it."""
    if hasattr(module, "in_features"):
        return min(int(module.in_features), int(module.out_features))
    return min(int(side) for side in module.weight.shape)
