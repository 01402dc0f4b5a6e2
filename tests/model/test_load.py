"""Folders that are no model give one ModelError, whatever is wrong; no code of theirs runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import CPU, llama
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, MistralConfig

from afina.errors import AfinaError, ModelError, ResourceError
from afina.model.load import Hardware, cache_bytes, choose_hardware, limit_of, load_model, without_dropout
from afina.recipe.schema import Model

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    llama().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A good model folder, to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def config_of(folder: Path, **changes) -> None:
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def refused(folder: Path | str) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), CPU)
    error = caught.value
    assert str(folder) in str(error) and error.hint and "\n" not in error.message
    return error


def test_a_saved_model_is_loaded_to_be_asked(saved):
    model = load_model(str(saved), CPU)
    ids = torch.tensor([[3, 4, 5]])
    assert not model.training
    assert torch.equal(model(input_ids=ids).logits, llama()(input_ids=ids).logits)
    assert limit_of(model) == 256
    assert cache_bytes(model) == 2 * 2 * 2 * 8 * 4


def test_weights_are_held_in_the_precision_asked_for(saved):
    model = load_model(str(saved), Hardware(torch.device("cpu"), torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_no_folder_and_no_network():
    refused("/nowhere/at/all")
    refused("some-owner/no-such-model")
    refused("")


def test_a_folder_without_a_configuration(folder):
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder).message


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "no .safetensors" in refused(folder).message


def test_pickled_weights_alone_are_never_opened(folder):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (folder / "exploded",))

    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb()}, folder / "pytorch_model.bin")
    assert "can run code" in refused(folder).hint
    (folder / "decoy.safetensors").write_bytes((b"\x02" + b"\0" * 7) + b"{}")
    refused(folder)
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"llama"', b"null", b"{}", b"\xff\xfe", b'{"model_type": "llama"', b"[" * 100_000],
    ids=["empty", "cut", "list", "text", "null", "bare", "bytes", "open", "deep"],
)
def test_a_configuration_that_is_none(folder, content):
    (folder / "config.json").write_bytes(content)
    refused(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no-such-architecture"},
        {"model_type": 7},
        {"model_type": "bert"},
        {"hidden_size": "many"},
        {"hidden_size": -32},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 3},
        {"hidden_size": 48, "head_dim": 8},
        {"vocab_size": 96},
        {"rope_parameters": {"rope_type": "no-such-type"}},
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()),
)
def test_a_configuration_that_does_not_fit(folder, changes):
    config_of(folder, **changes)
    refused(folder)


@pytest.mark.parametrize("content", [b"", b"\0" * 4, b"not tensors at all", b"\xff" * 64])
def test_damaged_weights(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder)


def test_weights_cut_short(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(folder)


def test_weights_of_which_some_are_missing(folder):
    """transformers would fill them with random numbers and only log it."""
    config_of(folder, tie_word_embeddings=False)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "up_proj" in refused(folder).message


@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_model_folder_never_runs(folder, known):
    code = f"from pathlib import Path\nPath({str(folder / 'exploded')!r}).touch()\n"
    code += "from transformers import LlamaForCausalLM as Evil, LlamaConfig as EvilConfig\n"
    (folder / "modeling_evil.py").write_text(code)
    auto = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"}
    config_of(folder, auto_map=auto, trust_remote_code=True, **({} if known else {"model_type": "evil"}))
    if known:
        load_model(str(folder), CPU)  # our own class of that name
    else:
        refused(folder)
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_configuration_cannot_ask_for_a_kernel_from_the_hub(folder, key):
    config_of(folder, **{key: "someone/evil-kernel"})
    assert load_model(str(folder), CPU).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL, query_pre_attn_scalar=8),
        GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1),
        MistralConfig(**SMALL, sliding_window=16),
    ],
    ids=lambda config: config.model_type,
)
def test_other_families_load(tmp_path, config):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), CPU)(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 97)


def test_auto_is_what_the_machine_has():
    assert choose_hardware(Model(device="cpu")) == CPU
    assert str(CPU) == "CPU, fp32"
    assert choose_hardware(Model(device="cpu", precision="bf16")).dtype == torch.bfloat16
    for wanted in (
        {"device": "cpu", "precision": "fp16"},
        *([] if torch.cuda.is_available() else [{"device": "cuda"}]),
    ):
        with pytest.raises(ResourceError) as caught:
            choose_hardware(Model(**wanted))
        assert isinstance(caught.value, AfinaError) and caught.value.hint


def test_the_base_drops_nothing_but_says_so_still():
    from transformers import AutoModelForCausalLM, PhiConfig

    shape = dict(vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = PhiConfig(**shape, resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.arange(3, 23)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert without_dropout(model) == 0.5 and without_dropout(model) == 0.0
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert model.config.resid_pdrop == 0.5, "the configuration is the base's own, and is exported"


def test_what_transformers_does_not_need_is_not_loaded():
    """In a process of its own, as packages are asked for once; what is left out is there for others afterwards."""
    code = """
import sys
from afina.model.load import load_model, spare_imports
spare_imports()
import afina.model.attach, afina.model.decode, transformers.loss.loss_utils, transformers.generation.candidate_generator
print(sorted({"scipy", "sklearn", "torchao"} & set(sys.modules)))
import sklearn.metrics
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "[]"
