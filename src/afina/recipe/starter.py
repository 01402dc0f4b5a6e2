"""A first recipe and a project folder for a use case: what `afina init` writes.

The comments of a starter are the schema's own help, its commented keys the schema's own defaults, so neither can go
stale; a use case only says which keys are live and what they hold. `recipes/` is made by the same functions.
"""

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from afina import durable
from afina.errors import OutputError, RecipeError, reason_of
from afina.language import _, chosen
from afina.recipe.document import inline
from afina.recipe.explain import Due, due_of, example, methods, nearest
from afina.recipe.place import BUNDLED
from afina.recipe.schema import Full, Lora, PrefixTuning, PromptTuning, Recipe, Section

WIDTH = 100
"""Columns of a comment."""

Values = Mapping[str, Any]

# The bundled base is tiny: it learns in minutes on a CPU, and bears five times the learning rate of a real one.
TINY = {"base": "afina/tiny"}
ADAPTER = {"name": "lora", "rank": 16, "alpha": 32.0}


GENERAL = {"name": "general", "kind": "forgetting"}
"""What tuning costs elsewhere: asked where a set has no held-out file too."""


def _tutor(train: str, temperature: float, **more: Any) -> dict[str, Any]:
    """What the conversations of fifty rows have in common."""
    return {
        "model": {**TINY, "max_length": 1024},
        "data": {"train": train, "validation": 0.1},
        "method": ADAPTER,
        "training": {"epochs": 5.0, "batch_size": 8, "learning_rate": 1e-3},
        "export": {"formats": ["q8_0"]},
        "chat": {"temperature": temperature, "max_new_tokens": 256},
        **more,
    }


USE_CASES: dict[str, dict[str, Any]] = {
    "sentiment": {
        "model": {**TINY, "max_length": 256},
        "data": {"train": "afina/sentiment/train", "validation": 0.1},
        "method": ADAPTER,
        "training": {"epochs": 4.0, "batch_size": 16, "learning_rate": 1e-3},
        "tasks": [
            {
                "name": "sentiment",
                "kind": "classification",
                "data": "afina/sentiment/test",
                "labels": ["positiva", "neutra", "negativa"],
            }
        ],
        "export": {"formats": ["q8_0", "q4_k_m"]},
        "chat": {"temperature": 0.0, "max_new_tokens": 16},
    },
    "sentiment-explained": {
        "model": {**TINY, "max_length": 512},
        "data": {
            "train": "afina/sentiment-explained/train",
            "validation": 0.1,
            "schema_file": "afina/sentiment-explained/schema.json",
        },
        "method": ADAPTER,
        # The loss of the reasons, most of an answer's tokens, is lowest long before the labels are learnt.
        "training": {
            **{"epochs": 8.0, "batch_size": 8, "learning_rate": 5e-4, "keep": "last", "early_stop": False},
        },
        "tasks": [
            {
                # Right: the label; an answer without a reason is counted as not of the schema.
                "name": "label",
                "kind": "json",
                "data": "afina/sentiment-explained/test",
                "field": "etiqueta",
            },
            {
                "name": "reason",
                "kind": "similarity",
                "data": "afina/sentiment-explained/test",
                "field": "motivo",
            },
        ],
        "export": {"formats": ["q8_0"]},
        "chat": {"temperature": 0.0, "max_new_tokens": 128},
    },
    "maths-tutor": _tutor(
        "afina/maths-tutor/train",
        0.3,
        tasks=[
            {"name": "exercises", "kind": "maths", "data": "afina/maths-tutor/test", "max_new_tokens": 256},
            GENERAL,
        ],
    ),
    "python-tutor": _tutor("afina/python-tutor/train", 0.3, tasks=[GENERAL]),
    "algorithms-tutor": _tutor("afina/algorithms-tutor/train", 0.5, tasks=[GENERAL]),
    "bot-configurator": _tutor(
        "afina/bot-configurator/train",
        0.0,
        data={
            "train": "afina/bot-configurator/train",
            "validation": 0.1,
            "schema_file": "afina/bot-configurator/schema.json",
        },
        tasks=[
            {
                # The set has no held-out file: this says how well what was seen is kept, and its name says so.
                "name": "seen-in-training",
                "kind": "json",
                "data": "afina/bot-configurator/train",
                "field": "bot_name",
                "constrained": True,
                "limit": 20,
                "max_new_tokens": 512,
            }
        ],
        chat={"temperature": 0.0, "max_new_tokens": 512},
    ),
    "support-chat": _tutor("afina/support-chat/train", 0.7, tasks=[GENERAL]),
    "custom": _tutor("data/train.jsonl", 0.7),
}
"""The live keys of each use case; every other key stands in the starter as a comment, with the schema's default."""


def summary(use_case: str) -> str:
    """One sentence on what a use case is, in the user's language."""
    return {
        "sentiment": _("Tells positive, neutral and negative reviews apart, and measures how often it is right."),
        "sentiment-explained": _("Tells positive, neutral and negative reviews apart, and says why: JSON of a schema."),
        "maths-tutor": _("A tutor that solves maths exercises in numbered steps."),
        "python-tutor": _("A tutor that answers beginners' questions about Python with one example that runs."),
        "algorithms-tutor": _("A tutor that explains algorithms and always states their cost."),
        "bot-configurator": _("Turns the description of a chatbot into its configuration in JSON."),
        "support-chat": _("A shop's support chat that keeps to its rules and asks instead of inventing."),
        "custom": _("Your own examples, one JSON object per line in data/train.jsonl."),
    }[known(use_case)]


def known(use_case: str) -> str:
    """The use case itself. Raises RecipeError naming the nearest where there is none of this name."""
    if use_case in USE_CASES:
        return use_case
    near = nearest(use_case.replace("_", "-"), USE_CASES) or nearest(use_case.replace("_", "-").lower(), USE_CASES)
    hint = _("Did you mean {nearest}?").format(nearest=near) if near else ""
    message = _("There is no use case {name}; there are {names}.")
    raise RecipeError(message.format(name=ascii(use_case), names=", ".join(USE_CASES)), hint=hint)


def rows_of(use_case: str) -> int | None:
    """How many rows the bundled set of a use case has to learn from; None where the user brings the rows."""
    file = BUNDLED / "data" / f"{USE_CASES[use_case]['data']['train'].removeprefix('afina/')}.jsonl"
    return sum(1 for line in file.read_bytes().split(b"\n") if line) if file.is_file() else None


def starter(
    use_case: str, name: str, *, place: str = "recipe.yaml", whole: bool = True, changes: Values | None = None
) -> str:
    """A commented recipe. Its first line is the command that runs it, `place` being where it will lie.

    `whole` writes the keys that are not live as comments with their defaults.
    """
    values = {"name": name, **USE_CASES[known(use_case)]}
    for section, keys in (changes or {}).items():
        values[section] = keys if section == "method" else {**values[section], **keys}
    head = [f"# afina run {place}", *_comment(summary(use_case), "")]
    if whole:
        head += _comment(_("Keys after a # show their defaults. Remove the # to change one."), "")
    lines = [*head, "", *_section(Recipe, values, "", whole)]
    return "\n".join(lines) + "\n"


def _section(section: type[BaseModel], values: Values, indent: str, whole: bool) -> Iterator[str]:
    """The lines of one section, live and commented."""
    for key, info in section.model_fields.items():
        wanted = due_of(section, key)
        inner = _inner(wanted)
        top = section is Recipe and inner is not None
        if key in values or whole:
            yield from [""] if top else []
            yield from _comment(_help(section, key, inner), indent, _choices(wanted))
        if key in values and isinstance(values[key], list) and inner is not None:
            yield f"{indent}{key}:"
            for item in values[key]:
                yield from _item(_section(inner, item, indent + "    ", whole), indent)
        elif inner is not None and (key in values or (top and key != "tasks" and whole)):
            yield f"{indent}{key}:"
            yield from _section(_chosen(inner, values.get(key, {})), values.get(key, {}), indent + "  ", whole)
        elif key in values:
            yield f"{indent}{key}: {inline(values[key])}"
        elif whole and inner is not None:
            yield from _commented(key, inner, indent, wanted.kind == "list")
        elif whole:
            yield f"{indent}#{key}: {inline(info.get_default())}"


def _inner(wanted: Due) -> type[Section] | None:
    """The section that a key holds, alone, in a list, or as a choice of which the first is the default."""
    for option in (wanted, *wanted.options):
        if option.section is not None and issubclass(option.section, Section):
            return option.section
    return None


def _chosen(inner: type[Section], values: Values) -> type[Section]:
    methods: dict[str, type[Section]] = {"full": Full, "prompt-tuning": PromptTuning, "prefix-tuning": PrefixTuning}
    return methods.get(values.get("name", ""), inner) if inner is Lora else inner


def _help(section: type[BaseModel], key: str, inner: type[Section] | None) -> str:
    """The key's help; of a section of the recipe, what the section is for."""
    text = section.help_of(key) if issubclass(section, Section) else ""
    return _(text) if text else _(inner.purpose()) if inner is not None else ""


def _choices(wanted: Due) -> str:
    """`(auto | cpu | cuda | mps)` for a key of few values."""
    choices = wanted.choices or (*methods(wanted), *(choice for option in wanted.options for choice in option.choices))
    return f"({' | '.join(str(choice) for choice in choices)})" if len(choices) > 1 else ""


def _comment(text: str, indent: str, choices: str = "") -> list[str]:
    words = f"{text} {choices}".strip()
    return textwrap.wrap(
        words, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_on_hyphens=False
    )


def _item(lines: Iterator[str], indent: str) -> Iterator[str]:
    """The lines of a list's entry: the dash stands before its first key, comments above it."""
    dashed = False
    for line in lines:
        live = not line.lstrip().startswith("#")
        yield f"{indent}  - {line.lstrip()}" if live and not dashed else line
        dashed = dashed or live


SHOWN = "data"
"""Stands in the example of a section though it may be left out: few kinds of task do without."""


def _commented(key: str, inner: type[Section], indent: str, listed: bool) -> Iterator[str]:
    """An example of a section that is off by default."""
    required: dict[str, Any] = example(Due("section", section=inner))
    required |= {name: info.examples[0] for name, info in inner.model_fields.items() if name == SHOWN and info.examples}
    yield f"{indent}#{key}:"
    for number, (name, value) in enumerate(required.items()):
        dash = ("  - " if number == 0 else "    ") if listed else "  "
        yield f"{indent}#{dash}{name}: {inline(value)}"


def create_project(folder: Path, use_case: str, changes: Values | None = None) -> list[Path]:
    """Lay out a project folder and return its files. Raises OutputError where the folder holds something already.

    `changes` to the use case's values, section by section.

    A new folder appears complete or not at all; in one that exists and is empty, what was written is removed again.
    """
    files = _files(known(use_case), _name(folder), changes or {})
    if not folder.exists() and not folder.is_symlink():
        with durable.new_folder(folder) as new:
            for name, text in files.items():
                durable.write_text(new / name, text)
    else:
        _refuse_used(folder)
        _fill(folder, files)
    return [folder / name for name in files]


def _fill(folder: Path, files: dict[str, str]) -> None:
    """Write into an empty folder, the recipe last: without it there is no project."""
    try:
        for name, text in files.items():
            durable.write_text(folder / name, text)
    except BaseException:
        for name in files:
            (folder / name).unlink(missing_ok=True)
        for parent in {Path(name).parent for name in files} - {Path()}:
            with suppress(OSError):
                (folder / parent).rmdir()
        raise


def _refuse_used(folder: Path) -> None:
    if not folder.is_dir():
        raise OutputError(_("{path} is not a folder.").format(path=folder), hint=_("Choose another name."))
    try:
        used = next(folder.iterdir(), None) is not None
    except OSError as error:
        raise OutputError(_("{path} cannot be read: {reason}.").format(path=folder, reason=reason_of(error))) from error
    if used:
        raise OutputError(
            _("{path} is not empty.").format(path=folder), hint=_("Choose a new or empty folder for the project.")
        )


def _name(folder: Path) -> str:
    """The folder's name as a recipe's name."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).lstrip("._-")[:100].rstrip("-")
    return name or "my-first-tune"


def _files(use_case: str, name: str, changes: Values) -> dict[str, str]:
    """Every file of a project, by its path in the folder; the recipe last."""
    files = {
        ".gitignore": "/runs/*\n/models/*\n!README.md\n.env\n",
        "data/README.md": _data_readme(use_case),
        "models/README.md": _page(
            _("Models"), _("Exported models and bases you downloaded. Git ignores what lies here.")
        ),
        "runs/README.md": _page(_("Runs"), _("One folder for each run of `afina run recipe.yaml`. Git ignores them.")),
    }
    if use_case == "custom":
        files["data/train.jsonl"] = _examples()
    return {**files, "recipe.yaml": starter(use_case, name, changes=changes)}


def _page(title: str, *paragraphs: str) -> str:
    return (
        "\n\n".join([f"# {title}", *(textwrap.fill(text, WIDTH, break_on_hyphens=False) for text in paragraphs)]) + "\n"
    )


def _data_readme(use_case: str) -> str:
    if use_case == "custom":
        own = _(
            "Replace the three rows of train.jsonl with your examples: one JSON object per line, as they stand there."
        )
    else:
        own = _(
            "The recipe learns from a set that ships with Afina. Put your own files here and name them in data.train."
        )
    return _page(_("Data"), own, _("`afina train` checks every row and names the file and line of what is wrong."))


def _examples() -> str:
    """Three rows in the user's language: enough to see the shape, too few to learn from."""
    rows = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in EXAMPLES[chosen()]]
    return "\n".join(rows) + "\n"


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


EXAMPLES = {
    "en": (
        _turns("What are your opening hours?", "We open from 9 to 18 h, Monday to Friday."),
        _turns("Do you ship to the islands?", "Yes, within 5 working days."),
        [
            {"role": "system", "content": "You answer for a bicycle shop."},
            *_turns("My chain jumps.", "Bring the bicycle in: we look at it for free."),
        ],
    ),
    "es": (
        _turns("¿Qué horario tenéis?", "Abrimos de 9 a 18 h, de lunes a viernes."),
        _turns("¿Enviáis a las islas?", "Sí, en un máximo de 5 días laborables."),
        [
            {"role": "system", "content": "Respondes en nombre de una tienda de bicicletas."},
            *_turns("Me salta la cadena.", "Tráenos la bicicleta: la miramos gratis."),
        ],
    ),
}
