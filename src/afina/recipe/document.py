"""YAML text in, a tree of values with their lines out, and back. The only door to ruamel.yaml.

What is read is a strict part of YAML 1.2: one document of mappings, lists and plain values. No tag, anchor, alias or
directive is obeyed, nothing is ever constructed but str, int, float, bool and None, and size, depth and number of
values are bounded. Knows nothing of the recipe's keys.

Scalars follow the core schema of YAML 1.2: `1e-4` and `.5` are numbers, `0o10` is 8, `0x10` is 16; `yes`, `no`, `on`,
`off`, `12:30`, `2024-01-31` and `1_000` are text. `010` is refused: YAML 1.1 reads 8 in it and YAML 1.2 reads 10.
"""

import io
import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from afina.language import _
from afina.recipe.problem import Place, Problem

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_VALUES = 10_000
MAX_DIGITS = 40
"""Of a whole number: more are a mistake, and are slow to convert."""

NULLS = frozenset({"", "~", "null", "Null", "NULL"})
TRUTHS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
WHOLE = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
NUMBER = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
BARE = re.compile(r"[A-Za-z0-9_./+][A-Za-z0-9_./+-]*(?: [A-Za-z0-9_./+-]+)*|\$\{\w+\}[A-Za-z0-9_./-]*")
"""Text that needs no quotes wherever it stands; what else would not need them gets them all the same."""
UNPRINTABLE = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
HALF = re.compile(r"[\ud800-\udfff]")
"""Escapes such as "\\ud800" make these; they cannot be written to a file again."""
LINE_END = re.compile(r"\r\n|\r|\n")

Scalar = str | int | float | bool | None


@dataclass
class Node:
    """A value and where it stands.

    `text` is a scalar as written; `quoted` tells `"3"` from `3`; `key` is the place of the key that leads here. A
    `faulty` node has been reported already.
    """

    value: "Scalar | list[Node] | dict[str, Node]"
    place: Place
    text: str = ""
    quoted: bool = False
    key: Place | None = None
    faulty: bool = False

    @property
    def empty(self) -> bool:
        """True where nothing at all is written: `model:` and the end of the line."""
        return self.value is None and not self.text

    def plain(self) -> Any:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {name: child.plain() for name, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


def node_of(value: Any, place: Place) -> Node:
    """The tree of a plain value, all of it at one place."""
    if isinstance(value, dict):
        return Node({name: node_of(item, place) for name, item in value.items()}, place)
    if isinstance(value, list):
        return Node([node_of(item, place) for item in value], place)
    return Node(value, place, inline(value))


class Unreadable(Exception):
    """Reading cannot go on; carries the problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def decode(content: bytes) -> str:
    """The text of a recipe file without its byte order mark. Raises Unreadable with line and column."""
    _refuse_size(len(content))
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        _stop(_("This file is UTF-16. Save it as UTF-8."), Place(1, 1))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # After a byte order mark the codec counts from behind it.
        body = content.removeprefix(b"\xef\xbb\xbf")
        byte = f"0x{body[error.start]:02X}"
        place = _place_at(body[: error.start].decode("utf-8", "replace"))
        _stop(_("The byte {byte} is not UTF-8. Save the file as UTF-8.").format(byte=byte), place)


def read(text: str, problems: list[Problem], override: str = "") -> Node | None:
    """The tree of `text`, or None where there is none to judge. What is wrong is added to `problems`.

    `override` is the override whose value `text` is, if it is one.
    """
    try:
        _refuse_size(len(text))
        _refuse_characters(text)
        builder = _Builder(text, override)
        try:
            return builder.document()
        finally:
            problems.extend(builder.problems)
    except Unreadable as error:
        problem = error.problem
    except MarkedYAMLError as error:
        problem = _syntax(error, text)
    except (YAMLError, ValueError, OverflowError, IndexError) as error:
        # An escape such as "\Uffffffff" fails inside the scanner, which tells no line for it.
        problem = Problem(Place(1, 1), _("This is not YAML: {reason}.").format(reason=error))
    problems.append(problem._replace(place=problem.place._replace(override=override)))
    return None


def resolve(text: str) -> Scalar:
    """What an unquoted scalar means in YAML 1.2. Leading zeros and endless digits are judged by the reader."""
    if text in NULLS:
        return None
    if text in TRUTHS:
        return TRUTHS[text]
    if WHOLE.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if NUMBER.fullmatch(text):
        return float(text)
    if NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def write(value: Any) -> str:
    """`value`, made of dicts, lists and scalars, as YAML that `read` reads back equal."""
    yaml = YAML(typ="rt", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.width = 1 << 30
    yaml.allow_unicode = True
    stream = io.StringIO()
    yaml.dump(_quoted(value), stream)
    return stream.getvalue()


class _Representer(RoundTripRepresenter):
    """As ruamel's, but nothing is written as `null`."""

    def represent_null(self, _value: None) -> Any:
        """The word, where ruamel writes an empty value."""
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_null)


def inline(value: Any) -> str:
    """`value` on one line, as it may stand after a key."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {inline(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(inline(item) for item in value) + "]"
    if isinstance(value, str) and _bare(value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _bare(text: str) -> bool:
    return BARE.fullmatch(text) is not None and resolve(text) == text


def _quoted(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _quoted(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_quoted(item) for item in value]
    return DoubleQuotedScalarString(value) if isinstance(value, str) and not _bare(value) else value


class _Builder:
    """The parser's events, one after the other, into nodes; depth and number are bounded on the way."""

    def __init__(self, text: str, override: str) -> None:
        self.events = YAML(typ="safe", pure=True).parse(text)
        self.lines = LINE_END.split(text)
        self.override = override
        self.problems: list[Problem] = []
        self.values = 0

    def document(self) -> Node | None:
        """The one document of the stream."""
        next(self.events)
        start = next(self.events)
        if not isinstance(start, DocumentStartEvent):
            return None
        if start.version or start.tags:
            _stop(_("Directives such as %YAML are not obeyed. Remove the line."), self.place(start))
        node = self.node(next(self.events), 0)
        next(self.events)
        following = next(self.events)
        if isinstance(following, DocumentStartEvent):
            _stop(_("A recipe is one document; another one starts here. Remove the line ---."), self.place(following))
        return node

    def node(self, event: Any, depth: int) -> Node:
        """The node that starts with `event`."""
        self.values += 1
        if self.values > MAX_VALUES:
            _stop(_("A recipe has at most {limit:,} values.").format(limit=MAX_VALUES), self.place(event))
        if depth > MAX_DEPTH:
            _stop(_("A recipe is nested at most {limit} levels deep.").format(limit=MAX_DEPTH), self.place(event))
        if isinstance(event, AliasEvent):
            self.complain(event, _("References such as *{name} are not obeyed. Write the value out."), event.anchor)
            return Node(None, self.place(event), faulty=True)
        if isinstance(event, MappingStartEvent):
            node = self.mapping(event, depth)
        elif isinstance(event, SequenceStartEvent):
            node = self.sequence(event, depth)
        else:
            node = self.scalar(event)
        if event.anchor is not None:
            self.complain(event, _("Anchors such as &{name} are not obeyed. Remove it."), event.anchor)
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.complain(event, _("Tags such as {name} are not obeyed. Remove it."), tag)
            node.faulty = True
        return node

    def sequence(self, start: Any, depth: int) -> Node:
        """A list."""
        items: list[Node] = []
        while not isinstance(event := next(self.events), SequenceEndEvent):
            items.append(self.node(event, depth + 1))
        return Node(items, self.place(start))

    def mapping(self, start: Any, depth: int) -> Node:
        """A section; of a key that stands twice the first is kept."""
        entries: dict[str, Node] = {}
        odd = False
        while not isinstance(event := next(self.events), MappingEndEvent):
            key = self.node(event, depth + 1)
            value = self.node(next(self.events), depth + 1)
            value.key = key.place
            if value.empty:
                value.place = key.place  # the parser would point at whatever follows
            if isinstance(key.value, dict | list):
                odd = True
                self.complain(event, _("A key must be a word. Text that starts with {{ or [ stands between quotes."))
            elif key.text in entries:
                first = entries[key.text].key or key.place
                self.complain(
                    event, _("The key {name} stands twice; the first is on line {line}."), key.text, line=first.line
                )
            else:
                entries[key.text] = value
        return Node(entries, self.place(start), faulty=odd and not entries)

    def scalar(self, event: ScalarEvent) -> Node:
        """One value."""
        text = str(event.value)
        place = self.place(event)
        if HALF.search(text):
            self.complain(event, _("Half a character: the escape of the other half is missing."))
            return Node(None, place, text, faulty=True)
        if event.style is not None:
            return Node(text, place, text, quoted=True)
        self.refuse_tabs(event)
        if LEADING_ZERO.fullmatch(text) and len(text) <= MAX_DIGITS:
            message = _("{name} has a leading zero, which YAML reads in two ways. Write {number}, or quote it.")
            self.complain(event, message, text, number=int(text))
            return Node(None, place, text, faulty=True)
        if len(text) > MAX_DIGITS and WHOLE.fullmatch(text):
            self.complain(event, _("A number has at most {limit} digits."), limit=MAX_DIGITS)
            return Node(None, place, text, faulty=True)
        return Node(resolve(text), place, text)

    def complain(self, event: Any, message: str, name: str = "", **values: Any) -> None:
        """Note a problem and go on."""
        self.problems.append(Problem(self.place(event), message.format(name=name, **values)))

    def place(self, event: Any) -> Place:
        """Where `event` starts."""
        return _place(event.start_mark, self.override)

    def refuse_tabs(self, event: ScalarEvent) -> None:
        """YAML lets a tab begin the next line of a text, so what was meant as a new key would join the text above."""
        for number in range(event.start_mark.line + 1, event.end_mark.line + 1):
            if "\t" in (indent := _indent(self.lines, number)):
                _stop(_tab(), Place(number + 1, indent.index("\t") + 1))


def _refuse_size(size: int) -> None:
    if size > MAX_BYTES:
        _stop(_("A recipe has at most {limit:,} bytes; this one has more.").format(limit=MAX_BYTES), Place(1, 1))


def _refuse_characters(text: str) -> None:
    if (found := UNPRINTABLE.search(text)) is not None:
        code = f"U+{ord(found.group()):04X}"
        _stop(_("The character {code} cannot stand in a recipe.").format(code=code), _place_at(text[: found.start()]))


def _syntax(error: MarkedYAMLError, text: str) -> Problem:
    """The scanner's complaint in the user's words."""
    mark = error.problem_mark or error.context_mark
    place = _place(mark) if mark is not None else Place(1, 1)
    opening = _place(error.context_mark) if error.context_mark is not None else place
    lines = LINE_END.split(text)
    for number in (place.line, place.line - 1):
        if "\t" in (indent := _indent(lines, number - 1)):
            return Problem(Place(number, indent.index("\t") + 1), _tab())
    problem = error.problem or ""
    if "cannot start any token" in problem and lines[place.line - 1][place.column - 1 : place.column] == "\t":
        return Problem(place, _("A tab cannot stand here. Write a space."))
    if "end of stream" in problem:
        return Problem(opening, _("The quote opened here is never closed."))
    if "expected ',' or" in problem:
        return Problem(opening, _("The bracket opened here is not closed, or a comma is missing."))
    return Problem(place, _complaint(problem))


def _complaint(problem: str) -> str:
    if "mapping values are not allowed" in problem:
        return _("A colon cannot stand here. Quote text that contains a colon, and check the indentation.")
    if "cannot start any token" in problem:
        return _("This character cannot start a value. Put the text between quotes.")
    if "could not find expected ':'" in problem:
        return _("A key needs a colon and a space after it: write key: value.")
    if "block end" in problem:
        return _("The indentation does not fit the lines above, or something stands after a closed value.")
    if "document start" in problem:
        return _("Something follows after the end of the recipe. A data file is no recipe: name it under data.train.")
    if "unknown escape" in problem or "escape sequence" in problem:
        return _("This is no escape of YAML. Put the text between single quotes.")
    return _("This is not YAML: {reason}.").format(reason=problem)


def _indent(lines: list[str], number: int) -> str:
    line = lines[number] if 0 <= number < len(lines) else ""
    return line[: len(line) - len(line.lstrip(" \t"))]


def _tab() -> str:
    return _("A tab in the indentation. Indent with spaces.")


def _place(mark: Any, override: str = "") -> Place:
    return Place(mark.line + 1, mark.column + 1, override)


def _place_at(before: str) -> Place:
    """The place of the character that follows `before`."""
    lines = LINE_END.split(before)
    return Place(len(lines), len(lines[-1]) + 1)


def _stop(message: str, place: Place) -> NoReturn:
    raise Unreadable(Problem(place, message))
