"""Text of any encoding, as bytes of UTF-8 whose places in the file stay known."""

import codecs
import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from afina.data.lines import CHUNK, open_raw
from afina.errors import DataError
from afina.language import _


def decoded(path: Path, raw: bytes, number: int, offset: int) -> str:
    """A line as text. Raises DataError: that is no matter of one row, the file is of another encoding."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise undecodable(path, raw[error.start], offset + error.start, number, "utf-8") from error


def undecodable(path: Path, byte: int, position: int, line: int, encoding: str) -> DataError:
    """The error of a byte that the encoding does not know."""
    with path.open("rb") as file:
        wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return DataError(
        _("Byte {byte:#04x} at position {position} is not {encoding}.").format(
            byte=byte, position=position, encoding=encoding
        ),
        file=path,
        line=line,
        hint=_("The file begins as UTF-16 does: data.encoding: [utf-16].")
        if wide
        else _("Convert the file to UTF-8, or name its encoding: data.encoding: [utf-8, latin-1]."),
    )


def encoding_of(path: Path, encodings: Sequence[str]) -> str:
    """The first of the encodings that fits the whole file. Raises DataError when none does, or one is unknown.

    A single one is not tried here: reading the file will say where it does not fit.
    """
    if not encodings:
        raise DataError(_("data.encoding names no encoding."), hint=_("Write data.encoding: [utf-8]."))
    for encoding in encodings:
        _known(encoding)
    if len(encodings) == 1:
        return encodings[0]
    failure: DataError | None = None
    for encoding in encodings:
        try:
            with open_raw(path) as raw:
                file = _Transcoded(path, raw, encoding)
                while file.read(CHUNK):
                    pass
        except DataError as error:
            if not isinstance(error.__cause__, UnicodeError):
                raise
            failure = failure or error
        else:
            return encoding
    raise failure or DataError(_("data.encoding names no encoding."), hint=_("Write data.encoding: [utf-8]."))


def _known(encoding: str) -> None:
    try:
        b"a".decode(encoding)
    except UnicodeDecodeError:
        return
    except (LookupError, ValueError) as error:
        raise DataError(
            _("There is no encoding called {name}.").format(name=encoding),
            hint=_("Name one that Python knows in data.encoding, such as utf-8, latin-1 or utf-16."),
        ) from error


def open_text(path: Path, encoding: str) -> IO[bytes]:
    """The text of a file as bytes of UTF-8, without a byte order mark; undecompressed and untranscoded as needed."""
    file = open_raw(path)
    if encoding.lower() not in ("utf-8", "utf8"):
        return io.BufferedReader(_Transcoded(path, file, encoding), CHUNK)
    if not file.peek(3).startswith(codecs.BOM_UTF8):
        return file
    return io.BufferedReader(_Marked(file), CHUNK)


class _Marked(io.RawIOBase):
    """A file of UTF-8 whose byte order mark reads as three spaces: all places stay what they are."""

    def __init__(self, file: IO[bytes]) -> None:
        self._head = b" " * len(file.read(len(codecs.BOM_UTF8)))
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content, self._head = self._head or self._file.read(len(buffer)), b""
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Transcoded(io.RawIOBase):
    """A file of another encoding as UTF-8. Raises DataError at the first byte that the encoding does not know."""

    def __init__(self, path: Path, file: IO[bytes], encoding: str) -> None:
        self._path, self._file, self._encoding = path, file, encoding
        name = "utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding
        self._decoder = codecs.getincrementaldecoder(name)()
        self._made, self._read, self._lines, self._ended = b"", 0, 1, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._made and not self._ended:
            chunk = self._file.read(CHUNK)
            self._ended = not chunk
            self._made = self._decode(chunk)
        content, self._made = self._made[: len(buffer)], self._made[len(buffer) :]
        buffer[: len(content)] = content
        return len(content)

    def _decode(self, chunk: bytes) -> bytes:
        held = self._decoder.getstate()[0]
        try:
            made = self._decoder.decode(chunk, final=self._ended)
        except UnicodeError as error:
            start = error.start if isinstance(error, UnicodeDecodeError) else 0
            before = (held + chunk)[:start]
            byte = (held + chunk)[start : start + 1] or b"\0"
            position, line = self._read - len(held) + start, self._lines + before.count(b"\n")
            raise undecodable(self._path, byte[0], position, line, self._encoding) from error
        self._read += len(chunk)
        self._lines += made.count("\n")
        return made.encode("utf-8", "surrogatepass")

    def close(self) -> None:
        self._file.close()
        super().close()
