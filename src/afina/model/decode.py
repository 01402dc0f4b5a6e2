"""Many prompts to answers at once: sorted by length, padded on the left, finished rows leave, stopping at the end.

The plain way is one call a prompt (`generate`); the tests hold this to the same ids. Greedy answers are written over
fixed memory, prompts read a few at a time and a step on a GPU being a CUDA graph (fixed.py). Where chance or a grammar
chooses, or a window or sinks want more than one mask, the cache grows. Knows no text.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from afina.errors import ModelError
from afina.language import _
from afina.model.choose import choose
from afina.model.fixed import READ_AT_ONCE, can_be_fixed, write_fixed
from afina.model.generate import generate
from afina.model.load import cache_bytes, limit_of
from afina.model.longrope import original_context
from afina.model.rows import Grammar, Row, Sampling, Settings, device_of, next_logits, note_broken, padded

CACHE_AT_ONCE = {"cpu": 2**28, "cuda": 2**33}
"""Bytes that keys and values of the answers being written may take together, where the free memory is not known."""
CACHE_SHARE = 0.5
"""Of a GPU's free memory."""
PROMPTS_AT_ONCE = {"cpu": 128, "cuda": 512}
"""Beyond these a step takes as much longer as it holds more rows."""
PADDED_TO, SHORT = 0.5, 32
"""Prompts that are read at once are half as long as the longest at least; so many tokens less make no difference."""
LEAVING = 0.125
"""Share of rows that must be done before they are taken out of a growing cache: taking out copies it."""


@dataclass(frozen=True)
class Continuation:
    """`ids` end before the end-of-turn token; `ended` says whether it came. `seconds`: this answer's share of the
    time of those written with it. `broken`: the model computed what is no number, so this is no answer of its own."""

    ids: list[int]
    ended: bool
    seconds: float
    broken: bool = False


@torch.inference_mode()
def write_all(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    on_answer: Callable[[int, Continuation], None],
    grammar: Callable[[], Grammar] | None = None,
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
) -> None:
    """Continue each prompt; `on_answer(place, continuation)` is called once a prompt, in the order they are done.

    Temperature 0 is greedy. Above it, answer i is drawn by `seeds[i]` and its own ids alone, whoever is written beside
    it. An answer also ends where the model's context does. Raises ModelError for an empty prompt or one beyond it.
    """
    limit = limit_of(model)
    for prompt in prompts:
        if not prompt or (limit is not None and len(prompt) >= limit):
            raise ModelError(
                _("A prompt of {length} tokens cannot be continued by a model made for {limit}.").format(
                    length=len(prompt), limit=limit or "-"
                )
            )
    settings, original = Settings(frozenset(end_ids), pad_id), original_context(model)
    sampling = Sampling(temperature)
    turn = None if _learns_prompts(model) else original  # else it is written by `generate`, which sees to it
    fixed = grammar is None and temperature == 0 and device_of(model).type in READ_AT_ONCE and can_be_fixed(model)
    answers: dict[int, list[int]] = {place: [] for place in range(len(prompts))}  # of those that are not done
    seconds = dict.fromkeys(answers, 0.0)
    order = list(answers)
    most = PROMPTS_AT_ONCE.get(device_of(model).type, PROMPTS_AT_ONCE["cpu"])

    def known(place: int) -> int:
        return len(prompts[place]) + len(answers[place])

    def row(place: int) -> Row:
        """To be written to its end, or to where LongRoPE's other factors begin: then it is read again."""
        prompt = list(prompts[place])
        room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))
        until = room if turn is None or known(place) > turn else min(room, turn + 1 - len(prompt))
        so_far, seed = list(answers[place]), seeds[place] if seeds else 0
        own = grammar() if grammar else None
        return Row(place, prompt, seed, until, own, ids=so_far, whole=until == room, sampling=sampling)

    while order:
        # Neighbours in length; the longest first, so that a model that does not fit says so at once.
        order.sort(key=lambda place: (-known(place), place))
        began = time.perf_counter()
        width = len(prompts[order[0]]) + max_new_tokens
        group = order[: min(most, _fitting(model, min(width, limit) if limit else width))]
        if not fixed:  # all are read at once, as wide as the longest
            least = known(group[0]) * PADDED_TO - SHORT
            group = [place for place in group if known(place) >= least]
        rows = [row(place) for place in group]
        if not _write(model, rows, settings, max_new_tokens, fixed):
            most = max(1, len(rows) // 2)
            continue
        share, order = (time.perf_counter() - began) / len(rows), order[len(group) :]
        for one in rows:
            seconds[one.place] += share
            if one.ended or one.whole:
                on_answer(one.place, Continuation(one.ids, one.ended, seconds[one.place], one.broken))
            else:
                answers[one.place] = one.ids
                order.append(one.place)


def _write(model: nn.Module, rows: list[Row], settings: Settings, new: int, fixed: bool) -> bool:
    """Write these together, by the way that suits; False, and nothing is kept, when the GPU's memory ran out."""
    try:
        if _learns_prompts(model):
            _write_plain(model, rows, settings, new)
        elif fixed:
            write_fixed(model, rows, settings)
        else:
            _write_growing(model, rows, settings)
        return True
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    torch.cuda.empty_cache()  # outside the handler, whose traceback holds the tensors
    return False


def _fitting(model: nn.Module, width: int) -> int:
    """How many rows of so many tokens the memory for keys and values holds, one at least."""
    device = device_of(model)
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = int((torch.cuda.mem_get_info(device)[0] + kept) * CACHE_SHARE)
    else:
        free = CACHE_AT_ONCE.get(device.type, CACHE_AT_ONCE["cpu"])
    return max(1, free // (width * cache_bytes(model)))


def _write_growing(model: nn.Module, rows: list[Row], settings: Settings) -> None:
    device = device_of(model)
    ids, mask = (tensor.to(device) for tensor in padded(rows, settings.pad_id))
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    logits = next_logits(model, ids, mask.long(), positions, cache)
    note_broken(rows, logits)
    alive, position = list(range(len(rows))), positions[:, -1:]
    idle: set[int] = set()
    while True:
        chosen = choose(logits, [rows[place] for place in alive])
        idle |= {
            number
            for number, index in enumerate(chosen)
            if number not in idle and not rows[alive[number]].take(index, settings.end_ids)
        }
        if len(idle) == len(alive):
            return
        if len(idle) >= max(1, LEAVING * len(alive)):
            kept = [number for number in range(len(alive)) if number not in idle]
            selected = torch.tensor(kept, device=device)
            cache.batch_select_indices(selected)
            mask, position = mask[selected], position[selected]
            chosen, alive, idle = [chosen[number] for number in kept], [alive[number] for number in kept], set()
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
        position = position + 1
        logits = next_logits(model, torch.tensor(chosen, device=device)[:, None], mask.long(), position, cache)


def _learns_prompts(model: nn.Module) -> bool:
    """Whether PEFT puts learnt tokens before every prompt: only its own generate knows where."""
    config: Any = getattr(model, "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))


def _write_plain(model: nn.Module, rows: list[Row], settings: Settings, new: int) -> None:
    """By the library's own loop, greedily; what it cannot do is refused."""
    if any(row.grammar or row.sampling.temperature > 0 for row in rows):
        raise ModelError(
            _("Learnt prompts can be asked neither with a grammar nor with a temperature."),
            hint=_("Write constrained: false, decide: likelihood and temperature: 0 in the task, or tune with lora."),
        )
    prompts, ends = [row.prompt for row in rows], sorted(settings.end_ids)
    found = generate(model, prompts, end_ids=ends, pad_id=settings.pad_id, max_new_tokens=new)
    for row, ids in zip(rows, found, strict=True):
        row.ids, row.ended = ids[: row.room], len(ids) < min(new, row.room)
