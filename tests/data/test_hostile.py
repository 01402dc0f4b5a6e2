"""Files made to harm: each ends in one typed error, soon, with the process alive and its memory bounded."""

import gzip
import io
import json
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from afina.data.lines import FREE_BYTES, ROW_BYTES
from afina.data.read import read
from afina.data.row import Shape
from afina.data.rows import rows
from afina.errors import DataError
from afina.recipe.schema import Data, Mapping

pyarrow = pytest.importorskip("pyarrow", reason='install "afina[parquet]" to read Parquet files')
zstandard = pytest.importorskip("zstandard", reason='install "afina[zstd]" to read Zstandard files')
MOST = 40 * ROW_BYTES
"""Bytes that any of them may take: 320 MiB."""


def peak() -> int:
    """The most bytes that this process has held so far."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024


def sparse(start: bytes, size: int = 2**30) -> Callable[[Path], None]:
    """A file of a gigabyte that takes no room on the disk."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(start)
            file.truncate(size)

    return write


def holding(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def parquet(columns: dict[str, object], **options: object) -> Callable[[Path], None]:
    from pyarrow import parquet as writer

    return lambda path: writer.write_table(pyarrow.table(columns), path, **options)


def one_text_a_million_times(path: Path) -> None:
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 10**6, pyarrow.int32()), ["x" * 2**20])
    parquet({"text": text})(path)


def torn_parquet(path: Path) -> None:
    sink = io.BytesIO()
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.table({"text": ["a"] * 100}), sink)
    content = bytearray(sink.getvalue())
    content[8:40] = bytes(32)
    path.write_bytes(content)


def lying(place: int, number: int) -> Callable[[Path], None]:
    """A Parquet file whose one page says `number` where it held its size unpacked (0) or its values (2)."""

    def varint(value: int) -> bytes:
        value = (value << 1) ^ (value >> 63)  # Thrift's zigzag
        made = bytearray()
        while value > 127:
            made.append(value & 127 | 128)
            value >>= 7
        return bytes([*made, value])

    def write(path: Path) -> None:
        from pyarrow import parquet as writer

        sink = io.BytesIO()
        texts = ["a" * 200 + str(n) for n in range(50)]
        writer.write_table(pyarrow.table({"text": texts}), sink, use_dictionary=False, compression="snappy")
        content = sink.getvalue()
        head = re.match(rb"PAR1\x15\x00\x15(.\xa0\x01)\x15(..)\x2c\x15(\x64)\x15.{8}\x28\xc9\x01", content, re.DOTALL)
        begin, end = head.span(place + 1)
        said = varint(number)
        more = len(said) - (end - begin)  # taken out of the statistics, so that the page begins where it did
        content = (
            content[:begin]
            + said
            + content[end : head.end() - 2]
            + bytes([0xC9 - more, 1])
            + content[head.end() + more :]
        )
        path.write_bytes(content)

    return write


HOSTILE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "depth in lines": ("a.jsonl", holding(b'{"text": ' + b"[" * 100_000)),
    "depth in a document": ("a.json", holding(b"[" * 100_000 + b"]" * 100_000)),
    "depth of objects": ("a.json", holding(b'{"a":' * 100_000)),
    "a line of a gigabyte": ("a.jsonl", sparse(b'{"text": "')),
    "a string of a gigabyte": ("a.json", sparse(b'[{"text": "')),
    "a key of a gigabyte": ("a.json", sparse(b'{"')),
    "a text of a gigabyte": ("a.txt", sparse(b"Once ")),
    "a cell of a gigabyte": ("a.csv", sparse(b'text\n"')),
    "a header of a gigabyte": ("a.csv", sparse(b"text")),
    "a cell of many lines": ("a.csv", holding(b'text\n"' + b"a\n" * ROW_BYTES)),
    "columns without end": ("a.csv", holding(b"," * ROW_BYTES)),
    "cells without end": ("a.csv", holding(b"text\n" + b"," * (ROW_BYTES - 9))),
    "empty lists": ("a.jsonl", holding(b"[" + b"[]," * (ROW_BYTES // 3 - 9) + b"[]]")),
    "brackets that close nothing": ("a.json", holding(b"[" + b"{}," * (ROW_BYTES // 3) + b"]]")),
    "nothing but nul": ("a.jsonl", sparse(b"")),
    "nul in text": ("a.jsonl", holding(b'{"text": "a\x00b"}')),
    "nul in a table": ("a.csv", holding(b"te\x00xt,text\na\n")),
    "lone surrogates as keys": ("a.jsonl", holding(b'{"\\ud800": "\\udfff", "id": "\\ud800"}')),
    "a lone surrogate as text": ("a.jsonl", holding(b'{"id": "\\udc00", "text": "\\ud800"}')),
    "a gzip bomb": ("a.jsonl.gz", holding(gzip.compress(b"\n" * (FREE_BYTES + 2**21)))),
    "a gzip bomb of one row": ("a.json.gz", holding(gzip.compress(b'["' + b"a" * (FREE_BYTES + 2**21)))),
    "a Zstandard bomb": ("a.json.zst", holding(zstandard.compress(b" " * (FREE_BYTES + 2**21)))),
    "a Zstandard bomb in a table": ("a.csv.zst", holding(zstandard.compress(b"\n" * (FREE_BYTES + 2**21)))),
    "a Parquet bomb": ("a.parquet", parquet({"text": ["x" * 2**23]}, compression="zstd")),
    "a Parquet bomb of many rows": ("a.parquet", one_text_a_million_times),
    "torn Parquet": ("a.parquet", torn_parquet),
    "a Parquet page of two gigabytes by its word": ("a.parquet", lying(0, 2**31 - 1)),
    "a Parquet page of less than nothing": ("a.parquet", lying(0, -(2**31))),
    "a Parquet page of two thousand million values": ("a.parquet", lying(2, 2**31 - 1)),
    "Parquet in name": ("a.parquet", holding(b"PAR1" + bytes(100) + b"PAR1")),
    "a page of an error": ("a.json", holding(b"<!DOCTYPE html><html>404</html>")),
    "many keys given twice": ("a.jsonl", holding(b"{" + b'"a":1,' * 10**5 + b'"a":1}')),
    "a number of many digits": ("a.jsonl", holding(b'{"text": ' + b"1" * 10**6 + b"}")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_error(tmp_path, name):
    file, write = HOSTILE[name]
    write(tmp_path / file)
    before = peak()
    with pytest.raises(DataError) as raised:
        read(file, Data(train=file), tmp_path)
    assert peak() - before < MOST
    assert raised.value.hint
    assert raised.value.file == str(tmp_path / file)


@pytest.mark.parametrize("name", [name for name in HOSTILE if "Parquet" in name])
def test_after_a_hostile_file_others_are_read(tmp_path, name):
    """The process that a hostile file ends is begun again."""
    file, write = HOSTILE[name]
    write(tmp_path / file)
    with pytest.raises(DataError):
        read(file, Data(train=file), tmp_path)
    parquet({"text": ["one", "two"]})(tmp_path / "b.parquet")
    assert [sample.messages[0].content for sample in read("b.parquet", Data(train="x"), tmp_path).samples] == [
        "one",
        "two",
    ]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "1 s"),
        ("{{ 'a' * 2000000000 }}", "MiB"),  # while it is compiled
        ("{{ row.q * 2000000000 }}", "MiB"),
        ("{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}", "characters"),
    ],
)
def test_a_mapping_that_takes_too_much_is_stopped(tmp_path, template, why):
    (tmp_path / "a.jsonl").write_text('{"q": "x", "a": "b"}\n' * 3)
    mapping = Mapping(user=template, assistant="{{ row.a }}")
    with pytest.raises(DataError, match=f"data.mapping.user was stopped: .*{why}") as raised:
        read("a.jsonl", Data(train="a.jsonl", mapping=mapping), tmp_path)
    assert raised.value.hint
    mapping = Mapping(user="{{ row.q }}", assistant="{{ row.a }}")
    assert len(read("a.jsonl", Data(train="a.jsonl", mapping=mapping), tmp_path).samples) == 3


@pytest.mark.parametrize(("head", "kind"), [(b"PK\x03\x04", "ZIP"), (b"\xfd7zXZ\x00", "xz"), (b"BZh91AY&SY", "bzip2")])
def test_an_archive_is_called_one(tmp_path, head, kind):
    (tmp_path / "a.jsonl").write_bytes(head + b'\n{"text": "a"}\n')
    with pytest.raises(DataError, match=f"is a {kind} archive"):
        read("a.jsonl", Data(train="a.jsonl"), tmp_path)


def test_a_hostile_value_beside_the_rows_is_passed_over(tmp_path):
    """What data.mapping does not ask for may be larger than any row."""
    big = {"beside": ["x" * 1000] * (2 * ROW_BYTES // 1000), "rows": [{"q": "a", "a": "b"}]}
    (tmp_path / "a.json").write_text(json.dumps(big))
    mapping = Mapping(rows="rows", user="{{ row.q }}", assistant="{{ row.a }}")
    assert len(read("a.json", Data(train="a.json", mapping=mapping), tmp_path).samples) == 1


def test_a_row_group_may_be_larger_than_the_memory_it_is_read_in(tmp_path):
    """Texts that are all different, as in any real file: what has been read is let go."""
    texts = [f"{number} " + "word " * 100 for number in range(60_000)]
    parquet({"text": texts, "meta": [{"tags": ["a", str(number)]} for number in range(60_000)]})(tmp_path / "a.parquet")
    found = [row.value for row in rows(tmp_path / "a.parquet", Shape())]
    assert [row["text"] for row in found] == texts
    assert found[-1]["meta"] == {"tags": ["a", "59999"]}
