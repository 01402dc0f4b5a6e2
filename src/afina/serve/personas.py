"""Several personalities on one base: who is there, and who answers next. One speaker, as a session sees it."""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina.artifact import MANIFEST, open_artifact, source_digest
from afina.data.conversation import Message
from afina.errors import ModelError, RecipeError
from afina.language import _
from afina.recipe.place import model_source
from afina.recipe.schema import Chat, Model
from afina.serve.speakers import ModelSpeaker, OnText

if TYPE_CHECKING:
    from afina.data.template import Renderer
    from afina.model.personalities import Personalities

BASE = "base"
"""How the base without any adapter is called."""
NAME = re.compile(r"[\w.-]{1,64}")


@dataclass
class Cast:
    """The personalities of one base, by name, `base` among them; `chosen` answers. `source` is where the base lies.
    `settings`: how those of a run are talked to, as its recipe says."""

    source: str
    crew: "Personalities"
    renderers: dict[str, "Renderer"]
    settings: dict[str, Chat] = field(default_factory=dict)
    chosen: str = BASE

    @property
    def name(self) -> str:
        """Who answers."""
        return self.chosen

    @property
    def names(self) -> tuple[str, ...]:
        """Who could."""
        return (BASE, *self.crew.names)

    def choose(self, name: str) -> None:
        """Let another one answer from now on. Raises ModelError for a name that is not there."""
        self._renderer(name)
        self.chosen = name

    def add(self, name: str, place: Path) -> None:
        """Load the adapter of a run folder, or in PEFT's format, to answer as `name`.

        Raises ModelError where there is none, it is of another base, or the name is taken; RecipeError for a name that
        cannot be one.
        """
        from afina.data.load_tokenizer import load_tokenizer
        from afina.data.template import Renderer
        from afina.train.reopen import recipe_of

        if not NAME.fullmatch(name):
            raise RecipeError(
                _("{name} cannot be the name of a personality.").format(name=repr(name)[:80]),
                hint=_("Take letters, digits, dots, dashes and underscores."),
            )
        if name == BASE:
            raise ModelError(_("The base itself is called {name}.").format(name=name), hint=_("Take another name."))
        folder = _adapter_in(place, self.source)
        self.crew.load(name, folder)
        own = (folder / "tokenizer.json").is_file()
        self.renderers[name] = Renderer(load_tokenizer(str(folder))) if own else self.renderers[BASE]
        run = folder.parent
        if (run / MANIFEST).is_file():
            self.settings[name] = recipe_of(open_artifact(run, "run"))[0].chat

    def drop(self, name: str) -> None:
        """Let an adapter go; the base answers where it was the chosen one. Raises ModelError."""
        if name == BASE:
            raise ModelError(_("The base cannot be dropped."), hint=_("End the chat instead."))
        self.crew.drop(name)
        del self.renderers[name]
        self.settings.pop(name, None)
        self.chosen = BASE if self.chosen == name else self.chosen

    def length(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt."""
        return self._speaker().length(messages)

    def answer(self, messages: Sequence[Message], settings: Chat, seed: int, on_text: OnText) -> str:
        """The answer of who was chosen."""
        return self._speaker().answer(messages, settings, seed, on_text)

    def _speaker(self) -> ModelSpeaker:
        return ModelSpeaker(self.chosen, self.crew.model, self._renderer(self.chosen), answering=self._answering)

    def _answering(self) -> AbstractContextManager[Any]:
        return self.crew.answering(None if self.chosen == BASE else self.chosen)

    def _renderer(self, name: str) -> "Renderer":
        if name not in self.renderers:
            raise ModelError(
                _("There is no personality called {name}.").format(name=name),
                hint=_("There are {names}.").format(names=", ".join(self.names)),
            )
        return self.renderers[name]


def open_cast(source: str, adapters: Sequence[str]) -> tuple[Cast, Chat, int | None]:
    """A base with the adapters of `adapters`, NAME=FOLDER each; the first one answers first.

    Returns them with the chat settings of the first one's run, and the context in tokens. Raises AfinaError.
    """
    from afina.data.load_tokenizer import load_tokenizer
    from afina.data.template import Renderer
    from afina.model.load import choose_hardware, limit_of, load_model
    from afina.model.personalities import Personalities

    named = [_pair(text) for text in adapters]
    base = model_source(source, Path())
    if (Path(base) / MANIFEST).is_file():
        raise ModelError(
            _("{folder} is a run, not a base model.").format(folder=base),
            hint=_("Name the base it was trained from, and the run as --adapter NAME={folder}.").format(folder=base),
        )
    model = load_model(base, choose_hardware(Model()))
    cast = Cast(base, Personalities(model), {BASE: Renderer(load_tokenizer(base))})
    for name, place in named:
        cast.add(name, place)
    cast.choose(named[0][0])
    return cast, cast.settings.get(cast.chosen, Chat()), limit_of(model)


def _pair(text: str) -> tuple[str, Path]:
    name, equals, place = text.partition("=")
    if not equals or not name or not place:
        raise RecipeError(
            _("A personality is given as NAME=FOLDER, not {text}.").format(text=repr(text)[:80]),
            hint=_("For instance --adapter pirate=runs/pirate."),
        )
    return name, Path(place).expanduser()


def _adapter_in(place: Path, base: str) -> Path:
    """The adapter of a run folder, or the folder itself. Raises ModelError for one of a run of another base."""
    from afina.train.reopen import recipe_of

    if (place / "adapter_config.json").is_file() and (place.parent / MANIFEST).is_file():
        place = place.parent
    if not (place / MANIFEST).is_file():
        return place
    run = open_artifact(place, "run")
    recipe, start = recipe_of(run)
    its = model_source(recipe.model.base, start)
    recorded = {parent["sha256"] for parent in run.manifest["parents"] if parent["role"] == "base"}
    if its != base and source_digest(Path(base)) not in recorded:
        raise ModelError(
            _("{run} was trained on another base, {base}.").format(run=place, base=recipe.model.base),
            hint=_("Adapters share a base only where it is the one they were trained on."),
        )
    return place / "adapter"
