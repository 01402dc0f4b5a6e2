"""A model pruned by some shares: each a new folder that transformers opens, with what it cost on held-out samples.

The loss before and after is that of training, on the samples that training kept back. Weights set to zero leave a file
as large as it was; layers and channels taken out make it smaller and faster.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from afina import durable
from afina.artifact import seal
from afina.compress.judge import judge
from afina.compress.parts import (
    channels_to_keep,
    influences,
    keep_channels,
    keep_layers,
    layers_to_keep,
)
from afina.compress.source import Source
from afina.compress.weights import Pattern, zero_weights
from afina.console import Console, size
from afina.data.template import Rendered
from afina.errors import DataError, RecipeError, ResourceError
from afina.language import _
from afina.model.imatrix import collect
from afina.model.load import DTYPES, load_model
from afina.model.saved import save_whole
from afina.recipe.schema import Full
from afina.train.examples import Examples, prepare, say_examples

Method = Literal["wanda", "magnitude", "magnitude-global", "layers", "channels"]
METHODS: tuple[Method, ...] = ("wanda", "magnitude", "magnitude-global", "layers", "channels")
CALIBRATION = 128
"""Training samples that are read to see what flows through the model, as many as Wanda takes."""
SPARE = 64 * 2**20
"""Bytes of the disk left alone."""


@dataclass(frozen=True)
class Cut:
    """One pruned model that is wanted."""

    method: Method
    share: float
    pattern: Pattern | None = None

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method}-{f'{self.share:g}' if self.pattern is None else str(self.pattern).replace(':', 'of')}"


@dataclass
class Seen:
    """What calibration saw: of each matrix the mean squares of its inputs, of each layer its influence."""

    squares: dict[str, torch.Tensor] = field(default_factory=dict)
    influences: list[float] = field(default_factory=list)


def cuts_of(method: str, shares: Sequence[float], pattern: str | None) -> list[Cut]:
    """What is wanted, checked. Raises RecipeError."""
    if method not in METHODS:
        raise RecipeError(
            _("There is no method {name}.").format(name=method),
            hint=_("There are {names}.").format(names=", ".join(METHODS)),
        )
    if pattern is not None:
        found = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", pattern)
        kept, of = (int(number) for number in found.groups()) if found else (0, 0)
        if not 0 < kept < of:
            raise RecipeError(_("A pattern is N:M with N below M, such as 2:4; {text} is none.").format(text=pattern))
        if shares or method not in ("wanda", "magnitude"):
            raise RecipeError(_("A pattern is a share of its own, and goes with the methods wanda and magnitude."))
        return [Cut(method, 1 - kept / of, Pattern(kept, of))]  # type: ignore[arg-type]
    if not shares:
        raise RecipeError(_("Say which share goes: --share 0.3, or several as 0.1,0.3,0.5."))
    for number, share in enumerate(shares):
        if not 0 < share < 1:
            raise RecipeError(_("A share lies between 0 and 1; {share:g} does not.").format(share=share))
        if share in shares[:number]:
            raise RecipeError(_("The share {share:g} stands twice.").format(share=share))
    return [Cut(method, share) for share in shares]  # type: ignore[arg-type]


def prune(source: Source, cuts: Sequence[Cut], out: Path, console: Console, limit: int | None = None) -> list[Path]:
    """Make a folder below `out` for each of `cuts`; returns them. `limit`: at most so many held-out samples are read.

    Raises AfinaError; what was finished before stays.
    """
    examples = prepare(source.recipe, source.folder, source.renderer, console)
    say_examples(examples, console)
    held_out = _held_out(source, examples, limit, console)
    ask = partial(judge, rows=held_out, hardware=source.hardware, pad_id=source.renderer.tokenizer.pad_id)
    loaded = [source.open()]
    with console.progress(_("Reading"), 2) as progress:
        before = ask(loaded[0], folder=source.place)
        progress.advance(1)
        seen = _look(loaded[0], cuts[0].method, examples.train)
        progress.advance(1)
    dtype = _precision(loaded[0], DTYPES[source.recipe.export.precision])
    _check_room(loaded[0], dtype, len(cuts), out)
    rows, made = [_row(source.name, before.facts())], []
    for cut in cuts:
        model = loaded.pop() if loaded else source.open()  # each share is cut from the whole model
        parts = _cut(model, cut, seen)
        place = out / cut.name
        with durable.new_folder(place) as folder:
            save_whole(model.to(dtype), folder)
            source.renderer.tokenizer.save(folder)
            del model
            after = ask(load_model(str(folder), source.hardware), folder=folder)  # what was written is what is judged
            facts = {
                "method": cut.method,
                "share": cut.share,
                "pattern": str(cut.pattern) if cut.pattern else None,
                **parts,
                "held_out_samples": len(held_out),
                "before": before.facts(),
                "after": after.facts(before),
            }
            _seal(folder, source, examples, facts)
        made.append(place)
        rows.append(_row(cut.name, facts["after"]))
        console.event("pruned", folder=str(place), **facts)
    _show(rows, len(held_out), source, cuts[0], console)
    return made


def _held_out(source: Source, examples: Examples, limit: int | None, console: Console) -> list[Rendered]:
    """The samples that training kept back, of many of them some, evenly spread."""
    if not examples.validation:
        raise DataError(
            _("There are no held-out samples, so nothing could tell what pruning costs."),
            hint=_("Give a recipe with data.validation: --recipe."),
        )
    if source.learnt_from and source.learnt_from != {entry["sha256"] for entry in examples.files}:
        console.warn(_("The data are not those of the training: what is held out here may have been learnt there."))
    rows = examples.validation
    count = min(limit or len(rows), len(rows))
    return [rows[place * len(rows) // count] for place in range(count)]


def _look(model: nn.Module, method: Method, rows: Sequence[Rendered]) -> Seen:
    """Let the model read training samples, where the method asks for it."""
    count = min(CALIBRATION, len(rows))
    sequences = [rows[place * len(rows) // count].ids.tolist() for place in range(count)]
    match method:
        case "wanda" | "channels":
            return Seen(squares=collect(model, sequences))
        case "layers":
            return Seen(influences=influences(model, sequences))
        case _:
            return Seen()


def _cut(model: nn.Module, cut: Cut, seen: Seen) -> dict[str, Any]:
    """Prune in place; returns which parts stay."""
    if cut.method == "layers":
        kept = layers_to_keep(seen.influences, cut.share)
        keep_layers(model, kept)
        return {"layers_kept": kept, "influences": seen.influences}
    if cut.method == "channels":
        channels = channels_to_keep(model, seen.squares, cut.share)
        keep_channels(model, channels)
        return {"channels_kept": next(iter(channels.values())).numel()}
    zero_weights(model, cut.method, cut.share, cut.pattern, seen.squares)
    return {}


def _precision(model: nn.Module, wanted: torch.dtype) -> torch.dtype:
    """The 16 bits that hold every weight as it is, as of a model that came in them; else what the recipe wants."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(parameter, parameter.to(dtype).float()) for parameter in model.parameters()):
            return dtype
    return wanted


def _check_room(model: nn.Module, dtype: torch.dtype, count: int, out: Path) -> None:
    needed = count * dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    if needed + SPARE > (free := durable.free_bytes(out.resolve())):
        raise ResourceError(
            _("The pruned models need {needed} on the disk of {out}, and {free} are free.").format(
                needed=size(needed), out=out, free=size(free)
            ),
            hint=_("Free some space, name fewer shares, or set export.precision to bf16."),
        )


def _seal(folder: Path, source: Source, examples: Examples, facts: dict[str, Any]) -> None:
    """What was made of what: a whole model, with the recipe that it is asked by."""
    recipe = source.recipe
    whole = recipe.model.model_copy(update={"quantization": "none", "adapter": None})
    asked_by = recipe.model_copy(update={"method": Full(name="full"), "model": whole})
    seal(
        folder,
        "model",
        parents=[*source.parents, *examples.files],
        recipe=asked_by.resolved(),
        recipe_folder=str(source.folder),
        seed=recipe.seed,
        hardware=str(source.hardware),
        pruning=facts,
    )


def _row(name: str, facts: dict[str, Any]) -> tuple[str, ...]:
    low, high = facts["interval"] or (None, None)
    change = facts.get("change_interval")
    return (
        name,
        f"{facts['parameters']:,}",
        f"{facts['zero_share']:.1%}",
        f"{facts['loss']:.4f}",
        "-" if low is None else f"{low:.4f} - {high:.4f}",
        f"{facts['perplexity']:.2f}",
        f"{facts['change']:+.4f} ± {(change[1] - change[0]) / 2:.4f}" if change else "-",
        size(facts["file_bytes"]) if facts["file_bytes"] else "-",
        f"{facts['tokens_per_second']:,.0f}",
    )


def _show(rows: list[tuple[str, ...]], samples: int, source: Source, cut: Cut, console: Console) -> None:
    console.table(
        (
            "",
            _("weights"),
            _("zero"),
            _("loss"),
            _("95% interval"),
            _("perplexity"),
            _("change"),
            _("size"),
            _("tokens/s read"),
        ),
        rows,
        title=_("{model}: {count} held-out samples").format(model=source.name, count=samples),
    )
    if cut.method in ("layers", "channels"):
        return
    console.line(
        _(
            "The zeros are no smaller and no faster: a dense file holds each, and dense products multiply by it. "
            "--method layers or channels takes parts out; afina export with fewer bits makes a file small."
        )
    )
