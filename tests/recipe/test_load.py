"""Reading recipes: what is accepted, what is refused, and where each mistake is said to stand."""

import subprocess
import sys
from pathlib import Path

import pytest

from afina.errors import RecipeError
from afina.recipe.document import MAX_BYTES
from afina.recipe.load import dump, load, parse
from afina.recipe.schema import Full, Lora, Recipe

LEAST = "name: a\ndata:\n  train: x.jsonl\n"


def refused(text: str, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml", overrides)
    for jargon in ("pydantic", "Input should", "type=", "union_tag", "NoneType", "ruamel"):
        assert jargon not in str(caught.value)
    return caught.value


def test_the_least_recipe_has_every_default() -> None:
    recipe = parse(LEAST, "r.yaml")
    assert recipe == Recipe(name="a", data={"train": "x.jsonl"})
    assert recipe.method == Lora()


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ("training: {learning_rate: 1e-4}", "training.learning_rate", 1e-4),
        ("training: {learning_rate: 2e-4}", "training.learning_rate", 2e-4),
        ("training: {learning_rate: 1E-4}", "training.learning_rate", 1e-4),
        ("training: {learning_rate: .5}", "training.learning_rate", 0.5),
        ("training: {learning_rate: 1}", "training.learning_rate", 1.0),
        ("training: {epochs: 1}", "training.epochs", 1.0),
        ("training: {clip_norm: null}", "training.clip_norm", None),
        ("training: {clip_norm: ~}", "training.clip_norm", None),
        ("training: {packing: false}", "training.packing", False),
        ("training: {packing: True}", "training.packing", True),
        ("training: {batch_size: 0o10}", "training.batch_size", 8),
        ("training: {batch_size: 0x10}", "training.batch_size", 16),
        ("training: {batch_size: +16}", "training.batch_size", 16),
        ("chat: {system: no}", "chat.system", "no"),
        ("chat: {system: yes}", "chat.system", "yes"),
        ("chat: {system: off}", "chat.system", "off"),
        ("chat: {system: 12:30}", "chat.system", "12:30"),
        ("chat: {system: 2024-01-31}", "chat.system", "2024-01-31"),
        ("chat: {system: 2024-01-31T10:00:00Z}", "chat.system", "2024-01-31T10:00:00Z"),
        ("chat: {system: 1_000}", "chat.system", "1_000"),
        ("chat: {system: '010'}", "chat.system", "010"),
        ('chat: {system: "3"}', "chat.system", "3"),
        ("chat: {system: nul}", "chat.system", "nul"),
        ("chat:\n  system: |\n    a\n    \tb\n", "chat.system", "a\n\tb\n"),
        ("chat:\n  system: two\n    lines\n", "chat.system", "two lines"),
        ("chat: {system: ñandú 🦤}", "chat.system", "ñandú 🦤"),
        ("chat:", "chat.temperature", 0.7),
        ("tasks:", "tasks", []),
        ("model:\nmethod:\n", "method.name", "lora"),
        ("method: {rank: 8}", "method.rank", 8),
        ("method: {name: full}", "method.name", "full"),
    ],
)
def test_values(written: str, key: str, value: object) -> None:
    found: object = parse(LEAST + written, "r.yaml")
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "column", "said"),
    [
        ("", 1, 1, "empty"),
        ("# only a comment\n", 1, 1, "empty"),
        ("- a\n", 1, 1, "made of keys"),
        ("just text\n", 1, 1, "made of keys"),
        ("name: a\n", 1, 1, "data is missing"),
        ("data:\n", 1, 1, "data.train is missing"),
        # keys
        (LEAST + "epoch: 1\n", 4, 1, "The keys here are name, seed"),
        (LEAST + "sed: 1\n", 4, 1, "Did you mean seed?"),
        (LEAST + "training:\n  epoch: 1\n", 5, 3, "Did you mean epochs?"),
        (LEAST + "training:\n  Epochs: 1\n", 5, 3, "Did you mean epochs?"),
        (LEAST + "training: {warm-up: 1}\n", 4, 12, "Did you mean warmup?"),
        (LEAST + "epochs: 1\n", 4, 1, "It belongs under training."),
        (LEAST + "training:\n  rank: 1\n", 5, 3, "It belongs under method."),
        (LEAST + "training:\n  lr: 1\n", 5, 3, "Afina calls it training.learning_rate."),
        (LEAST + "method: {name: full, rank: 3}\n", 4, 22, "a method that is not chosen"),
        (LEAST + "tasks:\n- name: a\n  dta: x\n", 5, 3, "tasks.0.kind is missing"),
        (LEAST + "<<: {seed: 1}\n", 4, 1, "is not a key of a recipe"),
        (LEAST + "12: 3\n", 4, 1, "is not a key of a recipe"),
        (LEAST + "name: b\n", 4, 1, "The key name stands twice; the first is on line 1."),
        (LEAST + "? [a]\n: b\n", 4, 3, "A key must be a word"),
        ("data:\n  train: x\n", 1, 1, "name is missing. Add a line such as name: my-first-tune"),
        # types
        (LEAST + "method: {rslora: yes}\n", 4, 18, 'takes true or false, not the text "yes". Write true.'),
        (LEAST + "method: {rslora: no}\n", 4, 18, "Write false."),
        (LEAST + "method: {rslora: on}\n", 4, 18, "Write true."),
        (LEAST + "method: {rslora: 1}\n", 4, 18, "takes true or false, not 1"),
        (LEAST + "training:\n  epochs: many\n", 5, 11, "takes a number above 0"),
        (LEAST + "training:\n  epochs: '3'\n", 5, 11, "Remove the quotes."),
        (LEAST + "training:\n  epochs:\n", 5, 3, "not nothing. For example: epochs: 3.0"),
        (LEAST + "training:\n  epochs: true\n", 5, 11, "not true"),
        (LEAST + "training:\n  epochs: [1]\n", 5, 11, "not a list of 1"),
        (LEAST + "training:\n  batch_size: 1.5\n", 5, 15, "takes a whole number"),
        (LEAST + "training:\n  batch_size: 1_000\n", 5, 15, "not the text"),
        ("name: 12\ndata: {train: x}\n", 1, 7, 'Put it between quotes: "12"'),
        ("name: a b\ndata: {train: x}\n", 1, 7, "letters, digits"),
        (LEAST + "chat: {system: {{ row.x }}}\n", 4, 17, "stands between quotes"),
        (LEAST + "chat: {system: {a: b}}\n", 4, 16, "between quotes"),
        (LEAST + "method: lora\n", 4, 9, "Write method: {name: lora}"),
        (LEAST + "model: 3\n", 4, 8, "takes keys of its own"),
        (LEAST + "tasks: {a: 1}\n", 4, 8, "takes a list"),
        (LEAST + "tasks:\n-\n", 5, 2, "tasks.0 takes keys of its own"),
        ("name: a\ndata:\n  train: [x, 3]\n", 3, 14, "data.train.1 takes text, not 3"),
        ("name: a\ndata:\n  train: {a: 3}\n", 3, 10, "data.train takes text"),
        # choices
        (
            LEAST + "model: {precision: bf61}\n",
            4,
            20,
            'takes auto, bf16, fp16 or fp32, not the text "bf61". Did you mean bf16?',
        ),
        (
            LEAST + "method: {name: lara}\n",
            4,
            16,
            'takes lora, full, prompt-tuning or prefix-tuning, not the text "lara". Did you mean lora?',
        ),
        (LEAST + "method: {name: [lora]}\n", 4, 16, "method.name takes lora, full, prompt-tuning or prefix-tuning"),
        (LEAST + "method: {targets: linear}\n", 4, 19, "all-linear"),
        (LEAST + "export: {formats: [q8]}\n", 4, 20, "Did you mean q8_0?"),
        # bounds
        (LEAST + "seed: -1\n", 4, 7, "from 0 to below 9223372036854775808, not -1"),
        (LEAST + "model: {max_length: 4}\n", 4, 21, "from 8 to 16777216"),
        (LEAST + "method: {rank: 0}\n", 4, 16, "from 1 to 1024, not 0. For example: rank: 16"),
        (LEAST + "training: {learning_rate: 0}\n", 4, 27, "a number above 0, not 0"),
        (LEAST + "training: {learning_rate: .nan}\n", 4, 27, "not .nan"),
        (LEAST + "training: {epochs: .inf}\n", 4, 20, "not .inf"),
        (LEAST + "training: {epochs: 1e999}\n", 4, 20, "not 1e999"),
        (LEAST + "training: {betas: [0.9]}\n", 4, 19, "a list of 2 entries"),
        (LEAST + "training: {betas: [0.9, 1]}\n", 4, 25, "to below 1, not 1"),
        (LEAST + "chat: {top_p: 1.1}\n", 4, 15, "above 0 and up to 1"),
        (
            "name: a\ndata: {train: x, validation: 1.5}\n",
            2,
            30,
            "from 0 to below 1, not 1.5. For example: validation: 0.1",
        ),
        (LEAST + "training: {batch_size: 010}\n", 4, 24, "leading zero"),
        (LEAST + "training: {batch_size: " + "9" * 5000 + "}\n", 4, 24, "at most 40 digits"),
        # YAML
        (LEAST + "seed: &a 1\n", 4, 7, "Anchors"),
        (LEAST + "seed: *a\n", 4, 7, "References"),
        (LEAST + "seed: !!python/object/apply:os.system [ls]\n", 4, 7, "Tags such as !!python/object/apply:os.system"),
        (LEAST + "seed: !!int '3'\n", 4, 7, "Tags"),
        (LEAST + "seed: ! 3\n", 4, 7, "Tags"),
        ("%YAML 1.1\n---\n" + LEAST, 2, 1, "Directives"),
        (LEAST + "---\nname: b\n", 4, 1, "one document"),
        (LEAST + "seed:\n\tx: 1\n", 5, 1, "tab"),
        (LEAST + "chat:\n  system: x\n\ttop_p: 1\n", 6, 1, "tab"),
        (LEAST + "chat:\n  system: x\n\tmore\n", 6, 1, "tab"),
        (LEAST + "seed:\t3\n", 4, 6, "tab"),
        ("a: 'x\nb: 2\n", 1, 4, "never closed"),
        ("a: {b: 1\n", 1, 4, "not closed"),
        ("a: [1\nb: 3\n", 1, 4, "not closed"),
        ("a: b: c\n", 1, 5, "colon"),
        ("a: @x\n", 1, 4, "quotes"),
        ("a:\n  b: 1\n c: 2\n", 3, 2, "indentation"),
        ('a: "\\q"\n', 1, 6, "escape"),
        ("a: x\0\n", 1, 5, "U+0000"),
        ("a: b\n\x1b", 2, 1, "U+001B"),
        ("[" * 5000, 1, 22, "nested"),
        ("a: [" + "1," * 20000 + "]", 1, 19999, "10,000 values"),
        (LEAST + 'chat: {system: "\\ud800"}\n', 4, 16, "Half a character"),
    ],
)
def test_mistakes(text: str, line: int, column: int, said: str) -> None:
    error = refused(text)
    assert said in error.message
    assert (error.file, error.line, error.column) == ("r.yaml", line, column)


def test_every_mistake_is_told_at_once() -> None:
    text = (
        "name: a\nseed: no\ndata:\n  trian: x\n  dialect: mapping\nmodel:\n  precision: bf61\n"
        "training: {epochs: 0, warmup: 2.5}\nfoo: 1\nfoo: 2\n"
    )
    error = refused(text)
    assert (error.line, error.column) == (2, 7)
    lines = error.message.splitlines()
    assert lines[0] == "The recipe has 9 mistakes:"
    assert [line.split(" ")[0] for line in lines[1:]] == [
        "r.yaml:2:7:",
        "r.yaml:3:1:",
        "r.yaml:4:3:",
        "r.yaml:5:3:",
        "r.yaml:7:14:",
        "r.yaml:8:20:",
        "r.yaml:8:23:",
        "r.yaml:9:1:",
        "r.yaml:10:1:",
    ]


def test_many_mistakes_are_counted() -> None:
    error = refused(LEAST + "".join(f"k{number}: 1\n" for number in range(500)))
    assert len(error.message.splitlines()) == 52
    assert "and 450 more" in error.message


def test_messages_are_safe_for_a_terminal() -> None:
    error = refused(LEAST + '"\\x1b[31m\\x9b\\n": 1\n' + f"{'k' * 900}: 1\n")
    assert all(char.isprintable() or char == "\n" for char in str(error))
    assert len(error.message) < 2000


# Overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.epochs=1", "training.epochs", 1.0),
        ("training.learning_rate=1e-4", "training.learning_rate", 1e-4),
        ("data.train=my.jsonl", "data.train", "my.jsonl"),
        ("data.train=[a, b]", "data.train", ["a", "b"]),
        ("method={name: full}", "method", Full(name="full")),
        ("method.name=full", "method", Full(name="full")),
        ("method.rank=4", "method.rank", 4),
        ("tasks.0.limit=50", "tasks.0.limit", 50),
        ("training.clip_norm=", "training.clip_norm", None),
        ("chat.system=", "chat.system", None),
        ("chat=", "chat.temperature", 0.7),
        ("chat.system=a=b", "chat.system", "a=b"),
        ("chat.system='a: b'", "chat.system", "a: b"),
        ("name=no", "name", "no"),
        ("data.encoding.0=latin-1", "data.encoding", ["latin-1"]),
    ],
)
def test_overrides(override: str, key: str, value: object) -> None:
    text = LEAST + "  encoding: [utf-8]\ntasks:\n- {name: t, kind: exact, data: y}\n"
    found: object = parse(text, "r.yaml", [override])
    for part in key.split("."):
        found = found[int(part)] if isinstance(found, list) else getattr(found, part)
    assert found == value


def test_the_last_override_wins() -> None:
    assert parse(LEAST, "r.yaml", ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.epoch=1", "epoch is not a key of training. Did you mean epochs?"),
        ("trainin.epochs=1", "trainin is not a key of a recipe. Did you mean training?"),
        ("epochs=1", "It belongs under training."),
        ("training.epochs=0", "takes a number above 0"),
        ("training.epochs=many", "takes a number above 0"),
        ("training.epochs=[1", "not closed"),
        ("training.epochs=!!int 1", "Tags"),
        ("training.epochs", "Write key=value"),
        ("=1", "Write key=value"),
        ("training..epochs=1", "Write key=value"),
        ("x." * 500 + "x=1", "Write key=value"),
        ("name.x=1", "name is a value"),
        ("tasks.0.limit=1", "0 is no entry of a list that has 0"),
        ("data.encoding.9=x", "9 is no entry of a list that has 1"),
        ("data.encoding.x=x", "x is no entry"),
        ("data.validation=2.5", "from 0 to below 1"),
        ("export.formats=[q8_0, q8_0]", "stands twice"),
    ],
)
def test_wrong_overrides(override: str, said: str) -> None:
    error = refused(LEAST + "  encoding: [utf-8]\n", override)
    assert said in error.message
    assert f"In the override {override[:50]}" in error.message
    assert (error.file, error.line, error.column) == (None, None, None)


def test_an_override_mends_the_file() -> None:
    assert parse(LEAST + "seed: many\n", "r.yaml", ["seed=3"]).seed == 3


# The environment


def test_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REAL", "/r${REAL}")
    text = (
        "name: a\nmodel: {base: '${REAL}/m', chat_template: '$${REAL}'}\nchat: {system: '${REAL}'}\n"
        "data: {train: ['${REAL}/a', b], validation: '${REAL}${REAL}'}\n"
        "tasks:\n- {name: t, kind: exact, data: '${REAL}/t'}\n"
    )
    recipe = parse(text, "r.yaml")
    assert recipe.model.base == "/r${REAL}/m"
    assert recipe.model.chat_template == "${REAL}"
    assert recipe.data.train == ["/r${REAL}/a", "b"]
    assert recipe.data.validation == "/r${REAL}/r${REAL}"
    assert recipe.tasks[0].data == "/r${REAL}/t"
    assert recipe.chat.system == "${REAL}"
    assert parse(dump(recipe), "d.yaml") == recipe


@pytest.mark.parametrize(
    ("value", "said"),
    [("${NOT_SET_AT_ALL}/x", "NOT_SET_AT_ALL is not set"), ("${", "is written"), ("${1}", "is written")],
)
def test_wrong_variables(value: str, said: str) -> None:
    error = refused(f"name: a\ndata:\n  train: [x, '{value}']\n")
    assert said in error.message
    assert (error.line, error.column) == (3, 14)


# Files


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(RecipeError) as caught:
            load(path)
        assert "cannot be read" in caught.value.message


@pytest.mark.parametrize(
    ("content", "line", "column", "said"),
    [
        (b"name: a\n# \xe9\n", 2, 3, "0xE9 is not UTF-8"),
        (b"\xef\xbb\xbfname: a\r\nb: \xff", 2, 4, "0xFF is not UTF-8"),
        ("name: a".encode("utf-16"), 1, 1, "UTF-16"),
        (b"a" * (MAX_BYTES + 1), 1, 1, "at most"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, content: bytes, line: int, column: int, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert said in caught.value.message
    assert (caught.value.file, caught.value.line, caught.value.column) == (str(path), line, column)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_line_ends(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(("\ufeff" + LEAST + "seed: x\n").replace("\n", ending).encode())
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert (caught.value.line, caught.value.column) == (4, 7)
    assert load(path, ["seed=1"]).seed == 1


def test_loading_is_light() -> None:
    code = (
        "import sys, afina.recipe.load, afina.recipe.starter;"
        "print([name for name in ('torch', 'transformers', 'numpy', 'jinja2') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
