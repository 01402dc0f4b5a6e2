"""A recipe file and the user's overrides in, a `Recipe` out; or one error that lists every mistake by line and column.

The order: YAML into a tree with places (`document`), overrides laid over it, `${NAME}` replaced, the schema
(`schema`, in words by `explain`), the rules between keys (`check`). Relative paths stay as they are written.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path as File

from pydantic import ValidationError

from afina.errors import AfinaError, RecipeError, reason_of
from afina.language import _
from afina.recipe import check, explain
from afina.recipe.document import HALF, MAX_BYTES, MAX_DEPTH, Node, Unreadable, decode, node_of, read, write
from afina.recipe.problem import Path, Place, Problem, dotted, failure
from afina.recipe.schema import Recipe

PLACES: tuple[Path, ...] = (
    ("model", "base"),
    ("model", "chat_template"),
    ("data", "train"),
    ("data", "validation"),
    ("training", "distill", "teacher"),
    ("tasks", "*", "data"),
    ("tasks", "*", "schema_file"),
    ("tasks", "*", "judge"),
    ("evaluation", "systems"),
)
"""The keys that name files, folders or models: in these alone `${NAME}` is the environment variable NAME."""

VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)(\}?)")
LIST_INDEX = re.compile(r"[0-9]{1,6}")
VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def load(path: File, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file. `overrides` are `key.key=value`, the value as YAML. Raises RecipeError with every mistake."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else error
        raise RecipeError(
            _("The recipe {path} cannot be read: {reason}.").format(path=path, reason=reason),
            hint=_("Name a recipe file; afina init writes one."),
        ) from error
    try:
        text = decode(content)
    except Unreadable as error:
        raise failure([error.problem], str(path)) from error
    return parse(text, str(path), overrides)


def load_or_default(source: str, overrides: Sequence[str] = ()) -> tuple[Recipe, File]:
    """A recipe file, or the recipe of nothing but defaults whose data.train is `source`; and its folder.

    What ends in .yaml or .yml is a recipe. Raises RecipeError.
    """
    if source.endswith((".yaml", ".yml")):
        return load(File(source), overrides), File(source).resolve().parent
    named = json.dumps(source.replace("${", "$${"))
    return parse(f"name: data\ndata:\n  train: {named}\n", _("the command line"), overrides), File()


def parse(text: str, file: str, overrides: Sequence[str] = ()) -> Recipe:
    """As `load`, from the text itself; `file` is what errors call it."""
    problems: list[Problem] = []
    root = read(text, problems)
    if root is None:
        raise failure(problems or [Problem(Place(1, 1), _("The recipe is empty. afina init writes one."))], file)
    if not isinstance(root.value, dict):
        message = _("A recipe is made of keys, such as name: my-first-tune on a line of its own.")
        raise failure([*problems, Problem(root.place, message)], file)
    for override in overrides:
        _override(root, override, problems)
    _drop_empty_sections(root)
    _expand(root, problems)
    recipe = _judge(root, problems)
    if recipe is None or problems:
        raise failure(problems, file)
    return recipe


@contextmanager
def places_told(path: File, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Inside the block an error that names a key of the recipe in `path` also says in which line it stands."""
    try:
        yield
    except AfinaError as error:
        if error.key is not None and error.file is None:
            with suppress(RecipeError, Unreadable, OSError):  # the file may have changed since it was read
                root = read(decode(path.read_bytes()), []) or Node({}, Place(1, 1))
                for override in overrides:
                    _override(root, override, [])
                place = _place(root, error.key)
                if place.override:
                    error.message = _("In the override {override}: {message}").format(
                        override=place.override, message=error.message
                    )
                else:
                    error.file, error.line, error.column = str(path), place.line, place.column
        raise


def dump(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML that `parse` reads back equal."""
    values = node_of(recipe.resolved(), Place(1, 1))
    for node in _places(values):
        node.value = str(node.value).replace("${", "$${")
    return write(values.plain())


def _judge(root: Node, problems: list[Problem]) -> Recipe | None:
    """The recipe of the tree if the schema takes it, with every mistake told that can be."""
    wrong = list(_faulty(root))
    recipe, verdict = _validate(root)
    if verdict is not None:
        problems.extend(verdict.problems)
        wrong += verdict.paths
        for path in verdict.paths:
            explain.repair(root, path)
        # The rules between the keys that are right are judged all the same, on a copy without those that are wrong.
        recipe, again = _validate(root)
        if again is not None and not problems:
            problems.extend(again.problems)
    if recipe is None:
        return None
    for fault in check.faults(recipe):
        if not any(_related(path, bad) for path in (fault.path, *fault.read) for bad in wrong):
            problems.append(Problem(_place(root, fault.path), f"{dotted(fault.path)}: {fault.message}"))
    return recipe


def _validate(root: Node) -> tuple[Recipe | None, explain.Verdict | None]:
    try:
        return Recipe.model_validate(root.plain()), None
    except ValidationError as error:
        return None, explain.explain(root, error.errors(include_url=False, include_context=False))


def _related(path: Path, other: Path) -> bool:
    """Whether one lies in the other."""
    return all(left == right for left, right in zip(path, other, strict=False))


def _faulty(node: Node, path: Path = ()) -> Iterator[Path]:
    """Where nodes are that the reader has reported."""
    if node.faulty:
        yield path
    for part, child in _children(node):
        yield from _faulty(child, (*path, part))


def _children(node: Node) -> Iterator[tuple[str | int, Node]]:
    if isinstance(node.value, dict):
        yield from node.value.items()
    elif isinstance(node.value, list):
        yield from enumerate(node.value)


def _place(root: Node, path: Path) -> Place:
    """Where the key of `path` stands; the nearest section above, where it is not written."""
    node = root
    for part in path:
        below = dict(_children(node)).get(part)
        if below is None:
            break
        node = below
    return node.key or node.place


def _drop_empty_sections(root: Node) -> None:
    """`chat:` with nothing under it, as commenting its keys out leaves it, is a section of defaults."""
    for key, child in _children(root):
        if child.empty and key in Recipe.model_fields:
            kind = explain.due_of(Recipe, str(key)).kind
            if kind in ("section", "one of", "list"):
                child.value = [] if kind == "list" else {}


def _places(root: Node) -> Iterator[Node]:
    """The texts that name files, folders or models."""
    for path in PLACES:
        nodes = [root]
        for part in path:
            nodes = [child for node in nodes for key, child in _children(node) if part in (key, "*")]
        for node in nodes:
            for text in (node, *(child for _key, child in _children(node))):
                if isinstance(text.value, str):
                    yield text


def _expand(root: Node, problems: list[Problem]) -> None:
    """Put the environment's values where `${NAME}` stands; `$${` is a plain `${`."""
    for node in _places(root):
        wrong: list[str] = []
        node.value = VARIABLE.sub(lambda match, wrong=wrong: _value(match, wrong), str(node.value))  # type: ignore[misc]
        problems.extend(Problem(node.place, message) for message in wrong)
        node.faulty = node.faulty or bool(wrong)


def _value(match: re.Match[str], wrong: list[str]) -> str:
    if match.group() == "$${":
        return "${"
    name = match[1]
    if not match[2] or not VARIABLE_NAME.fullmatch(name):
        wrong.append(_("A variable is written ${{NAME}}. For a plain ${{ write $${{.").format())
        return ""
    value = os.environ.get(name)
    if value is None:
        message = _("The environment variable {name} is not set. Set it first: export {name}=...")
        wrong.append(message.format(name=name))
    elif HALF.search(value):
        wrong.append(_("The environment variable {name} is not UTF-8.").format(name=name))
    return value or ""


def _override(root: Node, override: str, problems: list[Problem]) -> None:
    """Lay one `key.key=value` over the tree. A wrong key or value is left for the schema to judge."""
    key, equals, text = override.partition("=")
    place = Place(1, 1, override)
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        problems.append(Problem(place, _("Write key=value, such as training.epochs=1.")))
        return
    known = len(problems)
    value = read(text, problems, override)
    if len(problems) > known:
        return
    value = value or Node(None, place)
    value.key = place
    node: Node | None = root
    for part in parts[:-1]:
        node = node and _enter(node, part, place, problems)
    if node is not None:
        _put(node, parts[-1], value, problems)


def _enter(node: Node, part: str, place: Place, problems: list[Problem]) -> Node | None:
    """The section or list that `part` of an override leads to, made where there is none."""
    below = dict(_children(node)).get(_index(node, part))
    if below is None or below.value is None:
        listed = part in Recipe.model_fields and explain.due_of(Recipe, part).kind == "list"
        below = Node([] if listed else {}, place, key=place)
        return below if _put(node, part, below, problems) else None
    if isinstance(below.value, dict | list):
        return below
    problems.append(Problem(place, _("{key} is a value, not a section with keys.").format(key=part)))
    return None


def _put(node: Node, part: str, value: Node, problems: list[Problem]) -> bool:
    """Set one entry; of a list, one that is there."""
    index = _index(node, part)
    if isinstance(node.value, dict):
        node.value[part] = value
        return True
    if isinstance(node.value, list) and isinstance(index, int) and index < len(node.value):
        node.value[index] = value
        return True
    place = value.key or value.place
    message = _("{part} is no entry of a list that has {count}; the first is 0.")
    problems.append(Problem(place, message.format(part=part, count=len(dict(_children(node))))))
    return False


def _index(node: Node, part: str) -> str | int:
    return int(part) if isinstance(node.value, list) and LIST_INDEX.fullmatch(part) else part
