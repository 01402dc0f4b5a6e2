"""The rules between keys, each broken once and kept once."""

import pytest

from afina.errors import RecipeError
from afina.recipe import check
from afina.recipe.load import parse
from afina.recipe.schema import Recipe

LEAST = "name: a\ndata:\n  train: x.jsonl\n"
TASK = LEAST + "tasks:\n- name: t\n  kind: {kind}\n  data: y\n"


@pytest.mark.parametrize(
    ("text", "line", "column", "said"),
    [
        (LEAST + "  dialect: mapping\n", 4, 3, "data.dialect: This dialect needs data.mapping"),
        (LEAST + "  dialect: alpaca\n  mapping: {user: a, assistant: b}\n", 5, 3, "the dialect here is alpaca"),
        ("name: a\ndata:\n  train: []\n", 3, 3, "names no file"),
        ("name: a\ndata:\n  train: ['', x]\n", 3, 11, "data.train.0"),
        ('name: a\ndata:\n  train: "a\\0"\n', 3, 3, "not the name of a file"),
        (LEAST + "  validation: []\n", 4, 3, "names no file"),
        (LEAST + "model:\n  base: ' '\n", 5, 3, "model.base"),
        (LEAST + "  encoding: []\n", 4, 3, "at least one encoding"),
        (LEAST + "  encoding: [utf-8, rot13]\n", 4, 21, "not known"),
        (LEAST + "  encoding: [utf-9]\n", 4, 14, "not known"),
        (LEAST + '  encoding: ["a\\0b"]\n', 4, 14, "not known"),
        (TASK.format(kind="classification") + "  labels: [a]\n", 8, 3, "at least two"),
        (TASK.format(kind="classification") + "  labels: []\n", 8, 3, "at least two"),
        (TASK.format(kind="classification") + "  labels: [a, b, a]\n", 8, 18, "The label a stands twice"),
        (TASK.format(kind="classification") + "  labels: [a, ' ']\n", 8, 15, "cannot be empty"),
        (TASK.format(kind="exact") + "  labels: [a, b]\n", 8, 3, "labels belongs to tasks of kind classification"),
        (TASK.format(kind="exact") + "  field: a\n", 8, 3, "field belongs to tasks of kind json"),
        (TASK.format(kind="exact") + "- {name: t, kind: json, data: z}\n", 8, 4, "Two tasks are called t"),
        (LEAST + "tasks:\n- {name: '', kind: json, data: z}\n", 5, 4, "needs a name"),
        (LEAST + "training:\n  warmup: 1.5\n", 5, 3, "1.5 is neither"),
        (LEAST + "training:\n  steps: 5\n  warmup: 5\n", 6, 3, "never ends"),
        (LEAST + "training:\n  micro_batch_tokens: 1023\n", 5, 3, "cannot hold a sample of 1024"),
        (LEAST + "export:\n  formats: [f16, q8_0, f16]\n", 5, 24, "f16 stands twice"),
        (LEAST + "method:\n  targets: []\n", 5, 3, "names no layer"),
        (LEAST + "method:\n  targets: [a, a]\n", 5, 16, "named once"),
        (LEAST + "method:\n  init: orthogonal\n  rank: 3\n", 6, 3, "even rank"),
        (LEAST + "model: {quantization: nf4}\nmethod:\n  init: orthogonal\n", 6, 3, "beside plain weights"),
        (LEAST + "method:\n  init: pissa\n  experts: true\n", 5, 3, "cannot begin as pissa"),
        (LEAST + "method:\n  router: true\n  dora: true\n", 5, 3, "know no DoRA"),
        (LEAST + "method: {name: full}\nexport:\n  formats: [lora]\n", 6, 3, "merged instead of lora"),
        (
            TASK.format(kind="classification")
            + "  decide: constrained\nmethod: {name: prompt-tuning}\nexport: {formats: []}\n",
            8,
            3,
            "Leave decide out",
        ),
        (
            TASK.format(kind="code") + "  temperature: 0.5\nmethod: {name: prefix-tuning}\nexport: {formats: []}\n",
            8,
            3,
            "Leave temperature out",
        ),
        (LEAST + "method: {bias: all}\nexport:\n  formats: [q8_0, lora]\n", 6, 3, "method.bias makes more of it"),
    ],
)
def test_broken_rules(text: str, line: int, column: int, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml")
    assert said in caught.value.message
    assert (caught.value.line, caught.value.column) == (line, column)


@pytest.mark.parametrize(
    "text",
    [
        LEAST + "  dialect: mapping\n  mapping: {user: a, assistant: b}\n",
        LEAST + "  mapping: {user: a, assistant: b}\n",
        LEAST + "  encoding: [utf-8, latin-1, cp1252, utf-16]\n",
        TASK.format(kind="classification") + "  labels: [a, b]\n",
        TASK.format(kind="json") + "  field: a\n",
        LEAST + "training:\n  steps: 5\n  warmup: 4\n",
        LEAST + "training:\n  warmup: 100\n",
        LEAST + "training:\n  micro_batch_tokens: 1024\n",
        LEAST + "export: {formats: []}\n",
        LEAST + "method:\n  targets: [q_proj, v_proj]\n",
        LEAST + "method: {init: orthogonal}\n",
        LEAST + "method: {init: pissa, router: true}\n",
        LEAST + "method: {name: full}\nexport: {formats: [merged]}\n",
    ],
)
def test_kept_rules(text: str) -> None:
    assert check.faults(parse(text, "r.yaml")) == []


def test_a_rule_is_silent_about_what_is_reported_already() -> None:
    with pytest.raises(RecipeError) as caught:
        parse(LEAST + "  dialect: mapping\n  mapping: {user: a}\n", "r.yaml")
    assert "data.mapping.assistant is missing" in caught.value.message
    assert "mistakes" not in caught.value.message


def test_rules_serve_recipes_made_in_python() -> None:
    recipe = Recipe(name="a", data={"train": []}, training={"warmup": 1.5})
    assert [fault.path for fault in check.faults(recipe)] == [("data", "train"), ("training", "warmup")]
