"""The Triton kernels against their plain twins in double precision, on odd shapes and in rows wider than the data.

On a GPU as they are; elsewhere through Triton's interpreter (conftest.py asks for it), where Triton is installed.
"""

import pytest
import torch

CUDA = torch.cuda.is_available()
pytest.importorskip("triton")

from afina.engine import elementwise, kernels, movers  # noqa: E402
from afina.engine.elementwise import Norm  # noqa: E402
from afina.engine.nf4 import from_bitsandbytes  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
SHAPES = [(1, 8), (7, 96), (33, 4096), (130, 2056), (5, 14336)] if CUDA else [(1, 8), (7, 96), (3, 2056)]
# The interpreter cuts instead of rounding, by up to 2^-7 each time, and an RMS norm is rounded twice.
TOLERANCE = {torch.bfloat16: 4e-3 if CUDA else 2**-6, torch.float32: 2e-6}


def draw(rows, width, dtype, extra=16):
    """Random rows inside wider ones that hold NaN, so that a wrong stride shows."""
    wide = torch.full((rows, width + extra), float("nan"), dtype=dtype, device=DEVICE)
    wide[:, :width] = torch.randn(rows, width, device=DEVICE, dtype=torch.float64).to(dtype)
    return wide[:, :width]


def exact(x):
    return x.detach().double().cpu()


def close(found, truth, dtype):
    assert torch.isfinite(found).all()
    assert (exact(found) - truth).norm() <= TOLERANCE.get(dtype, 1e-12) * truth.norm()


def exactly(by):
    """The norm in double precision."""
    return Norm(exact(by.weight), by.eps, None if by.bias is None else exact(by.bias), by.learnt)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, width", SHAPES)
@pytest.mark.parametrize("kind", ["rms", "rms, learning", "layer", "layer, learning"])
def test_norm(rows, width, dtype, kind):
    x, dy, past, out = (draw(rows, width, dtype) for _ in range(4))
    x += 0.5
    w, b = (draw(1, width, dtype)[0].contiguous() for _ in range(2))
    centred = kind.startswith("layer")
    parameters = [torch.nn.Parameter(part.float()) for part in ([w, b] if centred else [w])]
    by = Norm(w, 1e-5, b if centred else None, tuple(parameters) if "learning" in kind else ())
    truth = torch.empty(rows, width, dtype=torch.float64)
    elementwise.norm(exact(x), exactly(by), truth)
    close(kernels.norm(x, by, out), truth, dtype)
    for residual in (None, past):
        dx, y = draw(rows, width, dtype), draw(rows, width, dtype)
        true_dx, true_y = torch.empty_like(truth), torch.empty_like(truth)
        past_exact = None if residual is None else exact(residual)
        learnt = elementwise.norm_backward(exact(dy), exact(x), exactly(by), true_dx, residual=past_exact, y=true_y)
        found = kernels.norm_backward(dy, x, by, dx, residual=residual, y=y)
        close(dx, true_dx, dtype)
        close(y, true_y, dtype)
        assert len(found) == len(learnt) == len(by.learnt)
        for ours, theirs in zip(found, learnt, strict=True):
            close(ours, theirs, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads, kept, width", [((1, 1), 1, 8), ((5, 2), 2, 64), ((16, 8), 8, 128), ((6, 2), 2, 80)])
def test_head_norms(heads, kept, width, dtype):
    columns = (sum(heads) + kept) * width
    x, d, out = (draw(5, columns, dtype) for _ in range(3))
    norms = tuple(Norm(draw(1, width, dtype)[0].contiguous(), 1e-6) for _ in range(2))
    exact_norms = tuple(exactly(by) for by in norms)
    truth = elementwise.head_norms(exact(x), exact_norms, heads, torch.empty(5, columns, dtype=torch.float64))
    close(kernels.head_norms(x, norms, heads, out), truth, dtype)
    slopes = elementwise.head_norms_backward(exact(d), exact(x).clone(), exact_norms, heads)
    close(kernels.head_norms_backward(d, x, norms, heads), slopes, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads, kept, width, half", [(1, 0, 8, 4), (5, 3, 64, 32), (40, 8, 128, 64), (6, 2, 80, 16)])
def test_rotate(heads, kept, width, half, dtype):
    x = draw(17, (heads + kept) * width, dtype)
    angles = torch.rand(17, half, device=DEVICE) * 6
    truth = elementwise.rotate(exact(x).clone(), exact(angles.cos()), exact(angles.sin()), heads, width)
    found = kernels.rotate(x.clone(), angles.cos(), angles.sin(), heads, width)
    close(found, truth, dtype)
    assert torch.equal(found[:, heads * width :], x[:, heads * width :])
    elementwise.rotate(truth, exact(angles.cos()), -exact(angles.sin()), heads, width)
    close(exact(x), truth, torch.float32)


def test_copy_many():
    wide = torch.zeros(50, 40, dtype=torch.bfloat16, device=DEVICE)
    triples = []
    for number, (rows, columns) in enumerate([(3, 5), (16, 40), (31, 8)]):
        source = torch.randn(rows, columns, device=DEVICE)
        triples.append((source, wide[sum((3, 16, 31)[:number]) :][:rows, :columns], float(number + 1)))
    movers.copying(triples)()
    for source, target, factor in triples:
        close(target, exact(source * factor), torch.bfloat16)
    assert wide[0, 5:].eq(0).all() and wide[:3, 5:].eq(0).all()


def test_gather_rows():
    table = torch.randn(30, 72).to(torch.bfloat16)
    table = table.pin_memory() if CUDA else table
    ids = torch.randint(0, 30, (11,), device=DEVICE)
    assert torch.equal(movers.gather_rows(table, ids).cpu(), table[ids.cpu()])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, width", SHAPES)
def test_swiglu(rows, width, dtype):
    gate_up, d, out = draw(rows, 2 * width, dtype), draw(rows, width, dtype), draw(rows, width, dtype)
    truth, slopes = torch.empty(rows, width, dtype=torch.float64), exact(gate_up).clone()
    close(kernels.swiglu(gate_up, out), elementwise.swiglu(exact(gate_up), truth), dtype)
    again = elementwise.swiglu_backward(exact(d).clone(), slopes)
    close(again, truth, torch.float64)
    close(kernels.swiglu_backward(d, gate_up), truth, dtype)
    close(gate_up, slopes, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "samples, length, heads, kept, width, half",
    [(1, 17, 5, 3, 64, 32), (3, 9, 8, 2, 128, 64), (2, 4, 6, 6, 80, 40), (2, 4, 6, 6, 80, 16)],
)
def test_gather_rotated(samples, length, heads, kept, width, half, dtype):
    def heads_of(count, swapped):
        parts = torch.randn(samples, count, length, width, device=DEVICE).to(dtype)
        return parts.transpose(1, 2) if swapped else parts.transpose(1, 2).contiguous()

    angles = torch.rand(samples * length, half, device=DEVICE) * 6
    for swapped in (False, True):
        parts = [heads_of(count, swapped) for count in (heads, kept, kept)]
        truth = torch.empty(samples * length, (heads + 2 * kept) * width, dtype=torch.float64)
        cosines = angles.double().cos().cpu(), angles.double().sin().cpu()
        elementwise.gather_rotated(truth, [exact(part) for part in parts], *cosines)
        out = draw(samples * length, (heads + 2 * kept) * width, dtype)
        close(kernels.gather_rotated(out, parts, angles.cos(), angles.sin()), truth, dtype)


@pytest.mark.parametrize(
    "rows, width", [(1, 3), (9, 97), (33, 4096), (5, 128256)] if CUDA else [(1, 3), (9, 97), (3, 9001)]
)
def test_cross_entropy(rows, width):
    logits = draw(rows, width, torch.float32, extra=0) * 4
    logits[0, 0] = -float("inf") if width > 3 else 0.0
    targets = torch.randint(1, width, (rows,), device=DEVICE)
    losses, truth = elementwise.cross_entropy(exact(logits).clone(), targets.cpu(), torch.float64)
    for dtype in (torch.bfloat16, torch.float32):
        found, slopes = kernels.cross_entropy(logits.clone(), targets, dtype)
        assert (exact(found) - losses).abs().max() <= 1e-5 * (1 + losses.abs().max())
        # by element, as 1 is taken from the target's share: what is left of a sure one is rounding
        torch.testing.assert_close(exact(slopes), truth, rtol=max(1e-5, TOLERANCE[dtype]), atol=5e-6)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows, columns", [(3, 64), (40, 192), (1024, 4096)] if CUDA else [(3, 64), (40, 192)])
def test_fill_nf4(rows, columns, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        torch.randn(rows, columns, device=DEVICE), blocksize=64, compress_statistics=nested, quant_type="nf4"
    )
    packed.quant_state = state
    weight, out = from_bitsandbytes(packed), draw(rows, columns, torch.bfloat16)
    movers.fill_nf4(weight, out)
    truth = functional.dequantize_4bit(packed, state).to(torch.bfloat16)
    if CUDA:  # a scale that differs in its last bit may round a weight the other way
        assert (out != truth).float().mean() < 1e-3
    torch.testing.assert_close(out, truth, rtol=2**-7, atol=0)
