"""The Triton kernels of mixtures against their plain twins in double precision; grouped products against loops.

On a GPU as they are; elsewhere through Triton's interpreter (conftest.py asks for it), where Triton is installed.
"""

from dataclasses import replace

import pytest
import torch

CUDA = torch.cuda.is_available()
pytest.importorskip("triton")

from afina.engine import expert_kernels  # noqa: E402
from afina.engine import experts as experts_module  # noqa: E402
from afina.engine import grouped as grouped_module  # noqa: E402
from afina.engine.experts import Gating  # noqa: E402
from afina.engine.router import Router  # noqa: E402
from afina.model.mxfp4 import dequantise  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
TOLERANCE = {torch.bfloat16: 4e-3 if CUDA else 8e-3, torch.float32: 2e-6}  # the interpreter cuts instead of rounding


def exact(x):
    return x.detach().double().cpu()


def close(found, truth, dtype):
    assert torch.isfinite(found).all()
    assert (exact(found) - truth).norm() <= TOLERANCE[dtype] * truth.norm()


def routed(tokens, experts, chosen):
    """A routing with an expert that nobody chose, on the device and exactly."""
    router = Router(torch.randn(experts, 8).double(), torch.full((experts,), 0.0).double(), chosen)
    router.bias[experts // 2] = -100.0
    truth = router.route(torch.randn(tokens, 8).double())
    found = replace(truth, **{name: part.to(DEVICE) for name, part in vars(truth).items() if part is not None})
    return truth, replace(found, weights=found.weights.float())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens, experts, chosen, width", [(1, 4, 2, 8), (37, 9, 3, 40), (64, 32, 4, 1344)])
@pytest.mark.parametrize("by", [Gating(), Gating(1.702, 0.7, 1.0, True)], ids=["swiglu", "gpt-oss"])
@pytest.mark.parametrize("biased", [False, True])
def test_gated(tokens, experts, chosen, width, by, biased, dtype):
    truth, routing = routed(tokens, experts, chosen)
    gate_up, d = (torch.randn(tokens * chosen, n * width, device=DEVICE).to(dtype) for n in (2, 1))
    bias = torch.randn(experts, 2 * width, device=DEVICE).to(dtype) if biased else None
    exact_bias = None if bias is None else exact(bias)
    act = experts_module.gated(exact(gate_up), exact_bias, truth.experts, by)
    close(expert_kernels.gated(gate_up, bias, routing.experts, by), act, dtype)
    slopes, again = exact(gate_up).clone(), exact(d).clone()
    of_rows = experts_module.gated_backward(again, slopes, exact_bias, truth.experts, truth.share, by)
    found = expert_kernels.gated_backward(d, gate_up, bias, routing.experts, routing.share, by)
    close(found, of_rows, torch.float32)
    close(gate_up, slopes, dtype)
    close(d, again, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens, experts, chosen, width", [(1, 4, 2, 8), (37, 9, 3, 40), (33, 32, 4, 2880)])
def test_combine(tokens, experts, chosen, width, dtype):
    truth, routing = routed(tokens, experts, chosen)
    rows = torch.randn(tokens * chosen, width, device=DEVICE).to(dtype)
    bias, past = (
        torch.randn(experts, width, device=DEVICE).to(dtype),
        torch.randn(tokens, 2 * width, device=DEVICE).to(dtype)[:, :width],
    )
    for given in ({}, {"bias": bias, "residual": past, "weighted": True}):
        plain = {name: exact(part) if torch.is_tensor(part) else part for name, part in given.items()}
        expected = experts_module.combine(exact(rows), truth, torch.empty(tokens, width).double(), **plain)
        options = {"bias": None, "residual": None, "weighted": False, **given}
        close(
            expert_kernels.combine(
                rows, routing, torch.randn(tokens, 2 * width, device=DEVICE).to(dtype)[:, :width], **options
            ),
            expected,
            dtype,
        )


def test_fill_mxfp4_is_the_published_format():
    blocks = torch.randint(0, 256, (3, 5, 17, 16), dtype=torch.uint8)
    least = 0 if CUDA else 2  # the interpreter has no subnormal bf16
    scales = torch.randint(least, 255, (3, 5, 17), dtype=torch.uint8)
    scales[0, 0, :3], blocks[0, 1, 0] = torch.tensor([least, 1 + least, 254]), torch.arange(16) * 17
    out = torch.full((3, 5, 17 * 32), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    expert_kernels.fill_mxfp4(blocks.to(DEVICE), scales.to(DEVICE), out)
    truth = dequantise(blocks, scales, torch.float32).to(torch.bfloat16)
    assert torch.equal(out.cpu().view(torch.int16), truth.view(torch.int16))  # minus zero too


@pytest.mark.parametrize("dtype", TOLERANCE if CUDA else [torch.float32])  # the interpreter's dot knows no bf16
@pytest.mark.parametrize("r, width", [(8, 40), (16, 136), (24, 2880)] if CUDA else [(8, 40), (24, 136)])
def test_grouped_outer(r, width, dtype):
    sizes = [0, 130, 1, 64, 0, 17]
    ends = torch.tensor(sizes, device=DEVICE).cumsum(0, dtype=torch.int32)
    a, b = (torch.randn(sum(sizes), n, device=DEVICE).to(dtype) for n in (r, width))
    found = expert_kernels.grouped_outer(a, b, ends)
    truth = grouped_module.grouped_outer(exact(a), exact(b), ends.cpu())
    close(found, truth, torch.float32)
    assert found[0].eq(0).all()
    weights = torch.randn(len(sizes), width, r, device=DEVICE).to(dtype).transpose(1, 2)
    truth = grouped_module.grouped_add(exact(b).clone(), exact(a), exact(weights), ends.cpu())
    close(expert_kernels.grouped_add(b, a, weights, ends), truth, dtype)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("experts, k, n", [(32, 2880, 5760), (5, 64, 192), (128, 2048, 8)])
@pytest.mark.parametrize("turned", [False, True])
def test_grouped_products_are_those_of_loops(experts, k, n, turned):
    sizes = [(13 * number) % 7 * 11 for number in range(experts)]
    ends = torch.tensor(sizes, device=DEVICE).cumsum(0, dtype=torch.int32)
    x = torch.randn(sum(sizes), k, device=DEVICE).to(torch.bfloat16)
    shape = (experts, n, k) if turned else (experts, k, n)
    weights = torch.randn(shape, device=DEVICE).to(torch.bfloat16)
    weights = weights.transpose(1, 2) if turned else weights
    found, start = grouped_module.grouped(x, weights, ends), 0
    for number, end in enumerate(ends.tolist()):
        if end > start:
            close(found[start:end], exact(x[start:end].float() @ weights[number].float()), torch.bfloat16)
        start = end
