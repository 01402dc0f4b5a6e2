"""Writing over fixed memory: keys and values stay where they are, and on a GPU one step is a CUDA graph.

A token then costs one launch instead of hundreds, and nothing is copied to grow. Greedy only. A model whose step waits
for the GPU (8-bit layers look for outliers, some mixtures for how many tokens an expert has) cannot be a graph: each of
its launches is Python's.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from afina.model.attention import attending
from afina.model.rows import Row, Settings, device_of, next_logits, note_broken, padded

READ_AT_ONCE = {"cpu": 2**9, "cuda": 2**14}
"""Tokens of prompts, padding included, that are read at once into fixed memory: enough for the products to be quick,
and the fewer the less is padded."""
GROUPED = "afina_grouped"
LOOKED_AFTER = {"cpu": 1, "cuda": 8}
"""Steps between two looks at which rows are done: a look waits for the GPU."""
STAYING = {"cpu": 0.875, "cuda": 0.5}
"""Share of the rows that are still going, at which the others are taken out: a graph is then made anew."""


def can_be_fixed(model: nn.Module) -> bool:
    """Whether every layer attends to all that came before, nothing added: only then is one mask right for all."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return (
        set(kinds) == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and getattr(model, "_supports_attention_backend", False)
        and model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    )


def write_fixed(model: nn.Module, rows: list[Row], settings: Settings) -> None:
    """As `_write_growing`, greedy, over memory of a fixed size, each step a replay of a CUDA graph where there is
    one. What a row chooses after its end is thrown away."""
    state, kind = _read(model, rows, settings), device_of(model).type
    at = list(range(len(rows)))  # which row of `rows` stands in each row of the state
    going = [place for place, index in enumerate(state.ids[:, 0].tolist()) if rows[place].take(index, settings.end_ids)]
    if len(going) < len(rows) and going:
        state, at = state.only(going), list(going)
    with attending(model, GROUPED):
        while going:
            new = state.advance(
                min(LOOKED_AFTER[kind], max(rows[place].room - len(rows[place].ids) for place in going))
            )
            place_of = {place: number for number, place in enumerate(at)}
            for place in list(going):
                if not all(rows[place].take(index, settings.end_ids) for index in new[place_of[place]]):
                    going.remove(place)
            if going and len(going) <= STAYING[kind] * len(at):
                state, at = state.only([place_of[place] for place in going]), list(going)


def _read(model: nn.Module, rows: Sequence[Row], settings: Settings) -> "_Steps":
    """The prompts' keys and values in fixed memory, right-aligned, and the first token of each answer.

    Some rows at a time, neighbours in length, so that padding and what is computed at once stay small.
    """
    device, width = device_of(model), max(len(row.known) for row in rows)
    length = _rounded(width + max(row.room - len(row.ids) for row in rows))
    cache = StaticCache(config=model.config, max_cache_len=length)
    cache.layers = [_Layer(length) for _layer in cache.layers]
    seen = torch.zeros(len(rows), length, dtype=torch.bool, device=device)
    first = torch.zeros(len(rows), 1, dtype=torch.long, device=device)
    start = 0
    while start < len(rows):
        stop = start + max(1, READ_AT_ONCE[device.type] // len(rows[start].known))
        ids, mask = (tensor.to(device) for tensor in padded(rows[start:stop], settings.pad_id))
        read, here = DynamicCache(config=model.config), slice(width - ids.shape[1], width)
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        logits = next_logits(model, ids, mask.long(), positions, read)
        note_broken(rows[start:stop], logits)
        first[start:stop, 0] = logits.argmax(-1)
        for fixed, layer in zip(cache.layers, read.layers, strict=True):
            if not fixed.is_initialized:
                kind = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
                whole = (part[:1].expand(len(rows), -1, -1, -1).to(kind) for part in (layer.keys, layer.values))
                fixed.lazy_initialization(*whole)
            fixed.keys[start:stop, :, here], fixed.values[start:stop, :, here] = layer.keys, layer.values
        seen[start:stop, here] = mask
        start = stop
    for fixed in cache.layers:
        fixed.cumulative_length.fill_(width)
    position = torch.tensor([[len(row.known)] for row in rows], device=device)
    return _Steps(model, cache, seen[:, None, None], position, first, width)


class _Layer(StaticLayer):
    """Keys and values in one precision, that of the products: under autocast over fp32 weights, as in a full
    fine-tuning, turned keys come in fp32 and values in bf16, and attention takes both in bf16."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """See StaticLayer."""
        return super().update(key_states.to(self.dtype), value_states.to(self.dtype), *args, **kwargs)


def _rounded(length: int) -> int:
    """Kernels of attention read masks in eights."""
    return -(-length // 16) * 16


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
        self.warm = False
        self.waits = ids.device.type != "cuda"

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
        elif self.waits:
            self._compute()
        elif self.warm:
            self.graph = self._captured()
            self.graph.replay()  # capturing computes nothing
        else:  # the first step runs as it is, on a stream of its own, as capturing asks; the second is captured
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside), _waits() as noted:
                self._compute()
            torch.cuda.current_stream().wait_stream(aside)
            self.warm, self.waits = True, bool(noted)

    def _captured(self) -> Any:
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a cast that was remembered would not be in the graph
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._compute()
        finally:
            torch.set_autocast_cache_enabled(cached)
        return graph

    def _compute(self) -> None:
        self.mask.index_fill_(3, self.at, True)
        logits = next_logits(self.model, self.ids, self.mask, self.position, self.cache)
        self.ids.copy_(logits.argmax(-1)[:, None])
        self.position.add_(1)
        self.at.add_(1)


@contextmanager
def _waits() -> Iterator[list[str]]:
    """Holds after the block what in it made the computer wait for the GPU, which capturing would not survive."""
    before, found = torch.cuda.get_sync_debug_mode(), list[str]()
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
            found += [text for one in noted if "called a synchronizing" in (text := str(one.message))]
