"""Files to samples: finds the files, decodes them, parses JSON and JSON Lines, recognises the dialect of the rows.

Every row is accounted for. All bad rows of all files are reported in one error, each with its file, line and reason.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from glob import has_magic
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from afina.data.conversation import ROLES, Message, Sample
from afina.errors import DataError
from afina.language import _
from afina.recipe.place import BUNDLED
from afina.recipe.schema import Data, Mapping, Sources

BUNDLED_SETS = BUNDLED / "data"
SHOWN_PROBLEMS = 20
"""Bad rows printed in full; the rest is counted."""


class BadRow(ValueError):
    """A row that cannot become a sample; its text is the reason."""


@dataclass(frozen=True, slots=True)
class Row:
    """A parsed record: its value, the keys that led to it in a JSON document, and its line."""

    value: Any
    keys: tuple[str, ...]
    line: int


@dataclass
class Reading:
    """What was read and how."""

    samples: list[Sample] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    dialects: set[str] = field(default_factory=set)
    encodings: dict[str, list[Path]] = field(default_factory=dict)


def read(sources: Sources, data: Data, folder: Path) -> Reading:
    """Read every sample of `sources`; relative paths start at `folder`, else at the working directory.

    Raises DataError: a source is missing or empty, or rows are bad (all of them named).
    """
    reading = Reading()
    problems: list[tuple[Path, int, str]] = []
    for source in [sources] if isinstance(sources, str) else sources:
        for file in find(source, folder):
            reading.files.append(file)
            _read_file(file, data, reading, problems)
    if problems:
        raise _all_of(problems, len(reading.samples))
    return reading


def find(source: str, folder: Path) -> list[Path]:
    """The files a source names: a bundled set (afina/NAME/SPLIT), a pattern, a folder of JSON files, or one file."""
    if source.startswith("afina/") and not (folder / source).exists():
        file = BUNDLED_SETS / f"{source.removeprefix('afina/')}.jsonl"
        if not file.is_file():
            names = sorted(f"afina/{path.parent.name}/{path.stem}" for path in BUNDLED_SETS.glob("*/*.jsonl"))
            raise DataError(
                _("There is no bundled data set {name}.").format(name=source),
                hint=_("There are: {names}.").format(names=", ".join(names)),
            )
        return [file]
    for start in (folder, Path()):
        path = (start / Path(source).expanduser()).resolve()
        if path.is_file():
            return [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
            if not found:
                raise DataError(_("The folder {path} holds no .json or .jsonl file.").format(path=path))
            return found
        if has_magic(source):
            pattern = str(path.relative_to(path.anchor))
            if found := sorted(file for file in Path(path.anchor).glob(pattern) if file.is_file()):
                return found
    raise DataError(
        _("There is no data file {path}.").format(path=source),
        hint=_("Paths start at the recipe's folder ({folder}), then at the current one.").format(folder=folder),
    )


def _read_file(file: Path, data: Data, reading: Reading, problems: list[tuple[Path, int, str]]) -> None:
    text, encoding = _decode(file, data.encoding)
    reading.encodings.setdefault(encoding, []).append(file)
    before = len(reading.samples), len(problems)
    make: Callable[[Row], tuple[Message, ...]] | None = None
    for row in _rows(text, file, data.mapping.rows if data.mapping else "", problems):
        try:
            if make is None:
                dialect = _dialect(row.value, data)
                make = _maker(dialect, data.mapping)
                reading.dialects.add(dialect)
            messages = _checked(make(row), data.system)
        except BadRow as reason:
            problems.append((file, row.line, str(reason)))
        else:
            reading.samples.append(Sample(messages, file, row.line))
    if before == (len(reading.samples), len(problems)):
        raise DataError(
            _("The data file holds no rows."), file=file, hint=_("Each line should be one JSON object.")
        )


def _decode(file: Path, encodings: list[str]) -> tuple[str, str]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(_("The data file cannot be read: {reason}.").format(reason=error.strerror), file=file) from error
    failure: UnicodeDecodeError | None = None
    for encoding in encodings:
        try:
            return content.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding), encoding
        except UnicodeDecodeError as error:
            failure = failure or error
        except LookupError as error:
            raise DataError(_("There is no encoding called {name}.").format(name=encoding)) from error
    if failure is None:
        raise DataError(_("data.encoding names no encoding."))
    raise DataError(
        _("Byte {byte:#04x} at position {position} is not {encoding}.").format(
            byte=content[failure.start], position=failure.start, encoding=encodings[0]
        ),
        file=file,
        line=content.count(b"\n", 0, failure.start) + 1,
        hint=_("Convert the file to UTF-8, or name its encoding: data.encoding: [utf-8, latin-1]."),
    )


def _rows(text: str, file: Path, path: str, problems: list[tuple[Path, int, str]]) -> Iterator[Row]:
    """The records of a document; what cannot be parsed goes to `problems`."""
    if file.suffix == ".jsonl" or (not path and text.lstrip()[:1] == "{" and _is_lines(text)):
        for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also cut at U+2028
            if line.strip():
                try:
                    yield Row(_parse(line), (), number)
                except BadRow as reason:
                    problems.append((file, number, str(reason)))
        return
    if not text.strip():
        return
    try:
        if path:
            yield from _walk(_parse(text), path.split("."), ())
        else:
            yield from _elements(text)
    except BadRow as reason:
        problems.append((file, 1, str(reason)))


def _is_lines(text: str) -> bool:
    """Whether a text that begins with `{` is one object a line rather than one document."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    try:
        _parse(first)
    except BadRow:
        return False
    return text.strip() != first.strip()


def _elements(text: str) -> Iterator[Row]:
    """The elements of a JSON array one by one, so that each has its line."""
    position = len(text) - len(text.lstrip())
    if text[position : position + 1] != "[":
        raise BadRow(_("neither JSON Lines nor a JSON array; a document of another shape needs data.mapping.rows"))
    line, counted, position = 1, 0, _skip_space(text, position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = _decoder().raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise BadRow(_("the array stops being valid JSON at line {line}: {reason}").format(line=line, reason=error)) from None
        yield Row(value, (), line)
        position = _skip_space(text, position)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise BadRow(_("the array is not closed: a comma or ] is missing"))
    if text[position + 1 :].strip():
        raise BadRow(_("there is text after the array's end"))


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _walk(value: Any, path: list[str], keys: tuple[str, ...]) -> Iterator[Row]:
    """Follow data.mapping.rows into a document."""
    if not path:
        for number, element in enumerate(value if isinstance(value, list) else [value], start=1):
            yield Row(element, keys, number)
        return
    step, *rest = path
    if not isinstance(value, dict) or (step != "*" and step not in value):
        raise BadRow(_("data.mapping.rows leads nowhere at “{step}”").format(step=step))
    for key in value if step == "*" else [step]:
        yield from _walk(value[key], rest, (*keys, key) if step == "*" else keys)


@cache
def _decoder() -> json.JSONDecoder:
    def refuse(name: str) -> Any:
        raise BadRow(_("{name} is not JSON").format(name=name))

    return json.JSONDecoder(parse_constant=refuse)


def _parse(text: str) -> Any:
    try:
        return _decoder().decode(text)
    except BadRow:
        raise
    except RecursionError:
        raise BadRow(_("nested too deeply")) from None
    except json.JSONDecodeError as error:
        raise BadRow(_("not valid JSON at column {column}: {reason}").format(column=error.colno, reason=error.msg)) from None
    except ValueError as error:
        raise BadRow(_("not valid JSON: {reason}").format(reason=error)) from None


def _dialect(row: Any, data: Data) -> str:
    if data.mapping is not None:
        return "mapping"
    if data.dialect != "auto":
        return data.dialect
    if isinstance(row, dict):
        if "messages" in row:
            return "messages"
        if {"instruction", "output"} <= row.keys():
            return "alpaca"
    keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise BadRow(
        _("unknown shape ({keys}): rows hold messages, or instruction and output, or need data.mapping").format(keys=keys)
    )


def _maker(dialect: str, mapping: Mapping | None) -> Callable[[Row], tuple[Message, ...]]:
    if dialect == "messages":
        return _from_messages
    if dialect == "alpaca":
        return _from_alpaca
    if mapping is None:
        raise BadRow(_("data.dialect is mapping, but there is no data.mapping"))
    return _from_mapping(mapping)


def _from_messages(row: Row) -> tuple[Message, ...]:
    messages = row.value.get("messages") if isinstance(row.value, dict) else None
    if not isinstance(messages, list):
        raise BadRow(_("no list of messages"))
    made = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise BadRow(_("message {number} has no text content").format(number=number))
        if message.get("role") not in ROLES:
            raise BadRow(
                _("message {number} has the role {role}; known are {roles}").format(
                    number=number, role=message.get("role"), roles=", ".join(ROLES)
                )
            )
        made.append(Message(message["role"], message["content"]))
    return tuple(made)


def _from_alpaca(row: Row) -> tuple[Message, ...]:
    texts = {}
    for key in ("instruction", "input", "output"):
        texts[key] = row.value.get(key, "" if key == "input" else None) if isinstance(row.value, dict) else None
        if not isinstance(texts[key], str):
            raise BadRow(_("{key} is not a text").format(key=key))
    question = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    return (Message("user", question), Message("assistant", texts["output"]))


def _from_mapping(mapping: Mapping) -> Callable[[Row], tuple[Message, ...]]:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    try:
        templates = {
            role: environment.from_string(text)
            for role, text in (("system", mapping.system), ("user", mapping.user), ("assistant", mapping.assistant))
            if text is not None
        }
    except TemplateError as error:
        raise DataError(_("data.mapping is not a valid template: {reason}.").format(reason=error)) from error

    def make(row: Row) -> tuple[Message, ...]:
        try:
            return tuple(
                Message(role, template.render(row=row.value, keys=row.keys).strip())
                for role, template in templates.items()
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise BadRow(_("data.mapping does not fit: {reason}").format(reason=error)) from None

    return make


def _checked(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """What every sample must be: an answer at its end, nothing empty, text that can be encoded."""
    if not messages or messages[-1].role != "assistant":
        raise BadRow(_("the last message is not the assistant's, so there is nothing to learn"))
    for message in messages:
        if not message.content.strip():
            raise BadRow(_("the {role}'s message is empty").format(role=message.role))
        try:
            message.content.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRow(_("half a character (a lone surrogate) in the {role}'s message").format(role=message.role)) from None
    if any(message.role == "system" for message in messages[1:]):
        raise BadRow(_("a system message stands after the first message"))
    if system is not None and messages[0].role != "system":
        return (Message("system", system), *messages)
    return messages


def _all_of(problems: list[tuple[Path, int, str]], good: int) -> DataError:
    """One error that names every bad row."""
    shown = [f"{file}:{line}: {reason}" for file, line, reason in islice(problems, SHOWN_PROBLEMS)]
    if len(problems) > len(shown):
        shown.append(_("... and {count} more").format(count=len(problems) - len(shown)))
    file, line, _reason = problems[0]
    return DataError(
        _("{bad} of {all} rows cannot be used:").format(bad=len(problems), all=len(problems) + good)
        + "\n"
        + "\n".join(shown),
        file=file,
        line=line,
        hint=_("Mend or remove these rows; nothing was changed or dropped."),
    )
