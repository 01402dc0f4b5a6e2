"""The bounded reader: what it reads is what was written, what lies is refused, and at no great cost."""

import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model.fuzz_gguf import fuzz
from model.gguf_bytes import ARRAY, DATA, ENTRIES, F32, STRING, TENSORS, U32, build, hostile

from afina.errors import ModelError
from afina.gguf_file import TYPES, GgufFile, Strings, read_head

HOSTILE = hostile()


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, Strings) else value.tolist() if isinstance(value, np.ndarray) else value


def test_what_was_written_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(build().content)
    file = GgufFile(tmp_path / "a.gguf")
    assert file.architecture == "llama" and file.head.version == 3
    expected = {key: value[1] if kind == ARRAY else value for key, kind, value in ENTRIES}
    assert {key: plain(value) for key, value in file.metadata.items()} == expected
    assert [(t.name, list(t.shape[::-1]), t.start + DATA - len(build().content)) for t in file.tensors.values()] == [
        (name, sizes, offset) for name, sizes, _kind, offset in TENSORS
    ]
    assert file.values("one").shape == (3, 4) and file.values("two").shape == (32,)
    assert file.value("a.words", Strings)[-1] == "três" and file.value("a.words", Strings)[:2] == ["one", ""]
    assert file.value("a.absent", int, 5) == 5 and file.value("a.absent", str, None) is None
    for key, kind in (("a.u8", str), ("a.bool", int), ("a.absent", int)):
        with pytest.raises(ModelError, match=r"a\.gguf: .*a\."):
            file.value(key, kind)
    with pytest.raises(ModelError, match="lacks the tensor four"):
        file.values("four")


def test_every_type_has_the_sizes_and_values_of_the_package(tmp_path: Path) -> None:
    for number, (name, block, width) in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name.lower() == name and gguf.GGML_QUANT_SIZES[kind] == (block, width)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    weights = np.random.default_rng(0).standard_normal((3, 5, 64)).astype(np.float32)
    stored = {name: gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "MXFP4")}
    for name, kind in stored.items():
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "a.gguf")
    for name, kind in stored.items():
        expected = gguf.quants.dequantize(gguf.quants.quantize(weights, kind), kind)
        assert file.tensors[name].kind == name.lower()
        np.testing.assert_array_equal(file.values(name), expected)
        np.testing.assert_array_equal(file.values(name, 1, 3), expected[1:3])
        assert file.values(name, 2, 2).shape == (0, 5, 64)
    np.testing.assert_array_equal(file.values("F32"), weights)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    """Within 50 ms on a quiet machine (printed), and twice the file's size of memory and half a MiB."""
    content = HOSTILE[name]
    (tmp_path / "a.gguf").write_bytes(content)
    started = time.perf_counter()
    with pytest.raises(ModelError, match=r"a\.gguf: "):
        GgufFile(tmp_path / "a.gguf")
    taken = time.perf_counter() - started
    tracemalloc.start()
    try:
        with pytest.raises(ModelError):
            read_head(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(f"{name}: {1000 * taken:.1f} ms, {peak / len(content):.1f} times the file")
    assert peak <= 2 * len(content) + 2**19


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 60 and len(set(HOSTILE.values())) == len(HOSTILE)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    for name in ("pipe.gguf", "empty.gguf", "absent.gguf", "."):
        with pytest.raises(ModelError):
            GgufFile(tmp_path / name)


def test_a_text_in_an_array_is_checked_when_it_is_read() -> None:
    found = read_head(bytes(build([("a", ARRAY, (STRING, ["x", b"\xff"]))], []).content)).metadata["a"]
    assert isinstance(found, Strings) and found[0] == "x"
    with pytest.raises(ModelError, match="no UTF-8"):
        list(found)


def test_files_wrong_in_one_to_three_ways() -> None:
    found = fuzz(20_000, seed=7)
    assert found["files"] == 20_000 and 500 < found["accepted"] < 10_000


@given(st.binary(max_size=200), st.integers(0, 400))
@settings(max_examples=200, deadline=None)
def test_any_bytes_anywhere(noise: bytes, at: int) -> None:
    content = bytes(build().content)
    for made in (noise, b"GGUF" + noise, content[:at] + noise + content[at + len(noise) :]):
        try:
            read_head(made)
        except ModelError:
            continue


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.lists(st.text(max_size=8), max_size=5), max_size=5))
@settings(max_examples=100, deadline=None)
def test_texts_come_back(entries: dict[str, list[str]]) -> None:
    made = build([(key, ARRAY, (STRING, texts)) for key, texts in entries.items()], [])
    head = read_head(bytes(made.content))
    assert {key: plain(value) for key, value in head.metadata.items()} == entries


def test_numbers_of_an_array_do_not_keep_the_file() -> None:
    head = read_head(bytes(build([("a", ARRAY, (F32, [0.5] * 3)), ("b", U32, 2**32 - 1)], []).content))
    assert plain(head.metadata["a"]) == [0.5] * 3 and head.metadata["b"] == 2**32 - 1
