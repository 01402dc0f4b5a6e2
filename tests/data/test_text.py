"""Plain text has no template: every token of it is learnt, its end too where it has one, and it stays text."""

from pathlib import Path

import pytest
from data.byte_level import build
from hypothesis import given, settings
from hypothesis import strategies as st

from afina.data.audit.labels import audit
from afina.data.conversation import DOCUMENT, PASSAGE, Message, Sample
from afina.data.template import Renderer
from afina.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer(build(bos="<s>", adds_bos=True, special=["<|im_end|>"]), None)
TEXT = st.lists(
    st.sampled_from(["<s>", "</s>", "<|im_end|>", "a", " ", "ñ", "\n"])
    | st.text(st.characters(exclude_categories=["Cs"])),
    min_size=1,
).map("".join)


@settings(deadline=None, max_examples=60)
@given(TEXT.filter(str.strip), st.sampled_from([DOCUMENT, PASSAGE]))
def test_all_of_a_text_is_learnt_and_none_of_it_is_control(text, role):
    sample = Sample((Message(role, text),), Path("a.txt"), 1)
    row = Renderer(TOKENIZER).sample(sample)
    end = [TOKENIZER.hf.eos_token_id] if role == DOCUMENT else []
    ids = row.ids.tolist()
    assert ids[0] == TOKENIZER.bos_id
    assert ids[len(ids) - len(end) :] == end
    inside = ids[1 : len(ids) - len(end)]
    assert TOKENIZER.hf.decode(inside) == text
    assert not set(inside) & set(TOKENIZER.control_tokens.values())
    assert row.learnt.tolist() == [False] + [True] * (len(ids) - 1)
    assert audit([sample], [row], TOKENIZER, 10**6) == []


def test_a_text_is_no_question(tmp_path):
    from afina.errors import DataError
    from afina.evaluate.run import questions
    from afina.recipe.load import parse

    (tmp_path / "a.txt").write_text("Once upon a time.")
    recipe = parse("{name: a, data: {train: a.txt}, tasks: [{name: t, kind: exact, data: a.txt}]}", "a.yaml")
    with pytest.raises(DataError, match="is plain text"):
        questions(recipe, tmp_path)
