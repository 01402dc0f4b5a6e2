"""What a translation must leave as it is."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from afina.data.protect import Unit, joined, parts, proof

TEXT = """# A title

Call `print("hi")` or ``a ` b`` with $x^2 + 1$ and \\(y\\), see https://github.com/a_(b)?c=d and [here](page.html#top).

```python
def translate(me):  # not at all
    return "no"
```

- a list
  ~~~
  deep code
  ~~~

$$
\\int_0^1 x
$$

    indented code

It costs $5 and $6, he has <<3+4=7>>7 {name} <b>apples</b>. Mail a@b.org
"""


def units(text: str) -> list[Unit]:
    return [part for part in parts(text) if isinstance(part, Unit)]


def test_what_stays_and_what_is_translated():
    said = " ".join(unit.text for unit in units(TEXT))
    for word in ("A title", "Call", "a list", "It costs", "apples"):
        assert word in said
    for word in (
        "print",
        "not at all",
        "deep code",
        "int_0",
        "indented",
        "github.com",
        "page.html",
        "3+4",
        "{name}",
        "<b>",
    ):
        assert word not in said
    assert "$5 and $6" in said  # prices are no formula


def test_proof_sees_each_loss():
    assert proof(TEXT, TEXT) == ""
    translated = TEXT.replace("A title", "Un título").replace("a list", "una lista").replace("apples", "manzanas")
    assert proof(TEXT, translated) == ""
    for old, new in (
        ('print("hi")', 'imprimir("hola")'),
        ("not at all", "para nada"),
        ("deep code", "código"),
        ("x^2", "x^3"),
        ("c=d", "c=e"),
        ("page.html", "pagina.html"),
        ("{name}", "{nombre}"),
        ("3+4=7", "3+4=8"),
        ("<b>", "<i>"),
        ("indented code", "código sangrado"),
    ):
        assert proof(TEXT, TEXT.replace(old, new)), old


def test_json_keeps_keys_numbers_and_names():
    text = '{ "greeting": "Hello, dear \\"friend\\" of `x`",\n "intent": "GetWeather", "n": [1.50, true], '
    text += '"a b": "two words"}'
    assert [unit.text for unit in units(text)] == ['Hello, dear "friend" of ⟦1⟧', "two words"]
    made = joined(parts(text), ['Hola, querido "amigo" de ⟦1⟧\n', "dos palabras"])
    assert json.loads(made) == {
        "greeting": 'Hola, querido "amigo" de `x`\n',
        "intent": "GetWeather",
        "n": [1.5, True],
        "a b": "dos palabras",
    }
    assert "[1.50, true]" in made and proof(text, made) == ""
    assert proof(text, made.replace("GetWeather", "Tiempo"))
    assert proof(text, made.replace('"n"', '"m"'))


def test_a_mark_that_is_lost_or_doubled_is_no_translation():
    (unit,) = units("Use `a` and `b`.")
    assert unit.text == "Use ⟦1⟧ and ⟦2⟧."
    assert unit.restored("Usa ⟦2⟧ y ⟦1⟧.") == "Usa `b` y `a`."
    for wrong in ("Usa ⟦1⟧.", "Usa ⟦1⟧ y ⟦1⟧ ⟦2⟧", "Usa ⟦1⟧ ⟦2⟧ ⟦3⟧", "Usa ⟦1⟧ ⟦2⟧ ⟦"):
        assert unit.restored(wrong) is None
    assert "⟦" in units("A text with ⟦7⟧ in it.")[0].kept


BITS = [
    "a word ",
    "`",
    "``",
    "```\n",
    "$",
    "$$",
    "\\(",
    "\\)",
    "\n\n",
    "\n",
    "    ",
    "⟦1⟧",
    "https://arxiv.org/z ",
    "<b>",
    "{{",
    "}}",
]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(st.sampled_from(BITS), st.text(max_size=8)), max_size=20).map("".join))
@example("a word `$`⟦1⟧$")  # a formula that begins in code and swallows the marks behind it is no formula
def test_parts_are_the_whole_text(text):
    made = parts(text)
    assert joined(made, [part.text for part in made if isinstance(part, Unit)]) == text
    assert proof(text, text) == ""


@settings(deadline=None, max_examples=100)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=12),
        lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=5), s, max_size=3),
        max_leaves=8,
    )
)
def test_any_json_comes_back(value):
    text = json.dumps(value, ensure_ascii=False)
    made = parts(text)
    again = joined(made, [part.text for part in made if isinstance(part, Unit)])
    assert json.loads(again) == value


@pytest.mark.parametrize("unit", ["`", "$", "\\(", "{{", "<a ", "](", "⟦", "a@", "www.", "\n"])
def test_no_text_is_hard(unit):
    parts(unit * 20_000)
