"""The 8-bit Triton kernels against their plain twins, on odd shapes and in rows wider than the data.

On a GPU as they are; elsewhere through Triton's interpreter. Two roundings of one number may differ where it lies at
the edge between two steps of the format, so what is compared is what the rows mean, and how many values differ at all.
"""

import numpy as np
import pytest
import torch

CUDA = torch.cuda.is_available()
triton = pytest.importorskip("triton")

from afina.engine import eight, eight_kernels, eight_matrix, eight_movers, elementwise  # noqa: E402
from afina.engine.eight import FP8, INT8, Rows  # noqa: E402
from afina.engine.elementwise import Norm  # noqa: E402
from afina.engine.nf4 import from_bitsandbytes  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
SHAPES = [(1, 16), (7, 96), (33, 4096), (130, 2064), (5, 14336)] if CUDA else [(1, 16), (7, 96), (3, 2064)]
DTYPE = torch.bfloat16 if CUDA else torch.float32
"""In Triton's interpreter 16-bit conversions cut instead of rounding, and products of 16-bit tiles are wrong."""
FORMATS = [FP8, INT8]


@pytest.fixture(autouse=True)
def rounding_of_the_gpu(monkeypatch):
    """Triton's interpreter loses the carry of e4m3's mantissa (31.6 becomes 16) and wraps around beyond 448: PyTorch
    rounds for it, as the GPU's instruction does."""
    if CUDA:
        return
    from triton.runtime import interpreter

    theirs = interpreter._convert_float

    def convert(values, source, target, rounding):
        if target != triton.language.float8e4nv:
            return theirs(values, source, target, rounding)
        wide = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
        return wide.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def draw(rows, width, extra=16, dtype=DTYPE):
    wide = torch.full((rows, width + extra), float("nan"), dtype=dtype, device=DEVICE)
    wide[:, :width] = torch.randn(rows, width, device=DEVICE, dtype=torch.float64).to(dtype)
    return wide[:, :width]


def empty(rows, width, form, appended=16):
    made = Rows.empty(rows, width, appended, form, DEVICE)
    made.values.view(torch.uint8).fill_(0x55)
    made.scales.fill_(float("nan"))
    return made


def on_cpu(rows):
    return Rows(rows.values.cpu().clone(), rows.scales.cpu().clone(), rows.width, rows.form)


def plain(x):
    return x.detach().cpu().float() if x.dtype != torch.float32 or CUDA else x.detach().clone()


def alike(found, truth, share=0.02):
    """The same rows but for values that lay between two steps, and one step off there."""
    ours, theirs = on_cpu(found).exact(), truth.exact()
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(found.scales.cpu(), truth.scales, rtol=1e-2 if CUDA else 1e-5, atol=0)
    different = (found.values[:, : found.width].cpu().float() != truth.values[:, : found.width].float()).float().mean()
    assert different <= (0.1 if CUDA else share) + 2 / truth.values[:, : truth.width].numel(), different
    assert (ours - theirs).norm() <= 2e-2 * theirs.norm()


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("rows, width", SHAPES)
@pytest.mark.parametrize("folded", [False, True])
def test_quantise(rows, width, form, folded):
    x = draw(rows, width)
    x[0] *= 0
    fold = torch.rand(width, device=DEVICE) + 0.1 if folded else None
    truth = eight.quantise(x.cpu(), on_cpu(empty(rows, width, form)), None if fold is None else fold.cpu())
    found = eight_kernels.quantise(x, empty(rows, width, form), fold, form.peak)
    alike(found, truth)
    assert found.exact()[0].eq(0).all()
    assert (found.values[:, width:].view(torch.uint8) == 0x55).all()


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("rows, width", SHAPES)
def test_norm_and_its_backward(rows, width, form):
    x, past, total, dy, dx, residual = (draw(rows, width) for _ in range(6))
    by = Norm(draw(1, width)[0].contiguous(), 1e-5)
    exact_by = Norm(by.weight.cpu(), by.eps)
    for sums in (None, total):
        true_sums = None if sums is None else torch.empty(rows, width, dtype=DTYPE)
        truth = eight.norm_rows(
            x.cpu(), exact_by, on_cpu(empty(rows, width, form)), None if sums is None else past.cpu(), true_sums
        )
        found = eight_kernels.norm_rows(x, by, empty(rows, width, form), None if sums is None else past, sums)
        alike(found, truth)
        if sums is not None:
            torch.testing.assert_close(sums.cpu(), true_sums)
    fold = torch.rand(width, device=DEVICE) + 0.1
    for to in (None, empty(rows, width, form)):
        true_dx, true_again = torch.empty(rows, width, dtype=DTYPE), on_cpu(empty(rows, width, form))
        true_to = None if to is None else on_cpu(to)
        eight.norm_backward_rows(dy.cpu(), x.cpu(), exact_by, true_dx, residual.cpu(), true_again, true_to, fold.cpu())
        again = empty(rows, width, form)
        eight_kernels.norm_backward_rows(dy, x, by, dx, residual, again, to, fold)
        torch.testing.assert_close(dx.cpu(), true_dx, rtol=2e-2 if CUDA else 1e-4, atol=1e-2 if CUDA else 1e-5)
        alike(again, true_again)
        if to is not None:
            alike(to, true_to)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("rows, width", SHAPES)
def test_swiglu_and_its_backward(rows, width, form):
    gate_up, d = draw(rows, 2 * width), draw(rows, width)
    truth = on_cpu(empty(rows, width, form))
    known = eight.swiglu_rows(gate_up.cpu(), truth)
    found = empty(rows, width, form)
    ours = eight_kernels.swiglu_rows(gate_up, found)
    torch.testing.assert_close(ours.cpu(), known, rtol=1e-2 if CUDA else 1e-5, atol=0)
    alike(found, truth)
    fold = torch.rand(2 * width, device=DEVICE) + 0.1
    slopes, again = on_cpu(empty(rows, 2 * width, form)), on_cpu(empty(rows, width, form))
    eight.swiglu_backward_rows(d.cpu(), gate_up.cpu(), fold.cpu(), known, slopes, again)
    largest = fold.view(2, -1).amax(1) if form is FP8 else None
    our_slopes, our_again = empty(rows, 2 * width, form), empty(rows, width, form)
    eight_kernels.swiglu_backward_rows(d, gate_up, fold, largest, ours, our_slopes, our_again)
    alike(our_slopes, slopes)
    alike(our_again, again)
    exact = gate_up.cpu().double()
    elementwise.swiglu_backward(d.cpu().double(), exact)
    assert (slopes.exact(torch.float64) - exact * fold.cpu()).norm() <= 0.04 * (exact * fold.cpu()).norm()
    assert slopes.values[:, : 2 * width].float().abs().max() <= form.peak * 1.001


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize(
    "samples, length, heads, kept, width, half",
    [(1, 17, 5, 3, 64, 32), (3, 9, 8, 2, 128, 64), (2, 4, 6, 6, 80, 16)],
)
def test_gather_rotated(samples, length, heads, kept, width, half, form):
    angles = torch.rand(samples * length, half, device=DEVICE) * 6
    columns = (heads + 2 * kept) * width
    parts = [
        torch.randn(samples, count, length, width, device=DEVICE).to(DTYPE).transpose(1, 2)
        for count in (heads, kept, kept)
    ]
    fold = torch.rand(columns, device=DEVICE) + 0.1
    truth = eight.gather_rotated_rows(
        [part.cpu() for part in parts], angles.cos().cpu(), angles.sin().cpu(), fold.cpu(),
        on_cpu(empty(samples * length, columns, form)),
    )  # fmt: skip
    found = eight_kernels.gather_rotated_rows(
        parts, angles.cos(), angles.sin(), fold, empty(samples * length, columns, form)
    )
    alike(found, truth)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("rows, width", SHAPES)
@pytest.mark.parametrize("r", [8, 16, 24, 48])
def test_low_rank_products(rows, width, r, form):
    appended = -(-3 * r // 128) * 128
    x = eight_kernels.quantise(draw(rows, width), empty(rows, width, form, appended), None, form.peak)
    small = (torch.randn(r, width, device=DEVICE) / width**0.5).to(DTYPE)
    unfold = torch.rand(width, device=DEVICE) + 0.5
    for by in (None, unfold):
        theirs = on_cpu(x)
        appends = form is FP8
        unit = torch.tensor([4.0]) if appends else None
        truth = eight.inward(theirs, small.cpu(), None if by is None else by.cpu(), unit)
        low = eight_matrix.inward(x, small, by, None if unit is None else unit.to(DEVICE))
        assert (low.cpu().double() - truth.double()).norm() <= (1e-2 if CUDA else 1e-5) * truth.double().norm()
        if appends:
            ours = x.values[:, width:].cpu().float()
            again = theirs.values[:, width:].float()
            for part in (slice(0, r), slice(r, 2 * r), slice(2 * r, 3 * r)):
                assert torch.isfinite(ours[:, part]).all()
            both = [found[:, :r] + found[:, r : 2 * r] for found in (ours, again)]
            assert (both[0] - both[1]).norm() <= 1e-2 * both[1].norm()
            assert torch.equal(ours[:, :r], ours[:, 2 * r : 3 * r]) and ours[:, 3 * r :].eq(0).all()
    truth = eight.outward(on_cpu(x), low.cpu(), torch.float32)
    found = eight_matrix.outward(x, low, torch.float32)
    assert (found.cpu() - truth).norm() <= (1e-2 if CUDA else 1e-5) * truth.norm()
    first = (torch.arange(width, device=DEVICE) // -(-width // (r // 8)) * 8).int()  # adapters of rank 8
    truth = eight.outward_turned(on_cpu(x), low.cpu(), first.cpu(), unfold.cpu(), 8, torch.float32)
    found = eight_matrix.outward_turned(x, low, first, unfold, 8, torch.float32)
    assert found.shape == (width, 8)
    assert (found.cpu() - truth).norm() <= (1e-2 if CUDA else 1e-5) * truth.norm()


@pytest.mark.parametrize("rows, width", [(16, 16), (96, 32), (144, 272)] + ([(6144, 4096)] if CUDA else []))
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("r", [0, 8, 16, 48])
def test_weights_turned_over_with_the_adapters_behind(rows, width, r, form):
    appended = -(-3 * r // 128) * 128 if form is FP8 else 0
    weights = empty(rows, width, form, appended)
    weights.write(torch.randn(rows, width, device=DEVICE) * 0.02, form.weights_peak)
    ours, theirs, unit = weights, on_cpu(weights), torch.tensor([4.0])
    if appended:
        up = (torch.randn(rows, r, device=DEVICE) * 1e-2).to(DTYPE)
        eight_movers.append_up(ours, up, unit.to(DEVICE))
        eight.append_up(theirs, up.cpu(), unit)
        assert (ours.values.cpu().float() - theirs.values.float()).norm() <= 1e-3 * theirs.values.float().norm()
    out = torch.zeros(width, rows + appended, dtype=form.dtype, device=DEVICE)
    truth = eight.turn(theirs, torch.zeros(width, rows + appended, dtype=form.dtype))
    eight_movers.turn(ours, out)
    if appended:
        down = (torch.randn(r, width, device=DEVICE) * 1e-2).to(DTYPE)
        eight_movers.append_down(out, rows, down, 128 * unit.to(DEVICE), form.largest)
        eight.append_down(truth, rows, down.cpu(), 128 * unit, form)
    assert torch.equal(out[:, :rows].cpu().view(torch.uint8), truth[:, :rows].view(torch.uint8))
    assert (out.cpu().float() - truth.float()).norm() <= 1e-3 * truth.float().norm()


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows, columns", [(16, 64), (48, 192), (1024, 4096)] if CUDA else [(16, 64), (48, 192)])
def test_unpack(rows, columns, nested, form):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(rows, columns, device=DEVICE)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
    packed.quant_state = state
    four = from_bitsandbytes(packed)
    plain = functional.dequantize_4bit(packed, state).cpu().float()
    truth = Rows.empty(rows, columns, 16, form, torch.device("cpu"))
    truth.write(plain, form.weights_peak)
    found = empty(rows, columns, form)
    found.scales.copy_(truth.scales)
    eight_movers.unpack(four, found.scales, found.values, False)
    alike(found, truth)
    out = torch.zeros(columns, rows + 16, dtype=form.dtype, device=DEVICE)
    eight_movers.unpack(four, found.scales, out[:, :rows], True)
    assert torch.equal(
        out[:, :rows].t().contiguous().view(torch.uint8), found.values[:, :columns].contiguous().view(torch.uint8)
    )
    assert out[:, rows:].float().eq(0).all()


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("rows, width", [(1, 16), (7, 97), (3, 4100)])
def test_cross_entropy_in_eight_bits(rows, width, form):
    logits = torch.randn(rows, width, device=DEVICE) * 3
    targets = torch.randint(width, (rows,), device=DEVICE)
    logits[0, targets[0]] = 5.0
    fold = torch.rand(width, device=DEVICE) + 0.01
    found, truth = (empty(rows, width, form, -width % 16) for _ in range(2))
    truth = on_cpu(truth)
    losses = eight_kernels.cross_entropy_rows(logits, targets, fold, fold.amax(), found)
    exact = eight.cross_entropy_rows(logits.cpu(), targets.cpu(), fold.cpu(), truth)
    torch.testing.assert_close(losses.cpu(), exact, rtol=1e-5, atol=1e-5)
    alike(found, truth)
    assert (found.values[:, width:].view(torch.uint8) == 0x55).all()


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("rows, width", SHAPES)
def test_what_the_eight_bits_mean_is_spread_out(rows, width, form):
    x = eight_kernels.quantise(draw(rows, width), empty(rows, width, form), None, form.peak)
    wide = torch.full((rows, width + 8), float("nan"), dtype=DTYPE, device=DEVICE)
    eight_movers.spread(x, wide[:, :width])
    torch.testing.assert_close(wide[:, :width].cpu(), on_cpu(x).exact().to(DTYPE), rtol=4e-3 if CUDA else 0, atol=0)
    assert wide[:, width:].isnan().all()
