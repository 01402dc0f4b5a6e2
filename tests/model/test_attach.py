"""What is attached learns, is saved in PEFT's format, and merges to the same function."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from small import CPU, llama, perturb_adapters
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from afina.errors import ModelError, RecipeError
from afina.model.attach import attach, learning, merged
from afina.model.load import load_model
from afina.model.saved import load_adapter, save_adapter
from afina.recipe.schema import Full, Lora

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
IDS = torch.tensor([[1, 5, 9, 33, 80, 7, 2, 64]])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def qwen(seed: int = 0) -> nn.Module:
    """A model whose projections have biases."""
    torch.manual_seed(seed)
    settings = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return AutoModelForCausalLM.from_config(Qwen2Config(**settings, num_key_value_heads=2)).eval()


def adapted_layers(model: nn.Module) -> set[str]:
    return {name.split(".lora_A")[0].rpartition(".")[2] for name, _parameter in learning(model) if "lora_A" in name}


def test_a_fresh_adapter_changes_nothing_and_learns_in_fp32():
    before = logits(llama())
    model = attach(llama().bfloat16(), Lora(), seed=0)
    assert all(parameter.dtype == torch.float32 for _name, parameter in learning(model))
    assert torch.equal(logits(attach(llama(), Lora(), seed=0).eval()), before)


def test_all_linear_is_every_linear_layer_but_the_head():
    for tied in (True, False):
        assert adapted_layers(attach(llama(tie_word_embeddings=tied), Lora(), seed=0)) == LINEAR


def test_named_targets_alone_get_adapters():
    assert adapted_layers(attach(llama(), Lora(targets=["q_proj", "down_proj"]), seed=0)) == {"q_proj", "down_proj"}


def test_a_target_there_is_not_is_named_with_those_there_are():
    with pytest.raises(RecipeError, match="qproj") as caught:
        attach(llama(), Lora(targets=["v_proj", "qproj"]), seed=0)
    assert caught.value.hint == "It has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj."
    with pytest.raises(RecipeError):  # half a name is none
        attach(llama(), Lora(targets=["proj"]), seed=0)


@pytest.mark.parametrize("rslora, scale", [(False, 32 / 8), (True, 32 / 8**0.5)])
def test_the_adapter_is_scaled_by_alpha_over_rank_or_its_root(rslora, scale):
    model = perturb_adapters(attach(llama(), Lora(rank=8, alpha=32, rslora=rslora), seed=0))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    low = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x), layer.base_layer(x) + scale * low)


@pytest.mark.parametrize("bias, learns", [("none", False), ("all", True), ("lora_only", True)])
def test_biases_learn_where_the_recipe_says_so(bias, learns):
    names = [name for name, _parameter in learning(attach(qwen(), Lora(bias=bias), seed=0))]
    assert any(name.endswith(".bias") for name in names) == learns


def test_dropout_is_repeatable_and_only_while_training():
    model = perturb_adapters(attach(llama(), Lora(dropout=0.5), seed=0)).train()
    found = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        found.append(logits(model))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(logits(model.eval()), logits(model.eval()))


def test_the_seed_decides_how_adapters_begin_and_nothing_else_does():
    models = [llama() for _ in range(3)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two, other = (dict(learning(attach(models[at], Lora(), seed=seed))) for at, seed in enumerate((1, 1, 2)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_full_learns_everything_in_fp32():
    model = attach(llama().bfloat16(), Full(name="full"), seed=0)
    assert len(learning(model)) == len(list(model.parameters()))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "method",
    [
        Lora(rank=4),
        Lora(rank=8, alpha=5, rslora=True, targets=["q_proj", "up_proj"], dropout=0.1),
        Lora(rank=2, bias="all"),
    ],
    ids=["plain", "rslora", "bias"],
)
def test_a_saved_adapter_is_opened_by_plain_peft(tmp_path, method):
    model = perturb_adapters(attach(llama(), method, seed=0)).eval()
    save_adapter(model, tmp_path / "adapter", base="somewhere/base")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    plain = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    assert torch.equal(logits(plain), logits(model))
    assert not torch.equal(logits(plain), logits(llama()))
    ours = load_adapter(llama(), tmp_path / "adapter")
    assert torch.equal(logits(ours), logits(model)) and not ours.training
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "somewhere/base" and written["inference_mode"]
    assert (written["r"], written["use_rslora"], written["bias"]) == (method.rank, method.rslora, method.bias)


def test_a_full_model_is_saved_as_transformers_reads_it(tmp_path):
    model = attach(llama(3), Full(name="full"), seed=0)
    save_adapter(model, tmp_path / "whole", base="x")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(plain.eval()), logits(model.eval()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_merging_keeps_the_function(tmp_path, tied, rslora):
    model = perturb_adapters(attach(llama(tie_word_embeddings=tied), Lora(rank=4, rslora=rslora), seed=0)).eval()
    before, base = logits(model), logits(llama(tie_word_embeddings=tied))
    whole = merged(model)
    assert not isinstance(whole, PeftModel)
    torch.testing.assert_close(logits(whole), before, rtol=1e-5, atol=1e-5)
    assert (logits(whole) - base).abs().max() > 1e-2
    whole.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), CPU)
    torch.testing.assert_close(logits(again), before, rtol=1e-5, atol=1e-5)
    assert (again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()) == tied


def test_merging_16_bit_weights_adds_up_in_fp32():
    """The sum of a bf16 weight and a small product must not be rounded back to the bf16 weight."""
    model = attach(llama().bfloat16(), Lora(rank=4), seed=0)
    weights = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        weights.lora_B["default"].weight.fill_(1e-4)
    base, low = weights.base_layer.weight.float(), weights.get_delta_weight("default")
    whole = merged(model)
    torch.testing.assert_close(whole.model.layers[0].self_attn.q_proj.weight, base + low, rtol=0, atol=1e-8)


def test_a_full_model_is_merged_already():
    model = attach(llama(), Full(name="full"), seed=0)
    assert merged(model) is model


def adapter_of(folder: Path, **changes) -> Path:
    save_adapter(perturb_adapters(attach(llama(**changes), Lora(rank=4), seed=0)), folder, base="x")
    return folder


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter_is_refused(tmp_path, missing):
    folder = adapter_of(tmp_path / "a")
    (folder / missing).unlink()
    torch.save({}, folder / "adapter_model.bin")  # a pickle is never opened
    with pytest.raises(ModelError, match="holds no adapter"):
        load_adapter(llama(), folder)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="does not fit"):
        load_adapter(llama(hidden_size=64), adapter_of(tmp_path / "a"))
    with pytest.raises(ModelError, match="does not fit"):
        load_adapter(llama(), adapter_of(tmp_path / "deeper", num_hidden_layers=4))


@pytest.mark.parametrize(
    "file, content",
    [
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", b'{"peft_type": "NONSENSE"}'),
        ("adapter_model.safetensors", b"not tensors"),
        ("adapter_model.safetensors", b""),
    ],
)
def test_a_damaged_adapter_is_one_clear_error(tmp_path, file, content):
    folder = adapter_of(tmp_path / "a")
    (folder / file).write_bytes(content)
    with pytest.raises(ModelError, match="does not fit"):
        load_adapter(llama(), folder)
