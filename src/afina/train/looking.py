"""Tasks asked of the model between two steps, without a trace in what it learns. Who asks is an argument."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from afina.console import Console
from afina.data.template import Renderer
from afina.errors import AfinaError, Interrupted
from afina.language import _
from afina.model.attention import attending
from afina.model.load import Hardware
from afina.train.best import Criterion, figure_of
from afina.train.memory import within_memory
from afina.train.stop import Stop


class OnEvaluate(Protocol):
    """Asks its tasks of a model. `tokens`: about how many are looked at each time; `falling`: the tasks whose figure is
    the better the smaller."""

    @property
    def tokens(self) -> int: ...

    @property
    def falling(self) -> frozenset[str]: ...

    def __call__(self, model: nn.Module, renderer: Renderer, hardware: Hardware) -> list[dict[str, Any]]:
        """For each `task` its `measure`, `value`, `interval`, and how many samples were `answered`."""
        ...


@dataclass(frozen=True)
class Asking:
    """`ask()` gives the figures of each task, after the steps of `after`; `work`: its units of progress."""

    ask: Callable[[], list[dict[str, Any]]] = list
    work: int = 0
    after: frozenset[int] = frozenset()


@dataclass
class Looking:
    """The model of one run and who asks it, None where nobody does; made before packed attention is switched on."""

    model: nn.Module
    renderer: Renderer
    hardware: Hardware
    on_evaluate: OnEvaluate | None = None
    _plain: str = field(init=False)

    @property
    def pad_id(self) -> int:
        """Of its tokenizer."""
        return self.renderer.tokenizer.pad_id

    def __post_init__(self) -> None:
        config: Any = self.model.config
        self._plain = config._attn_implementation

    def asking(self, after: frozenset[int]) -> Asking:
        """It is asked after these steps; never, where nobody asks."""
        return Asking(self.ask, self.on_evaluate.tokens, after) if self.on_evaluate else Asking()

    def criterion(self, task: str | None) -> Criterion:
        """By which figure the best weights are told."""
        if task is None or self.on_evaluate is None:
            return Criterion()
        return Criterion(figure_of(task), larger=task not in self.on_evaluate.falling)

    def ask(self) -> list[dict[str, Any]]:
        """The figures now. Random numbers, attention and places of weights are as before when it returns."""
        if self.on_evaluate is None:
            return []
        device = self.hardware.device
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
        with torch.random.fork_rng([device] if on_gpu else []), attending(self.model, self._plain), self._on_device():
            return self.on_evaluate(self.model, self.renderer, self.hardware)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Inside the block the weights that the engine keeps in the computer's memory are where it computes."""
        kind = self.hardware.device.type
        away = {part: part.data for part in self.model.parameters() if part.device.type != kind}
        try:
            for part in away:
                part.data = part.data.to(self.hardware.device)
            yield
        finally:
            for part, data in away.items():
                part.data = data


def figures_or_none(
    ask: Callable[[], list[dict[str, Any]]], stop: Stop, console: Console, step: int
) -> list[dict[str, Any]]:
    """What `ask` gives; nothing, with a warning, where that cannot be had: the training goes on. Raises Interrupted."""
    reason = _("the memory does not hold it")
    try:
        found = stop.compute(partial(within_memory, ask))
    except Interrupted:
        raise
    except AfinaError as error:
        found, reason = None, error.message
    if found is None:
        console.warn(_("The tasks could not be asked after step {step}: {reason}").format(step=step, reason=reason))
    return found or []


def tell(facts: dict[str, Any], console: Console, step: int, steps: int) -> None:
    """Print what one task said, and how many samples have no answer."""
    console.event("evaluation", step=step, **facts)
    if facts["value"] is not None:
        ends = " - ".join(f"{end:.3f}" for end in facts["interval"] or ())
        text = _("Asked     {task}: {value:.3f} ({interval}) after step {step} of {steps}")
        told = {"task": facts["task"], "value": facts["value"], "interval": ends or "-"}
        console.line(text.format(step=step, steps=steps, **told))
    if missing := facts["samples"] - facts["answered"]:
        console.warn(
            _("{count} of {samples} samples of {task} have no answer: {reason}").format(
                count=missing,
                samples=facts["samples"],
                task=facts["task"],
                reason="; ".join(facts["reasons"]) or "-",
            )
        )
