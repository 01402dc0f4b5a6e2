"""Many prompts to answers at once: sorted by length, padded on the left, finished rows leave, stopping at the end.

The plain way is one call a prompt (`generate`); the tests hold this to the same ids. On a GPU the keys and values lie
in fixed memory and one step of decoding is a CUDA graph, so that a token costs a few launches instead of hundreds;
elsewhere the cache grows, and rows that are done are taken out of it. Knows no text.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, StaticCache

from afina.errors import ModelError
from afina.language import _
from afina.model.generate import generate
from afina.model.load import cache_bytes, limit_of

CACHE_AT_ONCE = {"cpu": 2**28, "cuda": 2**33}
"""Bytes that keys and values of the answers being written may take together, where the free memory is not known."""
CACHE_SHARE = 0.5
"""Of a GPU's free memory."""
PROMPTS_AT_ONCE = {"cpu": 128, "cuda": 512}
"""Beyond these a step takes as much longer as it holds more rows."""
LEAVING = 0.125
"""Share of rows that must be done before they are taken out of a growing cache: taking out copies it."""
LOOKED_AFTER = 8
"""Steps of a CUDA graph between two looks at which rows are done: a look waits for the GPU."""
READ_AT_ONCE = 2**14
"""Tokens of prompts, padding included, that are read at once into fixed memory."""
GROUPED = "afina_grouped"
FEWER = 0.5
"""Share of a graph's rows that may be idle before it is made anew for those that are left."""


@dataclass(frozen=True)
class Continuation:
    """`ids` end before the end-of-turn token; `ended` says whether it came. `seconds`: this answer's share of the
    time of those written with it."""

    ids: list[int]
    ended: bool
    seconds: float


class Grammar(Protocol):
    """What one answer may still be."""

    def allowed(self) -> torch.Tensor:
        """(vocabulary,) bool on the CPU: tokens that may come next; the end among them where it may end."""
        ...

    def take(self, index: int) -> None:
        """This token was chosen."""
        ...


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
    for group in _groups(model, prompts, max_new_tokens, limit):
        began = time.perf_counter()
        rows = [_Row(place, list(prompts[place]), seeds[place] if seeds else 0) for place in group]
        for row in rows:
            room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(row.prompt))
            row.room, row.grammar = room, grammar() if grammar else None
        settings = _Settings(frozenset(end_ids), pad_id, temperature)
        if _learns_prompts(model):
            _write_plain(model, rows, settings, max_new_tokens)
        elif _device(model).type == "cuda" and grammar is None and temperature == 0 and _can_be_static(model):
            _write_static(model, rows, settings)
        else:
            _write_growing(model, rows, settings)
        share = (time.perf_counter() - began) / len(rows)
        for row in rows:
            on_answer(row.place, Continuation(row.ids, row.ended, share))


@dataclass
class _Row:
    place: int
    prompt: list[int]
    seed: int
    room: int = 0
    grammar: Grammar | None = None
    ended: bool = False

    def __post_init__(self) -> None:
        self.ids: list[int] = []
        self.dice = torch.Generator().manual_seed(self.seed)

    def take(self, index: int, end_ids: frozenset[int]) -> bool:
        """Note the token; returns whether more is to come."""
        if index in end_ids:
            self.ended = True
            return False
        self.ids.append(index)
        if self.grammar:
            self.grammar.take(index)
        return len(self.ids) < self.room


@dataclass(frozen=True)
class _Settings:
    end_ids: frozenset[int]
    pad_id: int
    temperature: float


def _groups(model: nn.Module, prompts: Sequence[Sequence[int]], new: int, limit: int | None) -> Iterator[list[int]]:
    """Neighbours in length, as many as the memory for keys and values holds; the longest first, so that a model that
    does not fit says so at once."""
    device = _device(model)
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0] * CACHE_SHARE)
    else:
        free = CACHE_AT_ONCE.get(device.type, CACHE_AT_ONCE["cpu"])
    order = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place))
    while order:
        width = len(prompts[order[0]]) + new
        width = min(width, limit) if limit else width
        fit = max(1, min(PROMPTS_AT_ONCE.get(device.type, 128), free // (width * cache_bytes(model))))
        yield order[:fit]
        order = order[fit:]


def _padded(rows: Sequence[_Row], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, width) ids and mask, padded on the left, so that every row's last token is its prompt's."""
    width = max(len(row.prompt) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, width - len(row.prompt) :] = torch.tensor(row.prompt)
        mask[number, width - len(row.prompt) :] = True
    return ids, mask


def _write_growing(model: nn.Module, rows: list[_Row], settings: _Settings) -> None:
    device = _device(model)
    ids, mask = (tensor.to(device) for tensor in _padded(rows, settings.pad_id))
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    logits = _forward(model, ids, mask.long(), positions, cache)
    alive, position = list(range(len(rows))), positions[:, -1:]
    idle: set[int] = set()
    while True:
        chosen = _choose(logits, [rows[place] for place in alive], settings)
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
        logits = _forward(model, torch.tensor(chosen, device=device)[:, None], mask.long(), position, cache)


def _forward(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any
) -> torch.Tensor:
    """(rows, vocabulary) logits of the next token."""
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: torch.Tensor = output.logits[:, -1]
    return logits


def _choose(logits: torch.Tensor, rows: Sequence[_Row], settings: _Settings) -> list[int]:
    """The next token of each row; a row that is done gets any."""
    if rows[0].grammar is not None:
        allowed = torch.stack([_within(row.grammar, logits.shape[-1]) for row in rows]).to(logits.device)
        logits = logits.masked_fill(~allowed, -torch.inf)
    if settings.temperature == 0:
        return list(logits.argmax(-1).tolist())
    chances = torch.softmax(logits.double() / settings.temperature, -1).cumsum(-1).cpu()
    thrown = torch.stack([torch.rand((1,), generator=row.dice, dtype=torch.float64) for row in rows])
    drawn = torch.searchsorted(chances, thrown * chances[:, -1:], right=True)
    return [min(int(index), logits.shape[-1] - 1) for index in drawn]


def _within(grammar: Grammar | None, width: int) -> torch.Tensor:
    """What a grammar allows, as wide as the logits, which may be wider than the vocabulary."""
    allowed = grammar.allowed() if grammar else torch.ones(width, dtype=torch.bool)
    return nn.functional.pad(allowed[:width], (0, max(0, width - len(allowed))))


def _learns_prompts(model: nn.Module) -> bool:
    """Whether PEFT puts learnt tokens before every prompt: only its own generate knows where."""
    config: Any = getattr(model, "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))


def _write_plain(model: nn.Module, rows: list[_Row], settings: _Settings, new: int) -> None:
    """By the library's own loop, greedily; what it cannot do is refused."""
    if settings.temperature > 0 or any(row.grammar for row in rows):
        raise ModelError(
            _("Learnt prompts can be asked neither with a grammar nor with a temperature."),
            hint=_("Set constrained to false and temperature to 0, or tune with lora."),
        )
    prompts, ends = [row.prompt for row in rows], sorted(settings.end_ids)
    found = generate(model, prompts, end_ids=ends, pad_id=settings.pad_id, max_new_tokens=new)
    for row, ids in zip(rows, found, strict=True):
        row.ids, row.ended = ids[: row.room], len(ids) < min(new, row.room)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _can_be_static(model: nn.Module) -> bool:
    """Whether every layer attends to all that came before, nothing added: only then is one mask right for all."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return (
        set(kinds) == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and getattr(model, "_supports_attention_backend", False)
        and model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    )


def _write_static(model: nn.Module, rows: list[_Row], settings: _Settings) -> None:
    """As `_write_growing`, greedy, over memory of a fixed size, each step a replay of a CUDA graph where there is
    one. What a row chooses after its end is thrown away."""
    state = _read(model, rows, settings)
    at = list(range(len(rows)))  # which row of `rows` stands in each row of the state
    going = [place for place, index in enumerate(state.ids[:, 0].tolist()) if rows[place].take(index, settings.end_ids)]
    if len(going) < len(rows) and going:
        state, at = state.only(going), list(going)
    with _grouped_attention(model):
        while going:
            new = state.advance(min(LOOKED_AFTER, max(rows[place].room - len(rows[place].ids) for place in going)))
            place_of = {place: number for number, place in enumerate(at)}
            for place in list(going):
                if not all(rows[place].take(index, settings.end_ids) for index in new[place_of[place]]):
                    going.remove(place)
            if going and len(going) <= FEWER * len(at):
                state, at = state.only([place_of[place] for place in going]), list(going)


def _read(model: nn.Module, rows: Sequence[_Row], settings: _Settings) -> "_Steps":
    """The prompts' keys and values in fixed memory, right-aligned, and the first token of each answer.

    Some rows at a time, neighbours in length, so that padding and what is computed at once stay small.
    """
    device, width = _device(model), max(len(row.prompt) for row in rows)
    length = _rounded(width + max(row.room for row in rows))
    cache = StaticCache(config=model.config, max_cache_len=length)
    seen = torch.zeros(len(rows), length, dtype=torch.bool, device=device)
    first = torch.zeros(len(rows), 1, dtype=torch.long, device=device)
    start = 0
    while start < len(rows):
        stop = start + max(1, READ_AT_ONCE // len(rows[start].prompt))
        ids, mask = (tensor.to(device) for tensor in _padded(rows[start:stop], settings.pad_id))
        read, here = DynamicCache(config=model.config), slice(width - ids.shape[1], width)
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        first[start:stop, 0] = _forward(model, ids, mask.long(), positions, read).argmax(-1)
        for fixed, layer in zip(cache.layers, read.layers, strict=True):
            if not fixed.is_initialized:
                whole = (part[:1].expand(len(rows), -1, -1, -1) for part in (layer.keys, layer.values))
                fixed.lazy_initialization(*whole)
            fixed.keys[start:stop, :, here], fixed.values[start:stop, :, here] = layer.keys, layer.values
        seen[start:stop, here] = mask
        start = stop
    for fixed in cache.layers:
        fixed.cumulative_length.fill_(width)
    position = torch.tensor([[len(row.prompt)] for row in rows], device=device)
    return _Steps(model, cache, seen[:, None, None], position, first, width)


def _rounded(length: int) -> int:
    """Kernels of attention read masks in eights."""
    return -(-length // 16) * 16


@contextmanager
def _grouped_attention(model: nn.Module) -> Iterator[None]:
    """Inside the block each row asks with one token, and heads that share keys and values read them once."""
    before = model.config._attn_implementation  # type: ignore[union-attr]
    model.set_attn_implementation(GROUPED)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


def _attend(
    _module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """query: (rows, heads, 1, width); key, value: (rows, kv heads, length, width). Returns (rows, 1, heads, width).

    transformers repeats keys and values for every head that shares them, four times the memory of Llama's. Here such
    heads are queries of one head.
    """
    rows, heads, _one, width = query.shape
    asked = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    seen = attention_mask.expand(rows, key.shape[1], asked.shape[2], key.shape[2])
    out = nn.functional.scaled_dot_product_attention(asked, key, value, seen, scale=scaling)
    return out.reshape(rows, 1, heads, value.shape[3]), None


AttentionInterface.register(GROUPED, _attend)


class _Steps:
    """The steps after the prompt, over a static cache: everything a step reads and writes stays where it is.

    mask: (rows, 1, 1, length) bool. position, ids: (rows, 1). `at`: where the next token's keys and values go.
    """

    def __init__(
        self, model: nn.Module, cache: Any, mask: torch.Tensor, position: torch.Tensor, ids: torch.Tensor, at: int
    ) -> None:
        self.model, self.cache, self.mask, self.position, self.ids = (
            *(model, cache),
            *(mask.clone(), position.clone(), ids.clone()),
        )
        self.at = torch.full((1,), at, device=ids.device)
        self.graph: Any = None

    def advance(self, steps: int) -> list[list[int]]:
        """The next `steps` tokens of each row."""
        found = []
        for _step in range(steps):
            self._one()
            found.append(self.ids.clone())
        return list(torch.cat(found, 1).tolist())

    def only(self, kept: Sequence[int]) -> "_Steps":
        """The same for some of the rows."""
        rows = torch.tensor(kept, device=self.ids.device)
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
            layer.batch_size = len(kept)
        return _Steps(self.model, self.cache, self.mask[rows], self.position[rows], self.ids[rows], int(self.at))

    def _one(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        if self.ids.device.type != "cuda":
            self._compute()
            return
        # The first step runs as it is, on a stream of its own, as capturing asks; the second is captured.
        if not hasattr(self, "_warm"):
            self._warm = torch.cuda.Stream()
            self._warm.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._warm):
                self._compute()
            torch.cuda.current_stream().wait_stream(self._warm)
            return
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a cast that was remembered would not be in the graph
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._compute()
        finally:
            torch.set_autocast_cache_enabled(cached)
        self.graph = graph
        self.graph.replay()  # capturing computes nothing

    def _compute(self) -> None:
        self.mask.index_fill_(3, self.at, True)
        logits = _forward(self.model, self.ids, self.mask, self.position, self.cache)
        self.ids.copy_(logits.argmax(-1)[:, None])
        self.position.add_(1)
        self.at.add_(1)
