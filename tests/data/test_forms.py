"""One set of rows, written in every form that is read, is the same set of samples; and each row is where it says."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from afina.data import document, passages
from afina.data.conversation import DOCUMENT, PASSAGE, Message
from afina.data.hub import hub_files
from afina.data.problem import BadRows
from afina.data.read import Reading, read
from afina.data.row import Row, Shape
from afina.data.rows import format_of, rows
from afina.errors import DataError
from afina.recipe.schema import Data

pyarrow = pytest.importorskip("pyarrow", reason='install "afina[parquet]" to read Parquet files')
zstandard = pytest.importorskip("zstandard", reason='install "afina[zstd]" to read Zstandard files')
with_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), min_size=1).filter(str.strip)
PAIRS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6)
Rows = list[dict[str, str]]


def as_csv(found: Rows, delimiter: str = ",") -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, found[0].keys(), delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(found)
    return out.getvalue().encode()


def as_parquet(found: Rows) -> bytes:
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(found), sink, row_group_size=2)
    return sink.getvalue()


def as_lines(found: Rows) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in found).encode()


def as_columns(found: Rows) -> bytes:
    return json.dumps({key: [row[key] for row in found] for key in found[0]}, ensure_ascii=False).encode()


FORMS: dict[str, Callable[[Rows], bytes]] = {
    "a.jsonl": as_lines,
    "a.json": lambda found: json.dumps(found, indent=1, ensure_ascii=False).encode(),
    "columns.json": as_columns,
    "columns-2.json": lambda found: json.dumps(json.loads(as_columns(found)), indent=2).encode(),
    "a.csv": as_csv,
    "semicolon.csv": lambda found: as_csv(found, ";"),
    "a.tsv": lambda found: as_csv(found, "\t"),
    "a.parquet": as_parquet,
    "a.jsonl.gz": lambda found: gzip.compress(as_lines(found)),
    "a.json.zst": lambda found: zstandard.compress(json.dumps(found).encode()),
    "a.csv.gz": lambda found: gzip.compress(as_csv(found)),
    "bom.csv": lambda found: b"\xef\xbb\xbf" + as_csv(found),
    "bom.jsonl": lambda found: b"\xef\xbb\xbf" + as_lines(found),
}


def read_bytes(folder: Path, content: bytes, name: str, **keys: object) -> Reading:
    (folder / name).write_bytes(content)
    return read(name, Data(train=name, **keys), folder)


@with_folder
@given(PAIRS)
def test_every_form_of_the_same_rows_is_the_same_samples(tmp_path, pairs):
    found = [{"question": asked, "answer": answer} for asked, answer in pairs]
    expected = [(Message("user", asked), Message("assistant", answer)) for asked, answer in pairs]
    for name, write in FORMS.items():
        reading = read_bytes(tmp_path, write(found), name)
        assert [sample.messages for sample in reading.samples] == expected, name
        assert reading.dialects == {"question-answer"}


@with_folder
@given(PAIRS, st.sampled_from(["a.jsonl", "a.json", "a.csv", "bom.jsonl"]), st.integers(1, 40))
def test_a_row_is_at_its_byte_and_line_however_the_file_is_cut(tmp_path, pairs, name, chunk):
    content = FORMS[name]([{"question": asked, "answer": answer} for asked, answer in pairs])
    (tmp_path / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document, "CHUNK", chunk)
        found = list(rows(tmp_path / name, Shape()))
    assert len(found) == len(pairs)
    for row in found:
        assert not row.fault
        assert content[row.offset :].startswith(row.raw.lstrip(b" ")) or row.offset == 0
        assert content.count(b"\n", 0, row.offset) + 1 == row.line


JSONISH = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)),
    max_leaves=12,
)


@with_folder
@given(st.lists(JSONISH, max_size=6), st.integers(1, 30), st.booleans())
@example([None, 0.5, -1e-7, 12], 1, True)
def test_a_document_reads_as_json_does_whatever_the_window(tmp_path, values, chunk, ascii_only):
    (tmp_path / "a.json").write_bytes(
        json.dumps({"skip": [values], "rows": values}, ensure_ascii=ascii_only).encode("utf-8", "replace")
    )
    expected = json.loads((tmp_path / "a.json").read_bytes())["rows"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document, "CHUNK", chunk)
        found = list(rows(tmp_path / "a.json", Shape("rows")))
    assert [row.value for row in found] == expected


def test_what_is_no_table_of_columns_is_asked_for(tmp_path):
    def fault(content: object) -> Row:
        (tmp_path / "a.json").write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
        (row,) = [row for row in rows(tmp_path / "a.json", Shape()) if row.fault]
        return row

    for content in ({"data": [{"a": 1}]}, {"a": [1], "b": 3}, {"a": 1}):
        assert "needs data.mapping.rows" in fault(content).fault
    assert fault({"a": ["1", "2"], "b": ["1"]}).fault == "the column “b” has fewer rows than the others"
    broken = fault('{\n"a": ["1", "2"],\n"b": ["1", oops]}')
    assert (broken.line, "not valid JSON" in broken.fault) == (3, True)
    assert "given twice" in fault('{\n"a": ["1"],\n"a": ["1"]}').fault


def test_a_table_without_a_header_and_rows_that_do_not_fit(tmp_path):
    reading = read_bytes(tmp_path, "¿2+2?\t4\n\n¿3?\t3\n".encode(), "a.tsv", columns=["question", "answer"])
    assert [(sample.line, sample.answer) for sample in reading.samples] == [(1, "4"), (3, "3")]
    with pytest.raises(BadRows) as raised:
        read_bytes(tmp_path, b'question,answer\na,"b\nc"\nx,y,z\n1\n', "a.csv")
    assert [(problem.line, problem.reason) for problem in raised.value.problems] == [
        (4, "3 cells where there are 2 columns"),
        (5, "1 cells where there are 2 columns"),
    ]
    with pytest.raises(BadRows, match="must name the columns"):
        read_bytes(tmp_path, b"a,a\n1,2\n", "b.csv")
    with pytest.raises(BadRows, match="not valid CSV"):
        read_bytes(tmp_path, b'question,answer\na,"b"c\n', "c.csv")


@with_folder
@example("  ?", 1)
@given(st.text(st.sampled_from("ab .!?\n\r é\u2028"), max_size=300), st.integers(1, 30))
def test_no_word_of_a_text_is_lost_or_cut(tmp_path, text, size):
    (tmp_path / "a.txt").write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passages, "PASSAGE", size)
        patch.setattr(passages, "LONGEST", 2 * size)
        found = list(rows(tmp_path / "a.txt", Shape(), "text"))
    assert " ".join(row.value["text"] for row in found).split() == text.split()
    assert all(row.value["text"].strip() for row in found)
    assert [row.line for row in found] == sorted(row.line for row in found)


def test_plain_text_is_learnt_whole(tmp_path):
    novel = read_bytes(tmp_path, b"En un lugar de la Mancha.\n\nDe cuyo nombre.\n", "quijote.txt")
    assert novel.samples[0].messages == (Message(PASSAGE, "En un lugar de la Mancha.\n\nDe cuyo nombre."),)
    pages = read_bytes(tmp_path, b'{"text": "One."}\n{"text": "Two."}', "pages.jsonl")
    assert [sample.messages for sample in pages.samples] == [(Message(DOCUMENT, "One."),), (Message(DOCUMENT, "Two."),)]
    assert pages.dialects == novel.dialects == {"text"}


def test_dialects_are_known_by_their_keys_and_never_guessed(tmp_path):
    talk = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "GPT", "value": "Yes"}]
    for row, dialect in (
        ({"conversations": talk}, "sharegpt"),
        ({"conversations": talk[1:], "system": "Be brief."}, "sharegpt"),
        ({"prompt": "Hi", "completion": "Yes", "system": "Be brief."}, "prompt-completion"),
        ({"question": "Hi", "answer": "Yes", "system": "Be brief."}, "question-answer"),
        ({"instruction": "Hi", "output": "Yes", "system": "Be brief.", "text": "### Hi"}, "alpaca"),
    ):
        reading = read_bytes(tmp_path, json.dumps(row).encode(), "a.jsonl")
        assert reading.dialects == {dialect}
        assert reading.samples[0].messages == (
            Message("system", "Be brief."),
            Message("user", "Hi"),
            Message("assistant", "Yes"),
        )
    both = {"prompt": "a", "completion": "b", "question": "c", "answer": "d"}
    with pytest.raises(BadRows, match="the keys fit prompt-completion, question-answer: choose one"):
        read_bytes(tmp_path, json.dumps(both).encode(), "a.jsonl")
    chosen = read_bytes(tmp_path, json.dumps(both).encode(), "a.jsonl", dialect="question-answer")
    assert chosen.samples[0].answer == "d"
    bad = [{"conversations": 3}, {"conversations": [{"from": "tool", "value": "x"}]}, {"conversations": [{"from": 1}]}]
    for row in (*bad, {"question": 3, "answer": "x"}, {"text": None}, {"text": " "}, {"prompt": []}):
        with pytest.raises(BadRows):
            read_bytes(tmp_path, json.dumps(row).encode(), "a.jsonl")


def test_a_folder_of_data_files(tmp_path):
    for name in ("a.csv", "b.parquet", "c.jsonl.gz"):
        (tmp_path / name).write_bytes(
            FORMS[name.replace("b.", "a.").replace("c.", "a.")]([{"prompt": "a", "completion": "b"}])
        )
    (tmp_path / "notes.txt").write_text("not rows")
    assert len(read(".", Data(train="."), tmp_path).samples) == 3
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text("A text.")
    assert read("books", Data(train="books"), tmp_path).forms == {"text"}
    assert format_of(tmp_path / "a.jsonl.gz", Shape()) == "jsonl"


class Shelf:
    """A folder that stands for the hub: the same two questions, answered from disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self, name: str, revision: str | None) -> list[str]:
        start = self.folder / name / (revision or "main")
        if not start.is_dir():
            raise OSError(f"404: no data set {name} at {revision}")
        return [path.relative_to(start).as_posix() for path in start.rglob("*") if path.is_file()]

    def fetch(self, name: str, path: str, revision: str | None) -> str:
        return str(self.folder / name / (revision or "main") / path)


def test_a_set_of_the_hub_by_name(tmp_path):
    def put(revision: str, *paths: str) -> None:
        for path in paths:
            file = tmp_path / "openai/gsm8k" / revision / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}")

    def names(source: str) -> list[str]:
        return [file.relative_to(tmp_path / "openai/gsm8k").as_posix() for file in hub_files(source, Shelf(tmp_path))]

    shards = ["main/train-00000-of-00002.parquet", "main/train-00001-of-00002.parquet"]
    put("main", *shards, "main/test-00000-of-00001.parquet", "README.md", "dataset_infos.json", "code.py")
    put("v1", "train.jsonl", ".hidden.jsonl")
    assert names("openai/gsm8k/main/train") == [f"main/{shard}" for shard in shards]
    assert names("openai/gsm8k@v1") == ["v1/train.jsonl"]
    with pytest.raises(DataError, match="has the parts main/test, main/train") as raised:
        names("openai/gsm8k")
    assert "hub:openai/gsm8k/main/test" in raised.value.hint
    for source in ("openai/gsm8k/nothing", "openai/gsm8k@v9", "openai/none", "gsm8k", "../a/b", ""):
        with pytest.raises(DataError) as raised:
            names(source)
        assert raised.value.hint
