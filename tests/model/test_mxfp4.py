"""Experts packed in MXFP4: the numbers are the format's and transformers', packed stays packed, adapters learn."""

from itertools import product
from pathlib import Path

import gguf
import pytest
import torch
from families import build, pack_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from small import CPU, perturb_adapters
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from afina.errors import ModelError
from afina.model.attach import attach, learning, merged
from afina.model.generate import generate
from afina.model.load import Hardware, load_model
from afina.model.mxfp4 import PackedExperts, dequantise, packed_experts, quantise
from afina.model.saved import load_adapter, save_adapter, save_whole
from afina.recipe.schema import Full, Lora, Model

IDS = torch.tensor([[5, 9, 33, 80, 7, 64, 3, 11, 90, 4, 5, 6]])
WHOLE = Lora(rank=3, alpha=6, experts=True, router=True)


def packed_folder(folder: Path) -> Path:
    """A tiny gpt-oss as its makers publish it: experts in blocks and scales."""
    build("gpt-oss").save_pretrained(folder)
    return pack_folder(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return packed_folder(tmp_path_factory.mktemp("gpt-oss"))


@pytest.fixture(scope="module")
def plain(folder) -> nn.Module:
    """transformers alone, its own dequantisation."""
    return unpacked_by_transformers(folder)


def unpacked_by_transformers(folder: Path) -> nn.Module:
    """Its own classes and its own arithmetic of the format, in fp32 (as a quantised model it would be bf16)."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        packed = (tensors.pop(f"{name}_{part}") for part in ("blocks", "scales"))
        tensors[name] = convert_moe_packed_tensors(*packed, dtype=torch.float32)
    model = build("gpt-oss")
    assert not any(model.load_state_dict(tensors))
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def test_every_byte_and_every_exponent_is_what_the_format_says():
    """The specification spelled out: sign, two bits of exponent with bias 1, one of mantissa; 2^(byte - 127)."""
    numbers = []
    for sign, exponent, mantissa in product((1, -1), range(4), range(2)):
        numbers.append(sign * (mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)))
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scales = torch.tensor([0, 1, 2, 60, 100, 120, 126, 127, 128, 129, 140, 180, 200, 250, 251, 252], dtype=torch.uint8)
    found = dequantise(blocks[:, None], scales[:, None], torch.float32).double()
    for row, scale in enumerate(scales.tolist()):
        for place in range(32):
            byte = row * 16 + place // 2
            nibble = byte & 15 if place % 2 == 0 else byte >> 4
            assert found[row, place] == numbers[nibble] * 2.0 ** (scale - 127)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantised_as_transformers_does(dtype):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 250 if dtype != torch.float16 else 140, (3, 8, 2), dtype=torch.uint8, generator=generator)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert torch.equal(dequantise(blocks, scales, dtype).transpose(1, 2), expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=32, max_size=32))
def test_quantised_as_llama_cpp_does(row):
    weight = torch.tensor([row])
    packed = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.MXFP4)
    expected = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.MXFP4))
    found = dequantise(*quantise(weight), torch.float32)
    assert (found - weight).abs().sum() <= (expected - weight).abs().sum() * (1 + 1e-6)
    assert torch.equal(dequantise(*quantise(found), torch.float32), found)


def test_packed_stays_packed_and_gives_the_same(folder, plain):
    model = load_model(str(folder), CPU)
    assert len(packed_experts(model)) == 2
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    held = sum(buffer.numel() * buffer.element_size() for name, buffer in model.named_buffers() if "experts" in name)
    weights = 2 * 4 * (64 * 64 + 32 * 64)
    assert held == weights // 2 + weights // 32
    unpacked = load_model(str(folder), CPU, Model(experts="unpacked"))
    assert not packed_experts(unpacked) and torch.equal(logits(unpacked), logits(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_a_matrix_is_kept_for_the_backward(folder, dtype):
    """What autograd saves between forward and backward holds no unpacked matrix."""
    model = attach(load_model(str(folder), Hardware(CPU.device, dtype)), WHOLE, seed=0)
    matrix, saved = 64 * 32, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(input_ids=IDS[:, :3], use_cache=False).logits.sum().backward()
    experts = model.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    assert isinstance(experts, PackedExperts)
    there = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    new = [t for t in saved if t.untyped_storage().data_ptr() not in there and t.is_floating_point()]
    assert saved and max(t.numel() for t in new) < matrix


def test_adapters_on_packed_experts_are_pefts(folder, tmp_path):
    """Attention, experts and router: outputs and gradients as plain PEFT's on transformers' unpacked experts."""
    ours = perturb_adapters(attach(load_model(str(folder), CPU), WHOLE, seed=0))
    save_adapter(ours, tmp_path / "a", base="x")
    theirs = PeftModel.from_pretrained(unpacked_by_transformers(folder), tmp_path / "a", is_trainable=True)
    gradients = []
    for model in (ours, theirs):
        out = model.train()(input_ids=IDS, use_cache=False).logits
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() == dict(learning(ours)).keys()
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in gradients[0]} >= {"q_proj", "router", "experts"}
    for name, gradient in gradients[1].items():
        assert gradient.norm() > 0
        assert (gradients[0][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    torch.testing.assert_close(logits(ours.eval()), logits(theirs.eval()), rtol=1e-5, atol=1e-5)
    again = load_adapter(load_model(str(folder), CPU), tmp_path / "a")
    assert torch.equal(logits(again), logits(ours))
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(load_model(str(folder), CPU)))


@pytest.mark.parametrize("method", [Lora(rank=3), WHOLE], ids=["attention", "experts too"])
def test_merged_saved_and_loaded_by_transformers(folder, tmp_path, method):
    """Experts that did not learn are written as they came, byte for byte; those that did are written plain."""
    model = perturb_adapters(attach(load_model(str(folder), CPU), method, seed=0)).eval()
    before = logits(model)
    asked = {"end_ids": [2], "pad_id": 0, "max_new_tokens": 8}
    answers = generate(model, [[5, 9], [7, 8, 9]], **asked)
    save_whole(merged(model), tmp_path)
    tensors, origin = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    packed = {name for name in origin if name.endswith(("_blocks", "_scales"))}
    if method.experts:
        assert not packed & tensors.keys()
        again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    else:
        assert all(torch.equal(tensors[name], origin[name]) for name in packed)
        again = unpacked_by_transformers(tmp_path)
    torch.testing.assert_close(logits(again), before, rtol=1e-4, atol=1e-4)
    ours = load_model(str(tmp_path), CPU)
    assert bool(packed_experts(ours)) != method.experts
    assert generate(ours, [[5, 9], [7, 8, 9]], **asked) == answers


def test_what_cannot_be_is_said(folder):
    with pytest.raises(ModelError, match="cannot learn themselves"):
        attach(load_model(str(folder), CPU), Full(name="full"), seed=0)
    with pytest.raises(ModelError, match="dropout"):
        attach(load_model(str(folder), CPU), Lora(experts=True, dropout=0.1), seed=0)
    with pytest.raises(ModelError, match=r"method\.experts"):
        attach(build("llama3"), Lora(experts=True), seed=0)
    attach(load_model(str(folder), CPU, Model(experts="unpacked")), Full(name="full"), seed=0)
