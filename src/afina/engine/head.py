"""Both ends of the model: the embedding, and the last norm, head and loss on the rows that predict something.

Whole logits are never there. On the GPU the head goes over some rows at a time, all of the vocabulary at once. Where
memory is short both ends stay in the computer's memory (`host`): token rows are read from there, and the head passes by
in parts of the vocabulary, twice: for the sum of exponentials, then for the gradient. Exact either way.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from afina.engine.block import added
from afina.engine.elementwise import Norm, cross_entropy, norm, norm_backward, wide_product
from afina.engine.offload import brought
from afina.model.loss import Targeted

LOGITS_AT_ONCE = 2**26
"""Elements of one chunk of logits: 512 rows of a 128k vocabulary, 0.25 GiB in fp32."""
VOCABULARY_AT_ONCE = 8192
"""Rows of a head that waits in the computer's memory, on the GPU at a time."""
Host = Literal["neither", "embedding", "both"]
"""Which ends wait in the computer's memory."""


@dataclass(eq=False)
class Ends:
    """embedding, weight (the head's): (vocabulary, hidden), the same tensor where they are tied. bias: of the head.

    `learnt`: the parameters behind embedding, head and bias, where they learn; a tied one stands once. `passes_by`: the
    head waits in the computer's memory. `shared`: the model's own embedding and head.
    """

    embedding: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    norm: Norm
    learnt: tuple[nn.Parameter, ...] = ()
    passes_by: bool = False
    shared: tuple[nn.Parameter, ...] = ()

    @property
    def logits_at_once(self) -> int:
        """Elements of a chunk of logits: a head that learns sums a gradient as large as itself chunk by chunk, one that
        waits in the computer's memory passes by twice for each."""
        return LOGITS_AT_ONCE * (4 if self.learnt or self.passes_by else 1)

    def at_work(self, tokens: int, host: Host) -> int:
        """Bytes that the loss of so many tokens has at once beside their rows, when `host` has left the GPU."""
        vocabulary, hidden = self.weight.shape
        if host == "both":
            return 8 * (min(tokens * VOCABULARY_AT_ONCE, 4 * LOGITS_AT_ONCE) + VOCABULARY_AT_ONCE * hidden)
        return 4 * min(tokens * vocabulary, self.logits_at_once)

    def spared(self, host: Host) -> int:
        """Bytes that are free on the GPU when `host` has left it."""
        return self.weight.nbytes * {"neither": 0, "embedding": 1, "both": 1 if self.tied else 2}[host]

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one."""
        return self.embedding is self.weight

    def leave(self, which: Host) -> None:
        """Move an end, or both, into the computer's memory for good; they are frozen then.

        The transformers model shares them, so it no longer runs on the GPU itself.
        """
        if which == "neither" or self.learnt:
            return
        tied = self.tied
        if tied and which == "embedding":
            raise ValueError("tied ends leave together")
        self.embedding = _pinned(self.embedding)
        if which == "both":
            self.weight = self.embedding if tied else _pinned(self.weight)
            self.passes_by = True
        for parameter, ours in zip(self.shared, (self.embedding, self.weight), strict=False):
            parameter.data = ours

    def refresh(self) -> None:
        """Take over what has learnt in another precision."""
        places = [self.embedding, *([] if self.tied else [self.weight]), *([] if self.bias is None else [self.bias])]
        for place, parameter in zip(places, self.learnt, strict=False):
            if place.data_ptr() != parameter.data_ptr():
                place.copy_(parameter.detach())

    def parameters(self) -> list[nn.Parameter]:
        """What learns, in the order of the gradients."""
        return [*self.norm.learnt, *self.learnt]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden) of ids (tokens,)."""
        if self.embedding.device == ids.device:
            return nn.functional.embedding(ids, self.embedding)
        from afina.engine import movers

        return movers.gather_rows(self.embedding, ids)

    def loss(self, hidden: torch.Tensor, batch: Targeted, extra: int | None) -> tuple[torch.Tensor, Any]:
        """Summed loss at the predicting rows; with `extra`, also what `gradients` needs.

        That is: hidden's gradient in rows with `extra` more columns, and those of norm, head and bias, which are
        summed in at least fp32.
        """
        rows = hidden[batch.predicting]
        d_rows = None if extra is None else torch.empty_like(rows)
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=rows.device)
        learn = [part for part in (self.weight, self.bias) if part is not None and self.learnt and d_rows is not None]
        sums = [torch.zeros(part.shape, dtype=wide, device=rows.device) for part in learn]
        of_norm: list[torch.Tensor] = []
        step = self.rows_at_once(d_rows is not None)
        for start in range(0, rows.shape[0], step):
            chunk, targets = rows[start : start + step], batch.targets[start : start + step]
            weights = None if batch.weights is None else batch.weights[start : start + step]
            normed = norm(chunk, self.norm, torch.empty_like(chunk))
            losses, d_normed = self.loss_of(normed, targets, weights, None if d_rows is None else sums)
            total += losses.sum()
            if d_rows is not None:
                parts = norm_backward(d_normed, chunk, self.norm, d_rows[start : start + step])
                of_norm = added(of_norm, parts)
        if extra is None or d_rows is None:
            return total, None
        d_hidden = hidden.new_zeros(hidden.shape[0], hidden.shape[1] + extra)
        d_hidden[:, : hidden.shape[1]].index_copy_(0, batch.predicting, d_rows)
        return total, (d_hidden, [*of_norm, *sums])

    def gradients(
        self, found: list[torch.Tensor], ids: torch.Tensor, d_embedded: torch.Tensor | None, d_loss: torch.Tensor
    ) -> list[torch.Tensor]:
        """In the order of `parameters`. found: what `loss` left, times d_loss here; d_embedded: (tokens, hidden)."""
        if not self.learnt or d_embedded is None:
            return []
        parameters, count = self.parameters(), len(self.norm.learnt)
        found = [part.mul_(d_loss) for part in found]
        if self.tied:
            found[count].index_put_((ids,), d_embedded.to(found[count].dtype), accumulate=True)
        else:
            backward, whole = torch.ops.aten.embedding_dense_backward, self.embedding.shape[0]
            found.insert(count, backward(d_embedded.contiguous(), ids, whole, -1, False))
        return [part.to(parameter.dtype) for part, parameter in zip(found, parameters, strict=True)]

    def rows_at_once(self, _slopes_too: bool) -> int:
        """How many rows `loss_of` takes."""
        return max(1, self.logits_at_once // (VOCABULARY_AT_ONCE if self.passes_by else self.weight.shape[0]))

    def loss_of(
        self, rows: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, sums: list[torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of each normed row (rows,) times its weight, and the gradient of rows (rows, hidden), unless `sums` is
        None: to these those of head and bias are added, where they learn. targets, weights: (rows,)."""
        if self.passes_by:
            losses, d_rows = self._by_vocabulary(rows, targets, sums is not None)
            if weights is not None:
                losses, d_rows = losses * weights, d_rows * weights[:, None].to(d_rows)
            return losses, d_rows
        losses, slopes = cross_entropy(logits_of(rows, self.weight, self.bias), targets, rows.dtype)
        if weights is not None:
            losses, slopes = losses * weights, slopes.mul_(weights[:, None])
        if sums:
            _add_product(sums[0], slopes.t(), rows)
            for of_bias in sums[1:]:
                of_bias += slopes.sum(0, dtype=of_bias.dtype)
        return losses, rows if sums is None else torch.mm(slopes, self.weight)

    def _by_vocabulary(
        self, normed: torch.Tensor, targets: torch.Tensor, slopes_too: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses and the gradient of normed (rows, hidden): the head passes by for the one, then for the other."""
        wide = torch.promote_types(normed.dtype, torch.float32)
        log_sum = torch.full((normed.shape[0],), -torch.inf, dtype=wide, device=normed.device)
        truth = torch.zeros_like(log_sum)
        for first, part, bias in self._passing():
            logits = logits_of(normed, part, bias)
            log_sum = torch.logaddexp(log_sum, torch.logsumexp(logits, dim=1))
            places, inside = _within(targets, first, part.shape[0])
            truth += logits.gather(1, places)[:, 0] * inside
            del logits
        if not slopes_too:
            return log_sum - truth, normed
        d_normed = torch.zeros(normed.shape, dtype=wide, device=normed.device)
        for first, part, bias in self._passing():
            slopes = logits_of(normed, part, bias).sub_(log_sum[:, None]).exp_()
            places, inside = _within(targets, first, part.shape[0])
            slopes.scatter_add_(1, places, -inside.to(wide)[:, None])
            _add_product(d_normed, slopes.to(normed.dtype), part)
            del slopes
        return log_sum - truth, d_normed.to(normed.dtype)

    def _passing(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """First row, rows and bias of each part of the head, on the device."""
        parts = self.weight.split(VOCABULARY_AT_ONCE)
        for number, part in enumerate(brought(parts) if self.norm.weight.is_cuda else parts):
            first = number * VOCABULARY_AT_ONCE
            yield first, part, None if self.bias is None else self.bias[first : first + part.shape[0]]


def _within(targets: torch.Tensor, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where targets (rows,) lie among `count` columns from `first` on, (rows, 1), and which of them do."""
    here = targets - first
    return here.clamp(0, count - 1)[:, None], (here >= 0) & (here < count)


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def logits_of(rows: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """In at least fp32, so that nothing is rounded between product and loss."""
    logits = wide_product(rows, head.t())
    return logits if bias is None else logits.add_(bias)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, summed in at least fp32 also from 16-bit factors."""
    if a.is_cuda and a.element_size() == 2:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(a, b))
