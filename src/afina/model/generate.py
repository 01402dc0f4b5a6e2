"""Prompts to answers, ids to ids: batched, with the KV cache, stopping at the end of turn. Knows no text."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, StoppingCriteria

from afina.errors import ModelError
from afina.language import _
from afina.model.longrope import crosses, original_context
from afina.model.mixed import alone
from afina.model.virtual import is_prefix, prompted

PLAIN = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
SAMPLED = {**PLAIN, "top_k": 0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
"""Said aloud, because transformers fills what is left unsaid from the model's own generation_config.json, and top_k
with 50: temperature and top_p would then not be what decides."""
COLDEST = 1e-4
"""Below this temperature sampling is greedy to the last bit, while dividing by it could overflow."""


@contextmanager
def _hushed() -> Iterator[None]:
    """transformers warns of settings of the model's own that ours replace; nobody who chats can act on that."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Watcher(StoppingCriteria):
    """Hands each new token on as it is chosen; a true answer stops the generation."""

    def __init__(self, on_token: Callable[[int], bool | None]) -> None:
        self._on_token, self.stopped = on_token, False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_kwargs: Any) -> torch.Tensor:
        self.stopped = bool(self._on_token(int(input_ids[0, -1])))
        return torch.full((input_ids.shape[0],), self.stopped, device=input_ids.device)


@_hushed()
@torch.inference_mode()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int], bool | None] | None = None,
) -> list[list[int]]:
    """Continue each prompt; the ids returned end before the end-of-turn token.

    Temperature 0 is greedy; above it, temperature and then top_p alone shape the choice. `on_token` (one prompt only)
    sees every token as it comes, the end included, and may return True to stop. Raises ModelError for an empty prompt.
    """
    if any(not prompt for prompt in prompts):
        raise ModelError(_("An empty prompt cannot be continued."))
    crossing = crosses(model, prompts, max_new_tokens)
    if len(prompts) > 1 and (crossing or (is_prefix(model) and len({len(prompt) for prompt in prompts}) > 1)):
        # Padding would stand between prefix and prompt, and push the prefix out of a sliding window.
        same = {"end_ids": end_ids, "pad_id": pad_id, "max_new_tokens": max_new_tokens, "seed": seed}
        return [
            ids
            for prompt in prompts
            for ids in generate(model, [prompt], temperature=temperature, top_p=top_p, **same)  # type: ignore[arg-type]
        ]
    sampled = temperature >= COLDEST
    settings: dict[str, Any] = {
        **(SAMPLED if sampled else PLAIN),
        "do_sample": sampled,
        "temperature": temperature if sampled else 1.0,
        "top_p": top_p if sampled else 1.0,
        "eos_token_id": list(end_ids) or None,
        "pad_token_id": pad_id,
        "use_cache": True,
    }
    watcher = _Watcher(on_token) if on_token else None
    device = next(model.parameters()).device
    with alone(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if not crossing:
            return [_until_end(ids, end_ids) for ids in _continued(model, prompts, settings, max_new_tokens, watcher)]
        first = (original_context(model) or 0) + 1 - len(prompts[0])
        (ids,) = _continued(model, prompts, settings, first, watcher)
        ids = _until_end(ids, end_ids)
        if len(ids) == first and not (watcher and watcher.stopped):
            (more,) = _continued(model, [[*prompts[0], *ids]], settings, max_new_tokens - first, watcher)
            ids += _until_end(more, end_ids)
        return [ids]


def _continued(
    model: nn.Module, prompts: Sequence[Sequence[int]], settings: dict[str, Any], new: int, watcher: _Watcher | None
) -> list[list[int]]:
    """Up to `new` tokens of each, what comes after the end among them. `settings`: of transformers' generation."""
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), settings["pad_token_id"])
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):  # padded on the left, so that every row's last token is its prompt's
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    whole, inputs, known = prompted(model, ids.to(device), mask.to(device))
    output = whole.generate(  # type: ignore[operator]
        **inputs,
        generation_config=GenerationConfig(**settings, max_new_tokens=new),
        stopping_criteria=[watcher] if watcher else None,
    )
    found: list[list[int]] = output[:, known:].tolist()
    return found


def _until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    return next((ids[:place] for place, index in enumerate(ids) if index in end_ids), ids)
