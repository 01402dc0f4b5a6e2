"""Foreign Jinja in a sandbox: chat templates as transformers runs them, and the mapping templates of a recipe.

A template sees nothing but what it is given, cannot change it, and reaches neither Python's internals nor files. It
can still loop for long, and while it is compiled too: worker.py runs them where that harms nobody.
"""

import json
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from jinja2 import StrictUndefined, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

DATE = datetime(2024, 7, 26)
"""What a template is told when it asks for today: the date Llama's templates name where there is no clock. A model
tuned today and asked tomorrow must see one prompt, and a run repeated tomorrow must be the same run."""

FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
    MemoryError,
)
"""What rendering a foreign template on foreign data can raise."""

MOST = 2**20
"""Characters that a rendering may have beside four times those it was given."""


class _Generation(Extension):
    """`{% generation %}` marks what the assistant writes; where that is, template.py finds without it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """Jinja's namespace, without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a template may not set {name}")
        super().__setitem__(name, value)


class TooLong(Exception):
    """A rendering has more characters than it may."""


def templated(text: str, most: int = MOST) -> Callable[[Any], str]:
    """A chat template as what it makes of [messages, prompt, given]; `most`: see MOST. Raises TemplateError.

    Rendering raises one of FAILURES, or TooLong.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=DATE.strftime, namespace=_Namespace)
    template = environment.from_string(text)

    def render(item: Any) -> str:
        messages, prompt, given = item
        return _joined(template.generate(messages=messages, add_generation_prompt=prompt, **given), item, most)

    return render


def mapped(text: str, most: int = MOST) -> Callable[[Any], str]:
    """A template of data.mapping as what it makes of [row, keys]: what is not there is an error, never an empty text.

    Raises as `templated`.
    """
    template = _mapping().from_string(text)

    def render(item: Any) -> str:
        row, keys = item
        return _joined(template.generate(row=row, keys=keys), item, most)

    return render


def copies(text: str) -> Callable[[Any], str]:
    """What a template of data.mapping copies: in turn literal texts, and the keys that lead to a text of the row, as
    JSON; "" where it does more than that. Raises as `templated`."""
    environment = _mapping()
    environment.from_string(text)
    parts: list[Any] = []
    for statement in environment.parse(text).body:
        for node in statement.nodes if isinstance(statement, nodes.Output) else [statement]:
            parts.append(node.data if isinstance(node, nodes.TemplateData) else _keys(node))
    said = "" if None in parts else json.dumps(parts)
    return lambda _item: said


def _keys(node: nodes.Node) -> list[str] | None:
    """The keys of row.a["b"], in order; None for all else. What dictionaries have as attributes is no key."""
    if isinstance(node, nodes.Name):
        return [] if node.name == "row" else None
    if isinstance(node, nodes.Getattr):
        key, before = None if hasattr(dict, node.attr) else node.attr, _keys(node.node)
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        key, before = node.arg.value, _keys(node.node)
    else:
        return None
    return [*before, key] if before is not None and isinstance(key, str) else None


def _mapping() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _to_json
    environment.globals["namespace"] = _Namespace
    return environment


def _joined(parts: Iterable[str], item: Any, most: int) -> str:
    """The parts of a rendering. Raises TooLong beyond `most` characters and four times those of what was given."""
    kept: list[str] = []
    count = 0
    for part in parts:
        kept.append(part)
        count += len(part)
        if count > most and count > most + 4 * len(json.dumps(item)):
            raise TooLong
    return "".join(kept)


def without_clock(text: str) -> str:
    """A chat template whose calls of strftime_now are replaced by DATE, so that every program renders it alike."""
    return re.sub(
        r"""strftime_now\(\s*(["'])([^"'\\\n]*)\1\s*\)""",
        lambda call: f'"{DATE.strftime(call.group(2))}"',
        text,
    )


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter writes ' and < as escapes, for the sake of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)
