"""Weights as they are stored, arithmetic in fp32: the numbers are those of the whole model in fp32."""

from pathlib import Path

import pytest
import torch
from families import FAMILIES, build
from small import perturb_adapters, spread
from transformers import AutoModelForCausalLM

from afina.model import as_stored as room
from afina.model.attach import attach
from afina.model.load import Hardware, load_model
from afina.model.saved import load_adapter, only_adds, save_adapter, settings_of
from afina.recipe.schema import Lora, Model

CPU = Hardware(torch.device("cpu"), torch.float32)
IDS = torch.tensor([[3, 17, 9, 40, 2, 2, 31, 8, 55, 12, 1]])


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "WEIGHTS", 1000)  # several parts a matrix


def stored(tmp_path: Path, name: str, dtype: torch.dtype) -> Path:
    spread(build(name)).to(dtype).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("name", FAMILIES)
def test_sixteen_bits_as_if_all_were_fp32(tmp_path: Path, name: str) -> None:
    base = stored(tmp_path, name, torch.bfloat16)
    whole, held = load_model(str(base), CPU), load_model(str(base), CPU, held=True)
    head = held.get_output_embeddings()  # Gemma's is its embedding, which is multiplied as it is held
    assert head.weight.dtype == (torch.float32 if name == "gemma2" else torch.bfloat16)
    with torch.inference_mode():
        truth, found = whole(input_ids=IDS).logits, held(input_ids=IDS).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_as_if_dequantised(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes", reason='install "afina[qlora]"')
    base = stored(tmp_path, "llama2", torch.float32)
    wanted = Model(quantization=kind, precision="fp32", device="cpu")
    plain, held = load_model(str(base), CPU, wanted, plain=True), load_model(str(base), CPU, wanted, held=True)
    with torch.inference_mode():
        truth, found = plain(input_ids=IDS).logits, held(input_ids=IDS).logits
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_upon_what_is_held(tmp_path: Path, dora: bool) -> None:
    base = stored(tmp_path, "llama2", torch.bfloat16)
    tuned = attach(load_model(str(base), CPU), Lora(rank=4, alpha=8, dora=dora), seed=0)
    perturb_adapters(tuned)
    save_adapter(tuned, tmp_path / "adapter", "base")
    assert only_adds(settings_of(tmp_path / "adapter"))
    held = load_adapter(load_model(str(base), CPU, held=True), tmp_path / "adapter")
    with torch.inference_mode():
        truth, found = tuned.eval()(input_ids=IDS).logits, held(input_ids=IDS).logits
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


def test_adapters_that_do_more_than_add(tmp_path: Path) -> None:
    assert only_adds({"peft_type": "LORA"}) and not only_adds({"peft_type": "LORA", "modules_to_save": ["lm_head"]})
    assert not only_adds({"peft_type": "PROMPT_TUNING"}) and not only_adds(settings_of(tmp_path))


def test_weights_are_pages_of_their_file(tmp_path: Path) -> None:
    """What is loaded in the type it is stored in takes no memory of its own."""
    base = stored(tmp_path, "llama2", torch.bfloat16)
    held = load_model(str(base), CPU, held=True)
    file = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("this system does not say what memory belongs to which file")
    pages = [line for line in maps.read_text().splitlines() if str(base / "model.safetensors") in line]
    spans = [tuple(int(number, 16) for number in line.split()[0].split("-")) for line in pages]
    weight = held.get_output_embeddings().weight
    assert any(start <= weight.data_ptr() < end for start, end in spans)
    assert torch.equal(weight, file.get_output_embeddings().weight)
