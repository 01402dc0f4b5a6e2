"""From what a user names to a server that answers for it: the same sources as in a chat, opened the same way."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from afina.artifact import MANIFEST
from afina.console import Console
from afina.errors import RecipeError, ResourceError
from afina.garbage import importing
from afina.language import _
from afina.recipe.place import model_source
from afina.recipe.schema import Chat, Model
from afina.serve.opening import settings_beside
from afina.serve.personas import BASE, open_cast
from afina.serve.wish import Desk

GGUF_SLOTS = 4
"""Answers of a GGUF file that llama.cpp writes at once, each with a context of its own."""
UNBOUNDED = 2**15
"""The context of a model that does not say how much it was made for."""


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


def open_desk(source: str, adapters: Sequence[str], at_once: int, stack: ExitStack) -> Desk:
    """Who answers requests for a source: as in a chat with it, a run's base beside the run. Closed with `stack`."""
    place = Path(source)
    if place.suffix == ".gguf":
        return _gguf_desk(place, adapters, min(GGUF_SLOTS, at_once), stack)
    with importing():  # loads torch, which a GGUF file does not need
        from afina.model.load import spare_imports

        spare_imports()
        from afina.data.load_tokenizer import load_tokenizer
        from afina.data.template import Renderer
        from afina.model.load import choose_hardware, limit_of, load_model
        from afina.model.personalities import Personalities
        from afina.serve.desk import ModelDesk, Voice
        from afina.train.reopen import reopen
    voices: dict[str, Voice] = {}
    if adapters:
        cast, _settings, limit = open_cast(source, adapters)
        crew = cast.crew
        for name in cast.names:
            said = cast.settings.get(name, Chat())
            voices[name] = Voice(None if name == BASE else name, cast.renderers[name], said)
    elif (place / MANIFEST).is_file():
        tuned = reopen(place)
        name, limit, said = tuned.recipe.name, tuned.recipe.model.max_length, tuned.recipe.chat
        crew = Personalities.of(tuned.model, name)
        voices[name] = Voice(name if crew.names else None, tuned.renderer, said)
        if crew.names and name != BASE:
            voices[BASE] = Voice(None, tuned.renderer, said)
    else:
        found = model_source(source, Path())
        model = load_model(found, choose_hardware(Model()))
        crew, limit = Personalities(model), limit_of(model)
        voices[place.resolve().name if place.is_dir() else source] = Voice(
            None, Renderer(load_tokenizer(found)), Chat()
        )
    desk = ModelDesk(crew, voices, limit or UNBOUNDED, at_once)
    stack.callback(desk.close)
    return desk


def _gguf_desk(file: Path, adapters: Sequence[str], slots: int, stack: ExitStack) -> Desk:
    if adapters:
        raise RecipeError(_("A GGUF file takes no adapters."), hint=_("Serve the base model, with the adapters' runs."))
    from afina.model.llamacpp import LlamaCpp
    from afina.serve.gguf_desk import GgufDesk

    llama = stack.enter_context(LlamaCpp(file, slots=slots))
    desk = GgufDesk(file.stem, llama, settings_beside(file), slots)
    stack.callback(desk.close)
    return desk
