"""From a recipe to what is to be expected of it: data read, the device found, everything weighed. Loads no weights."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from afina.console import Console
from afina.data.stats import Figures
from afina.data.stats import warnings as warnings_of
from afina.data.template import Rendered, Renderer
from afina.errors import DataError
from afina.forecast.choices import Choice, Load, Weighing, faster, table, to_fit
from afina.forecast.clock import trial
from afina.forecast.device import Device, device_of
from afina.forecast.disk import on_disk
from afina.forecast.gpus import Gpu
from afina.forecast.weigh import Given, weigh
from afina.language import _
from afina.recipe.advice import FEW, MANY, Advice, choose
from afina.recipe.place import model_source
from afina.recipe.schema import Full, Lora, Recipe
from afina.train.examples import Examples, prepare_once, renderer_of
from afina.train.repeats import notice, repeated

ROOMY = 0.7
"""Of what may be taken; with so much or less there is room for what is faster."""
NO_CONTEXT = 2**24
"""Longer than any sample."""


@dataclass(frozen=True)
class Forecast:
    """What is to be expected. table: the recipe first, then others. over: samples longer than the context; refused:
    whether training would end for them."""

    recipe: Recipe
    device: Device
    figures: Figures
    here: Choice
    table: list[Choice]
    fitting: list[Choice]
    faster: list[Choice]
    advice: Advice
    disk: dict[str, int | None]
    over: int
    warnings: list[str] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        """Whether training ends before it begins, as samples are too long."""
        return self.over > 0 and self.recipe.data.too_long != "reject"


def foresee(
    recipe: Recipe, folder: Path, load: Load, cache: Path, gpu: Gpu | None, memory: float | None, console: Console
) -> Forecast:
    """Weigh a recipe, and what else it could be. gpu, memory (GiB): of a machine that is not this one.

    Raises what training would before it loads weights: DataError, ModelError, RecipeError, ResourceError.
    """
    device = device_of(recipe, gpu, memory)
    source = model_source(recipe.model.base, folder)
    renderer = renderer_of(recipe, folder, source)
    tokenizer = renderer.tokenizer
    examples, rows, over = _examples(recipe, folder, renderer, console, cache)
    given = Given(recipe, source, rows, tokenizer)
    held_out = sum(row.ids.size for row in examples.validation)
    here_given = Given(recipe, source, [row for row in rows if row.ids.size <= recipe.model.max_length], tokenizer)
    rate = None
    if device.kind == "cpu":
        rate = trial(here_given, device, weigh(here_given, device))
    weighing = Weighing(given, device, load, held_out, rate)
    here = weighing.choice((), "")
    if here is None:
        raise DataError(
            _("No sample is left to learn from:"), hint=_("Raise model.max_length, or shorten the samples.")
        )
    choices = table(weighing, here)
    fits = here.need.fits
    return Forecast(
        recipe,
        device,
        figures := _figures(rows, recipe.model.max_length),
        here,
        choices,
        [] if fits else to_fit(weighing, here),
        faster(weighing, here) if fits and here.need.least <= ROOMY * here.need.limit else [],
        _advice(recipe, choices, here, device, len(rows)),
        on_disk(here_given, here.need),
        over,
        [*warnings_of(figures, recipe), *_more_warnings(recipe, examples, len(rows))],
    )


def _examples(
    recipe: Recipe, folder: Path, renderer: Renderer, console: Console, cache: Path
) -> tuple[Examples, list[Rendered], int]:
    """The examples as training prepares them, all samples to learn from whatever their length, and how many are beyond
    the recipe's context. Raises DataError for whatever else is wrong with them."""
    try:
        examples = prepare_once(recipe, folder, renderer, console, cache)
    except DataError:
        examples = None
    if examples is None or examples.rejected:
        without = recipe.model.model_copy(update={"max_length": NO_CONTEXT})
        examples = prepare_once(recipe.model_copy(update={"model": without}), folder, renderer, console, cache)
    limit = recipe.model.max_length
    over = sum(row.ids.size > limit for row in [*examples.train, *examples.validation])
    return examples, examples.train, over


def _figures(rows: Sequence[Rendered], context: int) -> Figures:
    """As `afina data stats` counts them, but for what only messages tell."""
    lengths = np.array([row.ids.size for row in rows], np.int64)
    learnt = np.array([int(row.learnt[1:].sum()) for row in rows], np.int64)
    losing = sum(bool(row.learnt[context:].any()) for row in rows)
    nobody: Counter[str] = Counter()
    return Figures(
        lengths, learnt, np.zeros(0, np.int64), context, int((lengths > context).sum()), losing, None, nobody
    )


def _advice(recipe: Recipe, choices: Sequence[Choice], here: Choice, device: Device, rows: int) -> Advice:
    """The method for these rows on this device, by what each was weighed to take."""
    weighed = {choice.name: float(choice.need.least) for choice in choices if choice.name}
    weighed[method_of(recipe)] = float(here.need.least)
    gpu = device.kind == "cuda"
    return choose(here.need.parameters, rows, device.memory, gpu=gpu, weighed=weighed, room=here.need.limit)


def method_of(recipe: Recipe) -> str:
    """What people call it: lora on a base of four bits is qlora."""
    return "qlora" if isinstance(recipe.method, Lora) and recipe.model.quantization != "none" else recipe.method.name


def _more_warnings(recipe: Recipe, examples: Examples, rows: int) -> list[str]:
    """What `train` says of repeats; and what suits few samples, or an export, badly."""
    said, epochs = list[str](), recipe.training.epochs
    if again := notice(repeated(examples.train), rows, epochs, lambda sample: examples.origin[sample].where):
        said.append(again)
    if isinstance(recipe.method, Full) and rows < MANY:
        said.append(
            _(
                "Every weight learns from {rows} samples: an adapter learns as well from so few, and forgets less."
            ).format(rows=rows)
        )
    if isinstance(recipe.method, Lora) and recipe.method.rank > 16 and rows < FEW:
        said.append(
            _(
                "{rows} samples and rank {rank}: a narrower adapter (method.rank=8) learns fewer of them by heart."
            ).format(rows=rows, rank=recipe.method.rank)
        )
    if "nf4" in recipe.export.formats and recipe.model.quantization != "none":
        said.append(
            _(
                "The format nf4 rounds what was trained to four bits again: by docs/export.md 0.0076 nats a token away "
                "from it, 0.375 where the checkpoint itself came in four bits. Rather export merged or a GGUF file."
            )
        )
    return said
