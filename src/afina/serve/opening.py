"""From what a user names, a run folder, a model folder, a hub name or a GGUF file, to those who answer for it."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from afina.artifact import MANIFEST
from afina.console import Console
from afina.errors import AfinaError, RecipeError
from afina.garbage import importing
from afina.language import _
from afina.recipe.place import model_source
from afina.recipe.schema import Chat, Model
from afina.serve.personas import open_cast
from afina.serve.session import Session
from afina.serve.speakers import GgufSpeaker, ModelSpeaker, Speaker
from afina.serve.terminal import answer_once, chat


def chat_with(
    source: str,
    adapters: Sequence[str],
    console: Console,
    *,
    prompt: str | None,
    beside_base: bool,
    seed: int,
    settings: Mapping[str, Any],
) -> None:
    """Talk to a source in the terminal, or ask it `prompt` and return. Raises AfinaError."""
    with ExitStack() as stack:
        speakers, defaults, limit = speakers_of(source, beside_base, adapters, stack)
        session = Session(speakers, defaults, seed=seed, limit=limit)
        try:
            session.change(**settings)
        except ValueError as error:
            raise RecipeError(_("These settings cannot be: {reason}").format(reason=error)) from error
        if prompt is None:
            chat(session, console)
        else:
            answer_once(session, prompt, console)


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
        return [GgufSpeaker(place.stem, llama)], settings_beside(place), llama.context
    with importing():  # loads torch, which a GGUF file does not need
        from afina.model.load import spare_imports

        spare_imports()
        from afina.data.load_tokenizer import load_tokenizer
        from afina.data.template import Renderer
        from afina.model.load import choose_hardware, limit_of, load_model
        from afina.train.reopen import reopen
    if adapters:
        cast, settings, limit = open_cast(source, adapters)
        return [cast], settings, limit
    if (place / MANIFEST).is_file():
        tuned = reopen(place)
        if beside_base and tuned.recipe.method.name == "full":
            raise AfinaError(
                _("A fully tuned model has no base beside it in memory."), hint=_("Chat with the base on its own.")
            )
        speakers: list[Speaker] = [ModelSpeaker("tuned", tuned.model, tuned.renderer, adapted=True)]
        if beside_base:
            speakers.insert(0, ModelSpeaker("base", tuned.model, tuned.renderer, adapted=False))
        return speakers, tuned.recipe.chat, tuned.recipe.model.max_length
    name = model_source(source, Path())
    model = load_model(name, choose_hardware(Model()))
    return [ModelSpeaker(source, model, Renderer(load_tokenizer(name)), adapted=False)], Chat(), limit_of(model)


def settings_beside(gguf: Path) -> Chat:
    """The chat settings of the run a GGUF file was exported from, where it still lies in its folder."""
    run = gguf.resolve().parent.parent
    if not (run / MANIFEST).is_file():
        return Chat()
    from afina.train.reopen import open_tuned, recipe_of

    return recipe_of(open_tuned(run))[0].chat
