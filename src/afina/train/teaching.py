"""The teacher of a recipe that distils: opened, checked to read the student's tokens, named by hash."""

from pathlib import Path

from torch import nn

from afina.artifact import MANIFEST, parent, source_digest
from afina.console import Console
from afina.data.load_tokenizer import load_tokenizer
from afina.data.tokenizer import Tokenizer
from afina.errors import RecipeError
from afina.language import _
from afina.model.distill import Teacher
from afina.model.load import Hardware, limit_of, load_model
from afina.model.packed import covers
from afina.recipe.place import model_source
from afina.recipe.schema import Model, Recipe
from afina.train.reopen import check_unchanged, open_tuned, reopen

KEY = ("training", "distill", "teacher")


def open_teacher(
    recipe: Recipe, folder: Path, tokenizer: Tokenizer, hardware: Hardware, console: Console
) -> tuple[Teacher | None, list[dict[str, str]]]:
    """The teacher and its entry among the run's parents; neither where the recipe has none. `tokenizer`: the student's.

    Raises RecipeError where the teacher does not read the same tokens, or fewer of them.
    """
    distill = recipe.training.distill
    if distill is None:
        return None, []
    source = model_source(distill.teacher, folder)
    if (Path(source) / MANIFEST).is_file():
        record = open_tuned(Path(source))
        check_unchanged(record)
        tuned = reopen(Path(source))
        model, words, digest = tuned.model, tuned.renderer.tokenizer, record.digest
    else:
        words = load_tokenizer(source)
        _check_tokens(tokenizer, words, distill.teacher)  # before gigabytes are read
        model = load_model(source, hardware, Model(quantization=distill.quantization))
        digest = source_digest(Path(source)) or "main"
    _check_tokens(tokenizer, words, distill.teacher)
    _check_model(model, recipe, distill.teacher)
    console.line(
        _("Teacher   {name}: {alpha:g} of the loss is the answers', the rest its distribution at T = {heat:g}").format(
            name=distill.teacher, alpha=distill.alpha, heat=distill.temperature
        )
    )
    model = model.to(hardware.device).requires_grad_(False).eval()
    teacher = Teacher(model, distill.temperature, distill.alpha, distill.divergence)
    return teacher, [parent(distill.teacher, digest, "teacher")]


def _check_tokens(ours: Tokenizer, theirs: Tokenizer, name: str) -> None:
    """Raises RecipeError naming the first id that means another token to the teacher."""
    student, teacher = ({index: text for text, index in one.hf.get_vocab().items()} for one in (ours, theirs))
    different = [index for index in {**student, **teacher} if student.get(index) != teacher.get(index)]
    if different:
        first = min(different)
        raise RecipeError(
            _("The teacher {name} has other tokens: {index} is {theirs} to it and {ours} to the student.").format(
                name=name,
                index=first,
                theirs=repr(teacher[first]) if first in teacher else _("nothing"),
                ours=repr(student[first]) if first in student else _("nothing"),
            ),
            hint=_("Take a teacher of the student's family, whose tokenizer is the same."),
            key=KEY,
        )


def _check_model(model: nn.Module, recipe: Recipe, name: str) -> None:
    limit = limit_of(model)
    if limit is not None and limit < recipe.model.max_length:
        raise RecipeError(
            _("The teacher {name} was made for {limit} tokens, and model.max_length is {wanted}.").format(
                name=name, limit=limit, wanted=recipe.model.max_length
            ),
            hint=_("Set model.max_length to {limit} or less.").format(limit=limit),
            key=KEY,
        )
    if recipe.training.packing and not covers(model):
        raise RecipeError(
            _("The teacher {name} cannot read samples that are packed.").format(name=name),
            hint=_("Set training.packing to false."),
            key=KEY,
        )
