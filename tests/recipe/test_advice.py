"""M07: the method that fits rows, model and memory, with its reason; whatever is advised must fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afina.recipe.advice import MANY, USABLE, choose, largest, needs, parameters_of

GIB = 2**30


@pytest.mark.parametrize(
    ("billions", "rows", "gib", "gpu", "method"),
    [
        (2.78, 500, 6, True, "qlora"),  # Phi-2 on the RTX 3050 of MISSION.md
        (8.0, 500, 16, True, "qlora"),
        (8.0, 500, 24, True, "lora"),
        (8.0, MANY, 24, True, "lora"),
        (1.0, MANY, 24, True, "full"),
        (1.0, 500, 24, True, "lora"),
        (70.0, 500, 24, True, None),
        (0.5, 50, 8, False, "lora"),
        (0.0039, 50, 8, False, "lora"),  # afina/tiny
        (8.0, 50, 16, False, None),
    ],
)
def test_the_method_that_fits_is_chosen_and_the_reason_told(billions, rows, gib, gpu, method):
    found = choose(billions * 1e9, rows, gib * GIB, gpu=gpu)
    assert found.method == method and f"{gib}" in found.why
    assert " 0.0 " not in found.why
    assert (found.overrides.get("model") == {"quantization": "nf4"}) == (method == "qlora")


def test_a_very_small_base_learns_at_the_rate_of_the_bundled_recipes():
    rates = [choose(size, 300, 8 * GIB, gpu=False).overrides["training"]["learning_rate"] for size in (3.9e6, 0.6e9)]
    assert rates == [1e-3, 2e-4]


def test_eight_bits_are_offered_where_they_pay_and_never_taken_unasked():
    for billions, gpu, offered in ((8.0, True, True), (0.5, True, False), (8.0, False, False), (70.0, True, True)):
        found = choose(billions * 1e9, 500, 64 * GIB, gpu=gpu)
        assert ("training.products: 8bit" in found.why) == offered
        assert "products" not in found.overrides.get("training", {})


@given(st.floats(1e6, 2e11), st.integers(1, 10**6) | st.none(), st.floats(1e9, 2e11), st.booleans())
def test_what_is_advised_fits_and_more_memory_never_means_less(parameters, rows, memory, gpu):
    found, roomier = (choose(parameters, rows, size, gpu=gpu) for size in (memory, 2 * memory))
    if found.method is not None:
        assert needs(parameters, gpu=gpu)[found.method] <= USABLE * memory
        assert roomier.method is not None


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Qwen/Qwen3-0.6B", 0.6e9),
        ("meta-llama/Llama-3.2-1B-Instruct", 1e9),
        ("openai/gpt-oss-20b", 20e9),
        ("HuggingFaceTB/SmolLM2-135M", 135e6),
        ("microsoft/phi-2", 2.78e9),
        ("someone/something", None),
    ],
)
def test_a_size_is_read_from_a_name(name, count):
    assert parameters_of(name) == count


def test_a_size_is_read_from_a_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"0" * 1000)
    assert parameters_of(str(tmp_path)) == 500


def test_the_largest_that_fits_grows_with_memory():
    found = [largest(gib * GIB, "qlora", gpu=True) or 0 for gib in (2, 6, 16, 24, 80, 141)]
    assert found == sorted(found) and found[1] >= 3 and found[-1] >= 70
    assert largest(GIB, "qlora", gpu=False) is None
