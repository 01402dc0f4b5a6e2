"""Every class of faults, wherever its row stands and however lines end; and sound rows, of which nothing is said."""

import csv
import io
import random
from pathlib import Path

import numpy as np
import pytest
from data.audit.auditing import audit_bytes, told
from data.audit.faulty import FAULTY, REJECTED, row, sentence, sound
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afina.data.audit.kind import Severity
from afina.data.audit.kinds import groups, kinds
from afina.data.audit.syntax import quotes, quotes_of
from afina.data.problem import BadRows
from afina.data.read import read
from afina.errors import DataError
from afina.recipe.schema import Data, Mapping

quietly = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
ENDS = {"LF": [b"\n"], "CRLF": [b"\r\n"], "mixed": [b"\n", b"\r\n"]}
ROWS = 5


def laid_out(lines: list[bytes], ends: list[bytes], last: bool) -> tuple[bytes, list[int]]:
    """The file, and the byte at which each line begins."""
    content, begins = b"", []
    for number, line in enumerate(lines):
        begins.append(len(content))
        content += line + (ends[number % len(ends)] if last or number < len(lines) - 1 else b"")
    return content, begins


@pytest.mark.parametrize("kind", FAULTY)
def test_each_class_is_found_wherever_it_stands(kind: str, tmp_path: Path):
    """Rows x positions x line ends: class, line, bytes, and the rows beside it survive."""
    rng = random.Random(kind)
    for position in (0, ROWS // 2, ROWS - 1):
        for ends in ENDS.values():
            for last in (True, False):
                if position == 0 and kind in ("mixed-shapes", "inner-bom"):
                    continue  # the first row says what the shape is; a mark before it is the file's own
                lines = [sound(rng) for _ in range(ROWS)]
                lines[position] = FAULTY[kind](rng)
                first = lines[position] if position == 0 and kind in REJECTED else None
                content, begins = laid_out(lines, ends, last)
                found, report = audit_bytes(tmp_path, content, dialect="messages" if first else "auto")
                assert told(found) == [(kind, position + 1)]
                begin, size = begins[position], len(lines[position])
                assert begin <= found[0].byte < found[0].end <= begin + size + 1
                rejected = kinds()[kind].severity is Severity.ERROR
                assert (report.rows, report.kept, report.rejected) == (ROWS, ROWS - rejected, int(rejected))
                assert dict(report.reasons) == ({kind: 1} if rejected else {})


def test_the_table_of_classes_is_whole():
    table = kinds()
    assert len(table) >= 110 and sum(len(group) for group in groups().values()) == len(table)
    assert set(FAULTY) <= set(table)
    for kind in table.values():
        assert kind.id == kind.id.lower() and " " not in kind.id
        assert (
            kind.sentence[0] != kind.sentence[0].upper()
            or kind.sentence[0] in "UNI"
            or kind.sentence.startswith("HTML")
        )
        assert kind.advice.endswith(".")


@pytest.mark.parametrize("kind", FAULTY)
def test_what_the_audit_calls_an_error_stops_training_and_nothing_else_does(kind: str, tmp_path: Path):
    """One truth: the reader refuses the rows that the audit rejects, at the same line."""
    rng = random.Random(kind)
    lines = [sound(rng), FAULTY[kind](rng), sound(rng)]
    found, _report = audit_bytes(tmp_path, b"\n".join(lines))
    wrong = kinds()[kind].severity is Severity.ERROR
    try:
        read("rows.jsonl", Data(train="rows.jsonl"), tmp_path)
    except BadRows as error:
        assert wrong and [(problem.line, problem.kind) for problem in error.problems] == [(2, kind)]
    except DataError as error:  # a file that is not of its encoding
        assert wrong and error.line == 2
    else:
        assert not wrong
    assert told(found) == [(kind, 2)]


@quietly
@given(seed=st.integers(0, 2**32))
def test_of_sound_rows_nothing_is_said(seed: int, tmp_path: Path):
    rng = random.Random(seed)
    lines = list(dict.fromkeys(sound(rng) for _ in range(60)))
    found, report = audit_bytes(tmp_path, b"\n".join(lines))
    assert not found and report.kept == report.rows == len(lines)


@quietly
@given(chosen=st.lists(st.sampled_from([*FAULTY, None]), min_size=1, max_size=30), seed=st.integers(0, 2**32))
def test_what_is_said_of_a_row_does_not_depend_on_the_others(chosen: list[str | None], seed: int, tmp_path: Path):
    """Shuffled, the same rows have the same faults; and rows in are rows kept and rows rejected."""
    rng = random.Random(seed)
    lines = [sound(rng)] + [sound(rng) if kind is None else FAULTY[kind](rng) for kind in chosen]
    before, one = audit_bytes(tmp_path, b"\n".join(lines), dialect="messages")
    order = [0, *rng.sample(range(1, len(lines)), len(lines) - 1)]  # a mark before the first row is the file's own
    after, other = audit_bytes(tmp_path, b"\n".join(lines[at] for at in order), dialect="messages")
    alone = {"duplicate", "contradiction", "other-language", "short-answer"}
    assert sorted((f.kind, lines[f.line - 1]) for f in before if f.line and f.kind not in alone) == sorted(
        (f.kind, lines[order[f.line - 1]]) for f in after if f.line and f.kind not in alone
    )
    assert (one.rows, one.kept, one.rejected) == (other.rows, other.kept, other.rejected)
    assert one.rows == one.kept + one.rejected == len(lines)
    assert one.rejected == one.reasons.total()


@quietly
@given(chosen=st.lists(st.sampled_from([*FAULTY, *[None] * 60]), min_size=1, max_size=90), seed=st.integers(0, 2**32))
def test_many_rows_at_once_are_judged_as_each_by_itself(chosen: list[str | None], seed: int, tmp_path: Path):
    """The quick look, by blocks, and the careful one, row by row: the same findings, bytes and sums."""
    rng = random.Random(seed)
    lines = [sound(rng)] + [sound(rng) if kind is None else FAULTY[kind](rng) for kind in chosen]
    found, report = audit_bytes(tmp_path, b"\n".join(lines))
    plain, other = audit_bytes(tmp_path, b"\n".join(lines), plain=True)
    assert found == plain
    assert (report.rows, report.rejected, report.reasons) == (other.rows, other.rejected, other.reasons)


PIECES = st.sampled_from(
    [
        *"aé ñ\n<[&@`|0123456789-_=",
        *[
            "\u200b",
            "\u0301",
            "\u200d",
            "\u202e",
            "\ufffd",
            "\ue000",
            "\U000e0041",
            "\U0001f600",
            "\u2028",
            "\x1b",
            "\xad",
        ],
        *[
            "Ã±",
            "â€™",
            "Ð¿",
            "¿",
            "É»",
            "hf_",
            "sk-proj-",
            "A1b2C3d4E5f6G7h8J9k0",
            "4111 1111 1111 1111",
            "x@y.org",
            "a" * 60,
        ],
        *["<|im_end|>", "<<SYS>>", "[INST]", "</s>", "<s>", "```", "&amp;", "as an AI model", "PRIVATE KEY-----"],
    ]
)


@quietly
@given(texts=st.lists(st.lists(PIECES, max_size=24).map("".join), min_size=1, max_size=8))
def test_the_fast_way_finds_what_the_plain_one_finds(texts: list[str], tmp_path: Path):
    content = b"\n".join(row("go on", f"so {text} it is", ascii_only=len(text) % 2 == 0) for text in texts)
    fast, _report = audit_bytes(tmp_path, content)
    plain, _report = audit_bytes(tmp_path, content, plain=True)
    assert fast == plain


@quietly
@given(text=st.lists(PIECES, max_size=30).map("".join))
def test_a_finding_names_the_bytes_that_hold_the_fault(text: str, tmp_path: Path):
    """The bytes, decoded as part of a JSON string, are the characters that the plain function names."""
    import json

    from afina.data.audit.text import faults

    said = f"so {text} it is"
    found, _report = audit_bytes(tmp_path, row("go on", said, ascii_only=len(text) % 2 == 0))
    content = (tmp_path / "rows.jsonl").read_bytes()
    spans = {fault.kind: said[fault.begin : fault.end] for fault in faults(said)}
    for finding in found:
        if finding.kind in spans:
            assert json.loads(b'"' + content[finding.byte : finding.end] + b'"') == spans[finding.kind]
    assert {finding.kind for finding in found} == set(spans)


@pytest.mark.parametrize("space", ["", " \n"])
@pytest.mark.parametrize("roles", [("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant") * 2])
def test_an_answer_that_repeats_its_question_is_found_in_every_turn(roles: tuple[str, ...], space: str, tmp_path: Path):
    rng = random.Random(0)
    texts = [sentence(rng, 12) for _role in roles[:-1]]
    lines = [sound(rng), row(*texts, texts[-1] + space, roles=roles), sound(rng)]
    for plain in (False, True):
        found, _report = audit_bytes(tmp_path, b"\n".join(lines), plain=plain)
        assert told(found) == [("echo", 2)]


@quietly
@given(lines=st.lists(st.text(st.sampled_from('"\\a '), max_size=12), max_size=9))
def test_quotation_marks_of_many_lines_are_those_of_each(lines: list[str]):
    raws = [line.encode() for line in lines]
    begins = np.cumsum([0, *(len(raw) + 1 for raw in raws)])[:-1]
    assert quotes_of(b"".join(raw + b"\n" for raw in raws), begins).tolist() == list(map(quotes, raws))


FORMS = {
    "messages": lambda ask, say: {
        "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]
    },
    "sharegpt": lambda ask, say: {"conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": say}]},
    "alpaca": lambda ask, say: {"instruction": ask, "input": "", "output": say},
    "prompt-completion": lambda ask, say: {"prompt": ask, "completion": say},
    "question-answer": lambda ask, say: {"question": ask, "answer": say},
    "text": lambda ask, say: {"text": say and f"{ask} {say}"},
}
MORE = st.sampled_from(
    [
        *[
            b"",
            b', "id": 7',
            b', "id": 7, "source": "web"',
            b', "id": "a-0"',
            b', "id": -0',
            b', "id": 0',
            b', "id": -0.5',
        ],
        *[b', "id": 18446744073709551617', b', "id": 1e999', b', "id": NaN', b', "id": null', b', "id": 7, "id": 7'],
        *[
            b', "tags": ["a"]',
            b', "meta": {"a": 1}',
            b', "meta": {"a": [{"b": "\\"", "c\\\\": null}, -1.5e3, "\xc3\xb1"]}',
            b', "meta": {"a": "x", "a": "x"}',
            b', "meta": {"a": [{"b": -0}]}',
            b', "meta": {"a": [18446744073709551617]}',
            b', "meta": {"a": [9223372036854775808]}',
            b', "meta": ' + b"[" * 9 + b"]" * 9,
            b', "meta": ["\\ud800"]',
            b', "input": "there"',
            b', "input": null',
            b', "system": "Be kind."',
        ],
        *[b', "chosen": "a", "rejected": "a"', b', "history": []', b', "text": "so"', b",", b' "', b'}, {"a": 1'],
    ]
)
MAPPINGS = {
    "alpaca": Mapping(system="{{ row['system'] }}", user="{{ row.instruction }}", assistant="{{ row.output }}\n"),
    "question-answer": Mapping(user="Q: {{ row.question }}{# why #}", assistant="{{ row['answer'] | upper }}"),
    "text": Mapping(user="{{ row.meta.a[0] }}", assistant="{{ row.meta['a'] }}: {{ row.text }}"),
    "prompt-completion": Mapping(user="Say it.", assistant="{{ row.completion }} {{ row.tags }}"),
}


@quietly
@given(
    form=st.sampled_from(list(FORMS)),
    rows=st.lists(st.tuples(MORE, st.sampled_from(["so", "go on", " ", "", "<|im_end|>", 'a "b" \\'])), max_size=90),
    first=MORE,
)
def test_rows_of_every_dialect_are_judged_at_once_as_each_by_itself(
    form: str, rows: list[tuple[bytes, str]], first: bytes, tmp_path: Path
):
    import json

    lines = [
        json.dumps(FORMS[form](f"question {number}", text)).encode()[:-1] + more + b"}"
        for number, (more, text) in enumerate([(first, "so"), *rows])
    ]
    for written, content in (("jsonl", b"\n".join(lines)), ("json", b"[" + b",\n".join(lines) + b"]")):
        for mapping in (None, MAPPINGS.get(form)):
            quick, plain = (
                audit_bytes(tmp_path, content, plain=plain, form=written, mapping=mapping) for plain in (False, True)
            )
            assert quick[0] == plain[0]
            assert quick[1].reasons == plain[1].reasons and quick[1].rows == plain[1].rows


@quietly
@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["how", '{"a": 1', " ", "ñ\u2028", 'say "a"']), st.sampled_from(["so", "-0", ""])),
        max_size=60,
    )
)
def test_rows_of_a_table_are_judged_at_once_as_each_by_itself(rows: list[tuple[str, str]], tmp_path: Path):
    text = io.StringIO()
    csv.writer(text).writerows([("question", "answer", "id"), *((*row, number) for number, row in enumerate(rows))])
    quick, plain = (audit_bytes(tmp_path, text.getvalue().encode(), plain=plain, form="csv") for plain in (False, True))
    assert quick[0] == plain[0] and quick[1].reasons == plain[1].reasons


def test_a_line_of_a_table_is_no_json(tmp_path: Path):
    content = b'question,answer\n{x} is a set?,-0\n"{""a"": 1} is an object?",yes\nhow cold,-0,\n'
    found, report = audit_bytes(tmp_path, content, form="csv")
    assert told(found) == [("row-refused", 4)] and report.kept == 2
    assert "3 cells where there are 2 columns" in found[0].reason
