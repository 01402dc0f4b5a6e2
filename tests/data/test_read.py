import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from afina.data.conversation import Message
from afina.data.files import BUNDLED_SETS, find
from afina.data.problem import SHOWN, BadRows
from afina.data.read import Reading, read
from afina.data.row import why_no_json
from afina.errors import DataError
from afina.recipe.schema import Data, Mapping

with_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
QUESTION = Mapping(user="{{ row.question }}", assistant="{{ row.answer }}")


def data(**keys: object) -> Data:
    return Data(train="train.jsonl", **keys)


def read_text(folder: Path, content: str | bytes, name: str = "train.jsonl", **keys: object) -> Reading:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read(name, data(**keys), folder)


def problems_of(folder: Path, content: str | bytes, name: str = "train.jsonl", **keys: object) -> list[tuple[int, str]]:
    """Line and reason of every bad row."""
    with pytest.raises(BadRows) as raised:
        read_text(folder, content, name, **keys)
    assert raised.value.hint
    assert (raised.value.file, raised.value.line) == (str(folder / name), raised.value.problems[0].line)
    return [(problem.line, problem.reason) for problem in raised.value.problems]


def row(user: str = "hi", assistant: str = "yes") -> str:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return json.dumps({"messages": messages}, ensure_ascii=False)


GOOD = st.builds(
    row,
    *[st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip).map(lambda t: t + "\u2028x")] * 2,
)
BAD = st.sampled_from(
    [
        "{",
        "[]",
        "null",
        "3",
        '"text"',
        "{}",
        '{"messages": []}',
        '{"messages": 3}',
        '{"messages": [{"role": "user", "content": "x"}]}',
        '{"messages": [{"role": "assistant", "content": " "}]}',
        '{"messages": [{"role": "assistant"}]}',
        '{"messages": [{"role": "bot", "content": "x"}]}',
        '{"messages": [{"role": ["user"], "content": "x"}]}',
        row() + row(),
        row()[:-1],
        row() + ",",
        row().replace('"hi"', "NaN"),
        row().replace('"hi"', "1e999"),
        row().replace('"messages"', '"x": 1, "x": 2, "messages"'),
        row().replace("hi", "\\ud800"),
        row().replace("hi", "a\x00b"),
        "'single'",
        "\u2028",
        row() + "\ufeff",
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 5000,
    ]
)
BLANK = st.sampled_from(["", " ", "\t"])
LINES = st.lists(
    st.one_of(st.tuples(GOOD, st.just(True)), st.tuples(BAD, st.just(False)), st.tuples(BLANK, st.just(None)))
)
"""Lines, and for each whether it is a good row, a bad one, or none."""


@with_folder
@given(
    LINES,
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["train.jsonl", "train.txt"]),
)
def test_every_row_is_kept_or_named_with_its_line(tmp_path, lines, ending, bom, last_ending, name):
    text = ("\ufeff" if bom else "") + ending.join(text for text, _kind in lines) + (ending if last_ending else "")
    good = [number for number, (_text, kind) in enumerate(lines, start=1) if kind]
    bad = [number for number, (_text, kind) in enumerate(lines, start=1) if kind is False]
    name = name if good and lines[0][1] else "train.jsonl"  # other names are JSON Lines where they begin so
    if bad:
        with pytest.raises(BadRows) as raised:
            read_text(tmp_path, text, name)
        assert [problem.line for problem in raised.value.problems] == bad
        assert all(problem.reason for problem in raised.value.problems)
        assert f"{len(bad)} of {len(bad) + len(good)} rows" in raised.value.message
        assert raised.value.message.count("\n") == min(len(bad), SHOWN + 1)
    elif good:
        reading = read_text(tmp_path, text, name)
        assert [sample.line for sample in reading.samples] == good
        expected = [json.loads(lines[number - 1][0])["messages"][0]["content"] for number in good]
        assert [sample.prompt[0].content for sample in reading.samples] == expected
    else:
        with pytest.raises(DataError, match="holds no rows"):
            read_text(tmp_path, text, name)


@with_folder
@given(st.binary(max_size=400), st.sampled_from(["train.json", "train.jsonl"]), st.sampled_from(["", "*", "a.*"]))
@example(b"\xef\xbb\xbf", "train.json", "")
@example(b'{"a": {"b": 1}, "a" 3}', "train.json", "a.*")
@example(b'{"a": {"b": [{}', "train.json", "a.*")
@example(b"{3: 4}", "train.json", "*")
@example(b"{[1]: 4}", "train.json", "*")
@example(b"\xff\xfe[\x00]\x00", "train.json", "")
@example(b"[[[" * 100_000, "train.json", "")
def test_no_bytes_make_anything_but_a_data_error(tmp_path, content, name, path):
    mapping = Mapping(rows=path, user="{{ row.q }}", assistant="{{ keys[0] }} {{ row.a }}")
    for keys in ({}, {"encoding": ["utf-8", "latin-1"]}, {"mapping": mapping}):
        with pytest.raises(DataError) as raised:
            read_text(tmp_path, content, name, **keys)
        assert raised.value.hint
        assert raised.value.file == str(tmp_path / name)


KEYS = ["messages", "role", "content", "instruction", "output", "a"]
JSONISH = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["messages", "role", "content", "instruction", "output", "a"]), inner, max_size=4
        ),
    ),
    max_leaves=12,
)


@with_folder
@given(st.lists(JSONISH, max_size=5))
def test_no_shape_makes_anything_but_a_data_error(tmp_path, rows):
    with pytest.raises(DataError):
        read_text(tmp_path, "\n".join(json.dumps(one) for one in rows))
    with pytest.raises(DataError):
        read_text(tmp_path, json.dumps(rows, indent=1), "train.json")


@with_folder
@given(st.lists(st.tuples(GOOD, st.integers(0, 3)), min_size=1, max_size=8), st.integers(0, 3))
def test_an_array_says_where_each_element_begins(tmp_path, elements, before):
    text, lines = "\n" * before + "[", []
    for number, (element, blank) in enumerate(elements):
        text += ("," if number else "") + "\n" * blank
        lines.append(text.count("\n") + 1)
        text += element
    reading = read_text(tmp_path, text + "\n]\n", "train.json")
    assert [sample.line for sample in reading.samples] == lines


def test_an_array_with_bad_elements_and_one_that_breaks_off(tmp_path):
    good, double, odd = row(), '{"messages": 1, "messages": 2}', "[NaN]"
    assert problems_of(tmp_path, f"[\n{good},\n{double},\n{odd},\n{good},\n3]", "train.json") == [
        (3, "the key “messages” is given twice"),
        (4, "NaN is not JSON"),
        (6, "no list of messages"),
    ]
    ((line, reason),) = problems_of(tmp_path, f"[\n{good},\n{good},\n{{'x'", "train.json")
    assert (line, "not valid JSON from column 2 on" in reason) == (4, True)
    for text, expected in (
        (f"[{good}\n{good}]", (2, "missing")),
        (f"[{good},\n]", (1, "comma too many")),
        (f"[{good}]\n\n[{good}]", (3, "text after the end")),
        (f"[\n{good}", (2, "missing")),
    ):
        line, reason = problems_of(tmp_path, text, "train.json")[-1]
        assert (line, expected[1] in reason) == (expected[0], True), reason


def test_documents_lines_and_what_is_neither(tmp_path):
    pretty = json.dumps(json.loads(row()), indent=2)
    assert len(read_text(tmp_path, row(), "one.json").samples) == 1
    assert len(read_text(tmp_path, "\n\n" + row() + "\n" + row(), "two.json").samples) == 2
    assert problems_of(tmp_path, pretty, "pretty.json")[0][1].startswith("neither JSON Lines nor a JSON array")
    assert problems_of(tmp_path, "<html>", "page.json")[0][1].startswith("neither JSON Lines nor a JSON array")
    assert problems_of(tmp_path, "{bad\n" + row(), "bad-first.json")[0][0] == 1


def test_rows_inside_a_document_have_their_lines(tmp_path):
    text = (
        '{"version": {"a": [1, 2]},\n "sets": {\n  "x": [\n   {"question": "1", "answer": "a"},\n   {"question": "2",\n'
    )
    text += '    "answer": "b"}],\n  "y": {"question": "3", "answer": "c"}}}'
    mapping = Mapping(rows="sets.*", system="{{ keys[0] }}", user="{{ row.question }}", assistant="{{ row.answer }}")
    reading = read_text(tmp_path, text, "sets.json", mapping=mapping)
    assert [(sample.line, sample.messages[0].content, sample.answer) for sample in reading.samples] == [
        (4, "x", "a"),
        (5, "x", "b"),
        (7, "y", "c"),
    ]
    ((line, reason),) = problems_of(tmp_path, '{\n"a": 1}', "none.json", mapping=mapping)
    assert (line, reason) == (1, "data.mapping.rows leads nowhere at “sets”")
    lines = '{"sets": {"a": [{"question": "1", "answer": "a"}]}}\n\n{"sets": 3}\n{"sets": {"b": {"question": 2}}}'
    found = problems_of(tmp_path, lines, mapping=mapping)
    assert [line for line, _reason in found] == [3, 4]


def test_mapping_names_the_key_that_is_missing(tmp_path):
    found = problems_of(tmp_path, '{"question": "x"}\n{"answer": "y"}\n[]\n3', mapping=QUESTION)
    assert [line for line, _reason in found] == [1, 2, 3, 4]
    assert ["'answer'" in found[0][1], "'question'" in found[1][1]] == [True, True]


@pytest.mark.parametrize(
    "template",
    [
        "{{ row.question.__class__ }}",
        "{{ row | dictsort | first | int + 'x' }}",
        "{{ 1 / 0 }}",
        "{{ row.question | nope }}",
        "{{",
        "{{ range(10 ** 9) | list }}",
        "{{ row.question.format(1, 2) }}{{ '{}'.format() }}",
        "{{ row.pop('question') }}",
        "{{ 3 | join }}",
        "{{ row.question | dictsort }}",
    ],
)
def test_mapping_templates_that_fail(tmp_path, template):
    with pytest.raises(DataError) as raised:
        read_text(tmp_path, '{"question": "x"}', mapping=Mapping(user=template, assistant="y"))
    assert "data.mapping" in raised.value.message
    assert raised.value.hint


def test_mapping_writes_json_as_it_is_and_leaves_an_empty_system_out(tmp_path):
    mapping = Mapping(system="{{ row.s }}", user="{{ row.q }}", assistant="{{ row | tojson }}")
    one, two = read_text(tmp_path, '{"s": "", "q": "ñ\'<"}\n{"s": "Brief.", "q": "x"}', mapping=mapping).samples
    assert one.messages == (Message("user", "ñ'<"), Message("assistant", '{"s": "", "q": "ñ\'<"}'))
    assert two.messages[0] == Message("system", "Brief.")


def test_alpaca(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Hi.", "input": None, "output": "Hi.", "system": "Be kind."},
        {"instruction": "Hi.", "output": "Hi.", "history": []},
    ]
    reading = read_text(tmp_path, json.dumps(rows), "a.json", system="Default.")
    assert reading.dialects == {"alpaca"}
    assert [sample.messages[0].content for sample in reading.samples] == ["Default.", "Be kind.", "Default."]
    assert [sample.messages[1].content for sample in reading.samples] == ["Add.\n\n1 2", "Hi.", "Hi."]
    bad = [{"instruction": "x", "output": "y", "history": [["a", "b"]]}, {"instruction": "x", "output": None}]
    bad += [{"instruction": "x", "input": 3, "output": "y"}, {"instruction": "", "output": "y"}]
    assert [line for line, _reason in problems_of(tmp_path, "\n".join(map(json.dumps, bad)))] == [1, 2, 3, 4]


def test_messages_that_hold_more_than_text(tmp_path):
    message = {"role": "assistant", "content": "x", "tool_calls": [{"function": {}}]}
    rows = [{"messages": [message]}, {"messages": [{**message, "tool_calls": None}]}]
    ((line, reason),) = problems_of(tmp_path, "\n".join(map(json.dumps, rows)))
    assert (line, reason) == (1, "message 1 has a tool call without a function's name")


def test_a_system_message_stands_first_or_nowhere(tmp_path):
    late = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "assistant", "content": "c"}]
    assert "stands after the first" in problems_of(tmp_path, json.dumps({"messages": late}))[0][1]


def test_encodings(tmp_path):
    latin = row("¿Sí?").encode("latin-1")
    with pytest.raises(DataError, match=r"Byte 0xbf at position \d+ is not utf-8") as raised:
        read_text(tmp_path, row().encode() + b"\n" + latin)
    assert raised.value.line == 2
    assert "data.encoding" in raised.value.hint
    reading = read_text(tmp_path, latin, encoding=["utf-8", "latin-1"])
    assert reading.encodings == {"latin-1": [tmp_path / "train.jsonl"]}
    assert reading.samples[0].prompt[0].content == "¿Sí?"
    utf16 = row("¿Sí?").encode("utf-16")
    with pytest.raises(DataError) as raised:
        read_text(tmp_path, utf16)
    assert "UTF-16" in raised.value.hint
    assert read_text(tmp_path, utf16, encoding=["utf-8", "utf-16"]).samples[0].prompt[0].content == "¿Sí?"
    for name in ("nonsense", "hex", "a\x00b", "undefined", ""):
        with pytest.raises(DataError) as raised:
            read_text(tmp_path, row(), encoding=[name])
        assert raised.value.hint
    with pytest.raises(DataError, match="names no encoding"):
        read_text(tmp_path, row(), encoding=[])


def test_a_byte_order_mark_begins_a_file_and_nothing_else(tmp_path):
    assert len(read_text(tmp_path, "\ufeff" + row()).samples) == 1
    assert [line for line, _reason in problems_of(tmp_path, row() + "\n\ufeff" + row())] == [2]


def test_a_fault_stays_on_its_line(tmp_path):
    assert [line for line, _reason in problems_of(tmp_path, '{"a": NaN, "b\n' + row())] == [1]


def test_long_lines_and_same_samples(tmp_path):
    long = "ñ" * 1_000_000
    reading = read_text(tmp_path, row(long) + "\n" + row(long) + "\n")
    assert [sample.line for sample in reading.samples] == [1, 2]
    assert reading.samples[0].digest() == reading.samples[1].digest()


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.json", "notes.txt", "sub/c.jsonl", "[x].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(row(), "utf-8")
    (tmp_path / "trap.jsonl").mkdir()

    def names(source: str, folder: Path = tmp_path) -> list[str]:
        return [file.name for file in find(source, folder)]

    assert names(".") == ["[x].jsonl", "a.json", "b.jsonl"]
    assert names("*.json*") == ["[x].jsonl", "a.json", "b.jsonl"]
    assert names("**/*.jsonl") == ["[x].jsonl", "b.jsonl", "c.jsonl"]
    assert names("[x].jsonl") == ["[x].jsonl"]
    assert names("notes.txt") == ["notes.txt"]
    monkeypatch.chdir(tmp_path / "sub")
    assert names("c.jsonl") == ["c.jsonl"]
    assert names("afina/sentiment/train") == ["train.jsonl"]
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="named twice"):
        read(["b.jsonl", "link.jsonl"], data(), tmp_path)
    assert len(read(["a.json", "sub"], data(), tmp_path).samples) == 2


@pytest.mark.parametrize(
    "source", ["nothing.jsonl", "no/*.jsonl", "a\x00b", "x" * 5000, "**.jsonl", "~nobody-here/x", ""]
)
def test_sources_that_are_not_there(tmp_path, source):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as raised:
        read(source, data(), tmp_path / "empty")
    assert raised.value.hint


def test_missing_empty_and_unreadable_files_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"There is no data file train\.jsonl") as raised:
        read("train.jsonl", data(), tmp_path)
    assert str(tmp_path) in raised.value.hint
    with pytest.raises(DataError, match="no bundled data set") as raised:
        read("afina/nothing", data(), tmp_path)
    assert "afina/sentiment/train" in raised.value.hint
    with pytest.raises(DataError, match="No data file is named"):
        read([], data(), tmp_path)
    for name, content in (("a.jsonl", ""), ("b.json", "[]"), ("c.json", " \n"), ("d.jsonl", "\n\n")):
        with pytest.raises(DataError, match="holds no rows") as raised:
            read_text(tmp_path, content, name)
        assert raised.value.file == str(tmp_path / name)
    with pytest.raises(DataError, match=r"there is no data\.mapping"):
        read_text(tmp_path, row(), dialect="mapping")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(_file: Path, _mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        read("train.jsonl", data(), tmp_path)


@pytest.mark.real
def test_gsm8k(real_data):
    reading = read("data/gsm8k/train.jsonl", data(mapping=QUESTION), real_data)
    assert len(reading.samples) == 7473
    assert [sample.line for sample in reading.samples] == list(range(1, 7474))
    assert all("####" in sample.answer for sample in reading.samples)
    assert len(read("data/gsm8k/*.jsonl", data(mapping=QUESTION), real_data).samples) == 7473 + 1319


@pytest.mark.real
def test_snips(real_data):
    mapping = Mapping(rows="*", user="{{ row.data | map(attribute='text') | join }}", assistant="{{ keys[0] }}")
    keys = {"mapping": mapping, "encoding": ["utf-8", "latin-1"]}
    training = read("data/snips/*/train_*_full.json", data(**keys), real_data)
    held_out = read("data/snips/*/validate_*.json", data(**keys), real_data)
    assert (len(training.samples), len(held_out.samples)) == (13784, 700)
    assert len({sample.answer for sample in training.samples}) == 7
    assert len(training.encodings["latin-1"]) == 1
    sample = held_out.samples[3]
    beside = sample.file.read_text("latin-1").split("\n")[sample.line - 1 : sample.line + 20]
    assert beside[0].strip() == "{"
    assert json.dumps(sample.prompt[0].content[:5])[1:-1] in "".join(beside)
    with pytest.raises(DataError, match="is not utf-8"):
        read("data/snips/*/train_*_full.json", data(mapping=mapping), real_data)


@pytest.mark.real
def test_gpteacher(real_data):
    """All 3,146 rows hold something to learn."""
    reading = read("data/gpteacher/roleplay.json", data(), real_data)
    assert (len(reading.samples), reading.dialects) == (3146, {"alpaca"})
    lines = reading.samples[0].file.read_text("utf-8").split("\n")
    assert all(lines[sample.line - 1].strip() == "{" for sample in reading.samples)


def test_every_bundled_set_has_a_name():
    assert {file.parent.name for file in BUNDLED_SETS.glob("*/*.jsonl")} >= {"sentiment", "maths-tutor", "support-chat"}


@pytest.mark.parametrize("text", ["", "{", "[1 2]", '{"a" 1}', "1 2", '"abc', '"\x01"', '"\\x"', "{1: 2}"])
def test_why_a_row_is_no_json_is_said_in_spanish_too(text, monkeypatch):
    """Python's reader speaks English; each of its reasons is known."""
    with pytest.raises(json.JSONDecodeError) as raised:
        json.loads(text)
    english = why_no_json(raised.value)
    monkeypatch.setenv("AFINA_LANG", "es")
    assert english in raised.value.msg and why_no_json(raised.value) != english
