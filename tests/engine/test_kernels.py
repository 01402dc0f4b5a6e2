"""The Triton kernels against their plain twins in double precision, on odd shapes and in rows wider than the data."""

import pytest
import torch

from afina.engine import elementwise
from afina.engine.nf4 import from_bitsandbytes

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU; the twins are tested everywhere"
)
SHAPES = [(1, 8), (7, 96), (33, 4096), (130, 2056), (5, 14336)]
TOLERANCE = {torch.bfloat16: 4e-3, torch.float32: 2e-6}


def draw(rows, width, dtype, extra=16):
    """Random rows inside wider ones that hold NaN, so that a wrong stride shows."""
    wide = torch.full((rows, width + extra), float("nan"), dtype=dtype, device="cuda")
    wide[:, :width] = torch.randn(rows, width, device="cuda", dtype=torch.float64).to(dtype)
    return wide[:, :width]


def exact(x):
    return x.detach().double().cpu()


def close(found, truth, dtype):
    assert torch.isfinite(found).all()
    assert (exact(found) - truth).norm() <= TOLERANCE[dtype] * truth.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, width", SHAPES)
def test_rms_norm(rows, width, dtype):
    x, dy, past, w = (
        draw(rows, width, dtype),
        draw(rows, width, dtype),
        draw(rows, width, dtype),
        draw(1, width, dtype)[0].contiguous(),
    )
    out = draw(rows, width, dtype)
    truth = torch.empty(rows, width, dtype=torch.float64)
    elementwise.rms_norm(exact(x), exact(w), 1e-5, truth)
    close(elementwise.rms_norm(x, w, 1e-5, out), truth, dtype)
    for residual in (None, past):
        dx, y = draw(rows, width, dtype), draw(rows, width, dtype)
        true_dx, true_y = torch.empty_like(truth), torch.empty_like(truth)
        elementwise.rms_norm_backward(
            exact(dy),
            exact(x),
            exact(w),
            1e-5,
            true_dx,
            residual=None if residual is None else exact(residual),
            y=true_y,
        )
        elementwise.rms_norm_backward(dy, x, w, 1e-5, dx, residual=residual, y=y)
        close(dx, true_dx, dtype)
        close(y, true_y, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads, kept, width", [(1, 0, 8), (5, 3, 64), (40, 8, 128), (6, 2, 80)])
def test_rotate(heads, kept, width, dtype):
    x = draw(17, (heads + kept) * width, dtype)
    angles = torch.rand(17, width // 2, device="cuda") * 6
    for backward in (False, True):
        truth = elementwise.rotate(
            exact(x).clone(), angles.double().cos().cpu(), angles.double().sin().cpu(), heads, backward=backward
        )
        found = elementwise.rotate(x.clone(), angles.cos(), angles.sin(), heads, backward=backward)
        close(found, truth, dtype)
        assert torch.equal(found[:, heads * width :], x[:, heads * width :])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, width", SHAPES)
def test_swiglu(rows, width, dtype):
    gate_up, d, out = draw(rows, 2 * width, dtype), draw(rows, width, dtype), draw(rows, width, dtype)
    truth, slopes = torch.empty(rows, width, dtype=torch.float64), torch.empty(rows, 2 * width, dtype=torch.float64)
    close(elementwise.swiglu(gate_up, out), elementwise.swiglu(exact(gate_up), truth), dtype)
    elementwise.swiglu_backward(exact(d), exact(gate_up), slopes)
    found = draw(rows, 2 * width, dtype)
    again = elementwise.swiglu_backward(d, gate_up, found)
    close(found, slopes, dtype)
    close(again, truth, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "samples, length, heads, kept, width", [(1, 17, 5, 3, 64), (3, 9, 8, 2, 128), (2, 4, 6, 6, 80)]
)
def test_gather_rotated(samples, length, heads, kept, width, dtype):
    def heads_of(count, swapped):
        parts = torch.randn(samples, count, length, width, device="cuda").to(dtype)
        return parts.transpose(1, 2) if swapped else parts.transpose(1, 2).contiguous()

    angles = torch.rand(samples * length, width // 2, device="cuda") * 6
    for swapped in (False, True):
        parts = [heads_of(count, swapped) for count in (heads, kept, kept)]
        truth = torch.empty(samples * length, (heads + 2 * kept) * width, dtype=torch.float64)
        cosines = angles.double().cos().cpu(), angles.double().sin().cpu()
        elementwise.gather_rotated([exact(part) for part in parts], *cosines, truth)
        out = draw(samples * length, (heads + 2 * kept) * width, dtype)
        close(elementwise.gather_rotated(parts, angles.cos(), angles.sin(), out), truth, dtype)


@pytest.mark.parametrize("rows, width", [(1, 3), (9, 97), (33, 4096), (5, 128256)])
def test_cross_entropy(rows, width):
    logits = draw(rows, width, torch.float32) * 4
    logits[0, 0] = -float("inf") if width > 3 else 0.0
    targets = torch.randint(1, width, (rows,), device="cuda")
    slopes, truth = draw(rows, width, torch.float32), torch.empty(rows, width, dtype=torch.float64)
    losses = elementwise.cross_entropy(exact(logits), targets.cpu(), truth)
    found = elementwise.cross_entropy(logits, targets, slopes)
    assert (exact(found) - losses).abs().max() <= 1e-5 * losses.abs().max()
    close(slopes, truth, torch.float32)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows, columns", [(3, 64), (40, 192), (1024, 4096)])
def test_fill_nf4(rows, columns, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        torch.randn(rows, columns, device="cuda"), blocksize=64, compress_statistics=nested, quant_type="nf4"
    )
    packed.quant_state = state
    weight, out = from_bitsandbytes(packed), draw(rows, columns, torch.bfloat16)
    weight.fill(out)
    truth = functional.dequantize_4bit(packed, state).to(torch.bfloat16)
    assert (out != truth).float().mean() < 1e-3  # a scale that differs in its last bit may round a weight the other way
    torch.testing.assert_close(out, truth, rtol=2**-7, atol=0)
