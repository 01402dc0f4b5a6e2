"""Each method against plain PEFT, on one family; every pair of method and family stands in docs/methods.json."""

import pytest
from parity.ours import METHODS, measure
from small import llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("base")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(place)
    return place


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_plain_pefts(folder, name):
    if METHODS[name].model.quantization != "none":
        pytest.importorskip("bitsandbytes")
    found = measure(folder, METHODS[name])
    assert found.holds(), found
