"""Files to samples: finds the files, decodes them, recognises the dialect of the rows, makes conversations of them.

Every row is accounted for. All bad rows of all files are reported in one error, each with its file, line and reason.
"""

import codecs
from collections.abc import Callable
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from afina.data.conversation import ROLES, Message, Sample
from afina.data.problem import BadRows, Problem
from afina.data.rows import BadRow, Row, rows
from afina.data.sandbox import FAILURES, Render, mapping_template
from afina.errors import DataError
from afina.language import _
from afina.recipe.place import BUNDLED
from afina.recipe.schema import Data, Mapping, Sources

BUNDLED_SETS = BUNDLED / "data"
NOT_LEARNT = ("tool_calls", "function_call", "thinking", "reasoning", "reasoning_content")
"""What a message may hold beside its text. To pass over it would teach something else than the file says."""

Make = Callable[[Row], tuple[Message, ...]]


@dataclass
class Reading:
    """What was read and how."""

    samples: list[Sample] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    dialects: set[str] = field(default_factory=set)
    encodings: dict[str, list[Path]] = field(default_factory=dict)


def read(sources: Sources, data: Data, folder: Path) -> Reading:
    """Read every sample of `sources`; relative paths start at `folder`, else at the working directory.

    Raises DataError: a source is missing or empty, a file is named twice, or rows are bad (BadRows names all of them).
    """
    reading = Reading()
    problems: list[Problem] = []
    for source in [sources] if isinstance(sources, str) else sources:
        for file in find(source, folder):
            if file in reading.files:
                raise DataError(
                    _("The data file {path} is named twice.").format(path=file),
                    hint=_("Two of the sources lead to it. Name it once, or its samples would count double."),
                )
            reading.files.append(file)
            _read_file(file, data, reading, problems)
    if problems:
        raise BadRows(
            problems,
            len(problems) + len(reading.samples),
            hint=_("Mend or remove these rows; nothing was changed or dropped."),
        )
    if not reading.samples:
        raise DataError(_("No data file is named."), hint=_("Name at least one file, folder or bundled set."))
    return reading


def find(source: str, folder: Path) -> list[Path]:
    """The files a source names: a bundled set (afina/NAME/SPLIT), a pattern, a folder of JSON files, or one file."""
    if source.startswith("afina/") and not (folder / source).exists():
        return [_bundled(source)]
    for start in (folder, Path()):
        try:
            if found := _files_at(start, source):
                return found
        except (OSError, ValueError, RuntimeError, NotImplementedError) as error:  # what pathlib raises for odd names
            raise DataError(
                _("The data source {source} cannot be looked up: {reason}.").format(source=source, reason=error),
                hint=_("Name a file, a folder, or a pattern such as data/*.jsonl."),
            ) from error
    raise DataError(
        _("There is no data file {path}.").format(path=source),
        hint=_("Paths start at the recipe's folder ({folder}), then at the current one.").format(folder=folder),
    )


def _bundled(source: str) -> Path:
    names = {f"afina/{path.parent.name}/{path.stem}": path for path in BUNDLED_SETS.glob("*/*.jsonl")}
    if source not in names:
        raise DataError(
            _("There is no bundled data set {name}.").format(name=source),
            hint=_("There are: {names}.").format(names=", ".join(sorted(names))),
        )
    return names[source]


def _files_at(start: Path, source: str) -> list[Path]:
    path = (start / Path(source).expanduser()).resolve()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl") and file.is_file())
        if not found:
            raise DataError(
                _("The folder {path} holds no .json or .jsonl file.").format(path=path),
                hint=_("Name the folder that holds them, or a pattern such as data/*.txt."),
            )
        return found
    if has_magic(source):
        pattern = str(path.relative_to(path.anchor))
        return sorted({file.resolve() for file in Path(path.anchor).glob(pattern) if file.is_file()})
    return []


def _read_file(file: Path, data: Data, reading: Reading, problems: list[Problem]) -> None:
    text, encoding = _decode(file, data.encoding)
    reading.encodings.setdefault(encoding, []).append(file)
    before = len(reading.samples), len(problems)
    make: Make | None = None
    path = data.mapping.rows if data.mapping else ""
    for row in rows(text, lines=file.suffix == ".jsonl", path=path):
        try:
            if row.fault:
                raise BadRow(row.fault)
            if make is None:
                dialect = _dialect(row.value, data)
                make = _maker(dialect, data.mapping)
                reading.dialects.add(dialect)
            messages = _checked(make(row), data.system)
        except BadRow as reason:
            problems.append(Problem(file, row.line, str(reason)))
        else:
            reading.samples.append(Sample(messages, file, row.line))
    if before == (len(reading.samples), len(problems)):
        raise DataError(_("The data file holds no rows."), file=file, hint=_("Each line should be one JSON object."))


def _decode(file: Path, encodings: list[str]) -> tuple[str, str]:
    """The text of a file and the first of the encodings that fits it."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(
            _("The data file cannot be read: {reason}.").format(reason=error.strerror),
            file=file,
            hint=_("See whether it is there and whether you may read it."),
        ) from error
    failure: UnicodeDecodeError | None = None
    for encoding in encodings:
        try:
            return content.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding), encoding
        except UnicodeDecodeError as error:
            failure = failure or error
        except (LookupError, ValueError) as error:
            raise DataError(
                _("There is no encoding called {name}.").format(name=encoding),
                hint=_("Name one that Python knows in data.encoding, such as utf-8, latin-1 or utf-16."),
            ) from error
    if failure is None:
        raise DataError(_("data.encoding names no encoding."), hint=_("Write data.encoding: [utf-8]."))
    raise DataError(
        _("Byte {byte:#04x} at position {position} is not {encoding}.").format(
            byte=content[failure.start], position=failure.start, encoding=encodings[0]
        ),
        file=file,
        line=content.count(b"\n", 0, failure.start) + 1,
        hint=_("The file begins as UTF-16 does: data.encoding: [utf-16].")
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        else _("Convert the file to UTF-8, or name its encoding: data.encoding: [utf-8, latin-1]."),
    )


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
    keys = ", ".join(row)[:200] if isinstance(row, dict) else type(row).__name__
    raise BadRow(
        _("unknown shape ({keys}): rows hold messages, or instruction and output, or need data.mapping").format(
            keys=keys
        )
    )


def _maker(dialect: str, mapping: Mapping | None) -> Make:
    if dialect == "messages":
        return _from_messages
    if dialect == "alpaca":
        return _from_alpaca
    if mapping is None:
        raise DataError(
            _("data.dialect is mapping, but there is no data.mapping."),
            hint=_("Add data.mapping with user and assistant."),
        )
    return _from_mapping(mapping)


def _from_messages(row: Row) -> tuple[Message, ...]:
    messages = row.value.get("messages") if isinstance(row.value, dict) else None
    if not isinstance(messages, list):
        raise BadRow(_("no list of messages"))
    return tuple(_message(message, number) for number, message in enumerate(messages, start=1))


def _message(message: Any, number: int) -> Message:
    if isinstance(message, dict) and (more := next((key for key in NOT_LEARNT if message.get(key)), None)):
        raise BadRow(_("message {number} has {key}, which is not learnt yet").format(number=number, key=more))
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise BadRow(_("message {number} has no text content").format(number=number))
    if message.get("role") not in ROLES:
        raise BadRow(
            _("message {number} has the role {role}; known are {roles}").format(
                number=number, role=str(message.get("role"))[:40], roles=", ".join(ROLES)
            )
        )
    return Message(message["role"], message["content"])


def _from_alpaca(row: Row) -> tuple[Message, ...]:
    value = row.value if isinstance(row.value, dict) else {}
    if value.get("history"):
        raise BadRow(_("history is not read: write such conversations as messages"))
    texts: dict[str, str] = {}
    for key in ("instruction", "input", "output", "system"):
        text = value.get(key)
        if text is None and key in ("input", "system"):
            text = ""
        if not isinstance(text, str):
            raise BadRow(_("{key} is not a text").format(key=key))
        texts[key] = text
    question = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    system = (Message("system", texts["system"]),) if texts["system"].strip() else ()
    return (*system, Message("user", question), Message("assistant", texts["output"]))


def _from_mapping(mapping: Mapping) -> Make:
    texts = {"system": mapping.system, "user": mapping.user, "assistant": mapping.assistant}
    templates: dict[str, Render] = {}
    for role, text in texts.items():
        try:
            if text is not None:
                templates[role] = mapping_template(text)
        except TemplateError as error:
            raise DataError(
                _("data.mapping.{key} is not a valid template: {reason}.").format(key=role, reason=error),
                hint=_('A value of the row is written {{ row.key }} or {{ row["a key"] }}.'),
            ) from error

    def make(row: Row) -> tuple[Message, ...]:
        try:
            made = {role: render(row=row.value, keys=row.keys).strip() for role, render in templates.items()}
        except FAILURES as error:
            raise BadRow(_("data.mapping does not fit: {reason}").format(reason=error)) from None
        return tuple(Message(role, text) for role, text in made.items() if text or role != "system")

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
            raise BadRow(
                _("half a character (a lone surrogate) in the {role}'s message").format(role=message.role)
            ) from None
    if any(message.role == "system" for message in messages[1:]):
        raise BadRow(_("a system message stands after the first message"))
    if system is not None and messages[0].role != "system":
        return (Message("system", system), *messages)
    return messages
