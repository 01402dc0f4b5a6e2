"""How far one distribution over the next token is from another, and what the model's are.

The divergence is KL(model || file), in nats a token. llama.cpp tells the likeliest tokens with their
log-probabilities over the whole vocabulary; the model's distribution is whole. Tokens that llama.cpp does not tell
count as one token, whose probability is what is left to one on each side. Joining tokens can only lower a divergence
(the data-processing inequality), so the figure is a lower bound, and exact where all are told.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

LOGITS = 2**27
"""How many a reading of the model may make at once: 512 MB."""
LEFT = 1e-9
"""The least that counts as left to the tokens that were not told; below it are roundings of a sum of floats."""


def distributions(model: nn.Module, asked: Sequence[tuple[list[int], list[int]]]) -> list[np.ndarray]:
    """For each prompt and answer: (len(answer) + 1, vocab) natural log-probabilities, in F32.

    Rows are read together, as each reading goes through all weights once. They are filled up on the right, where a
    causal model never looks from what is left of it.
    """
    found: list[np.ndarray] = []
    longest = max(len(prompt) + len(answer) for prompt, answer in asked)
    step = max(1, LOGITS // longest // model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
    for start in range(0, len(asked), step):
        found += _together(model, asked[start : start + step])
    return found


@torch.inference_mode()
def _together(model: nn.Module, asked: Sequence[tuple[list[int], list[int]]]) -> list[np.ndarray]:
    rows = [[*prompt, *answer] for prompt, answer in asked]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits
    return [
        torch.log_softmax(some[len(prompt) - 1 : len(row)].float(), -1).cpu().numpy()
        for some, row, (prompt, _answer) in zip(logits, rows, asked, strict=True)
    ]


def divergence(ours: np.ndarray, theirs: dict[int, float]) -> float:
    """KL(ours || theirs) in nats, the tokens that `theirs` lacks joined to one."""
    index = np.fromiter(theirs, np.int64)
    ours_told, theirs_told = ours[index].astype(np.float64), np.fromiter(theirs.values(), np.float64)
    told = float(np.sum(np.exp(ours_told) * (ours_told - theirs_told)))
    left, left_there = (max(1.0 - float(np.exp(values).sum()), LEFT) for values in (ours_told, theirs_told))
    if len(theirs) >= len(ours):
        return max(told, 0.0)
    return max(told + left * math.log(left / left_there), 0.0)
