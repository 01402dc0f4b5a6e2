"""From what a user names, a run folder, a model folder, a hub name or a GGUF file, to those who answer for it."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from afina.artifact import MANIFEST
from afina.errors import AfinaError
from afina.garbage import importing
from afina.language import _
from afina.recipe.place import model_source
from afina.recipe.schema import Chat, Model
from afina.serve.personas import open_cast
from afina.serve.speakers import GgufSpeaker, ModelSpeaker, Speaker


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


def _settings_beside(gguf: Path) -> Chat:
    """The chat settings of the run a GGUF file was exported from, where it still lies in its folder."""
    from afina.train.reopen import open_tuned, recipe_of

    run = gguf.resolve().parent.parent
    return recipe_of(open_tuned(run))[0].chat if (run / MANIFEST).is_file() else Chat()
