"""Raw lines: what is read is what is there, in any cut, and no file takes more memory than a row may have."""

import gzip
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afina.data import lines as subject
from afina.data.lines import Line, lines, open_raw
from afina.errors import DataError

zstandard = pytest.importorskip("zstandard", reason='install "afina[zstd]" to read Zstandard files')


@settings(deadline=None, max_examples=60)
@given(st.lists(st.binary(max_size=12).map(lambda raw: raw.replace(b"\n", b"\r"))), st.booleans(), st.integers(1, 9))
def test_lines_and_their_places_are_those_of_the_file(parts, ended, chunk):
    content = b"\n".join(parts) + (b"\n" if ended and parts else b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "CHUNK", chunk)
        found = list(lines(io.BytesIO(content)))
    expected = content.split(b"\n")
    assert [line.raw for line in found] == (expected if expected[-1] else expected[:-1])
    assert [line.number for line in found] == list(range(1, len(found) + 1))
    assert all(content[line.offset :].startswith(line.raw) and line.whole for line in found)


def test_a_line_over_the_limit_comes_cut_and_is_the_last(monkeypatch):
    monkeypatch.setattr(subject, "CHUNK", 8)
    monkeypatch.setattr(subject, "ROW_BYTES", 20)
    assert list(lines(io.BytesIO(b"a\n" + b"b" * 20 + b"\nc"))) == [
        Line(1, 0, b"a"),
        Line(2, 2, b"b" * 20),
        Line(3, 23, b"c"),
    ]
    found = list(lines(io.BytesIO(b"a\n" + b"b" * 1000 + b"\nc")))
    assert found[-1] == Line(2, 2, b"b" * 20, False)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_compressed_files_are_told_by_their_bytes(tmp_path, pack):
    content = b"one\ntwo\n" * 1000
    (tmp_path / "rows.jsonl").write_bytes(pack(content))
    with open_raw(tmp_path / "rows.jsonl") as file:
        assert file.read() == content
    (tmp_path / "half.jsonl").write_bytes(pack(content)[:-3])
    with pytest.raises(DataError, match="damaged") as raised, open_raw(tmp_path / "half.jsonl") as file:
        file.read()
    assert raised.value.file == str(tmp_path / "half.jsonl")


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_bomb_is_refused_before_it_takes_memory(tmp_path, pack):
    (tmp_path / "bomb.jsonl").write_bytes(pack(bytes(subject.FREE_BYTES + 2**21)))
    with pytest.raises(DataError, match="grows over 250 times"), open_raw(tmp_path / "bomb.jsonl") as file:
        while file.read(2**20):
            pass
