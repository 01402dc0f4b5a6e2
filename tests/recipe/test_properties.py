"""What holds for any recipe and for any text: dumps load back equal, and nothing but RecipeError comes out."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from afina.errors import RecipeError
from afina.recipe import check, load
from afina.recipe.document import inline, node_of, read
from afina.recipe.explain import RECIPE, Due, due_of
from afina.recipe.load import dump, parse
from afina.recipe.problem import Place
from afina.recipe.schema import Recipe
from afina.recipe.starter import USE_CASES, starter

LEAST = "name: a\ndata:\n  train: x.jsonl\n"
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20) | st.sampled_from(
    [
        *[
            "no",
            "yes",
            "on",
            "true",
            "null",
            "~",
            "",
            " ",
            "a: b",
            "# c",
            "- d",
            "${X}",
            "$${X}",
            "<<",
            "---",
            "...",
            "=",
        ],
        *[
            "12:30",
            "010",
            "1e-4",
            "0x1",
            "1_000",
            ".inf",
            ".nan",
            "2024-01-01",
            "*a",
            "&a",
            "!t",
            "%",
            "@",
            "`",
            "{",
            "[",
        ],
        *["'", '"', "|", ">", "?", ":", "\n", "a\n\n b\n", "\t", "\r\n", "\x85", "\u2028", "\ufeff", "\0", "\x1b"],
        "a" * 300 + " b",
    ]
)


def values(wanted: Due) -> st.SearchStrategy[object]:
    """Values that the schema takes."""
    low, above, high, below = (wanted.bound(name) for name in ("ge", "gt", "le", "lt"))
    least, most = (low if low is not None else above), (high if high is not None else below)
    match wanted.kind:
        case "text" if wanted.bound("pattern"):
            return st.from_regex(wanted.bound("pattern"), fullmatch=True)
        case "text":
            return TEXTS
        case "whole":
            return st.integers(least, most if below is None else below - 1)
        case "number":
            return st.floats(
                least, most, exclude_min=above is not None, exclude_max=below is not None, allow_infinity=False
            )
        case "truth":
            return st.booleans()
        case "null":
            return st.none()
        case "choice":
            return st.sampled_from(wanted.choices)
        case "list":
            return st.lists(
                values(wanted.options[0]),
                min_size=wanted.bound("min_length") or 0,
                max_size=wanted.bound("max_length") or 3,
            )
        case "one of":
            return st.one_of([values(option) for option in wanted.options])
        case "section":
            section: type[BaseModel] = wanted.section or Recipe
            keys = {key: values(due_of(section, key)) for key in section.model_fields}
            needed = {key for key in keys if section.model_fields[key].is_required()}
            return st.fixed_dictionaries(
                {key: value for key, value in keys.items() if key in needed},
                optional={key: value for key, value in keys.items() if key not in needed},
            )
    raise AssertionError(wanted)


RECIPES = values(RECIPE).map(Recipe.model_validate)
ROOTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            TEXTS | st.sampled_from([*Recipe.model_fields, "train", "rank", "epochs", "labels"]), inner, max_size=4
        )
    ),
    max_leaves=20,
)
MARKS = st.sampled_from(
    [*"{}[],:-?!&*#|>'\"%@`~\t\n \\", "\n  ", "- ", ": ", "---\n", "!!int ", "&a ", "*a", "<<: ", "\0", "\ufeff"]
)


@given(RECIPES)
@settings(suppress_health_check=list(HealthCheck), deadline=None)
def test_a_dump_loads_back_equal(recipe: Recipe) -> None:
    text = dump(recipe)
    problems: list = []
    root = read(text, problems)
    assert root is not None
    load._expand(root, problems)
    assert problems == []
    assert Recipe.model_validate(root.plain()) == recipe
    if not check.faults(recipe):
        assert parse(text, "r.yaml") == recipe


@given(TEXTS)
@settings(deadline=None)
def test_any_text_survives_a_dump(text: str) -> None:
    recipe = Recipe(name="a", data={"train": text + "x"}, chat={"system": text})
    if "\0" not in text:
        assert parse(dump(recipe), "r.yaml") == recipe


@given(st.text(st.characters(codec="utf-8", min_codepoint=32, max_codepoint=0x2FF), max_size=30))
def test_a_value_on_one_line_reads_back(text: str) -> None:
    problems: list = []
    node = read(inline([text, {"a": text}]), problems)
    if all(char.isprintable() for char in text):
        assert node is not None
        assert node.plain() == [text, {"a": text}]


def only_recipe_errors(text: str, *overrides: str) -> None:
    try:
        parse(text, "r.yaml", overrides)
    except RecipeError as error:
        assert all(char.isprintable() or char == "\n" for char in str(error))
        assert "pydantic" not in str(error)
        assert error.line is None or 1 <= error.line <= len(re.split(r"\r\n|\r|\n", text))


@given(st.text(max_size=200) | st.lists(MARKS, max_size=40).map("".join))
@settings(deadline=None, max_examples=400)
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    only_recipe_errors(text)
    only_recipe_errors(LEAST + text)
    only_recipe_errors(LEAST, text, "training." + text, "data.train=" + text)


@given(ROOTS)
@settings(deadline=None, max_examples=300)
def test_any_structure_is_a_recipe_or_a_recipe_error(value: object) -> None:
    text = inline(node_of(value, Place(1, 1)).plain())
    only_recipe_errors(text)
    for key in ("model", "data", "method", "training", "tasks", "export", "chat", "name", "seed"):
        only_recipe_errors(f"{LEAST}{key}: {text}", f"{key}={text}")
    only_recipe_errors(f"{LEAST}tasks: [{text}]")


@given(st.data())
@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
def test_any_damage_is_a_recipe_or_a_recipe_error(data: st.DataObject) -> None:
    text = starter(data.draw(st.sampled_from(sorted(USE_CASES))), "a", whole=data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = start + data.draw(st.sampled_from([0, 0, 1, 5, 40]))
        text = text[:start] + data.draw(MARKS | TEXTS) + text[end:]
    only_recipe_errors(text)


@pytest.mark.parametrize(
    "text", ["a: [" * 30, "[" * 100_000, "? " * 5000, "{a: " * 5000, "- " * 5000, "x" * 2**20, "'" * 2**18]
)
def test_hostile_texts_end_soon(text: str) -> None:
    only_recipe_errors(text)


def test_billion_laughs() -> None:
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]
    only_recipe_errors("\n".join(lines))


@pytest.mark.skipif("AFINA_FUZZ" not in os.environ, reason="set AFINA_FUZZ to a number of examples for a long search")
def test_a_long_search() -> None:
    settings(max_examples=int(os.environ["AFINA_FUZZ"]), deadline=None)(test_any_damage_is_a_recipe_or_a_recipe_error)()


def test_recipes_are_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    only_recipe_errors(LEAST + "x: !!python/object/apply:os.mkdir [made]\n")
    assert list(tmp_path.iterdir()) == []
