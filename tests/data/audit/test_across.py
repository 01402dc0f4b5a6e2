"""What shows only beside other rows: duplicates, leaks, contradictions, balance, form and language of answers."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data.audit.auditing import audit_bytes, told
from data.audit.faulty import row, sentence, sound
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afina.console import Console
from afina.data.audit.across import form, forms
from afina.data.audit.finding import Finding
from afina.data.audit.run import Audit
from afina.data.audit.scan import join
from afina.data.audit.tongue import LANGUAGES, LETTERS, SHORT, _first_words, _lower, _short_words, languages
from afina.recipe.schema import Data

quietly = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)


def audit_files(folder: Path, train: str, *held: str, near: bool = False, **keys: object) -> list[Finding]:
    found: list[Finding] = []
    console = Console()
    console.json = True
    Audit(Data(train=train, **keys), folder, held, tell=found.append, near=near).run(console)
    return found


@quietly
@given(rows=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=30))
def test_duplicates_and_contradictions_are_those_of_a_plain_count(rows: list[tuple[int, int]], tmp_path: Path):
    content = b"\n".join(row(f"How many is {asked}?", f"It is {answer}.") for asked, answer in rows)
    found, _report = audit_bytes(tmp_path, content)
    seen: Counter[tuple[int, int]] = Counter()
    answers: dict[int, set[int]] = {}
    wanted = []
    for line, (asked, answer) in enumerate(rows, 1):
        if seen[asked, answer]:
            wanted.append(("duplicate", line))
        elif answers.get(asked, set()) - {answer}:
            wanted.append(("contradiction", line))
        seen[asked, answer] += 1
        answers.setdefault(asked, set()).add(answer)
    known = ("duplicate", "contradiction")
    assert sorted(one for one in told(found) if one[0] in known) == sorted(wanted)


def test_a_row_of_the_validation_that_is_learnt_is_a_leak(tmp_path: Path):
    rng = random.Random(1)
    rows = [sound(rng) for _ in range(20)]
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(rows))
    (tmp_path / "test.jsonl").write_bytes(b"\n".join([sound(rng), rows[4], sound(rng), rows[7]]))
    found = audit_files(tmp_path, "train.jsonl", "test.jsonl")
    assert [(one.kind, one.file.name, one.line, one.detail) for one in found] == [
        ("leak", "test.jsonl", 2, "train.jsonl:5"),
        ("leak", "test.jsonl", 4, "train.jsonl:8"),
    ]


def test_rows_that_are_nearly_the_same(tmp_path: Path):
    rng = random.Random(11)
    rows = [row(sentence(rng, 30), sentence(rng, 60)) for _ in range(30)]
    close = [json.loads(one)["messages"] for one in (rows[3], rows[8])]
    rows[20] = row(close[0][0]["content"], close[0][1]["content"] + " Indeed!")
    rows[25] = rows[3]
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(rows))
    (tmp_path / "test.jsonl").write_bytes(row(close[1][0]["content"].upper(), close[1][1]["content"]))
    found = audit_files(tmp_path, "train.jsonl", "test.jsonl", near=True)
    assert [(one.kind, one.line, one.detail) for one in found] == [
        ("duplicate", 26, "train.jsonl:4"),
        ("contradiction", 21, "train.jsonl:4"),
        ("near-duplicate", 21, "train.jsonl:4"),
        ("near-leak", 1, "train.jsonl:9"),
    ]


def test_answers_unlike_all_others(tmp_path: Path):
    rng = random.Random(2)
    rows = [row(sentence(rng, 14), sentence(rng, 30)) for _ in range(100)]
    rows[30] = row(sentence(rng, 14), "No.")
    rows[60] = row(sentence(rng, 14), sentence(rng, 30, "es"))
    rows[80] = row(sentence(rng, 14), sentence(rng, 30)[:-1] + " and")
    found, _report = audit_bytes(tmp_path, b"\n".join(rows))
    assert sorted(told(found)) == [("abrupt-end", 81), ("other-language", 61), ("short-answer", 31)]


def test_in_a_set_of_two_languages_an_answer_follows_its_question(tmp_path: Path):
    rng = random.Random(3)
    rows = [row(sentence(rng, 20, tongue), sentence(rng, 30, tongue)) for _ in range(60) for tongue in ("en", "es")]
    rows[10] = row(sentence(rng, 30, "en"), sentence(rng, 30, "es"))
    found, _report = audit_bytes(tmp_path, b"\n".join(rows))
    assert told(found) == [("other-language", 11)]


def test_an_answer_that_is_no_json_among_json(tmp_path: Path):
    rng = random.Random(4)
    rows = [row(sentence(rng, 9), json.dumps({"name": sentence(rng, 4), "n": at})) for at in range(80)]
    rows[20] = row(sentence(rng, 9), "Sorry, I cannot do that for you.")
    found, _report = audit_bytes(tmp_path, b"\n".join(rows))
    assert told(found) == [("no-json", 21)]


def test_classes_out_of_balance(tmp_path: Path):
    rng = random.Random(5)
    rows = [row(sentence(rng, 12), "good" if at % 20 else "bad") for at in range(200)]
    found, _report = audit_bytes(tmp_path, b"\n".join(rows))
    assert [(one.kind, one.detail) for one in found] == [("imbalance", "good 190 : 10 bad")]
    found, _report = audit_bytes(tmp_path, b"\n".join(row(sentence(rng, 12), "yes") for _ in range(80)))
    assert [one.kind for one in found] == ["one-answer"]


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "The children of the village play with the ball that they have found in the garden."),
        ("es", "Los niños de la aldea juegan con la pelota que encontraron en el jardín por la tarde."),
        ("pt", "As crianças não sabem que a bola está em um jardim com os seus amigos do bairro."),
        ("fr", "Les enfants du village jouent avec le ballon qui est dans la maison pour le moment."),
        ("de", "Die Kinder spielen mit dem Ball, den sie auf der Straße gefunden haben, und es ist schön."),
        ("it", "Il bambino che gioca con la palla non è nel giardino della casa, ma anche lui è felice."),
        ("nl", "De kinderen spelen met het spel dat zij in de tuin van een vriend hebben, maar niet op straat."),
        ("pl", "To jest dom, w którym nie ma dzieci, ale są psy, które się do nas cieszą i po nas idą na spacer."),
        ("ru", "Дети играют во дворе."),
        ("ja", "子供たちは庭で遊んでいます。"),
        ("zh", "孩子们在花园里玩耍。"),
        ("ko", "아이들이 정원에서 놀고 있습니다."),
        ("ar", "الأطفال يلعبون في الحديقة"),
        ("", "x = [i ** 2 for i in range(10)]"),
        ("", "42"),
    ],
)
def test_languages(language: str, text: str):
    found = [LANGUAGES[code] for code in languages(join([text, "", text * 40 if language else "", "no"]))]
    assert found == [language, "", language, ""]


def test_what_the_first_bytes_say(tmp_path: Path):
    import gzip

    rng = random.Random(6)
    good = b"\n".join(sound(rng) for _ in range(5)) + b"\n"
    for name, content, kinds in (
        ("bom", b"\xef\xbb\xbf" + good, {"utf8-bom"}),
        ("wide", good.decode().encode("utf-16"), {"utf16"}),
        ("wide-unmarked", good.decode().encode("utf-16-le"), {"utf16"}),
        ("wider", good.decode().encode("utf-32"), {"utf32"}),
        ("packed", gzip.compress(good), {"compressed"}),
        ("empty", b"", {"no-rows"}),
        ("blank", b" \n\r\n\n", {"no-rows", "blank-lines", "mixed-line-ends"}),
    ):
        (tmp_path / f"{name}.jsonl").write_bytes(content)
        found = audit_files(tmp_path, f"{name}.jsonl")
        assert {one.kind for one in found} == kinds, name
        assert all(one.facts()["advice"] and one.reason for one in found)


def test_bytes_count_from_the_beginning_of_the_file_whatever_stands_there(tmp_path: Path):
    rng = random.Random(7)
    line = row("say", "zero\u200bwidth")
    content = b"\xef\xbb\xbf" + sound(rng) + b"\r\n" + line
    (tmp_path / "rows.jsonl").write_bytes(content)
    [one] = [one for one in audit_files(tmp_path, "rows.jsonl") if one.kind == "invisible"]
    assert content[one.byte : one.end].decode() == "\u200b"


def test_other_forms_are_audited_too(tmp_path: Path):
    (tmp_path / "rows.csv").write_text("question,answer\nhow?,so\nwhy?,\nwho?,zero\u200bwidth\n", "utf-8")
    found = audit_files(tmp_path, "rows.csv")
    assert [(one.kind, one.line) for one in found] == [("content-empty", 3), ("invisible", 4)]
    rows = [{"instruction": "go", "input": "", "output": "Ma\u202eana"}, {"instruction": "go", "output": 4}]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1), "utf-8")
    assert [one.kind for one in audit_files(tmp_path, "rows.json")] == ["direction", "content-number"]


def test_a_file_of_an_old_encoding_is_read_when_named(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_bytes(row("¿qué?", "Mañana").decode().encode("latin-1"))
    assert {one.kind for one in audit_files(tmp_path, "rows.jsonl")} == {"not-utf8"}
    assert {one.kind for one in audit_files(tmp_path, "rows.jsonl", encoding=["utf-8", "latin-1"])} == {"old-encoding"}


@pytest.mark.slow
def test_memory_stays_within_bounds(tmp_path: Path):
    """The peak of a real process over 200,000 rows, 1% of them bad, and every bad one found."""
    benchmark = Path(__file__).parents[3] / "benchmarks" / "data_check.py"
    path, truth = tmp_path / "rows.jsonl", tmp_path / "truth.json"
    subprocess.run([sys.executable, str(benchmark), "--make", str(path), str(truth), "200000"], check=True, timeout=600)
    done = subprocess.run(
        [sys.executable, str(benchmark), "--audit", str(path), str(truth)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["rows"] == 200_000 and figures["missed"] == {} and figures["false_alarms"] == {}
    assert figures["peak_memory_mib"] < 200


@quietly
@given(texts=st.lists(st.text(st.sampled_from("aZ9.}]{[ \n\u3000\u2003’»😀é#"), max_size=8), min_size=1, max_size=9))
def test_forms_of_many_answers_are_those_of_each(texts: list[str]):
    assert forms(join(texts), np.arange(len(texts))).tolist() == [form(text) for text in texts]


def test_code_has_no_language():
    """Names of variables may be words of some language; prose with a few figures in it is prose all the same."""
    texts = [
        "def joined(tup1, tup2):\n  return tuple(ele1 + ele2 for ele1, ele2 in zip(tup1, tup2))",
        "de, la, el, en, x, y, z, w, v, u, t = values\n" + "result = compute(alpha, beta, gamma)\n" * 12,
        "The 12 hens of the farm lay 3 eggs each, so that is 12 * 3 = <<12*3=36>>36 eggs for the market.",
    ]
    assert [LANGUAGES[code] for code in languages(join(texts))] == ["", "", "en"]


@quietly
@given(letters=st.text(st.sampled_from("abñ é1_.-"), max_size=60))
def test_the_words_looked_up_are_those_of_a_plain_search(letters: str):
    """Two to five letters, with nothing of a word on either side."""
    low = b"\0" + letters.encode("latin-1").translate(_lower()) + bytes(LETTERS)
    found = _short_words(np.frombuffer(low, np.uint8) != 0) + 1
    eights = np.array([np.frombuffer(low[at : at + 8], np.uint64)[0] for at in found], np.uint64)
    plain = [match for match in re.finditer(rb"[^\0]+", low) if 2 <= len(match.group()) <= SHORT]
    assert found.tolist() == [match.start() for match in plain]
    assert _first_words(eights).tolist() == [int.from_bytes(match.group(), "little") for match in plain]
