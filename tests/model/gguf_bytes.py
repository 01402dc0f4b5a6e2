"""GGUF files byte by byte: whole ones, 70 hostile ones made by hand, and a mutator that knows where the fields are."""

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
LETTERS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}


@dataclass
class Bytes:
    """A file under construction; `fields` are (place, width) of every number that says how to read on."""

    content: bytearray = field(default_factory=bytearray)
    fields: list[tuple[int, int]] = field(default_factory=list)

    def number(self, letter: str, value: Any) -> None:
        self.fields.append((len(self.content), struct.calcsize("<" + letter)))
        self.content += struct.pack("<" + letter, value)

    def text(self, value: str | bytes, length: int | None = None) -> None:
        raw = value if isinstance(value, bytes) else value.encode()
        self.number("Q", len(raw) if length is None else length)
        self.content += raw

    def entry(self, key: str | bytes, kind: int, value: Any) -> None:
        """A metadata entry; `value` of an array is (type, items) or (type, items, claimed count)."""
        self.text(key)
        self.number("I", kind)
        if kind == ARRAY:
            inner, items, *claimed = value
            self.number("I", inner)
            self.number("Q", claimed[0] if claimed else len(items))
            for item in items:
                self.text(item) if inner == STRING else self.number(LETTERS.get(inner, "I"), item)
        elif kind == STRING:
            self.text(value)
        else:
            self.number(LETTERS.get(kind, "I"), value)

    def tensor(
        self, name: str | bytes, sizes: list[int], kind: int, offset: int, dimensions: int | None = None
    ) -> None:
        self.text(name)
        self.number("I", len(sizes) if dimensions is None else dimensions)
        for size in sizes:
            self.number("Q", size)
        self.number("I", kind)
        self.number("Q", offset)


ENTRIES: list[tuple[Any, int, Any]] = [
    ("general.architecture", STRING, "llama"),
    ("a.u8", U8, 7),
    ("a.bool", BOOL, 1),
    ("a.f32", F32, 0.5),
    ("a.i64", I64, -3),
    ("a.floats", ARRAY, (F32, [1.0, -2.0])),
    ("a.words", ARRAY, (STRING, ["one", "", "três"])),
    ("a.flags", ARRAY, (BOOL, [0, 1])),
]
TENSORS: list[tuple[Any, list[int], int, int]] = [("one", [4, 3], 0, 0), ("two", [32], 8, 64), ("three", [2], 1, 128)]
DATA = 160
"""Bytes of the tensors: 48 and padding to 64, 34 and padding to 128, 4 and padding to 160."""


def build(
    entries: list[tuple[Any, int, Any]] | None = None,
    tensors: list[tuple[Any, ...]] | None = None,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int | None, int | None] = (None, None),
    data: int | None = None,
    alignment: int = 32,
) -> Bytes:
    """A file; `counts` of tensors and entries may be false, `data` is how many bytes of weights there really are."""
    entries = ENTRIES if entries is None else entries
    tensors = list(TENSORS) if tensors is None else tensors
    made = Bytes(bytearray(magic))
    made.number("I", version)
    made.number("Q", len(tensors) if counts[0] is None else counts[0])
    made.number("Q", len(entries) if counts[1] is None else counts[1])
    for entry in entries:
        made.entry(*entry)
    for tensor in tensors:
        made.tensor(*tensor)
    made.content += bytes(-len(made.content) % alignment)
    made.content += bytes(DATA if data is None else data)
    return made


def hostile() -> dict[str, bytes]:
    """Files that each lie once. The names say how."""
    whole = bytes(build().content)
    head = len(whole) - DATA
    huge = [2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
    plus: Callable[..., bytes] = lambda *entry: bytes(build([*ENTRIES, entry]).content)  # noqa: E731
    only: Callable[..., bytes] = lambda *tensor, **said: bytes(build(tensors=[tensor], **said).content)  # noqa: E731
    files: dict[str, bytes] = {
        "nothing but magic": b"GGUF",
        "other magic": bytes(build(magic=b"GGML").content),
        "magic turned": bytes(build(magic=b"FUGG").content),
        "version 0": bytes(build(version=0).content),
        "version 1": bytes(build(version=1).content),
        "version 4": bytes(build(version=4).content),
        "big-endian version": bytes(build(version=3 << 24).content),
        "cut in the counts": whole[:20],
        "cut in a key": whole[:40],
        "cut in the tensors": whole[: head - 60],
        "cut in the last tensor's data": whole[: head + 130],
        "cut before the data": whole[:head],
        "a key twice": plus("a.u8", U8, 7),
        "an empty key": plus("", U8, 7),
        "a key of 65536 bytes": plus("k" * 65536, U8, 7),
        "a key that is no UTF-8": plus(b"\xff\xfe", U8, 7),
        "a text that is no UTF-8": plus("b", STRING, b"\xc3("),
        "an overlong UTF-8": plus("b", STRING, b"\xc0\x80"),
        "a surrogate in UTF-8": plus("b", STRING, b"\xed\xa0\x80"),
        "type 13": plus("b", 13, 0),
        "type 2^32 - 1": plus("b", 2**32 - 1, 0),
        "an array of arrays": plus("b", ARRAY, (ARRAY, [])),
        "an array of type 13": plus("b", ARRAY, (13, [])),
        "a bool of 2": plus("b", BOOL, 2),
        "an array with a bool of 255": plus("b", ARRAY, (BOOL, [1, 255])),
        "alignment 0": plus("general.alignment", U32, 0),
        "alignment 3": plus("general.alignment", U32, 3),
        "alignment 2^31": plus("general.alignment", U32, 2**31),
        "alignment as a text": plus("general.alignment", STRING, "32"),
        "alignment as an array": plus("general.alignment", ARRAY, (U32, [32])),
        "alignment as a float": plus("general.alignment", F32, 32.0),
        "alignment -32": plus("general.alignment", I32, -32),
        "another alignment than the file has": plus("general.alignment", U32, 4096),
        "a tensor twice": bytes(build(tensors=[("one", [4], 0, 0), ("one", [4], 0, 32)]).content),
        "a tensor without a name": only("", [4], 0, 0),
        "a tensor's name of 64 bytes": only("n" * 64, [4], 0, 0),
        "a tensor's name that is no UTF-8": only(b"\x80", [4], 0, 0),
        "a tensor's name with a zero in it": only("a\0b", [4], 0, 0),
        "no dimensions": only("a", [], 0, 0),
        "five dimensions": only("a", [1, 1, 1, 1, 4], 0, 0),
        "2^32 - 1 dimensions": only("a", [4], 0, 0, 2**32 - 1),
        "a dimension of 0": only("a", [4, 0], 0, 0),
        "all dimensions 0": only("a", [0, 0, 0, 0], 0, 0),
        "a negative dimension": only("a", [2**64 - 4], 0, 0),
        "a product of 2^64": only("a", [2**32, 2**32], 0, 0),
        "a product of 2^64 + 4": only("a", [2**62 + 1, 4], 0, 0),
        "tensor type 4": only("a", [32], 4, 0),
        "tensor type 200": only("a", [32], 200, 0),
        "tensor type 2^32 - 1": only("a", [32], 2**32 - 1, 0),
        "half a block": only("a", [16], 8, 0),
        "a row of 33 in q8_0": only("a", [33], 8, 0),
        "an offset that is not aligned": only("a", [4], 0, 1),
        "an offset beyond the file": only("a", [4], 0, 1024),
        "an offset of 2^63": only("a", [4], 0, 2**63),
        "an offset of 2^64 - 32": only("a", [4], 0, 2**64 - 32),
        "a tensor beyond the file": only("a", [DATA // 4 + 1], 0, 0),
        "two tensors in one place": bytes(build(tensors=[("a", [4], 0, 0), ("b", [4], 0, 0)]).content),
        "a gap between tensors": bytes(build(tensors=[("a", [4], 0, 0), ("b", [4], 0, 64)]).content),
        "tensors in another order": bytes(build(tensors=[("a", [4], 0, 32), ("b", [4], 0, 0)]).content),
        "many empty texts, then nothing": plus("b", ARRAY, (STRING, [""] * 200_000))[:-400],
        "many bytes, then a lie": plus("b", ARRAY, (U8, [1] * 100_000, 10**6)),
        "many entries, then a lie": bytes(
            build([(f"{i}", U8, 1) for i in range(4000)] + [("last", ARRAY, (STRING, [], 2**40))]).content
        ),
    }
    for value in huge:
        files[f"{value} entries"] = bytes(build(counts=(None, value)).content)
        files[f"{value} tensors"] = bytes(build(counts=(value, None)).content)
        files[f"an array of {value} bytes"] = plus("b", ARRAY, (U8, [1], value))
        files[f"an array of {value} texts"] = plus("b", ARRAY, (STRING, ["x"], value))
    for value in (2**31, 2**63 - 1, 2**64 - 1):
        made = build()
        made.text("k", value)
        files[f"a text of {value} bytes"] = bytes(
            build([(b"b", STRING, "x")]).content.replace(struct.pack("<Q", 1) + b"x", struct.pack("<Q", value) + b"x")
        )
        files[f"a dimension of {value}"] = only("a", [value], 0, 0)
    return files


TELLING = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    9,
    13,
    31,
    32,
    63,
    64,
    255,
    256,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63,
    2**64 - 1,
]


class Mutator:
    """Files that are wrong in one to three ways, drawn from some whole ones. Fast: a mutation takes a microsecond."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        small = [("general.architecture", STRING, "gpt2"), ("general.alignment", U32, 64)]
        self.seeds = [
            build(),
            build(small, [("t", [3, 2], 0, 0)], alignment=64, data=24),
            build([], []),
            build(ENTRIES[:3], [], version=2),
            build([], list(TENSORS)),
        ]

    def draw(self) -> bytes:
        chance = self.random.random
        made = self.seeds[int(chance() * len(self.seeds))]
        content = bytearray(made.content)
        for _change in range(1 + int(chance() * 3)):
            size = len(content)
            if size < 2:
                break
            how = int(chance() * 8)
            if how < 4 and made.fields:  # a number that says how to read on
                at, width = made.fields[int(chance() * len(made.fields))]
                if at + width > size:
                    continue
                if how < 2:
                    value = TELLING[int(chance() * len(TELLING))]
                else:
                    value = int.from_bytes(content[at : at + width], "little") + int(chance() * 9) - 4
                content[at : at + width] = (value % 256**width).to_bytes(width, "little")
            elif how == 4:
                content[int(chance() * size)] ^= 1 << int(chance() * 8)
            elif how == 5:
                content[int(chance() * size)] = int(chance() * 256)
            elif how == 6:
                del content[int(chance() * size) :]
            else:  # a piece of it, or of another, somewhere else
                other = self.seeds[int(chance() * len(self.seeds))].content
                start = int(chance() * len(other))
                at = int(chance() * size)
                content[at : at + int(chance() * 16)] = other[start : start + int(chance() * 40)]
        return bytes(content)
