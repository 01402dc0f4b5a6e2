"""AdamW with its clipping: the plain twin against PyTorch's, the kernels against the plain twin in double precision."""

import pytest
import torch

from afina.train import adamw
from afina.train.adamw import CHUNK, Factors, Learning, Many

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SIZES = [1, 7, 64, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 2048]


def draw(sizes, dtype, device=DEVICE):
    def part(size):
        return torch.randn(size, device=device, dtype=torch.float64)

    return [
        Learning(part(n).to(dtype), (part(n) * 3).to(dtype), (part(n) / 9).to(dtype), (part(n) / 9).square().to(dtype))
        for n in sizes
    ]


def factors(count):
    rates = [1e-3 * (number + 1) for number in range(count)]
    return [Factors(1 - rate * 0.1, rate / 0.3, 0.5, 0.9, 0.999, 1e-8) for rate in rates]


def doubled(tensors):
    fields = ("weight", "gradient", "first", "second")
    return [Learning(*(getattr(one, name).detach().double().cpu() for name in fields)) for one in tensors]


@pytest.mark.parametrize("limit", [None, 0.5])
def test_the_plain_twin_is_pytorchs_adamw_after_its_clipping(limit):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(5, 7, dtype=torch.float64)) for _ in range(3)]
    ours = [parameter.detach().clone().flatten() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1, eps=1e-6)
    moments = [(torch.zeros(35, dtype=torch.float64), torch.zeros(35, dtype=torch.float64)) for _ in parameters]
    many = Many([35] * 3, ours[0])
    for step in range(1, 4):
        for parameter in parameters:
            parameter.grad = torch.randn(5, 7, dtype=torch.float64)
        tensors = [
            Learning(weight, parameter.grad.flatten().clone(), *both)
            for weight, parameter, both in zip(ours, parameters, moments, strict=True)
        ]
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit or float("inf"))
        assert torch.allclose(adamw.squares(many, tensors).sqrt(), norm)
        scale = torch.ones((), dtype=torch.float64) if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)
        by = Factors(1 - 1e-2 * 0.1, 1e-2 / (1 - 0.8**step), (1 - 0.95**step) ** 0.5, 0.8, 0.95, 1e-6)
        adamw.step(many, tensors, [by] * 3, scale)
        optimizer.step()
        for weight, parameter in zip(ours, parameters, strict=True):
            torch.testing.assert_close(weight, parameter.detach().flatten(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 2**-7), (torch.float32, 2e-6)], ids=str)
def test_the_kernels_step_as_the_plain_twin_does(dtype, limit):
    pytest.importorskip("triton")
    from afina.train import adamw_kernels

    torch.manual_seed(1)
    tensors, by = draw(SIZES, dtype), factors(len(SIZES))
    truth, many = doubled(tensors), Many(SIZES, tensors[0].weight)
    places = many.places(tensors)
    total = adamw.squares(Many(SIZES, truth[0].weight), truth)
    assert abs(adamw_kernels.squares(many, places).double().cpu() - total) <= 1e-5 * total
    scale = torch.tensor(0.37, device=DEVICE)
    gradients = [one.gradient.clone() for one in tensors]
    adamw_kernels.step(many, places, by, scale)
    adamw.step(Many(SIZES, truth[0].weight), truth, by, scale.double().cpu())
    for one, exact, gradient in zip(tensors, truth, gradients, strict=True):
        assert torch.equal(one.gradient, gradient)  # read, never written
        for found, true in ((one.weight, exact.weight), (one.first, exact.first), (one.second, exact.second)):
            assert ((found.double().cpu() - true).abs() <= limit * true.abs() + 1e-7).all()


def test_places_are_looked_up_again_where_one_has_moved():
    tensors = draw([64, 32], torch.float32, "cpu")
    many = Many([64, 32], tensors[0].weight)
    before = many.places(tensors)
    assert many.places(tensors) is before
    moved = [tensors[0], Learning(tensors[1].weight, tensors[1].gradient.clone(), tensors[1].first, tensors[1].second)]
    after = many.places(moved)
    assert after.view(2, 5)[1, 1] == moved[1].gradient.data_ptr() != before.view(2, 5)[1, 1]
    with pytest.raises(ValueError, match="row of its own"):
        many.places([tensors[0], Learning(*(torch.zeros(64)[::2] for _ in range(4)))])
