"""data.mapping: what a template only copies is copied here, and comes out as the sandbox would have it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afina.data.mapping import Mapped, copied
from afina.data.row import BadRow
from afina.data.worker import WORKER
from afina.recipe.schema import Mapping

COPIES = [
    "{{ row.a }}",
    "{{ row['a'] }}\n",
    "  {{- row.a }}: {{ row['b c'] -}}  \n{# a note #}",
    "{{ row.a.b }} {{ row['a']['items'] }}",
    "{{ row['items'] }}{{ row.b }}",
    "no row at all {% raw %}{{ row.a }}{% endraw %}",
    "{{ row }}",
    "",
]
DOES_MORE = [
    "{{ row.a | trim }}",
    "{{ row.items }}",
    "{{ row.__class__ }}",
    "{{ row.a[0] }}",
    "{{ row[keys[0]] }}",
    "{{ keys }}",
    "{{ rows.a }}",
    "{% if row.a %}{{ row.a }}{% endif %}",
    "{% set row = {'a': 'b'} %}{{ row.a }}",
    "{{ row.a ~ row.b }}",
    "{{ 'x' }}",
]
TEXTS = st.text(st.sampled_from("ab ñ\n\ud800{}<"), max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["a", "b", "b c", "items", "0"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("template", [*COPIES, *DOES_MORE])
def test_what_a_template_copies_is_what_the_sandbox_makes(template):
    status, parts = WORKER.ask("copies", template, [None])[0]
    assert status == "made" and bool(parts) == (template in COPIES)

    @settings(deadline=None, max_examples=40)
    @given(rows=st.lists(VALUES, max_size=8))
    def holds(rows):
        made = WORKER.ask("mapping", template, [(row, ()) for row in rows])
        for row, (status, text) in zip(rows, made, strict=True):
            here = copied(json.loads(parts), row) if parts else None
            assert here is None or (status, here) == ("made", text)

    holds()


def test_texts_are_copied_and_all_else_is_left_to_the_sandbox():
    parts = json.loads(WORKER.ask("copies", "{{ row.a }} = {{ row['b']['c'] }}.", [None])[0][1])
    assert copied(parts, {"a": "x", "b": {"c": "y"}}) == "x = y."
    for row in ({"a": 1, "b": {"c": "y"}}, {"a": "x", "b": "c"}, {"a": "x"}, ["a"], None, {"a": "x" * 2**20}):
        assert copied(parts, row) is None


def test_a_row_says_the_same_by_itself_and_among_others():
    mapped = Mapped(Mapping(system="{{ row.s }}", user="{{ row.q }}", assistant="{{ row.q }}{{ row.a | upper }}"))
    rows = [({"s": " ", "q": " one ", "a": "b"}, ()), ({"s": "s", "q": 2, "a": "b"}, ()), ({"q": "three"}, ())]
    together = mapped.said(rows)
    assert together[:2] == [
        (("user", "assistant"), ["one", "one B"]),
        (("system", "user", "assistant"), ["s", "2", "2B"]),
    ]
    assert isinstance(together[2], BadRow) and "'s'" in str(together[2])
    alone = [mapped.said([row])[0] for row in rows]
    assert alone[:2] == together[:2] and str(alone[2]) == str(together[2])
