"""The JSON Schema, the reference of keys and the recipes are what the schema says today."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from afina.recipe.document import read
from afina.recipe.load import load, parse
from afina.recipe.starter import USE_CASES

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs/recipe.schema.json").read_text("utf-8"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_generated_files_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "tools/recipe_docs.py"), "--check"]
    stale = subprocess.run(command, capture_output=True, text=True, check=False)
    assert stale.returncode == 0, f"run tools/recipe_docs.py: {stale.stdout}{stale.stderr}"


def test_the_schema_names_no_host_and_no_title() -> None:
    assert SCHEMA["$id"] == "recipe.schema.json"
    assert SCHEMA["required"] == ["name", "data"]
    assert '"title"' not in json.dumps(SCHEMA)
    assert all("description" in entry for entry in SCHEMA["$defs"].values())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_REAL_DATA", "/real")
    text = path.read_text("utf-8")
    assert text.splitlines()[:2] == [
        f"# afina run recipes/{path.name}",
        "# yaml-language-server: $schema=../docs/recipe.schema.json",
    ]
    recipe = load(path)
    assert recipe.name == path.stem
    assert len(RECIPES) == len(USE_CASES) - 1 + 4


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_schema_accepts_the_recipes(path: Path) -> None:
    assert list(validator().iter_errors(plain(path.read_text("utf-8")))) == []


@pytest.mark.parametrize(
    "wrong",
    ["seed: -1", "foo: 1", "method: {name: full, rank: 1}", "training: {epochs: many}", "tasks: [{}]", "model: 3"],
)
def test_the_schema_refuses_what_load_refuses(wrong: str) -> None:
    assert list(validator().iter_errors(plain(f"name: a\ndata: {{train: x}}\n{wrong}\n")))


@pytest.mark.parametrize("right", ["chat:", "method: {rank: 8}", "method: {name: full}", "training: {clip_norm: null}"])
def test_the_schema_accepts_what_load_accepts(right: str) -> None:
    text = f"name: a\ndata: {{train: x}}\n{right}\n"
    parse(text, "r.yaml")
    assert list(validator().iter_errors(plain(text))) == []


def validator():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    return jsonschema.Draft202012Validator(SCHEMA)


def plain(text: str) -> object:
    problems: list = []
    root = read(text, problems)
    assert root is not None
    assert problems == []
    return root.plain()


def snips(row: dict, intent: str) -> tuple[str, dict]:
    """The question and the parsed answer that recipes/snips.yaml makes of a row."""
    mapping = plain((ROOT / "recipes/snips.yaml").read_text("utf-8"))["data"]["mapping"]  # type: ignore[index]
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    user, assistant = (
        environment.from_string(mapping[key]).render(row=row, keys=(intent,)) for key in ("user", "assistant")
    )
    return user.strip(), json.loads(assistant)


def test_snips_answers_are_json_whatever_the_row_holds() -> None:
    parts = [{"text": "Add "}, {"text": 'a "b" \\ <c>', "entity": "x"}, {"text": " ñ\n"}, {"text": "d", "entity": "x"}]
    assert snips({"data": parts}, 'I"t') == (
        'Add a "b" \\ <c> ñ\nd',
        {"intent": 'I"t', "slots": {"x": 'a "b" \\ <c> d'}},
    )
    assert snips({"data": [{"text": "hm"}]}, "None") == ("hm", {"intent": "None", "slots": {}})


@pytest.mark.real
def test_snips_rows_become_answers(real_data: Path) -> None:
    for path in sorted(real_data.glob("data/snips/*/validate_*.json")):
        content = path.read_bytes()
        try:
            document = json.loads(content.decode("utf-8"))
        except UnicodeDecodeError:
            document = json.loads(content.decode("latin-1"))
        for intent, rows in document.items():
            for row in rows[:20]:
                said, answer = snips(row, intent)
                assert said
                assert answer["intent"] == intent
                assert set(answer["slots"]) == {part["entity"] for part in row["data"] if "entity" in part}
