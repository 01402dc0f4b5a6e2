"""A GGUF file, ours or foreign, read within bounds: its metadata, what tensors it has, and their values when asked.

Nothing in the file is believed before it is compared with what is there: each count and length is held against the
bytes that are left before anything of that size is made, so a hostile file costs no more than reading it. What is read
here llama.cpp reads too; where its own rules are laxer (empty tensors, text that is no UTF-8) the file is refused here.
Knows nothing of architectures. The layout is the one of the GGUF specification, versions 2 and 3, little-endian.
"""

import math
import mmap
import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from afina.errors import ModelError
from afina.language import _

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY, ALIGNMENT = "general.alignment", 32
MOST_ENTRIES = 2**12
"""Metadata entries, and tensors, that a file may have: the largest known have some 1,500 tensors. An entry takes more
memory than the 14 bytes that a file can say it with, so their number must be bounded: together, half a MiB."""
MOST_STRINGS = 2**22
"""Strings in all arrays together: the largest known vocabulary has 262,144 tokens and 514,906 merges."""
LONGEST_KEY, LONGEST_NAME, MOST_DIMENSIONS = 2**16 - 1, 63, 4
"""Bytes of a key, as specified; of a tensor's name and dimensions of a tensor, as ggml has room for."""

UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", UINT32: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}
"""Type number of a metadata value to its letter, for struct and for numpy."""
_WIDTHS = {kind: struct.calcsize("<" + letter) for kind, letter in SCALARS.items()}
_READERS = {kind: struct.Struct("<" + letter).unpack_from for kind, letter in SCALARS.items() if kind != BOOL}
_u32, _u64, _counts = _READERS[UINT32], struct.Struct("<Q").unpack_from, struct.Struct("<IQQ").unpack_from
_place = struct.Struct("<IQ").unpack_from
_dimensions = [struct.Struct(f"<{count}Q").unpack_from for count in range(MOST_DIMENSIONS + 1)]

TYPES: dict[int, tuple[str, int, int]] = {
    0: ("f32", 1, 4),
    1: ("f16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    24: ("i8", 1, 1),
    25: ("i16", 1, 2),
    26: ("i32", 1, 4),
    27: ("i64", 1, 8),
    28: ("f64", 1, 8),
    29: ("iq1_m", 256, 56),
    30: ("bf16", 1, 2),
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17),
}
"""Number of a tensor's type to its name, the weights in a block and the bytes of one."""
_PLAIN = {"f32": "<f4", "f16": "<f2", "f64": "<f8", "i8": "<i1", "i16": "<i2", "i32": "<i4", "i64": "<i8"}

T = TypeVar("T")


class Strings(Sequence[str]):
    """An array of texts in a file, each decoded when it is asked for. Raises ModelError for one that is no UTF-8."""

    def __init__(self, content: Any, places: "array[int]", path: Path | None) -> None:
        self._content, self._places, self._path = content, places, path

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._text(place) for place in self._places[index]]
        return self._text(self._places[index])

    def __iter__(self) -> Iterator[str]:
        return map(self._text, self._places)

    def _text(self, place: int) -> str:
        return _decoded(self._content, place + 8, _u64(self._content, place)[0], self._path)


Value = bool | int | float | str | np.ndarray | Strings


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: `shape` slowest dimension first, as torch has it; `kind` its type ("q4_k", ...); `start`
    and `bytes` its place in the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class Head:
    """What a file says before its weights. Arrays of numbers are numpy's, arrays of texts `Strings`."""

    version: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, StoredTensor]
    alignment: int


class GgufFile:
    """An opened GGUF file. Its weights stay on the disk until they are asked for.

    Raises ModelError when the file is no GGUF file, or one that cannot be what it says.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._content = _mapped(self.path)
        self.head = read_head(self._content, self.path)
        self.metadata, self.tensors = self.head.metadata, self.head.tensors

    @property
    def architecture(self) -> str:
        """llama.cpp's name for what kind of model it is."""
        return self.value("general.architecture", str)

    @overload
    def value(self, key: str, kind: type[T]) -> T: ...
    @overload
    def value(self, key: str, kind: type[T], default: None) -> T | None: ...
    @overload
    def value(self, key: str, kind: type[T], default: T) -> T: ...
    def value(self, key: str, kind: type[T], default: Any = ...) -> Any:
        """A metadata entry, which must be of `kind`: bool, int, float, str, np.ndarray or Strings. Raises ModelError
        when it is of another, or is missing and there is no default."""
        found = self.metadata.get(key)
        if found is None:
            if default is ...:
                raise ModelError(_("The file does not say {key}.").format(key=key), file=self.path)
            return default
        if type(found) is not kind:
            raise ModelError(
                _("{key} is of the type {found}, not {wanted}.").format(
                    key=key, found=type(found).__name__, wanted=kind.__name__
                ),
                file=self.path,
            )
        return found

    def raw(self, name: str) -> np.ndarray:
        """A tensor as stored: (rows, bytes of a row), read-only, on the disk. Raises ModelError when it is missing."""
        tensor = self._tensor(name)
        stored = np.frombuffer(self._content, np.uint8, tensor.bytes, tensor.start)
        return stored.reshape(math.prod(tensor.shape[:-1]), -1)

    def values(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A tensor's values in F32, or those of entries `start` to `stop` of its first dimension.

        Raises ModelError when it is missing or of a type that nothing here decodes.
        """
        tensor = self._tensor(name)
        first, rest = tensor.shape[0], tensor.shape[1:]
        start, stop, _step = slice(start, stop).indices(first)
        shape = (max(0, stop - start), *rest)
        if len(tensor.shape) == 1:  # the rows of a block are its columns
            return self._decoded(self.raw(name), tensor).reshape(-1)[start:stop]
        each = math.prod(rest[:-1])
        return self._decoded(self.raw(name)[start * each : stop * each], tensor).reshape(shape)

    def _decoded(self, rows: np.ndarray, tensor: StoredTensor) -> np.ndarray:
        if tensor.kind in _PLAIN:
            return np.ascontiguousarray(rows).view(_PLAIN[tensor.kind]).astype(np.float32)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        if not len(rows):
            return np.zeros((0, tensor.shape[-1]), np.float32)
        found: np.ndarray = dequantize(rows, GGMLQuantizationType[tensor.kind.upper()])
        return found

    def _tensor(self, name: str) -> StoredTensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ModelError(_("The file lacks the tensor {name}.").format(name=name), file=self.path)
        return tensor


def _mapped(path: Path) -> mmap.mmap:
    """The file in memory's address space. A pipe or a device is refused, not waited for."""
    try:
        if not path.is_file() and path.exists():
            raise ModelError(_("The file is not a GGUF file."), file=path)
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # mmap raises ValueError for an empty file
        raise ModelError(_("The file cannot be read: {reason}.").format(reason=error), file=path) from error


def read_head(content: bytes | mmap.mmap, path: Path | None = None) -> Head:
    """The head of a whole file that lies in `content`. Raises ModelError, naming `path`, and nothing else."""
    if content[:4] != MAGIC:
        raise ModelError(_("The file is not a GGUF file."), file=path)
    try:
        version, tensors, entries = _counts(content, 4)
        if version not in VERSIONS:
            raise ModelError(
                _("This GGUF file is of version {version}; versions 2 and 3 can be read.").format(version=version),
                hint=_("Convert it again with a newer llama.cpp."),
                file=path,
            )
        if tensors > MOST_ENTRIES or entries > MOST_ENTRIES:
            raise _damaged(_("it claims {count} entries").format(count=max(tensors, entries)), path)
        metadata, at = _read_metadata(content, entries, path)
        alignment = _alignment(metadata, path)
        stored, at = _read_tensors(content, at, tensors, path)
        return Head(version, metadata, _placed(content, at, stored, alignment, path), alignment)
    except struct.error:
        raise _damaged(_("it ends too early"), path) from None


def _read_metadata(content: Any, count: int, path: Path | None) -> tuple[dict[str, Value], int]:
    """`count` entries from where the metadata begins, and where it ends."""
    found: dict[str, Value] = {}
    at, end, strings = 24, len(content), 0
    for _entry in range(count):
        (length,) = _u64(content, at)
        at += 8
        if not 0 < length <= LONGEST_KEY or length > end - at:
            raise _damaged(_("a key has the length {length}").format(length=length), path)
        key = _decoded(content, at, length, path)
        at += length
        if key in found:
            raise _damaged(_("{name} stands in it twice").format(name=key), path)
        (kind,) = _u32(content, at)
        at += 4
        if kind == ARRAY:
            kind, amount = _place(content, at)
            at += 12
            if kind == STRING:
                strings += amount
                if strings > MOST_STRINGS:
                    raise _damaged(_("it claims {count} entries").format(count=strings), path)
                found[key], at = _read_strings(content, at, amount, path)
            else:
                found[key], at = _read_numbers(content, at, kind, amount, path)
        elif kind == STRING:
            (length,) = _u64(content, at)
            at += 8
            if length > end - at:
                raise _damaged(_("a text has the length {length}").format(length=length), path)
            found[key] = _decoded(content, at, length, path)
            at += length
        elif kind == BOOL:
            (value,) = _READERS[0](content, at)
            if value > 1:
                raise _damaged(_("{name} is neither true nor false").format(name=key), path)
            found[key] = value == 1
            at += 1
        elif kind in _READERS:
            (found[key],) = _READERS[kind](content, at)
            at += _WIDTHS[kind]
        else:
            raise _damaged(_("{name} is of the unknown type {kind}").format(name=key, kind=kind), path)
        if key == ALIGNMENT_KEY and kind != UINT32:
            raise _damaged(_("its alignment is {alignment}").format(alignment=found[key]), path)
    return found, at


def _read_strings(content: Any, at: int, count: int, path: Path | None) -> tuple[Strings, int]:
    end = len(content)
    if count > (end - at) // 8:
        raise _damaged(_("it claims {count} entries").format(count=count), path)
    places = array("Q", bytes(8 * count))
    for index in range(count):
        places[index] = at
        at += 8 + _u64(content, at)[0]
        if at > end:
            raise _damaged(_("a text has the length {length}").format(length=_u64(content, places[index])[0]), path)
    return Strings(content, places, path), at


def _read_numbers(content: Any, at: int, kind: int, count: int, path: Path | None) -> tuple[np.ndarray, int]:
    if kind not in SCALARS:
        raise _damaged(_("{name} is of the unknown type {kind}").format(name=_("an array"), kind=kind), path)
    if count > (len(content) - at) // _WIDTHS[kind]:
        raise _damaged(_("it claims {count} entries").format(count=count), path)
    if kind == BOOL:
        found = np.frombuffer(content, np.uint8, count, at)
        if count and found.max() > 1:
            raise _damaged(_("{name} is neither true nor false").format(name=_("an array")), path)
        return found == 1, at + count
    return np.frombuffer(content, "<" + SCALARS[kind], count, at).copy(), at + count * _WIDTHS[kind]


def _alignment(metadata: Mapping[str, Value], path: Path | None) -> int:
    found = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
    # Below 32 llama.cpp ends the process: tensors would not lie where its kernels read them.
    if type(found) is not int or found < ALIGNMENT or found & (found - 1) or found >= 2**31:
        raise _damaged(_("its alignment is {alignment}").format(alignment=found), path)
    return found


def _read_tensors(
    content: Any, at: int, count: int, path: Path | None
) -> tuple[list[tuple[str, int, tuple[int, ...], int]], int]:
    """Name, type, dimensions and offset of each tensor, and where the list ends."""
    stored = []
    names = set()
    end = len(content)
    for _entry in range(count):
        (length,) = _u64(content, at)
        at += 8
        if not 0 < length <= LONGEST_NAME or length > end - at:
            raise _damaged(_("the name of a tensor has the length {length}").format(length=length), path)
        name = _decoded(content, at, length, path)
        at += length
        if name in names or "\0" in name:  # ggml's names end there
            raise _damaged(_("{name} stands in it twice").format(name=name), path)
        names.add(name)
        (dimensions,) = _u32(content, at)
        if not 0 < dimensions <= MOST_DIMENSIONS:
            raise _damaged(_("{name} has {count} dimensions").format(name=name, count=dimensions), path)
        sizes = _dimensions[dimensions](content, at + 4)
        at += 4 + 8 * dimensions
        kind, offset = _place(content, at)
        at += 12
        stored.append((name, kind, sizes, offset))
    return stored, at


def _placed(
    content: Any, at: int, stored: list[tuple[str, int, tuple[int, ...], int]], alignment: int, path: Path | None
) -> dict[str, StoredTensor]:
    """The tensors, each where the one before ends, as llama.cpp demands, and all within the file."""
    found = {}
    start = at + -at % alignment
    expected, left = 0, len(content) - start
    for name, number, sizes, offset in stored:
        known = TYPES.get(number)
        if known is None:
            raise _damaged(_("{name} is of the unknown type {kind}").format(name=name, kind=number), path)
        kind, block, width = known
        if 0 in sizes or sizes[0] % block:
            raise _damaged(_("{name} has the shape {shape}").format(name=name, shape=sizes[::-1]), path)
        size = math.prod(sizes) // block * width
        if offset != expected or size > left - offset:
            raise _damaged(_("{name} does not lie in the file where it should").format(name=name), path)
        expected = offset + size + -size % alignment
        found[name] = StoredTensor(name, kind, sizes[::-1], start + offset, size)
    return found


def _decoded(content: Any, start: int, length: int, path: Path | None) -> str:
    try:
        return str(content[start : start + length], "utf-8")
    except UnicodeDecodeError:
        raise _damaged(_("a text in it is no UTF-8"), path) from None


def _damaged(reason: str, path: Path | None) -> ModelError:
    return ModelError(
        _("The GGUF file is damaged: {reason}.").format(reason=reason),
        hint=_("Download or export it again."),
        file=path,
    )
