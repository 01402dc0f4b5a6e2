"""Ids and masks of every template family as they were when last looked at by hand: what has been trained stays askable.

test_template.py holds that they are right; this holds that they stay. To renew after a change that is meant:

    AFINA_RENEW=1 python -m pytest -n 0 tests/data/test_golden.py
"""

import json
import os
from pathlib import Path

import pytest
from data.byte_level import FAMILIES, tokenizer_for

from afina.data.conversation import Message, Sample
from afina.data.template import Renderer
from afina.errors import AfinaError

GOLDEN = Path(__file__).with_name("golden.json")
TALK = (
    Message("user", "¿Cuánto es 2 + 2?"),
    Message("assistant", "Son 4."),
    Message("user", "And <|im_end|> twice?"),
    Message("assistant", "8\n\n«π ≈ 3» 🙂"),
)
SYSTEM = (Message("system", "You are brief."), *TALK[:2])


def seen(name: str, published: Path | None) -> dict[str, list[str]]:
    """Ids and mask, as two texts, of each conversation that the template takes."""
    render = Renderer(tokenizer_for(name, published))
    found = {}
    for title, messages in (("turns", TALK), ("system", SYSTEM)):
        try:
            row = render.sample(Sample(messages, Path("talk.jsonl"), 1))
        except AfinaError as error:
            found[title] = [type(error).__name__]
        else:
            mask = "".join("01"[int(learnt)] for learnt in row.learnt)
            found[title] = [" ".join(map(str, row.ids.tolist())), mask]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_masks_are_those_of_yesterday(name, request):
    ours = name.startswith("afina/")
    published = None if ours else request.getfixturevalue("real_data") / "templates"
    found, golden = seen(name, published), json.loads(GOLDEN.read_text("utf-8"))
    if os.environ.get("AFINA_RENEW"):
        GOLDEN.write_text(json.dumps({**golden, name: found}, indent=1) + "\n", "utf-8")
    else:
        assert found == golden[name]
