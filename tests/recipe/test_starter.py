"""Starters load, say what the schema says, and projects appear whole or not at all."""

import json
import re
from pathlib import Path

import pytest

from afina import durable
from afina.errors import OutputError, RecipeError
from afina.recipe import schema
from afina.recipe.load import load, parse
from afina.recipe.schema import Recipe, help_texts, sections
from afina.recipe.starter import USE_CASES, create_project, starter, summary

COMMENTED = re.compile(r"(?m)^( *)#(?! \S)(.*)$")
"""A key or a line of one after a #; help has a space there."""


@pytest.mark.parametrize("use_case", USE_CASES)
@pytest.mark.parametrize("whole", [True, False])
def test_starters_load(use_case: str, whole: bool) -> None:
    text = starter(use_case, "mine", whole=whole)
    recipe = parse(text, "recipe.yaml")
    assert text.splitlines()[0] == "# afina run recipe.yaml"
    assert recipe == Recipe.model_validate({"name": "mine", **USE_CASES[use_case]})
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("use_case", USE_CASES)
def test_the_keys_in_comments_hold_the_defaults(use_case: str) -> None:
    text = COMMENTED.sub(r"\1\2", starter(use_case, "mine"))
    for off in ("mapping", "distill", "tasks"):  # examples rather than defaults
        if not USE_CASES[use_case].get(off):
            text = re.sub(rf"(?m)^( *){off}:\n(?:\1  .*\n)+", "", text)
    assert parse(text, "recipe.yaml") == parse(starter(use_case, "mine"), "recipe.yaml")


def test_examples_in_comments_are_right() -> None:
    text = COMMENTED.sub(r"\1\2", starter("custom", "mine"))
    recipe = parse(text, "recipe.yaml")
    assert recipe.data.mapping is not None
    assert len(recipe.tasks) == 1


def test_a_starter_names_every_key() -> None:
    text = starter("sentiment", "mine")
    for section in sections():
        if section not in (schema.Full, schema.PromptTuning, schema.PrefixTuning):
            for key in section.model_fields:
                if section not in (schema.Mapping, schema.Distill) or section.model_fields[key].is_required():
                    assert re.search(rf"(?m)^ *(- )?#? *{key}:", text), key


def test_every_key_has_help() -> None:
    assert all(section.help_of(key) for section in sections()[1:] for key in section.model_fields)
    assert len(help_texts()) == len(set(help_texts()))
    assert all("\n" not in text for text in help_texts())
    assert all(section.purpose() in help_texts() for section in sections())
    assert {cls for cls in vars(schema).values() if isinstance(cls, type) and issubclass(cls, schema.Section)} == {
        *sections(),
        schema.Section,
    }


def test_unknown_use_cases_name_the_nearest(tmp_path: Path) -> None:
    for call in (summary, lambda name: starter(name, "x"), lambda name: create_project(tmp_path / "p", name)):
        with pytest.raises(RecipeError) as caught:
            call("math_tutor")
        assert caught.value.hint == "Did you mean maths-tutor?"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("use_case", USE_CASES)
def test_projects(tmp_path: Path, use_case: str) -> None:
    folder = tmp_path / "Mi proyecto ñ"
    files = create_project(folder, use_case)
    assert sorted(files) == sorted(path for path in folder.rglob("*") if path.is_file())
    assert {path.name for path in folder.iterdir()} == {".gitignore", "data", "models", "recipe.yaml", "runs"}
    assert load(folder / "recipe.yaml").name == "Mi-proyecto"


@pytest.mark.parametrize("language", ["en", "es"])
def test_the_users_own_examples_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str) -> None:
    monkeypatch.setenv("AFINA_LANG", language)
    create_project(tmp_path / "p", "custom")
    rows = [json.loads(line) for line in (tmp_path / "p/data/train.jsonl").read_text("utf-8").splitlines()]
    assert [row["messages"][-1]["role"] for row in rows] == ["assistant"] * 3
    assert (rows[0]["messages"][0]["content"] == "¿Qué horario tenéis?") == (language == "es")
    assert load(tmp_path / "p/recipe.yaml").data.train == "data/train.jsonl"


@pytest.mark.parametrize(
    ("folder", "name"), [("___", "my-first-tune"), ("..a", "a"), ("x" * 200, "x" * 100), ("ñ", "my-first-tune")]
)
def test_the_folders_name_becomes_the_recipes(tmp_path: Path, folder: str, name: str) -> None:
    create_project(tmp_path / folder, "custom")
    assert load(tmp_path / folder / "recipe.yaml").name == name


def test_an_empty_folder_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    create_project(Path(), "sentiment")
    assert load(folder / "recipe.yaml").name == "here"


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    for folder in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(OutputError):
            create_project(folder, "sentiment")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    folder = tmp_path / "p"
    if exists:
        folder.mkdir()
    write = durable.write_text

    def failing(path: Path, content: str) -> None:
        if path.name == "recipe.yaml":
            raise OutputError("full")
        write(path, content)

    monkeypatch.setattr(durable, "write_text", failing)
    with pytest.raises(OutputError):
        create_project(folder, "custom")
    assert list(tmp_path.rglob("*")) == ([folder] if exists else [])
