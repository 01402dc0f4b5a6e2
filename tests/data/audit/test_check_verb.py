"""`afina data check` as it is used: exit statuses, JSON lines, the page, the repaired copy, the labels of a recipe."""

import json
import math
import random
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from data.audit.auditing import audit_bytes, told
from data.audit.faulty import FAULTY, row, sound
from data.byte_level import build

from afina import dataset
from afina.artifact import open_artifact, sha256
from afina.console import Console, console
from afina.data.audit.finding import Finding, Report
from afina.data.audit.kind import Severity
from afina.data.audit.kinds import kinds
from afina.data.audit.labels import Labels, audit
from afina.data.audit.page import page
from afina.data.audit.run import Audit
from afina.data.problem import BadRows
from afina.data.read import read
from afina.data.template import Renderer
from afina.data.tokenizer import Tokenizer
from afina.errors import DataError
from afina.recipe.schema import Data


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(9)
    lines = [sound(rng) for _ in range(30)]
    lines[3], lines[10], lines[12] = FAULTY["mojibake"](rng), FAULTY["cut-row"](rng), FAULTY["invisible"](rng)
    lines[20] = lines[1]
    lines[25] = FAULTY["not-utf8"](rng)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\r\n".join(lines))
    return file


def test_errors_stop_and_warnings_do_not_unless_strict(rows: Path, tmp_path: Path):
    with pytest.raises(DataError, match="2 of 30 rows cannot be used") as raised:
        dataset.check(str(rows))
    assert raised.value.exit_status == 3
    good = tmp_path / "good.jsonl"
    good.write_bytes(
        b"\n".join(line for line in rows.read_bytes().split(b"\r\n") if b"\xf3n" not in line and line.endswith(b"]}"))
    )
    assert dataset.check(str(good)).counts.total() == 3
    with pytest.raises(DataError, match="should be looked at"):
        dataset.check(str(good), strict=True)


def test_json_lines_tell_every_finding(rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console, "json", True)
    with pytest.raises(DataError):
        dataset.check(str(rows))
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [event for event in events if event["event"] == "finding"]
    assert {(event["class"], event["line"]) for event in found} == {
        ("mojibake", 4),
        ("cut-row", 11),
        ("invisible", 13),
        ("duplicate", 21),
        ("not-utf8", 26),
    }
    assert all(event["reason"] and event["advice"] and event["end"] > event["byte"] for event in found)
    [summary] = [event for event in events if event["event"] == "checked"]
    assert summary["rows"] == summary["kept"] + summary["rejected"] == 30
    assert summary["reasons"] == {"cut-row": 1, "not-utf8": 1}


def test_a_repaired_copy(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = sha256(rows)
    with pytest.raises(DataError):
        dataset.check(str(rows), fix="mended")
    assert sha256(rows) == before, "the source is never touched"
    said = capsys.readouterr().out
    assert "Mañana comeré piña" in said and "28 rows kept" in said
    copy, aside = tmp_path / "mended" / "rows.jsonl", tmp_path / "mended" / "rejected.jsonl"
    report = dataset.check(str(copy))
    assert (report.rows, report.counts.total()) == (28, 0)
    reasons = [json.loads(line) for line in aside.read_text("utf-8").splitlines()]
    assert [(one["line"], one["class"]) for one in reasons] == [(11, "cut-row"), (21, "duplicate")]
    made = open_artifact(tmp_path / "mended", "repaired data")
    made.verify()
    assert made.manifest["rows"] == {"in": 30, "kept": 28, "of_these_repaired": 3, "duplicates": 1, "rejected": 1}
    assert made.manifest["changes"] == {
        "repaired": {"mojibake": 1, "invisible": 1, "not-utf8": 1},
        "set_aside": {"cut-row": 1, "duplicate": 1},
    }
    assert made.manifest["copies"] == [{"from": str(rows), "to": "rows.jsonl", "rows": 30, "kept": 28}]
    assert [one["sha256"] for one in made.manifest["parents"]] == [before]

    assert "canción" in (tmp_path / "mended" / "changes.diff").read_text("utf-8")
    kept = copy.read_bytes().splitlines()
    untouched = [line for at, line in enumerate(rows.read_bytes().split(b"\r\n")) if at not in (3, 10, 12, 20, 25)]
    assert [line for line in kept if line in untouched] == untouched, "a row with nothing wrong is kept byte for byte"


def test_copies_of_files_of_one_name_do_not_meet(tmp_path: Path):
    rng = random.Random(2)
    sources = [tmp_path / name for name in ("a/rows.jsonl", "b/rows.jsonl", "rejected.jsonl", "row.jsonl")]
    for source in sources:
        source.parent.mkdir(exist_ok=True)
        source.write_bytes(b"\n".join(sound(rng) for _ in range(5)))
    names = json.dumps([str(source) for source in sources])
    dataset.check(str(sources[0]), [f"data.train={names}"], fix=tmp_path / "mended")
    made = open_artifact(tmp_path / "mended").manifest["copies"]
    assert [one["to"] for one in made] == ["rows.jsonl", "rows-2.jsonl", "rejected-2.jsonl", "row.jsonl"]
    for one in made:
        assert (tmp_path / "mended" / one["to"]).read_bytes().strip() == Path(one["from"]).read_bytes()


def test_rows_of_a_document_on_one_line_are_mended_each_by_itself(tmp_path: Path):
    rng = random.Random(5)
    rows = [json.loads(sound(rng)) for _ in range(8)]
    rows[2], rows[5] = rows[1], json.loads(FAULTY["invisible"](rng))
    (tmp_path / "rows.json").write_text(json.dumps(rows), "utf-8")
    dataset.check(str(tmp_path / "rows.json"), fix=tmp_path / "mended")
    made = open_artifact(tmp_path / "mended").manifest
    assert made["rows"] == {"in": 8, "kept": 7, "of_these_repaired": 1, "duplicates": 1, "rejected": 0}
    kept = [json.loads(line) for line in (tmp_path / "mended" / "rows.jsonl").read_text("utf-8").splitlines()]
    assert [row for row in kept if row in rows] == [rows[0], rows[1], rows[3], rows[4], rows[6], rows[7]]


def test_rows_of_a_document_on_one_line_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """By their numbers: on the screen, on the page, in what is printed for machines, in changes, and by training."""
    rng = random.Random(5)
    rows = [json.loads(sound(rng)) for _ in range(8)]
    rows[2], rows[5] = rows[1], json.loads(FAULTY["invisible"](rng))
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows), "utf-8")
    dataset.check(str(file), fix=tmp_path / "mended", html=str(tmp_path / "page.html"))
    said, page_said = capsys.readouterr().out, (tmp_path / "page.html").read_text("utf-8")
    for shown in (said, page_said):
        assert "rows.json:1, row 3" in shown and "rows.json:1, row 2" in shown and "rows.json:1, row 6" in shown
    assert "@@ rows.json:1, row 6 invisible" in (tmp_path / "mended" / "changes.diff").read_text("utf-8")
    monkeypatch.setattr(console, "json", True)
    dataset.check(str(file))
    facts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {fact["class"]: fact["row"] for fact in facts if fact["event"] == "finding"} == {
        "duplicate": 3,
        "invisible": 6,
    }
    rows[4] = {"messages": []}
    file.write_text(json.dumps(rows), "utf-8")
    with pytest.raises(BadRows, match=r"rows\.json:1, row 5: "):
        read(str(file), Data(train=str(file)), tmp_path)


def test_the_page_is_one_file_and_escapes_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    evil = "<script>alert(1)</script>\u200b"
    Path("rows.jsonl").write_bytes(b"\n".join([row("q", f"a {evil}"), row("<|im_end|><img src=x onerror=y>", "b")]))
    dataset.check("rows.jsonl", html="page.html")
    text = Path("page.html").read_text("utf-8")
    assert "<script" not in text and "<img" not in text and not re.search(r"(?:src|href)=\"(?!#|data:)", text)
    assert "http://" not in text and "https://" not in text and "invisible" in text
    assert page(Report(), "nothing").startswith("<!doctype html>")


def test_the_labels_of_a_recipe_are_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    long = "word " * 300
    (tmp_path / "train.jsonl").write_bytes(b"\n".join([row("q", "a"), row("q two", long), row("q three", "b")]))
    (tmp_path / "recipe.yaml").write_text(
        "name: x\nmodel: {max_length: 64}\ndata: {train: train.jsonl, validation: 0}\n", "utf-8"
    )
    with pytest.raises(DataError):
        dataset.check(str(tmp_path / "recipe.yaml"))
    assert "over-context" in capsys.readouterr().out


@pytest.mark.real
def test_what_is_known_of_real_sets(real_data: Path):
    def counts(source: str, *changes: str) -> dict[str, int]:
        return dict(dataset.check(source, changes).counts)

    data = real_data / "data"
    assert counts(str(data / "gsm8k" / "train.jsonl")) == {"line-separator": 1, "invisible": 1}
    assert counts(str(data / "gsm8k" / "test.jsonl")) == {"invisible": 1}
    assert counts(str(data / "mgsm" / "mgsm_es.tsv"), "data.columns=[question, answer]") == {}
    snips = counts(
        str(data / "snips" / "PlayMusic" / "train_PlayMusic_full.json"),
        "data.encoding=[utf-8, latin-1]",
        "data.dialect=mapping",
        "data.mapping={rows: '*', user: \"{{ row.data | map(attribute='text') | join }}\", assistant: '{{ keys[0] }}'}",
    )
    assert snips["old-encoding"] == 1 and snips["mojibake"] >= 20


@pytest.mark.parametrize(
    "name",
    [
        *("algorithms-tutor", "bot-configurator", "maths-tutor", "python-tutor"),
        *("sentiment", "sentiment-explained", "support-chat"),
    ],
)
def test_of_the_bundled_sets_nothing_is_said(name: str):
    assert not dataset.check(f"afina/{name}/train").counts


def test_a_tokenizer_that_llama_cpp_does_not_know_is_said_before_training(tmp_path: Path, capsys):
    """Where GGUF files are to be written; then the finding names what is not known."""
    from data.byte_level import build
    from transformers import LlamaConfig

    config = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=500)
    LlamaConfig(**config, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "base")
    tokenizer = build(special=["<|im_start|>", "<|im_end|>"], eos="<|im_end|>")
    tokenizer.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "tokenizer.json"
    definition = json.loads(file.read_bytes())
    regex = {"type": "Split", "pattern": {"Regex": r" ?\p{L}{1,3}|\s+"}, "behavior": "Isolated", "invert": False}
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [regex, definition["pre_tokenizer"]]}
    file.write_text(json.dumps(definition), "utf-8")
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(row(f"how many is {n}", f"It is {n}.") for n in range(9)))
    recipe = tmp_path / "recipe.yaml"
    for formats, said in (("[]", False), ("[merged]", False), ("[f16]", True)):
        recipe.write_text(
            "name: x\nmodel: {base: base, chat_template: afina/chatml, max_length: 256}\n"
            f"data: {{train: train.jsonl, validation: 0}}\nexport: {{formats: {formats}}}\n",
            "utf-8",
        )
        report = dataset.check(str(recipe))
        assert ("unknown-splitter" in report.counts) is said
    assert "{1,3}" in capsys.readouterr().out


def test_rows_that_training_refuses_for_their_tools_are_found(tmp_path: Path):
    talk = {"messages": [{"role": "user", "content": "Is it warm?"}, {"role": "assistant", "content": "Yes."}]}
    beside = [{}, {"tools": "not json"}, {"reasoning_effort": "most"}, {"tools": [{"name": "f"}]}, {"tools": None}]
    content = b"\n".join(json.dumps({**talk, "id": at, **more}).encode() for at, more in enumerate(beside))
    found, report = audit_bytes(tmp_path, content)
    assert [one for one in told(found) if one[0] != "duplicate"] == [("row-refused", 2), ("row-refused", 3)]
    with pytest.raises(BadRows) as raised:
        read("rows.jsonl", Data(train="rows.jsonl"), tmp_path)
    assert [(problem.kind, problem.line) for problem in raised.value.problems] == [
        ("row-refused", 2),
        ("row-refused", 3),
    ]
    assert report.kept == 3


WITH_TOOLS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_labels_are_those_that_training_makes(tmp_path: Path):
    """Calls of tools, weights, the recipe's system message, and answers that a template writes otherwise later."""
    call = [{"type": "function", "function": {"name": "f", "arguments": {"city": "Málaga " * 40}}}]
    rows = [
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "x", "weight": 0}]},
        {
            "messages": [
                {"role": "user", "content": "two"},
                {"role": "assistant", "content": "", "tool_calls": call},
                {"role": "tool", "content": "31"},
                {"role": "assistant", "content": "Warm."},
            ],
            "tools": [{"name": "f"}],
        },
        {"messages": [{"role": "user", "content": "three"}, {"role": "assistant", "content": "y"}]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    renderer = Renderer(Tokenizer(build(eos="<|im_end|>", special=["<|im_start|>"]), WITH_TOOLS))
    for system in (None, "Be kind. " * 20):
        data = Data(train=str(file), system=system)
        samples = read(str(file), data, tmp_path).samples
        for length in (100, 10_000):
            wanted = audit(samples, renderer.samples(samples), renderer.tokenizer, length)
            found: list[Finding] = []
            labels = Labels(renderer, length)
            Audit(data, tmp_path, labels=labels, tell=found.append).run(Console())
            made = [(one.line, one.reason) for one in found if kinds()[one.kind].severity is Severity.ERROR]
            assert sorted(made) == sorted((sample.line, reason) for sample, reason in wanted)
            assert labels.tokens == sum(row.ids.size for row in renderer.samples(samples))


def test_answers_are_held_to_the_schema_of_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "schema.json").write_text('{"type": "object", "required": ["intent"]}', "utf-8")
    answers = ['{"intent": "greet"}', '{"intention": "greet"}', "Hello!", '{"intent": 1}']
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(row(f"q {at}", answer) for at, answer in enumerate(answers)))
    (tmp_path / "task.jsonl").write_bytes(row("q", "no JSON at all"))
    (tmp_path / "recipe.yaml").write_text(
        "name: x\ndata: {train: rows.jsonl, validation: 0, schema_file: schema.json}\n"
        "tasks: [{name: t, kind: exact, data: task.jsonl}]\n",
        "utf-8",
    )
    with pytest.raises(DataError, match="2 of 5 rows"):
        dataset.check(str(tmp_path / "recipe.yaml"))
    said = capsys.readouterr().out
    assert "schema-misfit" in said and "rows.jsonl:2" in said and "'intent' is a required property" in said


def test_values_that_only_parquet_has_survive_a_copy_and_a_split(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow", reason='install "afina[parquet]" to read Parquet files')
    from pyarrow import parquet

    when = [datetime(2024, 1, day, tzinfo=UTC) for day in (1, 2, 3)]
    columns = {"question": ["a", "b", "c"], "answer": ["d", "e", "f"], "when": when, "score": [math.nan, 0.5, math.inf]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    dataset.check(str(tmp_path / "rows.parquet"), fix=tmp_path / "copy")
    dataset.split(str(tmp_path / "rows.parquet"), "train,one=1", tmp_path / "split")
    for files in (["copy/rows.jsonl"], ["split/train.jsonl", "split/one.jsonl"]):
        found = read([str(tmp_path / file) for file in files], Data(train="x"), tmp_path, with_rows=True)
        beside = [(row.value["when"], row.value["score"]) for row in found.rows]
        assert sorted(beside, key=str) == [
            ("2024-01-01 00:00:00+00:00", None),
            ("2024-01-02 00:00:00+00:00", 0.5),
            ("2024-01-03 00:00:00+00:00", None),
        ]
