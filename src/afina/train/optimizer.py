"""What steps: groups of what learns (what decays, what learns faster), and the optimiser the recipe names.

Every optimiser's memory is there from the start, zero, so that memory fails early or not at all, and a checkpoint finds
a place for each tensor it holds.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from afina.model.quantize import bitsandbytes
from afina.recipe.schema import Training
from afina.train import adamw
from afina.train.adamw import Factors, Learning, Many

BETAS = (0.9, 0.999)
LION_BETAS = (0.9, 0.99)
Parameters = Mapping[str, nn.Parameter]
Groups = list[dict[str, Any]]


class Lion(torch.optim.Optimizer):
    """The sign of a mean of gradient and momentum (Chen et al., 2023, arXiv:2302.06675), weights decayed apart."""

    def __init__(self, groups: Groups, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            (first, second), rate = group["betas"], group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter]["exp_avg"]
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(torch.lerp(parameter.grad, momentum, first).sign_(), alpha=-rate)
                momentum.lerp_(parameter.grad, 1 - second)
        return loss


class ClippedAdamW(torch.optim.Optimizer):
    """AdamW that scales gradients down as it reads them: `clip` says by how much in its next step. See train/adamw.py.

    Its state is that of torch.optim.AdamW. All that learns lies on one device in one precision.
    """

    def __init__(self, groups: Groups, lr: float, betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._many: tuple[list[nn.Parameter], Many] | None = None
        self._scale: torch.Tensor | None = None

    @torch.no_grad()
    def clip(self, limit: float) -> torch.Tensor:
        """The norm of all gradients, (); the next step takes them no longer than `limit`."""
        learning = self._learning()
        norm = adamw.squares(self._of(learning), [tensors for _parameter, _group, tensors in learning]).sqrt()
        self._scale = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ does
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        if learning := self._learning():
            many = self._of(learning)
            counts = [self.state[parameter]["step"].add_(1) for parameter, _group, _tensors in learning]
            known: dict[tuple[int, float], Factors] = {}  # most are alike, and Python holds the GPU up meanwhile
            factors = [
                known.get(key := (id(group), count)) or known.setdefault(key, _of_step(group, count))
                for (_parameter, group, _tensors), count in zip(learning, torch.stack(counts).tolist(), strict=True)
            ]
            scale, self._scale = self._scale, None
            one = torch.ones((), device=many.like.device) if scale is None else scale
            adamw.step(many, [tensors for _parameter, _group, tensors in learning], factors, one)
        return loss

    def _learning(self) -> list[tuple[nn.Parameter, dict[str, Any], Learning]]:
        found = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if (gradient := parameter.grad) is not None:
                    if not adamw.in_a_row(gradient):  # a part of a product's gradient that begins anywhere
                        gradient = parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
                    memory = self.state[parameter]
                    tensors = Learning(parameter, gradient, memory["exp_avg"], memory["exp_avg_sq"])
                    found.append((parameter, group, tensors))
        return found

    def _of(self, learning: list[tuple[nn.Parameter, dict[str, Any], Learning]]) -> Many:
        parameters = [parameter for parameter, _group, _tensors in learning]
        if self._many is None or [id(one) for one in self._many[0]] != [id(one) for one in parameters]:
            self._many = parameters, Many([one.numel() for one in parameters], parameters[0].detach())
        return self._many[1]


def _of_step(group: dict[str, Any], count: float) -> Factors:
    (first, second), rate = group["betas"], group["lr"]
    decay, root = 1 - rate * group["weight_decay"], math.sqrt(1 - second**count)
    return Factors(decay, rate / (1 - first**count), root, first, second, group["eps"])


def clip(optimizer: torch.optim.Optimizer, learning: Parameters, limit: float) -> torch.Tensor:
    """Scale the gradients down to a norm of `limit`, now or as the next step reads them; returns the norm they have."""
    if isinstance(optimizer, ClippedAdamW):
        return optimizer.clip(limit)
    return nn.utils.clip_grad_norm_(learning.values(), limit)


class Beside(torch.optim.Optimizer):
    """Several optimisers of different parameters as one: their groups and their state are shared with it."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        self.state = defaultdict(dict)
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each part."""
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss


def make_optimizer(
    learning: Parameters, training: Training, *, faster: float = 1.0, outside: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The optimiser of `training` over what learns; the loop sets the rate of every step.

    `faster`: how many times the rate the second low-rank matrices learn at (LoRA+). `outside`: embeddings and head,
    which muon leaves to AdamW as it does vectors. Raises ResourceError where bitsandbytes is needed and missing.
    """
    rate, betas = training.learning_rate, tuple(training.betas or BETAS)
    groups = _groups(learning, training.weight_decay, faster)
    optimizer: torch.optim.Optimizer
    match training.optimizer:
        case "adamw":
            return _adamw(groups, rate, betas)
        case "lion":
            optimizer = Lion(groups, rate, tuple(training.betas or LION_BETAS))  # type: ignore[arg-type]
            _fill(optimizer, _one_moment("exp_avg"))
        case "adafactor":
            optimizer = torch.optim.Adafactor(groups, lr=rate)
            _fill(optimizer, _factors)
        case "muon":
            optimizer = _muon(groups, rate, betas, {id(parameter) for parameter in outside})
        case _:
            optimizer = _eight_bits(groups, rate, betas, paged=training.optimizer.startswith("paged"))
    return optimizer


def _groups(learning: Parameters, decay: float, faster: float) -> Groups:
    """Matrices decay, vectors (biases, norms, DoRA's lengths) do not; with LoRA+, B has groups of its own."""
    found: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in learning.items():
        ratio = faster if ".lora_B." in name or ".lora_embedding_B." in name else 1.0
        found[decay if parameter.ndim >= 2 else 0.0, ratio].append(parameter)
    return [{"params": found[key], "weight_decay": key[0], "rate": key[1]} for key in found]


def _adamw(groups: Groups, rate: float, betas: Any) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, 2017, arXiv:1711.05101), fused."""
    optimizer: torch.optim.Optimizer
    if adamw.fits([parameter for group in groups for parameter in group["params"]]):
        optimizer = ClippedAdamW(groups, rate, betas)
        _fill(optimizer, lambda parameter: {**_two_moments(parameter), "step": torch.zeros(())})
    else:
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)
        _fill(optimizer, _two_moments)
    return optimizer


def _muon(groups: Groups, rate: float, betas: Any, outside: set[int]) -> torch.optim.Optimizer:
    """Muon (Jordan, 2024; scaled to AdamW's step as by Liu et al., 2025, arXiv:2502.16982) for hidden matrices."""
    matrices, rest = [], []
    for group in groups:
        inner = [p for p in group["params"] if p.ndim == 2 and id(p) not in outside]
        others = [p for p in group["params"] if p.ndim != 2 or id(p) in outside]
        matrices += [{**group, "params": inner}] if inner else []
        rest += [{**group, "params": others}] if others else []
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(torch.optim.Muon(matrices, lr=rate, adjust_lr_fn="match_rms_adamw"))
    if rest:
        parts.append(torch.optim.AdamW(rest, lr=rate, betas=betas, fused=True))
    both = Beside(parts)
    for part in parts:
        _fill(part, _one_moment("momentum_buffer") if isinstance(part, torch.optim.Muon) else _two_moments)
    return both


def _eight_bits(groups: Groups, rate: float, betas: Any, *, paged: bool) -> torch.optim.Optimizer:
    """AdamW with moments in eight bits, a scale for 256 of them (Dettmers et al., 2021, arXiv:2110.02861)."""
    package: Any = bitsandbytes().optim
    kind = package.PagedAdamW8bit if paged and torch.cuda.is_available() else package.AdamW8bit
    optimizer: Any = kind(groups, lr=rate, betas=betas)
    for place, group in enumerate(optimizer.param_groups):
        for number, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, place, number)
    found: torch.optim.Optimizer = optimizer
    return found


def _fill(optimizer: torch.optim.Optimizer, start: Callable[[nn.Parameter], dict[str, torch.Tensor]]) -> None:
    """Memory as the optimiser would make it at its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = start(parameter)


def _two_moments(parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def _one_moment(name: str) -> Callable[[nn.Parameter], dict[str, torch.Tensor]]:
    return lambda parameter: {name: torch.zeros_like(parameter, memory_format=torch.preserve_format)}


def _factors(parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """Adafactor's: means of rows and columns for a matrix (Shazeer & Stern, 2018, arXiv:1804.04235)."""
    step = torch.zeros((), dtype=torch.float32)
    if parameter.ndim < 2:
        return {"step": step, "variance": torch.zeros_like(parameter)}
    *above, rows, columns = parameter.shape
    return {
        "step": step,
        "row_var": parameter.new_zeros(*above, rows, 1),
        "col_var": parameter.new_zeros(*above, 1, columns),
    }
