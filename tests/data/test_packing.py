"""How full packed rows are on real samples; that packing loses none and cuts none is test_batch.py's."""

import numpy as np
import pytest

from afina.data.batch import micro_batches
from afina.data.load_tokenizer import load_tokenizer
from afina.data.read import read
from afina.data.template import Renderer
from afina.recipe.schema import Data


@pytest.mark.real
def test_gsm8k_fills_rows_of_2048_tokens(real_data):
    source = str(real_data / "tokenizers" / "gpt-2")
    reading = read("data/gsm8k/train.jsonl", Data(train="x"), real_data)
    rendered = Renderer(load_tokenizer(source, template="afina/chatml")).samples(reading.samples)
    packed = micro_batches(rendered, range(len(rendered)), budget=2048, packing=True, pad_id=0)
    placed = np.concatenate([batch.samples for batch in packed])
    assert sorted(placed.tolist()) == list(range(len(rendered)))
    assert all(batch.lengths == tuple(rendered[one].ids.size for one in batch.samples) for batch in packed)
    full = sum(batch.tokens for batch in packed) / (2048 * len(packed))
    assert full >= 0.98
