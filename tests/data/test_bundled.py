"""What ships with the project holds what its cards say."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rapidfuzz import fuzz, process

from afina.data.audit.labels import audit
from afina.data.conversation import Sample
from afina.data.files import BUNDLED_SETS
from afina.data.load_tokenizer import load_tokenizer
from afina.data.read import read
from afina.data.targets import check_targets
from afina.data.template import Renderer
from afina.recipe.place import BUNDLED
from afina.recipe.schema import Data

SETS = sorted(f"afina/{file.parent.name}/{file.stem}" for file in BUNDLED_SETS.glob("*/*.jsonl"))
QUESTION = "¿Positiva, neutra o negativa?"
NEAR_DUPLICATE = 85
"""rapidfuzz's token_set_ratio from which two reviews are the same one in other words."""
PRETRAINING = Path(__file__).parents[2] / "tools" / "pretrain_tiny"


def rows(name: str) -> list[Sample]:
    return read(name, Data(train=name), Path()).samples


def reviews(name: str) -> list[str]:
    return [sample.prompt[-1].content.removeprefix(QUESTION).strip() for sample in rows(name)]


@pytest.mark.parametrize("name", SETS)
def test_every_row_renders_and_audits_clean(name):
    tokenizer = load_tokenizer(str(BUNDLED / "tiny"))
    samples = rows(name)
    rendered = Renderer(tokenizer).samples(samples)
    assert audit(samples, rendered, tokenizer, 1024) == []
    assert len({sample.digest() for sample in samples}) == len(samples)
    end = tokenizer.hf.eos_token_id
    for sample, row in zip(samples, rendered, strict=True):
        answers = [message.content for message in sample.messages if message.role == "assistant"]
        learnt = row.ids[row.learnt]
        assert (learnt == end).sum() == len(answers)
        assert tokenizer.decode(learnt.tolist()) == "".join(answers)


def test_sentiment_is_large_balanced_and_asks_one_question():
    train, test = rows("afina/sentiment/train"), rows("afina/sentiment/test")
    assert len(train) + len(test) >= 600
    for samples in (train, test):
        counts = Counter(sample.answer for sample in samples)
        assert counts.keys() == {"positiva", "neutra", "negativa"}
        assert max(counts.values()) - min(counts.values()) <= 0.05 * len(samples)
        assert all(sample.prompt[-1].content.startswith(QUESTION + "\n") for sample in samples)


def test_no_review_is_another_in_other_words():
    """Neither within training and test nor across them: what is measured was not learnt by heart."""
    texts = reviews("afina/sentiment/train") + reviews("afina/sentiment/test")
    alike = process.cdist(texts, texts, scorer=fuzz.token_set_ratio, score_cutoff=NEAR_DUPLICATE, dtype=np.uint8)
    near = [(texts[one], texts[other]) for one, other in np.argwhere(np.triu(alike, 1)).tolist()]
    assert near == []


def test_each_reason_is_of_its_review():
    """The reviews are those of `sentiment`, training and test apart; every reason is its own."""
    reasons = []
    for part in ("train", "test"):
        labels = dict(zip(reviews(f"afina/sentiment/{part}"), rows(f"afina/sentiment/{part}"), strict=True))
        samples = rows(f"afina/sentiment-explained/{part}")
        for sample in samples:
            question, _line, review = sample.prompt[-1].content.partition("\n")
            answer = json.loads(sample.answer)
            assert question == "Clasifica la reseña y explica por qué." and list(answer) == ["etiqueta", "motivo"]
            assert answer["etiqueta"] == labels[review].answer
            reasons.append(answer["motivo"])
        counts = Counter(json.loads(sample.answer)["etiqueta"] for sample in samples)
        assert set(counts.values()) == {len(samples) // 3}
    assert len(set(reasons)) == 300 and all(reason[0].isupper() and reason[-1] == "." for reason in reasons)


def test_the_base_never_saw_the_task():
    """The sources of the pretraining text hold neither the question nor an answer that is a label, nor any review."""
    sources = sorted(file for file in PRETRAINING.rglob("*") if file.suffix in (".py", ".txt", ".jsonl"))
    assert sources
    held_out = set(reviews("afina/sentiment/train") + reviews("afina/sentiment/test"))
    question = re.compile(r"positiv[ao]s?,?\s+neutr[ao]s?\W+(?:o\s+)?negativ[ao]s?", re.IGNORECASE)
    label = re.compile(
        r"""(?:^|["'>:\n])\s*(?:positiv[ao]|neutr[ao]|negativ[ao])\s*(?:$|["'<\n])""", re.IGNORECASE | re.MULTILINE
    )
    for file in sources:
        text = file.read_text("utf-8")
        assert not question.search(text), file
        found = label.search(text)
        assert found is None, (file, found)
        assert not held_out & {line.strip() for line in text.split("\n")}, file


def test_schemas_of_json_answers():
    """Answers of the sets that come with a schema are JSON of it."""
    for schema in BUNDLED_SETS.glob("*/schema.json"):
        assert isinstance(json.loads(schema.read_text("utf-8")), dict)
        for sample in rows(f"afina/{schema.parent.name}/train"):
            assert isinstance(json.loads(sample.answer), dict), sample.where
        check_targets(rows(f"afina/{schema.parent.name}/train"), schema.read_text("utf-8"))
