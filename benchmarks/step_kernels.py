"""Kernels of a full fine-tuning's step, alone on a GPU: AdamW with its clipping, and norms that learn, by their bytes.

python benchmarks/step_kernels.py
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from afina.engine import kernels
from afina.engine.elementwise import Norm
from afina.recipe.schema import Training
from afina.train import adamw_kernels
from afina.train.adamw import Many
from afina.train.optimizer import clip, make_optimizer

SHAPES = [(128256, 2048), *[(2048, 2048), (1024, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (2048,)] * 16]
"""Of Llama-3.2-1B, nearly."""


def microseconds(call: object, turns: int = 10) -> float:
    call()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(turns):
        call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / turns * 1e3


def optimiser() -> None:
    parameters = [torch.nn.Parameter(torch.randn(s, device="cuda", dtype=torch.bfloat16)) for s in SHAPES]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    total = sum(parameter.numel() for parameter in parameters)
    learning = {str(place): one for place, one in enumerate(parameters)}

    def pytorch() -> object:
        theirs = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            theirs.step()

        return step

    spent = microseconds(pytorch())
    print(f"PyTorch's clipping and AdamW: {spent:.0f} us, {22 * total / spent / 1e6:.2f} TB/s of 22 bytes")
    for chunk, block, warps in (
        (16384, 2048, 4),
        (16384, 1024, 4),
        (16384, 4096, 8),
        (8192, 2048, 4),
        (65536, 2048, 4),
    ):
        for module in (sys.modules["afina.train.adamw"], adamw_kernels):
            module.CHUNK = chunk
        adamw_kernels.BLOCK, adamw_kernels.WARPS = block, warps
        ours = make_optimizer(learning, Training(learning_rate=1e-5))

        def step(ours: object = ours) -> None:
            clip(ours, learning, 1.0)
            ours.step()

        spent = microseconds(step)
        print(
            f"ours, chunks of {chunk}, {block} at once, {warps} warps: {spent:.0f} us, {16 * total / spent / 1e6:.2f} "
            f"TB/s of 16 bytes; {len(Many([p.numel() for p in parameters], parameters[0]).chunks)} programs"
        )


def norms() -> None:
    x, dy, past, dx, y = (torch.randn(16384, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(5))
    weight = torch.ones(2048, device="cuda", dtype=torch.bfloat16)
    frozen, learnt = Norm(weight, 1e-5), Norm(weight, 1e-5, None, (torch.nn.Parameter(weight),))
    spent = microseconds(lambda: kernels.norm_backward(dy, x, frozen, dx, residual=past, y=y))
    print(f"a norm's backward, frozen: {spent:.1f} us, {5 * x.nbytes / spent / 1e6:.2f} TB/s")
    spent = microseconds(lambda: kernels.norm_backward(dy, x, learnt, dx, residual=past, y=y))
    print(f"that learns: {spent:.1f} us, {5 * x.nbytes / spent / 1e6:.2f} TB/s")


if __name__ == "__main__":
    print(torch.cuda.get_device_name())
    optimiser()
    norms()
