"""A file as lines of raw bytes, each with its number and its place, in constant memory. Knows no format.

Lines end at LF alone; a CR before it belongs to the line. `open_raw` undoes gzip and Zstandard, told by their first
bytes, never by a name.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from afina.errors import DataError, ResourceError, reason_of
from afina.language import _

ROW_BYTES = 2**23
"""No row is read beyond this: 8 MiB of brackets already become 250 MB of Python objects."""
CHUNK = 2**20
"""Bytes read at once."""
RATIO = 250
"""Compressed files that grow more than this are bombs: text shrinks 3 to 20 times, machine logs seldom 100 times."""
FREE_BYTES = 2**21
"""So much may come out of a compressed file before its ratio is looked at."""
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
COMPRESSED = (".gz", ".zst", ".zstd")
ARCHIVES = {b"PK\x03\x04": "ZIP", b"\xfd7zX": "xz", b"BZh9": "bzip2", b"7z\xbc\xaf": "7z"}
"""What else is told by its first bytes."""
PACKED = 2**11
"""Compressed bytes unpacked at once: of zeros, Zstandard makes 32,000 times as many."""
WINDOW = 2**27
"""The largest window of a Zstandard frame, as its own program's default."""


class Line(NamedTuple):
    """Line `number` (from 1) begins at byte `offset` (from 0); `raw` is without its LF. `whole`: not cut at a limit."""

    number: int
    offset: int
    raw: bytes
    whole: bool = True


def lines(file: IO[bytes]) -> Iterator[Line]:
    """Every line in order, the last one with or without LF. One over ROW_BYTES comes cut and is the last."""
    number, offset, rest = 1, 0, b""
    while chunk := file.read(CHUNK):
        if len(rest) > ROW_BYTES:
            break
        if b"\n" not in chunk:
            rest += chunk
            continue
        first, *middle, last = chunk.split(b"\n")
        for raw in (rest + first, *middle):
            yield Line(number, offset, raw)
            number, offset = number + 1, offset + len(raw) + 1
        rest = last
    if rest:
        yield Line(number, offset, rest[:ROW_BYTES], len(rest) <= ROW_BYTES)


def open_raw(path: Path) -> io.BufferedReader:
    """The bytes of a file, decompressed where it is gzip or Zstandard. Raises DataError and, lacking a package,
    ResourceError; a damaged or hostile compressed file raises DataError while it is read."""
    try:
        if not path.is_file():
            raise DataError(_("This is no file that could be read."), file=path, hint=_("Name a file of examples."))
        file = path.open("rb")
        head = file.read(4)
        file.seek(0)
    except OSError as error:
        raise DataError(
            _("The data file cannot be read: {reason}.").format(reason=reason_of(error)),
            file=path,
            hint=_("See whether it is there and whether you may read it."),
        ) from error
    if head in ARCHIVES:
        file.close()
        raise DataError(
            _("The data file is a {kind} archive, which is not read.").format(kind=ARCHIVES[head]),
            file=path,
            hint=_("Unpack it, and name the files or the folder; gzip and Zstandard are read as they are."),
        )
    if head[:2] == GZIP:
        return io.BufferedReader(_Inflated(path, file, gzip.GzipFile(fileobj=file)), CHUNK)
    if head == ZSTD:
        return io.BufferedReader(_Inflated(path, file, _Zstandard(file)), CHUNK)
    return file


class _Zstandard:
    """A reader of Zstandard frames that says when the last one breaks off, which the package's own does not."""

    def __init__(self, file: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ResourceError(
                _("The package zstandard is needed to read Zstandard files."),
                hint=_('Run: pip install "afina[zstd]", or decompress the file first.'),
            ) from error
        self._file = file
        self._new = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj
        self._frame = self._new()
        self._made = b""
        self._open = False

    def read(self, count: int) -> bytes:
        while not self._made:
            packed = self._file.read(PACKED)
            if not packed and self._open:
                raise EOFError("the file ends inside a frame")
            if not packed:
                break
            self._made = self._unpack(packed)
        made, self._made = self._made[:count], self._made[count:]
        return made

    def _unpack(self, packed: bytes) -> bytes:
        made = self._frame.decompress(packed)
        while rest := self._frame.unused_data:
            self._frame = self._new()
            made += self._frame.decompress(rest)
        self._open = not self._frame.eof
        if self._frame.eof:
            self._frame = self._new()
        return made


@dataclass(eq=False)
class _Inflated(io.RawIOBase):
    """What a decompressor makes of a file, until it makes too much of it."""

    path: Path
    file: IO[bytes]
    source: Any
    made: int = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self.source.read(len(buffer))
        except Exception as error:
            if not isinstance(error, OSError | EOFError | zlib.error) and type(error).__name__ != "ZstdError":
                raise
            raise DataError(
                _("The compressed file is damaged: {reason}.").format(reason=error),
                file=self.path,
                hint=_("Fetch or compress it again."),
            ) from error
        self.made += len(content)
        if self.made > FREE_BYTES and self.made > RATIO * self.file.tell():
            raise DataError(
                _("The compressed file grows over {ratio} times, which no data set does.").format(ratio=RATIO),
                file=self.path,
                hint=_("Decompress it yourself if you trust it."),
            )
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self.file.close()
        super().close()


def ending_of(path: Path) -> str:
    """The ending of a name that says what is inside, that of the compression left out."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSED), "")
