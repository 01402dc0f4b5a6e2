"""From what a user names, a run folder, a model folder, a hub name or a GGUF file, to those who answer for it."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from afina.artifact import MANIFEST, open_artifact
from afina.console import Console
from afina.errors import AfinaError, RecipeError, ResourceError
from afina.language import _
from afina.recipe.place import model_source
from afina.recipe.schema import Chat, Model
from afina.serve.personas import BASE, open_cast
from afina.serve.speakers import GgufSpeaker, ModelSpeaker, Speaker
from afina.serve.wish import Desk

if TYPE_CHECKING:
    from torch import nn

    from afina.data.template import Renderer

GGUF_SLOTS = 4
"""Answers of a GGUF file that llama.cpp writes at once, each with a context of its own."""
UNBOUNDED = 2**15
"""The context of a model that does not say how much it was made for."""


def speakers_of(
    source: str, beside_base: bool, adapters: Sequence[str], stack: ExitStack
) -> tuple[list[Speaker], Chat, int | None]:
    """Who answers for a source, how its recipe samples, and the context in tokens.

    `adapters` are personalities on a base, NAME=FOLDER each.
    """
    place = Path(source)
    if place.suffix == ".gguf" and not adapters:
        from afina.model.llamacpp import LlamaCpp

        llama = stack.enter_context(LlamaCpp(place))
        return [GgufSpeaker(place.stem, llama)], _settings_beside(place), llama.context
    from afina.model.load import spare_imports  # loads torch, which a GGUF file does not need

    spare_imports()
    if adapters:
        cast, settings, limit = open_cast(source, adapters)
        return [cast], settings, limit
    if (place / MANIFEST).is_file():
        from afina.train.reopen import reopen

        tuned = reopen(place)
        if beside_base and tuned.recipe.method.name == "full":
            raise AfinaError(
                _("A fully tuned model has no base beside it in memory."), hint=_("Chat with the base on its own.")
            )
        speakers: list[Speaker] = [ModelSpeaker("tuned", tuned.model, tuned.renderer, adapted=True)]
        if beside_base:
            speakers.insert(0, ModelSpeaker("base", tuned.model, tuned.renderer, adapted=False))
        return speakers, tuned.recipe.chat, tuned.recipe.model.max_length
    from afina.model.load import limit_of

    model, renderer = _plain(source)
    return [ModelSpeaker(source, model, renderer, adapted=False)], Chat(), limit_of(model)


def open_desk(source: str, adapters: Sequence[str], at_once: int, stack: ExitStack) -> Desk:
    """Who answers requests for a source: as in a chat with it, a run's base beside the run. Closed with `stack`."""
    place = Path(source)
    if place.suffix == ".gguf":
        if adapters:
            raise RecipeError(
                _("A GGUF file takes no adapters."), hint=_("Serve the base model, with the adapters' runs.")
            )
        from afina.model.llamacpp import LlamaCpp
        from afina.serve.gguf_desk import GgufDesk

        slots = min(GGUF_SLOTS, at_once)
        llama = stack.enter_context(LlamaCpp(place, slots=slots))
        desk = GgufDesk(place.stem, llama, _settings_beside(place), slots)
        stack.callback(desk.close)
        return desk
    from afina.model.load import spare_imports

    spare_imports()
    from afina.model.load import limit_of
    from afina.model.personalities import Personalities
    from afina.serve.desk import ModelDesk, Voice

    voices: dict[str, Voice] = {}
    if adapters:
        cast, _settings, limit = open_cast(source, adapters)
        crew = cast.crew
        for name in cast.names:
            known = cast.settings.get(name, Chat())
            voices[name] = Voice(None if name == BASE else name, cast.renderers[name], known)
    elif (place / MANIFEST).is_file():
        from afina.train.reopen import reopen

        tuned = reopen(place)
        name, limit, said = tuned.recipe.name, tuned.recipe.model.max_length, tuned.recipe.chat
        crew = Personalities.of(tuned.model, name)
        voices[name] = Voice(name if crew.names else None, tuned.renderer, said)
        if crew.names and name != BASE:
            voices[BASE] = Voice(None, tuned.renderer, said)
    else:
        model, renderer = _plain(source)
        crew, limit = Personalities(model), limit_of(model)
        voices[place.name if place.is_dir() else source] = Voice(None, renderer, Chat())
    made = ModelDesk(crew, voices, limit or UNBOUNDED, at_once)
    stack.callback(made.close)
    return made


def serve_source(
    source: str,
    adapters: Sequence[str],
    console: Console,
    *,
    at_once: int,
    waiting: int,
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str | None = None,
) -> None:
    """Serve a source until a signal comes. Raises AfinaError; of a taken address before the model is loaded."""
    try:
        from afina.serve import http
        from afina.serve.gate import House
    except ImportError as error:
        raise ResourceError(
            _("Serving needs the packages fastapi and uvicorn, which are not installed."),
            hint=_('Run: pip install "afina[serve]"'),
        ) from error
    with ExitStack() as stack:
        place, local = stack.enter_context(http.listen(host, port)), http.is_loopback(host)
        if key is None and not local:
            console.warn(_("Whoever reaches {host} is answered: give a key with --api-key.").format(host=host))
        desk = open_desk(source, adapters, at_once, stack)
        http.serve(House(desk, console, at_once + waiting, key, local), place)


def _plain(source: str) -> "tuple[nn.Module, Renderer]":
    """A model without adapters."""
    from afina.data.load_tokenizer import load_tokenizer
    from afina.data.template import Renderer
    from afina.model.load import choose_hardware, load_model

    name = model_source(source, Path())
    return load_model(name, choose_hardware(Model())), Renderer(load_tokenizer(name))


def _settings_beside(gguf: Path) -> Chat:
    """The chat settings of the run a GGUF file was exported from, where it still lies in its folder."""
    from afina.train.reopen import recipe_of

    run = gguf.resolve().parent.parent
    return recipe_of(open_artifact(run, "run"))[0].chat if (run / MANIFEST).is_file() else Chat()
