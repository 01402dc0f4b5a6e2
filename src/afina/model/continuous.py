"""Answers written together that begin and end each when it wants: continuous batching (Yu et al., 2022, Orca, OSDI).

One turn reads some tokens of a prompt and writes one token of every answer under way. So a newcomer begins while long
answers go on, and a long prompt holds nobody up for longer than its part takes. Rows stand padded on the left in one
growing cache, where a newcomer is set beside the others, and whoever is done is taken out. Personalities are mixed in
a batch where they can be; what cannot share one has a batch of its own, and batches take turns. Knows no text; not safe
from several threads.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from afina.errors import ModelError
from afina.language import _
from afina.model.choose import choose
from afina.model.decode import CACHE_SHARE, LEAVING
from afina.model.load import cache_bytes
from afina.model.longrope import original_context
from afina.model.personalities import Personalities
from afina.model.rows import Row, device_of, next_logits, padded
from afina.model.virtual import is_prefix, prompted, virtual_tokens, virtual_tokens_ever

READ_AT_ONCE = {"cpu": 2**8, "cuda": 2**12}
"""Tokens of prompts, padding included, read in one turn."""
CACHE_ON_CPU = 2**30
"""Bytes that keys and values of the answers under way may take together; a GPU's share is of what is free."""

Ended = Literal["end", "limit", "stop", "gone"]
"""The model ended its turn; there is no more room; who listens had enough; nobody listens."""


@dataclass(frozen=True)
class Likely:
    """Natural log-probabilities by the model alone, before temperature, penalties and grammar: of the token that was
    chosen, and of the likeliest ones by id."""

    chosen: float
    top: dict[int, float]


@dataclass
class Asked(Row):
    """A prompt to be answered by `voice` (None is the base). `top`: of how many tokens the likelihood is told, or None.

    `on_token` gets each token of the answer, the end left out, and a true answer ends it. `on_end` is called once, with
    why it ended or with what went wrong. Both are called by the thread that writes, and raise nothing. Whoever sets
    `gone` is answered no more.
    """

    voice: str | None = None
    end_ids: frozenset[int] = frozenset()
    top: int | None = None
    on_token: Callable[[int, Likely | None], bool | None] = lambda _index, _likely: None
    on_end: Callable[[Ended | Exception], None] = lambda _why: None
    gone: bool = False

    @property
    def length(self) -> int:
        """Tokens it may come to."""
        return len(self.prompt) + self.room


class Writing:
    """All that is being answered. `at_once`: rows written together; who comes beyond waits its turn, in order."""

    def __init__(self, voices: Personalities, at_once: int) -> None:
        self._voices, self._at_once = voices, at_once
        self.waiting: list[Asked] = []
        self._reading: _Reading | None = None
        self._batches: dict[Hashable, _Batch] = {}
        self._alone = not _can_share(voices.model)
        self._turning, self._base_turning = original_context(voices.model), original_context(voices.base)
        self._device, self._token_bytes = device_of(voices.model), cache_bytes(voices.model)
        self._stage = ExitStack()
        self._names: tuple[str | None, ...] = ()
        self._model: nn.Module = voices.model
        self._room = CACHE_ON_CPU
        if self._device.type == "cuda":
            self._room = int(torch.cuda.mem_get_info(self._device)[0] * CACHE_SHARE)

    def add(self, asked: Asked) -> None:
        """Let this be answered too. Raises ModelError for an empty prompt or an unknown voice."""
        if not asked.prompt:
            raise ModelError(_("An empty prompt cannot be continued."))
        self._voices.kind(asked.voice)
        self.waiting.append(asked)

    @property
    def under_way(self) -> list[Asked]:
        """Whose prompts are being read or answers written."""
        written = [row for batch in self._batches.values() for row in batch.going]
        return [*(self._reading.rows if self._reading else []), *written]

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self._reading or self._batches)

    @torch.inference_mode()
    def turn(self) -> None:
        """Read some of a prompt, write a token of each answer. Raises whatever the model does; then `abandon`."""
        self._read()
        for kind, batch in list(self._batches.items()):
            batch.leave([row for row in batch.going if row.gone], "gone")
            if batch.going:
                batch.tidy()
                self._take(batch, batch.advance(self._answering([row.voice for row in batch.rows])))
            if not batch.going:
                del self._batches[kind]

    def abandon(self, error: Exception) -> None:
        """Nobody who is being answered gets more: each is told the error. Who waits may still be answered."""
        lost, self._reading, self._batches = self.under_way, None, {}
        self._stage.close()
        self._names = ()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        for row in lost:
            row.on_end(error)

    def _read(self) -> None:
        if self._reading is None:
            self._admit()
        if self._reading is None:
            return
        reading = self._reading
        model = self._answering([row.voice for row in reading.rows])
        whole = self._alone or self._turning is not None  # angles are those of the length that is read
        logits = reading.advance(model, None if whole else READ_AT_ONCE[self._at])
        if not reading.over:
            return
        self._reading = None
        batch = reading.batch()
        self._take(batch, logits)
        batch.tidy()
        if not batch.going:
            return
        if there := self._batches.get(reading.kind):
            there.tidy()
            there.join(batch)
        else:
            self._batches[reading.kind] = batch

    def _admit(self) -> None:
        """Begin to read those who are next: one, and who comes behind it as long as they are read in one go."""
        for row in [row for row in self.waiting if row.gone]:
            self.waiting.remove(row)
            row.on_end("gone")
        there = self.under_way
        chosen: list[Asked] = []
        while self.waiting:
            one, together = self.waiting[0], [*chosen, self.waiting[0]]
            if chosen and (
                self._kind(one) != self._kind(chosen[0])
                or is_prefix(self._voices.model)  # padding would stand between prefix and prompt
                or max(len(row.known) for row in together) * len(together) > READ_AT_ONCE[self._at]
            ):
                break
            if (there or chosen) and not self._fits([*there, *together]):
                break
            chosen.append(self.waiting.pop(0))
        if chosen:
            self._reading = _Reading(chosen, self._kind(chosen[0]), self._device)

    @property
    def _at(self) -> str:
        return self._device.type if self._device.type in READ_AT_ONCE else "cpu"

    def _fits(self, rows: Sequence[Asked]) -> bool:
        width = max(row.length for row in rows) + virtual_tokens(self._voices.model)
        return len(rows) <= self._at_once and len(rows) * width * self._token_bytes <= self._room

    def _kind(self, row: Asked) -> Hashable:
        return id(row) if self._alone else self._voices.kind(row.voice)

    def _answering(self, names: Sequence[str | None]) -> nn.Module:
        """The model as it answers rows of these names. It stays so until others are asked for: to switch adapters takes
        as long as a step of a small model."""
        wanted = tuple(names) if len(set(names)) > 1 else (names[0],)
        if wanted != self._names:
            self._stage.close()
            self._names = ()
            self._model = self._stage.enter_context(self._voices.answering_all(wanted))
            self._names = wanted
        return self._model

    def _take(self, batch: "_Batch", logits: torch.Tensor) -> None:
        """Choose a token of each row from (rows, vocabulary) logits, hand it on, and let go of who is done."""
        broken = (~torch.isfinite(logits.amax(-1))).tolist()
        try:
            batch.chosen = choose(logits, batch.rows)
        except ModelError:  # a grammar that grew beyond its bounds: find out whose
            batch.chosen = [self._chosen_alone(batch, logits, number) for number in range(len(batch.rows))]
        for number, row in enumerate(batch.rows):
            if number in batch.done:
                continue
            if broken[number]:
                batch.leave([row], ModelError(_("What the model computes is no number.")))
                continue
            index = batch.chosen[number]
            going = row.take(index, row.end_ids)
            if row.ended:
                batch.leave([row], "end")
            elif row.on_token(index, None if row.top is None else _likely(logits[number], index, row.top)):
                batch.leave([row], "stop")
            elif not going:
                batch.leave([row], "limit")
            elif self._turning is not None and len(row.known) == self._last(row) + 1:
                batch.done.add(number)  # what is kept was turned by LongRoPE's short factors: it is read again
                self.waiting.insert(0, row)

    def _last(self, row: Asked) -> int:
        """The length up to which LongRoPE turns this row by its short factors."""
        return (self._base_turning if row.voice is None else self._turning) or 0

    @staticmethod
    def _chosen_alone(batch: "_Batch", logits: torch.Tensor, number: int) -> int:
        try:
            return choose(logits[number : number + 1], [batch.rows[number]])[0]
        except ModelError as error:
            batch.leave([batch.rows[number]], error)
            return 0


@dataclass
class _Reading:
    """Prompts, and what was answered to them so far, that are being read together, some columns at a time."""

    rows: list[Asked]
    kind: Hashable
    device: torch.device
    over: bool = False
    _inputs: dict[str, Any] = field(default_factory=dict)
    _cache: Any = None
    _known: int = 0
    _read: int = 0

    def advance(self, model: Any, at_once: int | None = None) -> torch.Tensor:
        """Read on, so many tokens at most, or all; once it is `over`, the (rows, vocabulary) logits of what is next."""
        if not self._inputs:
            ids, mask = (tensor.to(self.device) for tensor in padded(self.rows, 0))
            whole, self._inputs, _width = prompted(model, ids, mask.long())
            cache = self._inputs.pop("past_key_values", None)
            self._cache = DynamicCache(config=whole.config) if cache is None else cache  # type: ignore[arg-type]
            self._known = self._cache.get_seq_length()
        name = "inputs_embeds" if "inputs_embeds" in self._inputs else "input_ids"
        tokens, mask = self._inputs[name][:, self._known :], self._inputs["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, self._known :]
        stop = tokens.shape[1]
        if at_once is not None:
            stop = min(stop, self._read + max(1, at_once // len(self.rows)))
        here, seen = slice(self._read, stop), mask[:, : self._known + stop]
        self._read, self.over = stop, stop == tokens.shape[1]
        return next_logits(_whole(model), tokens[:, here], seen, positions[:, here], self._cache, name)

    def batch(self) -> "_Batch":
        """Those who have been read, to be written on."""
        mask = self._inputs["attention_mask"].bool()
        return _Batch(self.rows, self._cache, mask, mask.sum(-1, keepdim=True) - 1)


@dataclass
class _Batch:
    """Rows that are written together. mask: (rows, width) bool; position: (rows, 1) of the last token that was read.

    `chosen`: each row's next token, to be read in the next step. `done`: rows, by number, that are only still there.
    """

    rows: list[Asked]
    cache: Any
    mask: torch.Tensor
    position: torch.Tensor
    chosen: list[int] = field(default_factory=list)
    done: set[int] = field(default_factory=set)

    @property
    def going(self) -> list[Asked]:
        """Who gets more."""
        return [row for number, row in enumerate(self.rows) if number not in self.done]

    def advance(self, model: Any) -> torch.Tensor:
        """Read the chosen tokens; the (rows, vocabulary) logits of the next ones."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], 1)
        self.position = self.position + 1
        ids = torch.tensor(self.chosen, device=self.mask.device)[:, None]
        return next_logits(_whole(model), ids, self.mask.long(), self.position, self.cache)

    def leave(self, rows: Sequence[Asked], why: Ended | Exception) -> None:
        """These get no more, and are told why."""
        for number, row in enumerate(self.rows):
            if number not in self.done and any(row is one for one in rows):
                self.done.add(number)
                row.on_end(why)

    def tidy(self) -> None:
        """Take out who is done, where there are enough of them: it copies the cache."""
        if len(self.done) < max(1, LEAVING * len(self.rows)) or len(self.done) == len(self.rows):
            return
        kept = [number for number in range(len(self.rows)) if number not in self.done]
        selected = torch.tensor(kept, device=self.mask.device)
        self.cache.batch_select_indices(selected)
        self.mask, self.position = self.mask[selected], self.position[selected]
        self.rows, self.chosen = [self.rows[number] for number in kept], [self.chosen[number] for number in kept]
        self.done = set()
        self._narrow()

    def join(self, new: "_Batch") -> None:
        """Set others beside these, all ending at the same column."""
        width = max(self.mask.shape[1], new.mask.shape[1])
        for layer, other in zip(self.cache.layers, new.cache.layers, strict=True):
            columns = max(layer.keys.shape[2], other.keys.shape[2])
            layer.keys, layer.values = (
                torch.cat([_widened(one, columns), _widened(two, columns)])
                for one, two in ((layer.keys, other.keys), (layer.values, other.values))
            )
            if layer.is_sliding:
                layer.cumulative_length = width
        masks = [nn.functional.pad(one.mask, (width - one.mask.shape[1], 0)) for one in (self, new)]
        self.mask, self.position = torch.cat(masks), torch.cat([self.position, new.position])
        self.done |= {number + len(self.rows) for number in new.done}
        self.rows, self.chosen = [*self.rows, *new.rows], [*self.chosen, *new.chosen]

    def _narrow(self) -> None:
        """Cut off the columns on the left that nobody is in any more."""
        width = int(self.mask.shape[1] - self.mask.any(0).long().argmax())
        self.mask = self.mask[:, -width:]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, -width:], layer.values[:, :, -width:]
            if layer.is_sliding:
                layer.cumulative_length = width


def _widened(part: torch.Tensor, columns: int) -> torch.Tensor:
    return nn.functional.pad(part, (0, 0, columns - part.shape[2], 0))


def _whole(model: Any) -> nn.Module:
    """What computes where learnt prompts have been put before the rows already."""
    whole: nn.Module = model.get_base_model() if virtual_tokens_ever(model) else model
    return whole


def _can_share(model: Any) -> bool:
    """Whether rows of different lengths mean the same in one batch as alone: every layer keeps keys and values, of all
    tokens or of a window, and no angle depends on the longest row (dynamic NTK)."""
    config = model.config.get_text_config()
    kept = {type(layer) for layer in DynamicCache(config=config).layers}
    angles = str(getattr(config, "rope_parameters", None))
    return kept <= {DynamicLayer, DynamicSlidingWindowLayer} and "dynamic" not in angles


def _likely(logits: torch.Tensor, index: int, top: int) -> Likely:
    found = torch.log_softmax(logits.float(), -1)
    values, ids = found.topk(min(top, len(found)))
    return Likely(float(found[index]), dict(zip(ids.tolist(), values.tolist(), strict=True)))
