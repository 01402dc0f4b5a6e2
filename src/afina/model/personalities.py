"""Several adapters on one base in memory: loaded and dropped while running, chosen per request, mixed in one batch.

An adapter costs its own tensors and nothing more. Low-rank adapters in PEFT's format, of any rank and targets; those
that change the base's biases or whole modules cannot share it. Knows nothing of text, or of who asks.
"""

import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afina.errors import ModelError
from afina.language import _
from afina.model.foreign import read_object
from afina.model.generate import generate
from afina.model.longrope import crosses
from afina.model.mixed import BASE, mixable, mixed
from afina.model.saved import SETTINGS_BYTES, load_adapter
from afina.model.virtual import without


@dataclass
class Personalities:
    """Adapters by the names users give them, on `base`. Not safe from several threads at once."""

    base: nn.Module
    _adapted: Any = None
    _keys: dict[str, str] = field(default_factory=dict)
    _made: int = 0
    _mixable: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model: Any, name: str) -> "Personalities":
        """A base with the one adapter that it has, of any kind, called `name`; a model without any is the base."""
        if not hasattr(model, "peft_config"):
            return cls(model)
        (key,) = model.peft_config
        mixes = {key, BASE} <= mixable(model) and _shares(model.peft_config[key])
        return cls(model.get_base_model(), model, {name: key}, 1, {key, BASE} if mixes else set())

    @property
    def names(self) -> tuple[str, ...]:
        """Who is there, in the order they came."""
        return tuple(self._keys)

    @property
    def model(self) -> nn.Module:
        """What answers: the base, with whatever adapters there are."""
        return self.base if self._adapted is None else self._adapted

    def load(self, name: str, folder: Path) -> None:
        """Put the adapter in `folder` on the base, to answer as `name`.

        Raises ModelError for a name that is taken, a folder without an adapter, and one that does not fit or that
        cannot share a base; those who are there stay as they are.
        """
        if name in self._keys or name == BASE:
            raise ModelError(
                _("There is a personality called {name} already.").format(name=name),
                hint=_("Give this one another name, or drop that one first."),
            )
        file = folder / "adapter_config.json"
        if file.is_file():  # else load_adapter says what is missing
            said = read_object(file, SETTINGS_BYTES)
            _refuse_selfish(said, file)
            self._refuse_other_parameters(said, file)
        key = f"p{self._made}"  # a user's name may hold what a module's cannot
        self._made += 1
        active = None if self._adapted is None else self._adapted.active_adapters
        try:
            adapted: Any = load_adapter(self.model, folder, key)
        except ModelError:
            if self._adapted is not None and key in self._adapted.peft_config:
                self._adapted.delete_adapter(key)
            raise
        if active:
            adapted.set_adapter(active[0])
        self._adapted, self._keys[name], self._mixable = adapted, key, mixable(adapted)

    def drop(self, name: str) -> None:
        """Take an adapter off the base and free its memory. Raises ModelError for a name that is not there."""
        key = self._key(name)
        if len(self._keys) == 1:
            self.base, self._adapted = self._adapted.unload(), None
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # which one is active next decides nothing: `answering` says who
                self._adapted.delete_adapter(key)
        del self._keys[name]
        self._mixable = set() if self._adapted is None else mixable(self._adapted)

    def bytes_of(self, name: str) -> int:
        """The memory an adapter takes."""
        mark = f".{self._key(name)}."
        return sum(p.numel() * p.element_size() for key, p in self.model.named_parameters() if mark in key)

    @contextmanager
    def answering(self, name: str | None) -> Iterator[nn.Module]:
        """Inside the block the model answers as `name`; None is the base. Raises ModelError for an unknown name."""
        if name is None:
            if self._adapted is None:
                yield self.base
            else:
                with without(self._adapted):
                    yield self._adapted
            return
        self._adapted.set_adapter(self._key(name), inference_mode=True)
        yield self._adapted

    def kind(self, name: str | None) -> Hashable:
        """Those of one kind can answer rows of one batch. Raises ModelError for an unknown name."""
        key = BASE if name is None else self._key(name)
        return self._adapted is None or key in self._mixable or key

    @contextmanager
    def answering_all(self, names: Sequence[str | None]) -> Iterator[nn.Module]:
        """Inside the block row i of a batch is answered by `names[i]`, all of one kind; where all are one, any number
        of rows."""
        if len(set(names)) == 1:
            with self.answering(names[0]) as model:
                yield model
            return
        keys = [BASE if name is None else self._key(name) for name in names]
        with mixed(self._adapted, keys):
            yield _Rows(self._adapted, keys)

    def generate(
        self, prompts: Sequence[Sequence[int]], names: Sequence[str | None], **settings: Any
    ) -> list[list[int]]:
        """As `generate`, prompt i answered by `names[i]` (None is the base), all in one batch.

        Low-rank adapters of every kind that Afina makes are mixed, on layers (DoRA too), experts and routers; those of
        another kind take turns, a batch each, and so do all where an answer may grow beyond the original context of a
        base with LongRoPE. Raises ModelError for an unknown name.
        """
        together = not crosses(self.model, prompts, settings["max_new_tokens"])
        places: dict[Hashable, list[int]] = {}
        for place, name in enumerate(names):
            kind = self.kind(name)
            places.setdefault(kind if together else name, []).append(place)
        answers: dict[int, list[int]] = {}
        for group in places.values():
            with self.answering_all([names[place] for place in group]) as model:
                found = generate(model, [prompts[place] for place in group], **settings)
            answers |= dict(zip(group, found, strict=True))
        return [answers[place] for place in range(len(prompts))]

    def _refuse_other_parameters(self, said: dict[str, Any], file: Path) -> None:
        """Raises ModelError for adapters on other parameters than those that are there have: PEFT names an adapter's
        weights by how its parameters' wrappers lie one in another, which all adapters of a base share."""
        asked = said.get("target_parameters")
        new = sorted(map(str, asked)) if isinstance(asked, list) else []
        for name, key in self._keys.items():
            there = sorted(self._adapted.peft_config[key].target_parameters or ())
            if new and there and new != there:
                raise ModelError(
                    _("target_parameters are {new}, but {there} of {name}: the two cannot share a base.").format(
                        new=", ".join(new)[:200], there=", ".join(there), name=name
                    ),
                    hint=_("Chat with it alone, or drop the other one first."),
                    file=file,
                )

    def _key(self, name: str) -> str:
        if name not in self._keys:
            raise ModelError(
                _("There is no personality called {name}.").format(name=name),
                hint=_("There are {names}.").format(names=", ".join(self._keys) or "-"),
            )
        return self._keys[name]


class _Rows(nn.Module):
    """A model whose batch rows are answered by one adapter each."""

    def __init__(self, model: Any, keys: list[str]) -> None:
        super().__init__()
        self.model, self.config, self._keys = model, model.config, keys

    def forward(self, **inputs: Any) -> Any:
        """The model's, told whose rows they are."""
        return self.model(adapter_names=self._keys, **inputs)

    def generate(self, **settings: Any) -> torch.Tensor:
        """transformers' generate, told the same."""
        found: torch.Tensor = self.model.generate(adapter_names=self._keys, **settings)
        return found


def _shares(config: Any) -> bool:
    """Whether an adapter, by its settings, leaves as they are the base's biases and modules, so that rows of one batch
    can be its and the base's."""
    changed = (getattr(config, name, None) for name in ("modules_to_save", "trainable_token_indices"))
    return config.peft_type.value == "LORA" and config.bias == "none" and not any(changed)


def _refuse_selfish(said: dict[str, Any], file: Path) -> None:
    """Raises ModelError for an adapter that changes what the others on the same base rest on."""
    name = next((key for key in ("modules_to_save", "trainable_token_indices") if said.get(key)), None)
    if said.get("bias", "none") != "none":
        name = "bias"
    if said.get("peft_type") != "LORA":
        name = "peft_type"
    if name is not None:
        raise ModelError(
            _("{key} in adapter_config.json is {value}: this adapter cannot share its base with others.").format(
                key=name, value=str(said.get(name))[:60]
            ),
            hint=_("Chat with it alone. Personalities are low-rank adapters with bias none."),
            file=file,
        )
