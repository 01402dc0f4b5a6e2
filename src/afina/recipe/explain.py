"""What pydantic refuses, in the words of someone who has never heard of it.

pydantic judges; this file finds where in the document the judged value stands and what the schema wants there, and
says both. Knows nothing of YAML beyond the places of its nodes.
"""

import difflib
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from afina.language import _
from afina.recipe.document import Node, inline, node_of, resolve
from afina.recipe.problem import Path, Problem, dotted
from afina.recipe.schema import Recipe

ELSEWHERE = {
    "base_model": "model.base",
    "model_name_or_path": "model.base",
    "max_seq_length": "model.max_length",
    "max_seq_len": "model.max_length",
    "sequence_len": "model.max_length",
    "dtype": "model.precision",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "bnb_4bit_quant_type": "model.quantization",
    "bnb_4bit_use_double_quant": "model.double_quantization",
    "dataset": "data.train",
    "datasets": "data.train",
    "train_file": "data.train",
    "val_set_size": "data.validation",
    "val_size": "data.validation",
    "test_size": "data.validation",
    "r": "method.rank",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "target_modules": "method.targets",
    "lora_target_modules": "method.targets",
    "use_rslora": "method.rslora",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.steps",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.schedule",
    "lr_scheduler_type": "training.schedule",
    "warmup_ratio": "training.warmup",
    "warmup_steps": "training.warmup",
    "sample_packing": "training.packing",
    "max_grad_norm": "training.clip_norm",
    "per_device_train_batch_size": "training.batch_size",
    "micro_batch_size": "training.micro_batch_tokens",
    "metrics": "tasks",
}
"""What other tools call our keys: people arrive with these."""

YES = frozenset({"yes", "y", "on", "1", "true"})
NO = frozenset({"no", "n", "off", "0", "false"})
SHOWN_TEXT = 40
COMPARED_TEXT = 60
"""Characters of a wrong key that are compared with the known ones: likeness takes quadratic time."""


@dataclass(frozen=True)
class Due:
    """What the schema wants at one place: a type, its bounds, and what it is made of."""

    kind: Literal["text", "whole", "number", "truth", "choice", "list", "section", "null", "one of"]
    bounds: tuple[tuple[str, Any], ...] = ()
    choices: tuple[Any, ...] = ()
    options: tuple["Due", ...] = ()
    section: type[BaseModel] | None = None
    examples: tuple[Any, ...] = ()

    def bound(self, name: str) -> Any:
        """One of ge, gt, le, lt, min_length, max_length, pattern; None where unbounded."""
        return dict(self.bounds).get(name)


KINDS: dict[Any, Any] = {str: "text", int: "whole", float: "number", bool: "truth", type(None): "null"}
BOUNDS = ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern")


def due(annotation: Any, metadata: Iterable[Any] = ()) -> Due:
    """The `Due` of a type annotation, with the constraints that stand beside it."""
    constraints = list(_flat(metadata))
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return due(inner, [*more, *constraints])
    bounds = tuple(
        (name, getattr(item, name)) for item in constraints for name in BOUNDS if getattr(item, name, None) is not None
    )
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return Due("choice", choices=arguments)
    if get_origin(annotation) in (Union, types.UnionType):
        return Due("one of", options=tuple(due(option) for option in arguments))
    if get_origin(annotation) is list:
        return Due("list", bounds=bounds, options=(due(arguments[0]),))
    if annotation in KINDS:
        return Due(KINDS[annotation], bounds=bounds)
    return Due("section", section=annotation)


def due_of(section: type[BaseModel], key: str) -> Due:
    """The `Due` of one key, with its examples: those of the schema, else its default."""
    info = section.model_fields[key]
    default = None if info.is_required() or info.default_factory is not None else info.default
    examples = info.examples or ([] if default is None or default == [] else [default])
    return replace(due(info.annotation, info.metadata), examples=tuple(examples))


RECIPE = Due("section", section=Recipe)


def _flat(metadata: Iterable[Any]) -> Iterator[Any]:
    """Field(ge=1) inside Annotated keeps its constraints in a list of its own."""
    for item in metadata:
        yield item
        if isinstance(item, FieldInfo):
            yield from item.metadata


class Spot(NamedTuple):
    """Where an error of pydantic lies: the deepest node there is, what is due there, and what is left of the path."""

    path: Path
    node: Node
    due: Due
    rest: tuple[str | int, ...]


def spot(root: Node, location: Sequence[str | int]) -> Spot:
    """Follow pydantic's location through document and schema together; names of a union's branches are no keys."""
    node, wanted, found, left = root, RECIPE, list[str | int](), list(location)
    while left:
        if wanted.kind == "one of":
            if len([option for option in wanted.options if option.kind != "null"]) > 1:
                left.pop(0)
            wanted = replace(fitting(wanted, node), examples=wanted.examples)
        elif (below := _down(node, wanted, left[0])) is not None:
            node, wanted = below
            found.append(left.pop(0))
        else:
            break
    return Spot(tuple(found), node, wanted, tuple(left))


def _down(node: Node, wanted: Due, part: str | int) -> tuple[Node, Due] | None:
    """The entry `part` of a section or list, and what is due there; of an unknown key, what is due around it."""
    if isinstance(node.value, dict) and part in node.value and wanted.section is not None:
        known = part in wanted.section.model_fields
        return node.value[str(part)], due_of(wanted.section, str(part)) if known else wanted
    if isinstance(node.value, list) and isinstance(part, int) and part < len(node.value) and wanted.kind == "list":
        return node.value[part], wanted.options[0]
    return None


def repair(root: Node, path: Path) -> None:
    """Put something right where something is wrong, so that the rules between other keys can be judged."""
    node, wanted = root, RECIPE
    for part in path[:-1]:
        below = _down(node, fitting(wanted, node) if wanted.kind == "one of" else wanted, part)
        if below is None:
            return
        node, wanted = below
    wanted = fitting(wanted, node) if wanted.kind == "one of" else wanted
    last = path[-1] if path else ""
    if isinstance(node.value, dict) and wanted.section is not None:
        node.value.pop(str(last), None)
        info = wanted.section.model_fields.get(str(last))
        if info is not None and info.is_required():
            node.value[str(last)] = node_of(example(due_of(wanted.section, str(last))), node.place)
    elif isinstance(node.value, list) and isinstance(last, int) and wanted.kind == "list":
        node.value[last] = node_of(example(wanted.options[0]), node.place)


def fitting(wanted: Due, node: Node) -> Due:
    """The branch of a union that the written value was meant for."""
    shape = "section" if isinstance(node.value, dict) else "list" if isinstance(node.value, list) else ""
    same = [option for option in wanted.options if (option.kind if option.kind in ("section", "list") else "") == shape]
    named = [option for option in same if option.section is not None and _named(option.section, node)]
    return (named or same or list(wanted.options))[0]


def _named(section: type[BaseModel], node: Node) -> bool:
    name = node.value.get("name") if isinstance(node.value, dict) else None
    kind = section.model_fields.get("name")
    return name is not None and kind is not None and name.value in get_args(kind.annotation)


@dataclass
class Verdict:
    """What was found wrong: the sentences, and the paths they are about."""

    problems: list[Problem] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)


def explain(root: Node, errors: Iterable[ErrorDetails]) -> Verdict:
    """Every error of pydantic once, at its place, in words. Nodes that were reported before are passed over."""
    found: dict[Path, tuple[Spot, str]] = {}
    for error in errors:
        at = spot(root, error["loc"])
        path = (*at.path, *at.rest) if error["type"] == "missing" else at.path
        found.setdefault(path, (at, error["type"]))
    verdict = Verdict()
    for path, (at, kind) in found.items():
        if kind != "missing" and any(_below(other, path) for other in found):
            continue  # a union's other branch: the deeper error says more
        verdict.paths.append(path)
        if not at.node.faulty:
            verdict.problems.append(_problem(at, kind))
    return verdict


def _below(path: Path, upper: Path) -> bool:
    return len(path) > len(upper) and path[: len(upper)] == upper


def _problem(at: Spot, kind: str) -> Problem:
    if kind == "missing":
        return Problem(at.node.key or at.node.place, _missing(at))
    if kind == "extra_forbidden":
        return Problem(at.node.key or at.node.place, _unknown(at))
    if kind.startswith("union_tag") and isinstance(at.node.value, dict):
        name = at.node.value["name"]
        wanted = Due("choice", choices=tuple(methods(at.due)))
        return Problem(name.place, mismatch((*at.path, "name"), name, wanted))
    return Problem(at.node.place, mismatch(at.path, at.node, at.due))


def methods(wanted: Due) -> Iterator[str]:
    """The names that tell the sections of a union apart."""
    for option in wanted.options:
        if option.section is not None and "name" in option.section.model_fields:
            yield from get_args(option.section.model_fields["name"].annotation)


def _missing(at: Spot) -> str:
    key = str(at.rest[-1])
    wanted = due_of(at.due.section or Recipe, key)
    line = f"{key}: {inline(example(wanted))}"
    if not at.path:
        return _("{key} is missing. Add a line such as {line}").format(key=key, line=line)
    return _("{key} is missing. Add under {section} a line such as {line}").format(
        key=dotted((*at.path, key)), section=dotted(at.path), line=line
    )


def _unknown(at: Spot) -> str:
    *above, key = at.path
    section = at.due.section or Recipe
    where = dotted(tuple(above))
    unknown = (
        _("{key} is not a key of {section}.").format(key=_shown(str(key)), section=where)
        if where
        else _("{key} is not a key of a recipe.").format(key=_shown(str(key)))
    )
    return f"{unknown} {_advice(str(key), section, where)}"


def _advice(key: str, section: type[BaseModel], where: str) -> str:
    homes = [(home, owner) for home, owner in _homes() if key in owner.model_fields and owner is not section and home]
    if any(home == where for home, _owner in homes):
        return _("It belongs to a method that is not chosen here.")
    if homes:
        return _("It belongs under {section}.").format(section=_either([home for home, _owner in homes]))
    if key in ELSEWHERE:
        return _("Afina calls it {key}.").format(key=ELSEWHERE[key])
    if near := nearest(key, section.model_fields):
        return _("Did you mean {nearest}?").format(nearest=near)
    return _("The keys here are {keys}.").format(keys=", ".join(section.model_fields))


def _homes(wanted: Due = RECIPE, where: Path = ()) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of the schema with the dotted path to it."""
    for option in wanted.options:
        yield from _homes(option, where)
    if wanted.section is not None:
        yield dotted(where), wanted.section
        for key in wanted.section.model_fields:
            yield from _homes(due_of(wanted.section, key), (*where, key))


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is most like `word`, or an empty string."""
    small = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word[:COMPARED_TEXT].lower().replace("-", "_"), small, 1, 0.6)
    return small[close[0]] if close else ""


def mismatch(path: Path, node: Node, wanted: Due) -> str:
    """That a value is not what the schema wants there, and what to write."""
    meant = _meant(wanted, node)
    sentence = _("{key} takes {due}, not {given}.").format(key=dotted(path), due=describe(meant), given=_given(node))
    return f"{sentence} {_remedy(path, node, meant, wanted)}".rstrip()


def _meant(wanted: Due, node: Node) -> Due:
    """Of a union the branch whose type the value has, so that only its bounds are spoken of."""
    kinds = {bool: (), int: ("whole", "number"), float: ("number",), str: ("choice", "text")}
    for kind in kinds.get(type(node.value), ()):
        for option in wanted.options:
            if option.kind == kind and kind != "choice":
                return replace(option, examples=wanted.examples)
    return wanted


def describe(wanted: Due) -> str:
    """What is due, as words that complete "takes ..."."""
    match wanted.kind:
        case "text":
            return _name() if wanted.bound("pattern") else _("text")
        case "whole":
            return _bounded(_("a whole number"), wanted)
        case "number":
            return _bounded(_("a number"), wanted)
        case "truth":
            return _("true or false")
        case "null":
            return "null"
        case "choice":
            return _either([inline(choice) for choice in wanted.choices])
        case "section":
            return _("keys of its own ({keys})").format(keys=", ".join((wanted.section or Recipe).model_fields))
        case "list":
            count, item = wanted.bound("min_length"), describe(wanted.options[0])
            if count is not None:
                return _("a list of {count} entries, each {item}").format(count=count, item=item)
            return _("a list with {item} in each entry").format(item=item)
        case "one of" if all(option.kind == "section" for option in wanted.options):
            return _("keys of its own (name first, which is {names})").format(names=_either(list(methods(wanted))))
        case "one of":
            return _either([describe(option) for option in wanted.options])


def _name() -> str:
    return _("up to 100 letters, digits, dots, dashes and underscores, the first a letter or digit")


def _bounded(kind: str, wanted: Due) -> str:
    low, above, high, below = (wanted.bound(name) for name in ("ge", "gt", "le", "lt"))
    values = {"kind": kind, "low": low if low is not None else above, "high": high if high is not None else below}
    if low is not None and high is not None:
        return _("{kind} from {low} to {high}").format(**values)
    if low is not None and below is not None:
        return _("{kind} from {low} to below {high}").format(**values)
    if above is not None and high is not None:
        return _("{kind} above {low} and up to {high}").format(**values)
    if low is not None:
        return _("{kind} of at least {low}").format(**values)
    if above is not None:
        return _("{kind} above {low}").format(**values)
    return kind


def _given(node: Node) -> str:
    if isinstance(node.value, dict):
        return _("a section with keys of its own")
    if isinstance(node.value, list):
        return _("a list of {count}").format(count=len(node.value))
    if node.empty:
        return _("nothing")
    if isinstance(node.value, str):
        return _("the text {text}").format(text=_shown(node.value, quote=True))
    return _short(node.text)


def _remedy(path: Path, node: Node, meant: Due, wanted: Due) -> str:
    """The next step, from what was probably meant."""
    kinds = {wanted.kind, *(option.kind for option in wanted.options)}
    words = node.value.lower() if isinstance(node.value, str) else ""
    if "truth" in kinds and words in YES | NO:
        return _("Write {value}.").format(value="true" if words in YES else "false")
    if node.quoted and isinstance(resolve(node.text), int | float) and kinds & {"whole", "number", "truth"}:
        return _("Remove the quotes.")
    if "text" in kinds and isinstance(node.value, dict):
        return _("Text with a colon or braces stands between quotes.")
    if "text" in kinds and node.text and not isinstance(node.value, str | dict | list):
        return _("Put it between quotes: {text}").format(text=_shown(node.text, quote=True))
    if words in methods(wanted):
        return _("Write {line}").format(line=f"{path[-1]}: {inline({'name': words})}")
    if meant.kind == "choice" and (near := nearest(words, [str(choice) for choice in meant.choices])):
        return _("Did you mean {nearest}?").format(nearest=near)
    if isinstance(path[-1], int):
        return ""
    return _("For example: {line}").format(line=f"{path[-1]}: {inline(example(wanted))}")


def example(wanted: Due) -> Any:
    """A value that is right here."""
    if wanted.examples:
        return wanted.examples[0]
    match wanted.kind:
        case "section":
            fields = (wanted.section or Recipe).model_fields
            required = {
                key: example(due_of(wanted.section or Recipe, key)) for key in fields if fields[key].is_required()
            }
            return required or _first(wanted.section or Recipe)
        case "list":
            return [example(wanted.options[0])]
        case "one of":
            return example(wanted.options[0])
        case "choice":
            return wanted.choices[0]
        case "truth":
            return False
        case "null":
            return None
        case "text":
            return "text"
        case _:
            return wanted.bound("ge") or 1


def _first(section: type[BaseModel]) -> dict[str, Any]:
    """A section with its first key only, at its default."""
    key, info = next(iter(section.model_fields.items()))
    return {key: info.default}


def _either(words: Sequence[str]) -> str:
    """`a, b or c`."""
    if len(words) == 1:
        return words[0]
    return _("{first} or {last}").format(first=", ".join(words[:-1]), last=words[-1])


def _shown(text: str, *, quote: bool = False) -> str:
    """A user's text, short and on one line."""
    whole = inline(_short(text))
    return f'"{whole}"' if quote and not whole.startswith('"') else whole


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_TEXT else text[: SHOWN_TEXT - 1] + "…"
