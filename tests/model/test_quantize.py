"""A base of four or eight bits is bitsandbytes' own, whatever holds it, and can be turned back into plain weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import CPU, llama, perturb_adapters
from torch import nn
from transformers import AutoModelForCausalLM

from afina.data.batch import micro_batches
from afina.data.template import Rendered
from afina.engine.engine import Engine
from afina.engine.families import why_not
from afina.engine.nf4 import from_bitsandbytes
from afina.errors import ModelError, RecipeError, ResourceError
from afina.model import quantize
from afina.model.attach import attach, learning
from afina.model.load import load_model
from afina.model.loss import summed_loss
from afina.recipe.schema import Full, Lora, Model

functional = pytest.importorskip("bitsandbytes.functional")
KINDS = ("nf4", "fp4", "int8")
IDS = torch.tensor([[1, 5, 9, 33, 80, 7, 2, 64]])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base whose rows are whole blocks of 64."""
    place = tmp_path_factory.mktemp("base")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(place)
    return place


def held(folder: Path, kind: str, **more) -> nn.Module:
    return load_model(str(folder), CPU, Model(quantization=kind, **more))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_bitsandbytes_own_in_layer_engine_and_plain(folder, kind, double):
    model, plain = held(folder, kind, double_quantization=double), load_model(str(folder), CPU)
    asked = {"quant_type": kind, "compress_statistics": double, "blocksize": 64}
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        layer, weight = model.get_submodule(name), plain.get_submodule(name).weight
        packed, state = functional.quantize_4bit(weight.detach(), **asked)
        truth = functional.dequantize_4bit(packed, state)
        assert torch.equal(layer.weight.data, packed) and layer.weight.quant_state.nested == double
        assert 0.05 < (truth - weight).norm() / weight.norm() < 0.15
        assert torch.equal(quantize.whole(layer), truth)
        out = torch.empty_like(truth)
        from_bitsandbytes(layer.weight).fill(out)
        torch.testing.assert_close(out, truth, rtol=0, atol=1e-8)
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_is_the_same_function_with_plain_layers(folder, kind):
    model = held(folder, kind)
    before = logits(model)
    assert quantize.quantisation(model) == kind and quantize.is_quantised(model)
    plain = load_model(str(folder), CPU, Model(quantization=kind), plain=True)
    assert not quantize.is_quantised(plain) and type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    # In int8 the layer's inputs are rounded to eight bits as well, which plain layers do not.
    torch.testing.assert_close(logits(plain), before, rtol=0, atol=0.2 if kind == "int8" else 1e-5)
    assert (logits(load_model(str(folder), CPU)) - before).abs().max() > 1e-3


def test_a_plain_model_made_of_a_quantised_one_is_saved_and_loaded_as_plain(folder, tmp_path):
    plain = load_model(str(folder), CPU, Model(quantization="nf4"), plain=True)
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(load_model(str(tmp_path), CPU)), logits(plain))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_is_saved_so_is_recognised(folder, tmp_path, kind):
    model = held(folder, kind)
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), CPU)
    assert quantize.quantisation(again) == kind and torch.equal(logits(again), logits(model))
    assert quantize.quantisation(held(tmp_path, kind)) == kind
    with pytest.raises(RecipeError, match=f"held in {kind} already"):
        held(tmp_path, "fp4" if kind != "fp4" else "nf4")
    assert not quantize.is_quantised(load_model(str(tmp_path), CPU, plain=True))


def test_another_quantisation_is_named_and_refused(folder, tmp_path):
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match=r"quantization_config.*gptq"):
        held(tmp_path, "nf4")


def test_evaluating_does_not_lay_the_weights_out_anew(folder):
    """On CPUs with bf16 instructions bitsandbytes would, and multiply in bf16 from then on."""
    model = held(folder, "nf4")
    before = model.model.layers[0].mlp.up_proj.weight.data.clone()
    first = logits(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight.data, before)
    assert torch.equal(logits(model.train()), first)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_engine_takes_it_with_the_references_numbers(folder, kind):
    model = attach(held(folder, kind), Lora(rank=4), seed=0)
    assert why_not(model) is None
    with torch.no_grad():
        for name, parameter in learning(model):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    random = torch.Generator().manual_seed(0)
    samples = [
        Rendered(torch.randint(3, 97, (length,), generator=random).int().numpy(), torch.ones(length).bool().numpy())
        for length in (5, 17, 9)
    ]
    (batch,) = micro_batches(samples, range(3), budget=100, packing=True, pad_id=0)
    parameters = [parameter for _name, parameter in learning(model)]
    expected = summed_loss(model, batch)
    plain = torch.autograd.grad(expected, parameters)
    loss = Engine(model).summed_loss(model, batch)
    found = torch.autograd.grad(loss, parameters)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert all((one - two).norm() <= 1e-4 * two.norm() for one, two in zip(found, plain, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_dora_asks_a_quantised_base_again_and_again(folder, kind):
    """It looks at the base's weights in each forward, and PEFT moves eight-bit ones when it does."""
    method = Lora(rank=4, dora=True)
    model = perturb_adapters(attach(held(folder, kind), method, seed=0)).eval()
    base = load_model(str(folder), CPU, Model(quantization=kind), plain=True)
    plain = perturb_adapters(attach(base, method, seed=0)).eval()
    first = logits(model)
    torch.testing.assert_close(logits(plain), first, rtol=0, atol=0.2 if kind == "int8" else 1e-4)
    for _time in range(2):
        assert torch.equal(logits(model), first)
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    assert all(slope.norm() > 0 for slope in torch.autograd.grad(loss, [one for _name, one in learning(model)]))
    assert torch.equal(logits(model.eval()), first)


def test_the_engine_leaves_eight_bits_to_the_reference(folder):
    assert "Linear8bitLt" in why_not(attach(held(folder, "int8"), Lora(rank=4), seed=0))


def test_a_quantised_base_cannot_learn_itself(folder):
    with pytest.raises(ModelError, match="cannot learn itself"):
        attach(held(folder, "nf4"), Full(name="full"), seed=0)


def test_packed_weights_are_counted_as_weights(folder):
    plain, four = load_model(str(folder), CPU), held(folder, "nf4")
    assert sum(map(quantize.weights_in, four.parameters())) == sum(map(quantize.weights_in, plain.parameters()))


def test_a_missing_package_and_a_device_it_does_not_serve_are_told(folder, monkeypatch):
    with pytest.raises(ResourceError, match="does not serve mps"):
        quantize.settings(Model(quantization="nf4"), AutoModelForCausalLM, torch.device("mps"), torch.float32)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ResourceError) as caught:
        held(folder, "nf4")
    assert 'pip install "afina[qlora]"' in caught.value.hint


def test_no_kernel_is_fetched_and_nothing_printed(tmp_path):
    """bitsandbytes asks a package called kernels for compiled code from the hub, where the CPU could use it."""
    (tmp_path / "kernels.py").write_text("raise SystemExit('fetched')\n")
    code = "from afina.model import attach, quantize; quantize.bitsandbytes().nn; assert 'kernels' not in sys.modules"
    paths = [str(tmp_path), str(Path(quantize.__file__).parents[2])]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}; {code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
