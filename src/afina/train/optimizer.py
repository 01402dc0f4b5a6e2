"""AdamW over what learns: matrices decay, vectors do not."""

import torch
from torch import nn

from afina.recipe.schema import Training


def make_optimizer(parameters: list[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, 2017, arXiv:1711.05101), fused; the loop sets the rate of every step."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=(training.betas[0], training.betas[1]),
        fused=True,
    )
    for parameter in parameters:  # as AdamW would at its first step; here, so that memory fails early or not at all
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer
