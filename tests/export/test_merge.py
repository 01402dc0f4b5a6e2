"""An adapter added from file to file is what PEFT makes of it in memory, bit for bit where nothing was added."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export.test_gguf import pack_experts, random_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small import llama, perturb_adapters

from afina.data.conversation import Message, Sample
from afina.errors import ModelError, ProofError
from afina.export import folding, weights
from afina.export.certificate import Question
from afina.export.divergence import distributions
from afina.export.folding import can_fold, fold, read_adapter
from afina.export.merge import apart
from afina.export.merging import expected_changes, prove_merge
from afina.export.weights import Held, Source
from afina.model.attach import attach, merged
from afina.model.load import Hardware, load_model
from afina.model.saved import load_adapter, save_adapter
from afina.recipe.schema import Lora, Model

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "biases": {"bias": "all"},
    "ranks": {"rank_pattern": {"q_proj": 2}},
}


def adapted(folder: Path, base: Any, **settings: Any) -> Any:
    """The base saved in `folder`/base, in shards; an adapter that does something in `folder`/adapter."""
    base.save_pretrained(folder / "base", max_shard_size="20KB")
    wanted = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    model = perturb_adapters(get_peft_model(base, LoraConfig(**wanted)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("magnitude" in name or name.endswith("bias")):
                parameter.mul_(1.5).add_(0.01)
    model.save_pretrained(folder / "adapter")
    return model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_from_file_to_file_as_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, precision: torch.dtype
) -> None:
    monkeypatch.setattr(folding, "CHUNK_BYTES", 1000)  # several pieces a tensor
    model = adapted(tmp_path, llama(attention_bias=True, tie_word_embeddings=False), **CONFIGS[name])
    changes = expected_changes(model)
    adapter = read_adapter(tmp_path / "adapter")
    assert can_fold(Source(tmp_path / "base"), adapter) and adapter is not None
    counted: list[int] = []
    facts = fold(Source(tmp_path / "base"), adapter, tmp_path / "merged", precision, counted.append)
    expected = {key: value.to(precision) for key, value in merged(model).state_dict().items()}
    found = tensors(tmp_path / "merged")
    assert found.keys() == expected.keys() and sum(counted) == sum(tensor.numel() for tensor in found.values())
    for key, tensor in found.items():
        assert tensor.dtype == precision
        torch.testing.assert_close(tensor, expected[key], rtol=0.01 if precision == torch.bfloat16 else 1e-5, atol=1e-6)
    assert facts["used"] == adapter.tensors
    said = prove_merge(changes, tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "merged", precision)
    assert said["adapter_tensors"] == adapter.tensors and len(said["modules"]) == 14


def test_what_no_adapter_touches_keeps_its_bits(tmp_path: Path) -> None:
    """gpt-oss with its experts in MXFP4 and an adapter on attention."""
    adapted(tmp_path, random_model("gpt-oss"), target_modules=["q_proj", "o_proj"])
    plain = random_model("gpt-oss")
    for path in (tmp_path / "base").iterdir():
        path.unlink()
    plain.save_pretrained(tmp_path / "base")
    pack_experts(tmp_path / "base", plain)
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter is not None and can_fold(Source(tmp_path / "base"), adapter)
    fold(Source(tmp_path / "base"), adapter, tmp_path / "merged", torch.float32)
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "merged")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.endswith(("_blocks", "_scales"))} <= same
    assert before.keys() - same == {
        f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in range(4) for name in "qo"
    }


def test_experts_of_their_own_are_used_once_and_proved(tmp_path: Path) -> None:
    """Adapters on tensors of experts are merged in memory; each is accounted for."""
    model = adapted(
        tmp_path,
        random_model("gpt-oss"),
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    assert read_adapter(tmp_path / "adapter") is None
    changes = expected_changes(model)
    assert sum(change.tensor.endswith("experts.down_proj") for change in changes) == 4
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    merged(model).save_pretrained(tmp_path / "merged")
    said = prove_merge(changes, file, tmp_path / "merged")
    assert said["adapter_tensors"] == 2 * 3 * 4 and all(module["change"] > 0 for module in said["modules"])
    with pytest.raises(ProofError, match="did not use"):
        prove_merge(changes[:-1], file, tmp_path / "merged")
    with pytest.raises(ProofError, match="lacks the training"):
        prove_merge(changes, file, tmp_path / "base")


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    adapted(tmp_path, llama())
    other = tmp_path / "other"
    llama(intermediate_size=64).save_pretrained(other)
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter is not None
    with pytest.raises(ModelError, match=r"shape.*mlp"):
        fold(Source(other), adapter, tmp_path / "merged", torch.float32)
    llama(num_hidden_layers=1).save_pretrained(tmp_path / "shallow")
    assert not can_fold(Source(tmp_path / "shallow"), adapter)
    with pytest.raises(ProofError, match="did not use"):
        fold(Source(tmp_path / "shallow"), adapter, tmp_path / "merged2", torch.float32)


def test_what_is_more_than_a_sum_is_left_to_peft(tmp_path: Path) -> None:
    adapted(tmp_path, llama())
    path = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    for change in ({"modules_to_save": ["lm_head"]}, {"peft_type": "VERA"}, {"init_lora_weights": "pissa"}):
        path.write_text(json.dumps(settings | change))
        assert read_adapter(tmp_path / "adapter") is None
    path.write_text(json.dumps(settings))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weights["base_model.model.lm_head.lora_C.weight"] = torch.zeros(3)
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    assert read_adapter(tmp_path / "adapter") is None


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_merged_a_layer_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    pytest.importorskip("bitsandbytes", reason='install "afina[qlora]"')
    monkeypatch.setattr(weights, "FILE_WEIGHTS", 5_000)
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    cpu, wanted = (
        Hardware(torch.device("cpu"), torch.float32),
        Model(quantization=kind, precision="fp32", device="cpu"),
    )
    tuned = perturb_adapters(attach(load_model(str(tmp_path / "base"), cpu, wanted), Lora(rank=4), seed=0))
    save_adapter(tuned, tmp_path / "adapter", "base")
    plain = load_model(str(tmp_path / "base"), cpu, wanted, plain=True)
    expected = merged(load_adapter(plain, tmp_path / "adapter")).state_dict()
    held = load_adapter(load_model(str(tmp_path / "base"), cpu, wanted, held=True), tmp_path / "adapter")
    changes, adapter = expected_changes(held), read_adapter(tmp_path / "adapter")
    assert adapter is not None and can_fold(Held(held), adapter)
    fold(Held(held), adapter, tmp_path / "merged", torch.float32)
    found = tensors(tmp_path / "merged")
    assert found.keys() == expected.keys() - {"lm_head.weight"}
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)
    prove_merge(changes, tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "merged")


def test_a_model_that_thinks_all_tokens_alike_is_compared_too() -> None:
    """Of 128,000 equally likely tokens each has a log-probability below -11."""
    model = llama(vocab_size=60_000, hidden_size=16, intermediate_size=16)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    asked = [([3, 4], [5])]
    sample = Sample((Message("user", "a"), Message("assistant", "b")), Path("a"), 1)
    question = Question(sample, *asked[0], distributions(model, asked)[0])
    assert apart(model.eval(), [question]) == (0.0, 0.0)
