"""Mixtures of experts in the engine against transformers' own loops, and their parts against plain ones in fp64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import YARN
from small import CPU, pack_like_a_checkpoint, perturb_adapters, spread
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from afina.data.batch import micro_batches
from afina.data.template import Rendered
from afina.engine.block import HERE, Placement
from afina.engine.eight import FP8, INT8
from afina.engine.eight_gate import into_eight_bits, prove_eight, try_eight_bits
from afina.engine.engine import Engine
from afina.engine.experts import Matrix
from afina.engine.families import why_not
from afina.engine.plan import Rates, choose, ladder
from afina.engine.products import Scratch
from afina.engine.proof import prove
from afina.engine.router import LowRank, Router
from afina.errors import ModelError
from afina.model.attach import attach, learning
from afina.model.load import unpack
from afina.model.loss import summed_loss
from afina.model.mxfp4 import MATRICES, dequantise, quantise
from afina.model.packed import packed_attention
from afina.recipe.schema import Full, Lora

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = {**SHAPE, "moe_intermediate_size": 40, "num_experts": 9, "num_experts_per_tok": 3}
FAMILIES = {
    "gpt-oss": lambda: GptOssConfig(
        **SHAPE, num_local_experts=6, num_experts_per_tok=3, sliding_window=8, rope_parameters=dict(YARN)
    ),
    "qwen3-moe": lambda: Qwen3MoeConfig(**QWEN, norm_topk_prob=True),
    "qwen3-moe, shares of all": lambda: Qwen3MoeConfig(**QWEN, norm_topk_prob=False),
    "mixtral, all experts": lambda: MixtralConfig(
        **SHAPE, num_local_experts=2, num_experts_per_tok=2, sliding_window=11
    ),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=5, num_experts_per_tok=2),
}
METHODS = {
    "attention": {"targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "experts and router": {"experts": True, "router": True, "rank": 3},
}
RATES = Rates(products=1e2, copies=1e4, exact=1e2)
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def rows(lengths):
    random = np.random.default_rng(0)
    return [
        Rendered(random.integers(3, 97, length).astype(np.int32), np.append(random.random(length - 1) < 0.4, True))
        for length in lengths
    ]


def gradients(engine, model, batch):
    parameters = [parameter for _name, parameter in learning(model)]
    return torch.autograd.grad(engine.summed_loss(model, batch), parameters)


def built(family, packed=False):
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config._experts_implementation = "eager"
    eager = "eager" if config.model_type == "gpt_oss" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=eager)
    model = spread(model, scale=0.2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("_bias"):
                parameter.add_(torch.randn(parameter.shape) * 0.3)
            if "experts" in name and name.rpartition(".")[2] in MATRICES and config.model_type == "gpt_oss":
                parameter.mul_(4)  # so that gates and ups reach the limit of 7
    return pack_like_a_checkpoint(model) if packed else model


def learning_model(family, packed=False, **method):
    return perturb_adapters(attach(built(family, packed), Lora(**{"rank": 4, **method}), seed=0))


def both(model, lengths, dtype):
    """Loss and gradients of the engine on a packed batch, and of transformers on each sample by itself."""
    model, samples = model.to(dtype), rows(lengths)
    parameters = [parameter for _name, parameter in learning(model)]
    expected, plain = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
    for number in range(len(lengths)):
        (alone,) = micro_batches(samples, [number], budget=1, packing=False, pad_id=0)
        loss = summed_loss(model, alone)
        expected += loss.item()
        for total, part in zip(plain, torch.autograd.grad(loss, parameters), strict=True):
            total += part
    (batch,) = micro_batches(samples, range(len(lengths)), budget=100_000, packing=True, pad_id=0)
    loss = Engine(model).summed_loss(model, batch)
    found = torch.autograd.grad(loss, parameters)
    return (loss.item(), found), (expected, plain), [name for name, _parameter in learning(model)]


def agree(found, truths, names, limit):
    for name, gradient, truth in zip(names, found, truths, strict=True):
        assert gradient.shape == truth.shape, name
        assert truth.norm() > 0, name
        assert (gradient - truth).norm() <= limit * truth.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lengths", [[7], [2, 2, 33, 5], [129, 64, 3, 3, 3]], ids=str)
def test_loss_and_gradients_are_the_references(family, method, lengths):
    (loss, found), (expected, plain), names = both(learning_model(family, **METHODS[method]), lengths, torch.float64)
    assert loss == pytest.approx(expected, rel=1e-6)  # transformers' norms and angles are fp32 even here
    agree(found, plain, names, 2e-5)
    (loss, found), _again, _names = both(learning_model(family, **METHODS[method]), lengths, torch.float32)
    assert loss == pytest.approx(expected, rel=1e-5)
    agree(found, plain, names, 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_packed_experts_are_the_reference_and_what_they_unpack_to(method):
    packed = learning_model("gpt-oss", packed=True, **METHODS[method])
    (loss, found), (expected, plain), names = both(packed, [20, 9, 1, 31], torch.float32)
    assert loss == pytest.approx(expected, rel=1e-5)
    agree(found, plain, names, 1e-4)
    unpacked = unpack(built("gpt-oss", packed=True), torch.float32)
    unpacked = perturb_adapters(attach(unpacked, Lora(**{"rank": 4, **METHODS[method]}), seed=0))
    (batch,) = micro_batches(rows([20, 9, 1, 31]), range(4), budget=1000, packing=True, pad_id=0)
    agree(gradients(Engine(unpacked), unpacked, batch), found, names, 1e-5)
    engine = Engine(packed)
    engine.place([HERE] * 2, held=1)  # the last layer unpacked for good, the first in the scratch
    agree(gradients(engine, packed, batch), found, names, 1e-6)


def test_e4m3_holds_what_was_packed_in_mxfp4_exactly():
    """Sixteen powers of two lie between the largest and the least that it does; beyond that, small ones are rounded."""
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 40, 2, 16), dtype=torch.uint8)
    scales = torch.randint(120, 129, (3, 40, 2), dtype=torch.uint8)
    plain = dequantise(blocks, scales, torch.float32)
    plain[1, 7] = 0
    matrix = Matrix(3, 40, 64, torch.empty(0), Scratch(), plain).in_eight_bits(FP8, Scratch())
    assert matrix.plain is None and matrix.eight.values.dtype == torch.float8_e4m3fn
    assert torch.equal(matrix.weights(), plain)
    matrix.hold()
    assert torch.equal(matrix.weights(), plain)


@pytest.mark.parametrize("form", [FP8, INT8], ids=lambda form: form.name)
def test_experts_that_are_no_numbers_are_refused(form):
    plain = torch.randn(2, 16, 16)
    plain[1, 3, 3] = float("inf")
    with pytest.raises(ModelError, match="not a number"):
        Matrix(2, 16, 16, torch.empty(0), Scratch(), plain).in_eight_bits(form, Scratch())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
@pytest.mark.parametrize("family", ["gpt-oss", "qwen3-moe", "mixtral"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", [FP8, INT8], ids=lambda form: form.name)
def test_experts_in_eight_bits_are_those_that_they_mean(family, method, form, device):
    """The gradients of an engine whose experts were replaced by what the eight bits mean, attention aside; and what
    they took before is free."""
    names = ["qkv", "o", "head"]
    learnt = [name for name, _parameter in learning(learning_model(family, **METHODS[method]))]
    dtype, limit = (torch.bfloat16, 1e-2) if device == "cuda" else (torch.float32, 1e-5)
    (batch,) = micro_batches(rows([20, 9, 1, 31]), range(4), budget=1000, packing=True, pad_id=0)
    batch = batch.to(torch.device(device))
    model, meant = (learning_model(family, **METHODS[method]).to(device, dtype) for _ in range(2))
    engine, truth = Engine(model), Engine(meant)
    into_eight_bits(engine, form, exact=names)
    for block, other in zip(engine.blocks, truth.blocks, strict=True):
        for name in ("gate_up", "down"):
            matrix, plain = getattr(block.experts, name), getattr(other.experts, name)
            assert matrix.plain is None and matrix.eight.values.element_size() == 1 and matrix.base.numel() == 0
            plain.plain.copy_(matrix.weights())
    expected = gradients(truth, meant, batch)
    agree(gradients(engine, model, batch), expected, learnt, limit)
    assert 0 < engine.blocks[0].unpacked == engine.blocks[1].unpacked
    engine.place([HERE] * 2, held=1)
    agree(gradients(engine, model, batch), expected, learnt, limit)


@pytest.mark.parametrize("asked", ["fp8", "int8"])
@pytest.mark.parametrize("packed", [False, True])
def test_mixtures_pass_the_gate_of_eight_bits(asked, packed):
    model = learning_model("gpt-oss", packed=packed, **METHODS["experts and router"])
    with torch.no_grad():  # as training leaves them; the other tests' are many times larger
        for name, parameter in model.named_parameters():
            parameter.mul_(0.1 if "lora_B" in name else 0.3 if parameter.ndim > 1 and "embed" not in name else 1)
        for name, buffer in model.named_buffers():
            if name.endswith("_scales"):
                buffer.sub_(2)
    (batch,) = micro_batches(rows([60, 29, 31]), range(3), budget=1000, packing=True, pad_id=0)
    engine = Engine(model)
    loss, exact = engine.summed_loss(model, batch).item(), gradients(engine, model, batch)
    proof = prove_eight(engine, batch, {"fp8": FP8, "int8": INT8}[asked])
    assert {"qkv", "o"} <= set(proof.products) and all(block.router.told is None for block in engine.blocks)
    said = try_eight_bits(engine, batch, asked)
    assert proof.holds and said.startswith("products in eight bits"), (proof, said)
    held = [matrix.eight for block in engine.blocks for matrix in (block.experts.gate_up, block.experts.down)]
    assert [rows is None for rows in held] == [packed] * 4
    assert engine.summed_loss(model, batch).item() == pytest.approx(loss, rel=2e-2)
    assert len(gradients(engine, model, batch)) == len(exact)


@pytest.mark.parametrize("family", ["gpt-oss", "qwen3-moe"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows_at_once", [0, 7])
def test_what_is_made_again_changes_nothing(family, method, rows_at_once):
    model = learning_model(family, family == "gpt-oss", **METHODS[method])
    (batch,) = micro_batches(rows([20, 9, 31]), range(3), budget=1000, packing=True, pad_id=0)
    engine = Engine(model)
    kept = gradients(engine, model, batch)
    names = frozenset(engine.blocks[0].saves(1))
    for level in [level for level in ladder(names) if not level.away] + [Placement(again=names - {"x", "out"})]:
        engine.place([level] * len(engine.blocks), rows_at_once=rows_at_once)
        agree(gradients(engine, model, batch), kept, [name for name, _parameter in learning(model)], 1e-5)


def test_ends_that_pass_by_change_nothing():
    model = learning_model("gpt-oss", packed=True)
    (batch,) = micro_batches(rows([20, 9, 31]), range(3), budget=1000, packing=True, pad_id=0)
    engine = Engine(model)
    kept = gradients(engine, model, batch)
    engine.place([HERE] * 2, host="both")
    agree(gradients(engine, model, batch), kept, [name for name, _parameter in learning(model)], 1e-5)


def test_the_plan_lets_go_of_gate_and_up_first():
    held = choose(Engine(learning_model("gpt-oss", packed=True)), 4096, 256, 10**12, RATES)
    some = choose(Engine(learning_model("gpt-oss", packed=True)), 4096, 256, held.bytes - 1, RATES)
    assert (held.held, some.held) == (2, 1)
    engine = Engine(learning_model("gpt-oss"))
    whole = choose(engine, 4096, 256, 10**12, RATES)
    assert whole.tokens == 4096 and whole.placements == [HERE, HERE] and whole.held == 0
    tight = choose(engine, 4096, 4096, whole.bytes - 1, RATES)
    assert {name for placement in tight.placements for name in placement.again} == {"gate_up"}
    saved = sum(engine.blocks[0].saves(4096).values()) * 4 * len(engine.blocks)
    assert saved < whole.bytes and engine.blocks[0].saves(1)["gate_up"] == 3 * 2 * 96


@pytest.mark.parametrize("broken", ["", "products", "router"])
@pytest.mark.parametrize("family, packed", [("gpt-oss", True), ("qwen3-moe", False), ("mixtral", False)])
def test_the_proof_holds_where_it_should_and_fails_where_it_should(family, packed, broken):
    model = attach(built(family, packed), Lora(rank=4, experts=True), seed=0).train()
    (batch,) = micro_batches(rows([20, 9, 40]), range(3), budget=1000, packing=True, pad_id=0)
    engine = Engine(model)
    before = [parameter.detach().clone() for parameter in engine.parameters]
    if broken == "router":
        engine.blocks[1].router.weight = engine.blocks[1].router.weight.flip(0)
    if broken == "products":
        adapter = engine.blocks[1].experts.down.adapter
        engine.blocks[1].experts.down.adapter = replace(adapter, scale=adapter.scale * 1.3)
    with packed_attention(model):
        proof = prove(engine, model, batch, CPU.autocast(), engine.parameters)
    assert proof.holds != bool(broken), proof
    assert (proof.missed > 0.1) == (broken == "router")
    assert all(block.router.told is None for block in engine.blocks)
    assert all(torch.equal(a, b) for a, b in zip(before, engine.parameters, strict=True))


@pytest.mark.parametrize("family, packed", [("gpt-oss", True), ("qwen3-moe", False)])
def test_a_lean_proof_finds_the_same_and_places_what_the_engine_saves(family, packed):
    model = attach(built(family, packed), Lora(rank=4, experts=True), seed=0).train()
    (batch,) = micro_batches(rows([20, 9, 40]), range(3), budget=1000, packing=True, pad_id=0)
    engine, called = Engine(model), []

    def lean():
        engine.place([Placement(again=frozenset(engine.blocks[0].saves(1)) - {"x", "out"})] * 2, host="both")
        called.append(all(block.router.told is not None for block in engine.blocks))  # the reference was there

    with packed_attention(model):
        wide = prove(engine, model, batch, CPU.autocast(), engine.parameters)
        proof = prove(engine, model, batch, CPU.autocast(), engine.parameters, lean)
    assert called == [True] and proof.holds and proof.loss == pytest.approx(wide.loss, abs=1e-6)
    assert engine.blocks[0].placement.again and model.training


def test_a_proof_that_fails_halfway_leaves_the_adapters_as_they_were():
    model = attach(built("mixtral"), Lora(rank=4), seed=0).train()
    (batch,) = micro_batches(rows([20, 9]), range(2), budget=1000, packing=True, pad_id=0)
    engine = Engine(model)
    before = [parameter.detach().clone() for parameter in engine.parameters]

    def lean():
        raise torch.OutOfMemoryError

    with packed_attention(model), pytest.raises(torch.OutOfMemoryError):
        prove(engine, model, batch, CPU.autocast(), engine.parameters, lean)
    assert model.training and all(torch.equal(a, b) for a, b in zip(before, engine.parameters, strict=True))
    assert all(block.router.told is None for block in engine.blocks)


def test_what_of_a_mixture_is_not_covered_is_said():
    assert why_not(attach(built("gpt-oss"), Lora(experts=True, router=True), seed=0)) is None
    assert "experts themselves" in why_not(attach(built("mixtral"), Full(name="full"), seed=0))
    dense = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**QWEN, mlp_only_layers=[1]))
    assert "no experts" in why_not(attach(dense, Lora(), seed=0))
    noisy = AutoModelForCausalLM.from_config(MixtralConfig(**SHAPE, num_local_experts=2, router_jitter_noise=0.1))
    assert "noise" in why_not(attach(noisy, Lora(), seed=0))


@pytest.mark.parametrize("over_all", [False, True])
@pytest.mark.parametrize("tokens, experts, chosen", [(1, 3, 1), (17, 8, 8), (50, 7, 2), (20, 300, 2)])
def test_routing_is_a_softmax_and_its_gradient_autograds(tokens, experts, chosen, over_all):
    torch.manual_seed(tokens)
    n = torch.randn(tokens, 12).double().requires_grad_()
    weight, bias = torch.randn(experts, 12).double(), torch.randn(experts).double()
    a, b = (torch.nn.Parameter(torch.randn(shape).double()) for shape in ((2, 12), (experts, 2)))
    router = Router(weight, bias, chosen, over_all, LowRank(a, b, 0.7))
    logits = n @ (weight + 0.7 * b @ a).t() + bias
    highest, ids = logits.topk(chosen)
    truth = logits.softmax(1).gather(1, ids) if over_all else highest.softmax(1)
    routing = router.route(n.detach())
    assert torch.equal(routing.ids, ids)
    torch.testing.assert_close(routing.weights, truth.detach())
    d = torch.randn(truth.shape).double()
    slopes = torch.autograd.grad(truth, [n, a, b], d)
    d_n = torch.ones_like(n)
    found = router.backward(routing, d, n.detach(), d_n)
    for ours, theirs in zip([d_n - 1, *found], slopes, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)
    assert routing.ends[-1] == tokens * chosen
    assert torch.equal(ids.flatten().sort(stable=True).values, routing.experts)
    assert torch.equal(routing.tokens[routing.places], torch.arange(tokens)[:, None].expand(-1, chosen))
    assert torch.equal(routing.share[routing.places], routing.weights)


@pytest.mark.parametrize("rank", [0, 3, 8])
@pytest.mark.parametrize("sizes", [[0, 5, 0, 1, 12], [0, 0, 1], [4, 4]], ids=str)
def test_a_matrix_of_experts_is_a_loop_over_them(sizes, rank):
    """Odd sizes, experts without a row; forward, dx, and the adapters' gradients in PEFT's shapes."""
    torch.manual_seed(1)
    experts, n, k = len(sizes), 10, 6
    ends = torch.tensor(sizes).cumsum(0, dtype=torch.int32)
    x = torch.randn(sum(sizes), k).double().requires_grad_()
    dy, weight = torch.randn(sum(sizes), n).double(), torch.randn(experts, n, k).double()
    a = torch.nn.Parameter(torch.randn(experts * max(rank, 1), k).double())
    b = torch.nn.Parameter(torch.randn(n, max(rank, 1) * experts).double())
    adapter = LowRank(a, b, 0.5) if rank else None
    matrix = Matrix(experts, n, k, x.new_empty(0), Scratch(), weight, adapter=adapter)
    change = torch.einsum("ore,eri->eoi", b.view(n, -1, experts), a.view(experts, -1, k)) * (0.5 if rank else 0)
    parts = x.split(sizes)
    truth = torch.cat([part @ (weight[e] + change[e]).t() for e, part in enumerate(parts)])
    slopes = torch.autograd.grad(truth, [x, a, b], dy)
    y, low = matrix.forward(x.detach(), ends)
    dx, up = matrix.backward(dy, ends)
    torch.testing.assert_close(y, truth.detach())
    torch.testing.assert_close(dx, slopes[0])
    found = matrix.gradients(x.detach(), dy, low, up, ends)
    assert len(found) == (2 if rank else 0)
    for ours, theirs in zip(found, slopes[1:], strict=False):
        torch.testing.assert_close(ours, theirs)


def test_fills_share_one_scratch_and_are_made_when_another_was():
    torch.manual_seed(0)
    scratch, dtype, made = Scratch(), torch.float32, []
    weights = [torch.randn(3, 8, 64), torch.randn(3, 4, 32)]
    for weight in weights:
        blocks, scales = quantise(weight)
        made.append(Matrix(*weight.shape, torch.empty(0, dtype=dtype), scratch, blocks=blocks, scales=scales))
    truths = [dequantise(matrix.blocks, matrix.scales, dtype) for matrix in made]
    for number in (0, 1, 1, 0):
        found = made[number].weights()
        assert torch.equal(found, truths[number])
        assert found.data_ptr() == made[0].weights().data_ptr() or number == 1
    assert made[1].weights().untyped_storage().data_ptr() == made[0].weights().untyped_storage().data_ptr()
    made[0].hold()
    made[1].weights()
    assert torch.equal(made[0].weights(), truths[0])


def choices(router):
    """A list that grows by the experts of each call."""
    made, route = [], router.route

    def recording(n):
        routing = route(n)
        made.append(routing.ids)
        return routing

    router.route = recording
    return made


@ON_A_GPU
@pytest.mark.parametrize("method", METHODS)
def test_nothing_waits_for_the_gpu_and_no_shape_depends_on_the_routing_on_a_gpu(method):
    model = learning_model("gpt-oss", packed=True, **METHODS[method]).to("cuda", torch.bfloat16)
    (batch,) = micro_batches(rows([300, 2, 77]), range(3), budget=10**6, packing=True, pad_id=0)
    batch, engine = batch.to(torch.device("cuda")), Engine(model)
    truth = gradients(engine, model, batch)  # compiles, proves the grouped products, fills what is cached
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = gradients(engine, model, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(part).all() and (part - other).norm() <= 1e-2 * other.norm()
               for part, other in zip(found, truth, strict=True))  # fmt: skip


@ON_A_GPU
@pytest.mark.parametrize("family", ["gpt-oss", "gpt-oss, packed", "qwen3-moe", "mixtral"])
@pytest.mark.parametrize("method", METHODS)
def test_bf16_on_a_gpu_is_as_far_from_fp64_as_the_plain_twins_in_bf16(family, method):
    name, packed = family.partition(",")[0], "packed" in family
    model = learning_model(name, packed, **METHODS[method])
    (batch,) = micro_batches(rows([300, 2, 77, 130]), range(4), budget=10**6, packing=True, pad_id=0)
    plain = Engine(model.double())
    chosen = [choices(block.router) for block in plain.blocks]
    expected, exact = plain.summed_loss(model, batch).item(), gradients(plain, model, batch)
    errors = []
    for device in ("cpu", "cuda"):
        there, placed = model.to(device, torch.bfloat16), batch.to(torch.device(device))
        engine = Engine(there)
        for block, ids in zip(engine.blocks, chosen, strict=True):  # near ties fall otherwise in bf16
            block.router.told = ids[-1].to(device)
        assert engine.summed_loss(there, placed).item() == pytest.approx(expected, rel=1e-2)
        assert all(block.router.missed < 0.1 for block in engine.blocks)
        found = [part.double().cpu() for part in gradients(engine, there, placed)]
        errors.append(sum((a - b).square().sum() for a, b in zip(found, exact, strict=True)) ** 0.5)
    assert 0 < errors[1] <= 1.5 * errors[0]
