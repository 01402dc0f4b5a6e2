"""`afina plan RECIPE [KEY=VALUE ...] [--gpu NAME] [--memory GIB]`."""

from typing import Annotated

import typer

from afina.cli.options import Debug, Json, Overrides, Recipe
from afina.errors import DataError, ResourceError
from afina.language import _

Gpu = Annotated[
    str | None,
    typer.Option("--gpu", help=_("A GPU that is not here, such as 'RTX 3060' or T4."), show_default=False),
]
Memory = Annotated[
    float | None, typer.Option("--memory", min=0.5, help=_("How many GiB the GPU has."), show_default=False)
]


def command(
    recipe: Recipe,
    overrides: Overrides = None,
    gpu: Gpu = None,
    memory: Memory = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Will it fit, how long will it take, and what else it could be."""
    from afina import planning

    found = planning.plan(recipe, overrides or [], gpu=gpu, memory=memory)
    if found["fits"] is False:
        best = found["to_fit"][0]["change"] if found["to_fit"] else []
        raise ResourceError(
            _("This recipe does not fit into the memory of {device}.").format(device=found["device"]["name"]),
            hint=_("It would with: {change}").format(change=" ".join(best))
            if best
            else _("Take a smaller base model, or a machine with more memory."),
        )
    if found["data"]["refused"]:
        raise DataError(
            _("{count} samples are longer than model.max_length, so training would refuse them.").format(
                count=found["data"]["over"]
            ),
            hint=_("Raise model.max_length, or set data.too_long to reject to go on without the long ones."),
        )
