"""What is counted without memory is what a real pass takes, byte for byte; and what moments take is what they take."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import SHAPE
from torch import nn
from transformers import LlamaConfig

from afina.data.template import Rendered
from afina.engine.engine import Engine
from afina.errors import RecipeError, ResourceError
from afina.forecast.device import Device
from afina.forecast.gpus import GIB, GPUS, find, named
from afina.forecast.weigh import Given, largest_batch, opened, weigh
from afina.model.attach import learning
from afina.model.footprint import Footprint
from afina.model.load import Hardware
from afina.model.loss import summed_loss
from afina.model.packed import covers, packed_attention
from afina.model.skeleton import on_cpu
from afina.model.virtual import virtual_tokens
from afina.recipe.load import parse
from afina.recipe.schema import Training
from afina.train.loop import accumulate
from afina.train.opening import left_to_the_reference
from afina.train.optimizer import make_optimizer, moments

CPU = Device("cpu", "CPU", 8 * GIB, torch.float32)
METHODS = ["{rank: 4}", "{name: full}", "{name: prompt-tuning, virtual_tokens: 3}", "{name: prefix-tuning}"]


def samples(lengths: list[int]) -> list[Rendered]:
    """All learnt, of a vocabulary of 97."""
    more = [None] * (len(Rendered.__dataclass_fields__) - 2)
    return [
        Rendered(np.arange(length, dtype=np.int32) % 90 + 3, np.ones(length, bool), *more)  # type: ignore[arg-type]
        for length in lengths
    ]


def recipe_of(text: str, **model: object):
    recipe = parse(f"name: a\ndata: {{train: x}}\nexport: {{formats: []}}\n{text}", "recipe.yaml")
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"max_length": 64, **model})})


def base(folder, config) -> str:
    config.save_pretrained(folder)
    return str(folder)


def wanted(source: str, recipe, lengths: list[int]) -> Given:
    tokenizer = SimpleNamespace(turn_tokens={}, pad_id=0)
    return Given(recipe, source, samples(lengths), tokenizer)  # type: ignore[arg-type]


def really(given: Given) -> tuple[int, int]:
    """Peak and saved bytes of the same pass with tensors that have memory."""
    with Footprint() as held:
        model = on_cpu(opened(given, CPU)[0].train())
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:  # buffers hold what lay in memory before
                if tensor.is_floating_point():
                    tensor.normal_(0, 0.1)
        reason = left_to_the_reference(model, given.recipe)
        loss_fn = summed_loss if reason is not None else Engine(model, torch.float32).summed_loss
    packing = given.recipe.training.packing and covers(model)
    batch, _several = largest_batch(given, 4096, packing=packing, extra=virtual_tokens(model))
    saved = 0

    def noting(model: nn.Module, batch):
        nonlocal saved
        loss = loss_fn(model, batch)
        saved = held.now
        return loss

    before = held.now
    with packed_attention(model, packing):
        for _turn in range(2):  # the first finds what is kept for good
            for parameter in model.parameters():
                parameter.grad = None
            with held:
                before = held.peak = held.now
                loss = accumulate(model, [batch], 1.0, 0, 0, Hardware(torch.device("cpu"), torch.float32), noting)
    assert torch.isfinite(loss)
    return held.peak - before, saved - before


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.sampled_from([(2, 1), (4, 2), (4, 4)]),
    layers=st.integers(1, 3),
    lengths=st.lists(st.integers(16, 60), min_size=1, max_size=5),
    method=st.sampled_from(METHODS),
    training=st.sampled_from(
        ["{}", "{packing: false}", "{engine: reference}", "{engine: reference, neftune_alpha: 5}"]
    ),
)
def test_a_pass_takes_what_was_foretold(tmp_path, heads, layers, lengths, method, training):
    config = LlamaConfig(
        **SHAPE | {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "num_hidden_layers": layers}
    )
    given = wanted(base(tmp_path, config), recipe_of(f"method: {method}\ntraining: {training}\n"), lengths)
    need = weigh(given, CPU)
    assert need.unknown is None and need.fits
    peak, saved = really(given)
    foretold = need.parts["saved"] + need.parts["working"]
    # of a padded batch masks are counted in each layer that are not made where all tokens are real
    real = "padded" in (need.reason or "") and len(set(lengths)) == 1
    masks = 12 * layers * len(lengths) * (max(lengths) + 20) ** 2 if real else 0
    assert foretold == pytest.approx(peak, rel=0.05, abs=32768 + masks)
    assert need.parts["saved"] == pytest.approx(saved, rel=0.05, abs=4096 + masks)


@pytest.mark.parametrize("name", ["qwen3", "phi2", "phi3", "gemma2", "gpt2"])
def test_families_are_weighed_known_or_not(tmp_path, name):
    """Phi-3 and Gemma 2 decide by numbers which angles and masks they take; GPT-2 looks for padding."""
    given = wanted(base(tmp_path, FAMILIES[name]()), recipe_of("training: {engine: reference}"), [40, 30])
    need = weigh(given, CPU)
    assert need.unknown is None
    assert need.parts["saved"] + need.parts["working"] == pytest.approx(really(given)[0], rel=0.05, abs=4096)


def test_on_a_gpu_the_engine_plans_and_less_memory_asks_for_more_work(tmp_path):
    source = base(tmp_path, LlamaConfig(**SHAPE | {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 4000}))
    card = find("RTX 3090")
    given = wanted(source, recipe_of("method: {rank: 4}\ntraining: {batch_size: 64}"), [60] * 64)
    roomy = weigh(given, Device("cuda", "", 2 * GIB, torch.bfloat16, card))
    assert roomy.fits and not any(place.again or place.away for place in roomy.plan.placements)
    tight = weigh(given, Device("cuda", "", int(0.572 * GIB), torch.bfloat16, card))
    assert tight.least < roomy.least and (tight.budget < roomy.budget or any(p.again for p in tight.plan.placements))
    none = weigh(given, Device("cuda", "", int(0.5 * GIB), torch.bfloat16, card))
    assert not none.fits


@pytest.mark.parametrize("kind, bits", [("nf4", 4.5), ("int8", 8.1)])
def test_held_in_few_bits(tmp_path, kind, bits):
    """bitsandbytes is not asked: NF4 takes four bits a weight and a scale for 64, eight bits a scale a row."""
    config = LlamaConfig(**SHAPE | {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 97})
    recipe = recipe_of("method: {rank: 4}\n", quantization=kind, double_quantization=False)
    need = weigh(wanted(base(tmp_path, config), recipe, [30]), Device("cuda", "", 4 * GIB, torch.bfloat16, None))
    plain = weigh(wanted(str(tmp_path), recipe_of("method: {rank: 4}\n"), [30]), CPU)
    layers = plain.parameters - plain.learnt - 2 * 97 * 512
    told = need.parts["weights"] - 2 * 2 * 97 * 512
    assert need.parameters == plain.parameters
    assert 8 * told / layers == pytest.approx(bits, rel=0.15)


def test_what_training_would_refuse_is_refused(tmp_path):
    source = base(tmp_path, LlamaConfig(**SHAPE))
    with pytest.raises(RecipeError, match="512"):
        weigh(wanted(source, recipe_of("", max_length=512), [30]), CPU)
    with pytest.raises(RecipeError, match="no_such"):
        weigh(wanted(source, recipe_of("method: {targets: [no_such]}"), [30]), CPU)


@settings(max_examples=20, deadline=None)
@given(
    shapes=st.lists(
        st.one_of(
            st.tuples(st.integers(1, 9000)),
            st.tuples(st.integers(1, 90), st.integers(1, 90)),
            st.tuples(st.integers(2, 4), st.integers(8, 40), st.integers(8, 40)),
        ),
        min_size=1,
        max_size=4,
    ),
    kind=st.sampled_from(["adamw", "adamw-8bit", "paged-adamw-8bit", "muon", "adafactor", "lion"]),
)
def test_moments_take_what_the_optimiser_makes(shapes, kind):
    if kind.endswith("8bit"):
        pytest.importorskip("bitsandbytes")
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    training = Training(optimizer=kind)
    outside = parameters[:1]
    named = {str(number): parameter for number, parameter in enumerate(parameters)}
    optimizer = make_optimizer(named, training, outside=outside)
    made = sum(
        value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key != "step" and "qmap" not in key
    )
    assert moments(parameters, training, outside) == made


def test_a_forecast_leaves_nothing_behind(tmp_path):
    """Tensors without numbers do not stay in what is remembered of layouts: a real pass after it is as before."""
    given = wanted(base(tmp_path, LlamaConfig(**SHAPE)), recipe_of("training: {engine: reference}"), [20, 30])
    random = torch.get_rng_state()
    weigh(given, CPU)
    assert torch.equal(torch.get_rng_state(), random)
    assert really(given)[0] > 0
    model = opened(given, CPU)[0]
    assert all(parameter.is_meta for parameter in model.parameters()) and learning(model)


@pytest.mark.parametrize(
    "asked, name",
    [
        ("3090", "RTX 3090"),
        ("rtx3060", "RTX 3060"),
        ("NVIDIA GeForce RTX 3050 6GB Laptop GPU", "RTX 3050 Laptop 6 GB"),
        ("RTX 3050 8GB", "RTX 3050 8 GB"),
        ("4060ti", "RTX 4060 Ti"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("t4", "Tesla T4"),
    ],
)
def test_cards_are_known_by_what_people_and_drivers_call_them(asked, name):
    assert named(asked).name == name


def test_cards_that_are_not_known_are_no_others():
    assert all(find(card.name, card.memory) is card for card in GPUS)
    for name in ("RTX 3080 Ti", "NVIDIA GeForce RTX 3060 Laptop GPU", "rtx", "GTX 1080", "", "H1000"):
        assert find(name) is None
    with pytest.raises(ResourceError) as told:
        named("Voodoo 2")
    assert "RTX 3090" in told.value.hint and "--memory" in told.value.hint
