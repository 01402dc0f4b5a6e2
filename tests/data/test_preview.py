"""What show prints is the sample: its ids, its text to the character, and exactly what is learnt."""

from pathlib import Path

import numpy as np
import pytest
from data.byte_level import build
from hypothesis import given, settings
from hypothesis import strategies as st

from afina.data.conversation import Message, Sample
from afina.data.load_tokenizer import load_tokenizer
from afina.data.preview import page, runs, tokens
from afina.data.stats import advice, figures, spread, warnings
from afina.data.template import Renderer
from afina.data.tokenizer import Tokenizer
from afina.recipe.load import parse
from afina.recipe.place import BUNDLED

RENDERER = Renderer(load_tokenizer(str(BUNDLED / "tiny")))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def sample(*texts: str, line: int = 1) -> Sample:
    roles = ["user", "assistant"] * len(texts)
    return Sample(tuple(Message(role, text) for role, text in zip(roles, texts, strict=False)), Path("a.jsonl"), line)


@settings(deadline=None, max_examples=60)
@given(TEXT, TEXT)
def test_the_tokens_are_the_sample(asked, answer):
    row = RENDERER.sample(sample(asked, answer))
    found = tokens(row, RENDERER.tokenizer)
    assert [token.id for token in found] == row.ids.tolist()
    assert [token.learnt for token in found] == row.learnt.tolist()
    whole = "".join(token.text for token in found)
    assert whole == RENDERER.tokenizer.hf.decode(row.ids.tolist(), clean_up_tokenization_spaces=False)
    assert "".join(text for text, _kind in runs(found)) == whole
    learnt = "".join(text for text, kind in runs(found) if kind.startswith("learnt"))
    assert learnt.removesuffix("<|im_end|>").strip() == answer.strip()
    assert all(left[1] != right[1] for left, right in zip(runs(found), runs(found)[1:], strict=False))


def test_a_character_of_many_tokens_is_shown_once_and_a_broken_one_still_shown():
    tokenizer = Tokenizer(build(), "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    row = Renderer(tokenizer).sample(sample("é", "🙂"))
    assert "".join(token.text for token in tokens(row, tokenizer)).count("🙂") == 1


def test_the_page_holds_text_and_never_runs_it():
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    one = sample(attack, "ok")
    made = page([(one, tokens(RENDERER.sample(one), RENDERER.tokenizer))], attack)
    assert "<script" not in made
    assert "<img" not in made
    assert "default-src 'none'" in made
    assert made.count('class="learnt"') > 1


def recipe(**training: object):
    keys = ", ".join(f"{key}: {value}" for key, value in training.items())
    return parse(f"{{name: a, data: {{train: a.jsonl}}, model: {{max_length: 64}}, training: {{{keys}}}}}", "a.yaml")


def test_figures_and_what_they_say():
    samples = [sample("a", "b " * count) for count in (1, 10, 100)]
    rendered = RENDERER.samples(samples)
    found = figures(samples, rendered, 64)
    assert (found.over, found.losing, found.classes) == (1, 1, None)
    assert found.tokens == sum(row.ids.size for row in rendered)
    assert found.learnt.tolist() == [int(row.learnt.sum()) for row in rendered]
    assert spread(np.array([1, 2, 3, 10])) == {
        "min": 1,
        "median": 2.5,
        "mean": 4,
        "p95": pytest.approx(8.95),
        "max": 10,
    }
    context, epochs, batch = advice(found, recipe())
    assert context.better >= rendered[2].ids.size > context.better // 2
    assert "1 of 3 samples are longer; 1 would lose" in context.reason
    assert (epochs.better, batch.better) == (5.0, 4)
    assert [text.split(" ", 1)[0] for text in warnings(found, recipe())] == ["model.max_length", "3"]
    many = [sample("q", f"a{number}" * 30) for number in range(1000)]
    later = advice(figures(many, RENDERER.samples(many), 4096), recipe())
    assert (later[1].better, later[2].better) == (3.0, 16)


def test_classes_out_of_balance_are_told():
    samples = [sample(str(number), "yes") for number in range(95)] + [sample(f"x{n}", "no") for n in range(5)]
    found = figures(samples, RENDERER.samples(samples), 64)
    assert found.classes == {"yes": 95, "no": 5}
    assert any("out of balance" in text for text in warnings(found, recipe(epochs=20)))
