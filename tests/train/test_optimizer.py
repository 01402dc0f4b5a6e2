"""Every optimiser is its own reference's, is saved and taken up to the bit, and leaves alone what must not decay."""

import contextlib

import pytest
import torch
from small import CPU, llama, perturb_adapters
from torch import nn
from train.test_loop import rows

from afina.model.attach import attach
from afina.model.loss import summed_loss
from afina.recipe.schema import Full, Lora, Training
from afina.train import checkpoint
from afina.train.adamw import in_a_row
from afina.train.loop import train
from afina.train.optimizer import ClippedAdamW, Lion, clip, make_optimizer
from afina.train.state import Follower, State, begin

NAMES = ("adamw", "adamw-8bit", "paged-adamw-8bit", "muon", "adafactor", "lion")
SAMPLES = rows(12, seed=2)


def batches(step: int):
    from afina.data.batch import micro_batches

    return micro_batches(SAMPLES, [(step * 4 + place) % 12 for place in range(4)], budget=80, packing=False, pad_id=0)


def started(name: str, **more) -> tuple[nn.Module, Training, State]:
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    # Wide enough that bitsandbytes holds the moments of the large matrices in eight bits: 4,096 weights at least.
    model = attach(llama(hidden_size=64, intermediate_size=96, tie_word_embeddings=True), Full(name="full"), seed=0)
    training = Training(optimizer=name, learning_rate=2e-3, weight_decay=0.1, schedule="linear", **more)
    return model, training, begin(model, training, CPU, Full(name="full"))


def go_on(model: nn.Module, training: Training, state: State, steps: int, of: int = 8) -> None:
    class Stops(Follower):
        def on_whole(self, state):
            if state.step == steps:
                raise StopIteration

    with contextlib.suppress(StopIteration):
        train(
            model,
            batches,
            state,
            steps=of,
            training=training,
            seed=1,
            hardware=CPU,
            loss_fn=summed_loss,
            follower=Stops(),
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_run_taken_up_is_the_run_that_was_not_stopped(name, tmp_path):
    model, training, state = started(name)
    before = checkpoint.snapshot(state)
    go_on(model, training, state, 8)
    whole = checkpoint.snapshot(state)
    assert any(not torch.equal(before[key], whole[key]) for key in before if key.endswith("|weight"))
    if "8bit" in name:
        assert {tensor.dtype for key, tensor in whole.items() if key.endswith("|state1")} == {
            torch.uint8,
            torch.float32,
        }
    model, training, state = started(name)
    go_on(model, training, state, 3)
    saved = checkpoint.write(tmp_path, "run", 3, checkpoint.snapshot(state), checkpoint.facts_of(state))
    model, training, state = started(name)
    checkpoint.restore(state, checkpoint.read(saved.place, "run"))
    go_on(model, training, state, 8)
    again = checkpoint.snapshot(state)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_there_from_the_start_and_stays_as_it_is(name):
    model, training, state = started(name)
    shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in checkpoint.snapshot(state).items()}
    go_on(model, training, state, 2)
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in checkpoint.snapshot(state).items()} == shapes


@pytest.mark.parametrize("name", NAMES)
def test_only_matrices_decay(name):
    _model, _training, state = started(name)
    for group in state.optimizer.param_groups:
        dimensions = {parameter.ndim for parameter in group["params"]}
        assert group["weight_decay"] == (0.1 if dimensions == {2} else 0.0) and len(dimensions) == 1


def stepped(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], count: int = 4) -> None:
    generator = torch.Generator().manual_seed(5)
    for _step in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 96), (96, 80), (64,))]


def made(name: str, learning: list[nn.Parameter], **more) -> torch.optim.Optimizer:
    named = {str(place): parameter for place, parameter in enumerate(learning)}
    return make_optimizer(named, Training(optimizer=name, learning_rate=1e-2, weight_decay=0.0, **more))


def test_each_is_what_its_library_makes_lazily():
    """State that is made early must be what the optimiser would have made itself."""
    peers = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, fused=True),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    }
    for name, peer in peers.items():
        ours, theirs = parameters(), parameters()
        stepped(made(name, ours), ours)
        stepped(peer(theirs), theirs)
        assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True)), name


def test_eight_bits_are_bitsandbytes_own():
    optim = pytest.importorskip("bitsandbytes.optim")
    ours, theirs = parameters(), parameters()
    stepped(made("adamw-8bit", ours), ours)
    stepped(optim.AdamW8bit(theirs, lr=1e-2, weight_decay=0.0), theirs)
    assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


def test_muon_takes_hidden_matrices_and_leaves_the_rest_to_adamw():
    ours, theirs = parameters(), parameters()
    named = {str(place): parameter for place, parameter in enumerate(ours)}
    training = Training(optimizer="muon", learning_rate=1e-2)
    stepped(make_optimizer(named, training, outside=[ours[0]]), ours)
    muon = torch.optim.Muon([theirs[1]], lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([theirs[0], theirs[2]], lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(5)
    for _step in range(4):
        for parameter in theirs:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        muon.step()
        adamw.step()
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_lion_is_the_papers_algorithm():
    """Algorithm 2 of Chen et al., 2023, written out."""
    (weight, *_rest), rate, (first, second), decay = parameters(), 1e-2, (0.9, 0.99), 0.1
    truth, momentum = weight.detach().clone(), torch.zeros_like(weight)
    optimizer = Lion([{"params": [weight], "weight_decay": decay}], rate, (first, second))
    optimizer.state[weight] = {"exp_avg": torch.zeros_like(weight)}
    generator = torch.Generator().manual_seed(5)
    for _step in range(5):
        gradient = torch.randn(weight.shape, generator=generator)
        weight.grad = gradient.clone()
        optimizer.step()
        update = (first * momentum + (1 - first) * gradient).sign()
        truth = truth - rate * (update + decay * truth)
        momentum = second * momentum + (1 - second) * gradient
    torch.testing.assert_close(weight.detach(), truth, rtol=1e-5, atol=1e-6)


def test_the_second_matrix_learns_faster_with_lora_plus():
    method = Lora(rank=2, lora_plus_ratio=16.0)
    model = perturb_adapters(attach(llama(), method, seed=0))
    state = begin(model, Training(), CPU, method)
    ratios = {
        name: group["rate"]
        for group in state.optimizer.param_groups
        for name, parameter in state.learning.items()
        if any(parameter is one for one in group["params"])
    }
    assert all(ratio == (16.0 if ".lora_B." in name else 1.0) for name, ratio in ratios.items())
    assert len(ratios) == len(state.learning)


@pytest.mark.parametrize("limit", [0.3, float("inf")])
def test_adamw_that_clips_as_it_reads_is_clipping_and_then_adamw(limit):
    """Two groups that decay and learn otherwise, steps of changing rates, a parameter without a gradient."""
    torch.manual_seed(0)

    def made():
        torch.manual_seed(1)
        return [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((3, 5), (4, 4), (6,), (2, 2))]

    ours, theirs = made(), made()

    def groups(parameters):
        return [
            {"params": parameters[:2], "weight_decay": 0.1, "lr": 1e-2},
            {"params": parameters[2:], "weight_decay": 0.0, "lr": 3e-2},
        ]

    optimizer = ClippedAdamW(groups(ours), 1e-2, (0.9, 0.99))
    for parameter in ours:
        optimizer.state[parameter] = {"step": torch.zeros(())} | {
            name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")
        }
    reference = torch.optim.AdamW(groups(theirs), betas=(0.9, 0.99))
    for _step in range(4):
        for a, b in zip(ours[:3], theirs[:3], strict=True):
            a.grad = torch.randn(a.numel() + 1, dtype=a.dtype)[1:].view_as(a)  # begins at 8 bytes
            b.grad = a.grad.clone()
        for group, other in zip(optimizer.param_groups, reference.param_groups, strict=True):
            group["lr"] = other["lr"] = other["lr"] * 0.8
        norm = clip(optimizer, {str(place): one for place, one in enumerate(ours)}, limit)
        assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(theirs, limit).item())
        assert all(in_a_row(a.grad) for a in ours[:3])
        optimizer.step()
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    assert [optimizer.state[one]["step"].item() for one in ours] == [4, 4, 4, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 2**-6), (torch.float32, 1e-5)], ids=str)
def test_large_tensors_on_a_gpu_are_stepped_by_our_own_and_go_on_to_the_bit(dtype, limit):
    def drawn():
        generator = torch.Generator("cuda").manual_seed(3)
        return [
            nn.Parameter(torch.randn(shape, generator=generator, device="cuda").to(dtype))
            for shape in ((2048, 1024), (1024, 4096), (1024,))
        ]

    def step(optimizer, learning, count):
        generator = torch.Generator("cuda").manual_seed(count)
        for one in learning:
            one.grad = torch.randn(one.shape, generator=generator, device="cuda").to(dtype)
        clip(optimizer, {str(place): one for place, one in enumerate(learning)}, 0.5)
        optimizer.step()

    whole, parted, theirs = drawn(), drawn(), drawn()
    optimizer = made("adamw", whole)
    assert isinstance(optimizer, ClippedAdamW)
    first, peer = made("adamw", parted), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.0, fused=True)
    for count in range(6):
        step(optimizer, whole, count)
        step(peer, theirs, count)
        if count == 3:  # another process, with what a checkpoint holds
            second = made("adamw", parted)
            for one in parted:
                for name, value in first.state[one].items():
                    second.state[one][name].copy_(value)
            first = second
        step(first, parted, count)
    for a, b, c in zip(whole, parted, theirs, strict=True):
        assert torch.equal(a, b)
        assert ((a - c).float().norm() / c.float().norm()).item() < limit
