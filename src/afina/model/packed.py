"""Packed attention: samples lying end to end attend inside themselves, exactly, without a dense mask.

On a GPU PyTorch's variable-length flash attention runs over the row as it is. Elsewhere samples of like length are
gathered into padded groups; causal attention never looks at padding on the right, so no mask is needed there either.

Sinks (gpt-oss) are one more score s a head in the sum of exponentials, which nothing is taken from. Kernels that do not
know them give out and lse, the logarithm of the sum without s. With it they are out sigmoid(lse - s) and
log(exp lse + exp s), and from these the kernels' own backward makes exact gradients, as all it takes from the forward
are shares exp(score - lse) and sums of out d_out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

from afina.model.attention import attending
from afina.model.padded import padded_attention
from afina.model.repeatable import in_order
from afina.model.virtual import is_prefix

NAME = "afina_packed"


def covers(model: nn.Module) -> bool:
    """Whether packed attention is exact for this model: causal attention, in a window or not, nothing added.

    Soft-capped scores are left to the reference.
    """
    config: Any = model.config
    return (
        getattr(model, "_supports_attention_backend", False)
        and not getattr(config, "attn_logit_softcapping", None)
        and not is_prefix(model)
    )


@contextmanager
def packed_attention(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Inside the block every batch must be packed: transformers then builds no mask and calls `_attend`.

    Where that is not `on`, batches are padded.
    """
    with attending(model, NAME) if on else padded_attention(model):
        yield


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_lengths: tuple[int, ...] = (),
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """query: (1, heads, tokens, width); key, value: (1, kv heads, tokens, width); s_aux: (heads,) sinks.

    Returns (1, tokens, heads, width).
    """
    if sum(packed_lengths) != query.shape[2]:
        raise RuntimeError(f"packed lengths {packed_lengths} do not sum to {query.shape[2]} tokens")
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    if _has_flash(query) and dropout == 0.0:
        out: torch.Tensor = _Packed.apply(q, k, v, packed_lengths, scaling, sliding_window, s_aux)  # type: ignore[no-untyped-call]
        return out[None], None
    return _gathered(q, k, v, packed_lengths, scaling, sliding_window, s_aux, dropout)[None], None


def _gathered(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scaling: float | None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """query: (tokens, heads, width), key, value: (tokens, kv heads, width); differentiable, on any device."""
    groups, inverse = _groups(lengths, query.device)
    outputs = []
    for places, kept in groups:
        q, k, v = (part[places].transpose(1, 2) for part in (query, key, value))  # (samples, heads, longest, width)
        seen = None if window is None or window >= q.shape[2] else _band(q.shape[2], window, q.device)
        if sinks is not None:
            k, v, seen = _with_sinks(k, v, seen, sinks)
        attended = F.scaled_dot_product_attention(
            q, k, v, seen, dropout, is_causal=seen is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1)[kept])
    return torch.cat(outputs)[inverse]


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """What each token sees: itself and the window - 1 before it."""
    behind = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (behind >= 0) & (behind < window)


def _with_sinks(
    key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor | None, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values (samples, kv heads, length, width) and one of zeros more, whose score the mask is: the sink."""
    length = key.shape[2]
    if seen is None:
        seen = _band(length, length, key.device)
    scores = torch.zeros(seen.shape, dtype=key.dtype, device=key.device).masked_fill_(~seen, -torch.inf)
    of_sinks = sinks.to(key.dtype)[:, None, None].expand(-1, length, 1)
    mask = torch.cat([scores.expand(sinks.shape[0], -1, -1), of_sinks], dim=2)
    return F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1)), mask


@dataclass
class Attended:
    """What attention's backward needs beside `out` (tokens, heads, width): on a GPU the kernel's own results, elsewhere
    the graph of the gather. `out` may be taken away and put back. sinks: (heads,) fp32, where they learn."""

    out: torch.Tensor
    kernel: tuple[Any, ...] = ()
    leaves: tuple[torch.Tensor, ...] = ()
    sinks: torch.Tensor | None = None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scaling: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> Attended:
    """Causal attention inside each sample. query: (tokens, heads, width), key, value: (tokens, kv heads, width).

    window: how many tokens each sees, itself among them; None for all before it. sinks: (heads,) or None.
    """
    learnt = sinks.detach().float() if sinks is not None and sinks.requires_grad else None
    if not _has_flash(query):
        with torch.enable_grad():
            parts = [query, key, value, *([] if learnt is None or sinks is None else [sinks])]
            leaves = tuple(part.detach().requires_grad_() for part in parts)
            scores = leaves[3] if learnt is not None else sinks
            graph = _gathered(leaves[0], leaves[1], leaves[2], lengths, scaling, window, scores)
        return Attended(graph.detach(), (graph,), leaves, learnt)
    if window is not None and window >= max(lengths):
        window = None
    if window is None and len(set(lengths)) == 1 and lengths[0] > 1 and _cudnn_is_faster(query):
        q, k, v = (_as_batch(part, lengths) for part in (query, key, value))
        results = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, True, False, scale=scaling
        )
        kind, out = "cudnn", results[0].transpose(1, 2).flatten(0, 1)
        log_sums = results[1].view(len(lengths), query.shape[1], lengths[0]).transpose(0, 1)
    else:
        bounds, longest = _bounds(lengths, query.device), _longest(lengths)
        results = torch.ops.aten._flash_attention_forward(
            query, key, value, bounds, bounds, longest, longest, 0.0, True, False, scale=scaling, **_sides(window)
        )
        kind, out, log_sums = "flash", results[0], results[1]
    if sinks is not None:
        _let_sink(out, log_sums, sinks)
    return Attended(out, (kind, *results[1:]), sinks=learnt)


def _let_sink(out: torch.Tensor, log_sums: torch.Tensor, sinks: torch.Tensor) -> None:
    """Turn what attention without sinks gave into what it is with them, in place.

    out: (tokens, heads, width), log_sums: (heads, tokens) or (heads, samples, length), sinks: (heads,).
    """
    s = sinks.detach().float().view(-1, *[1] * (log_sums.ndim - 1))
    out.mul_(torch.sigmoid(log_sums - s).flatten(1).t()[..., None])
    torch.logaddexp(log_sums, s, out=log_sums)


@in_order()
def attend_backward(
    attended: Attended,
    d_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scaling: float,
    window: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key and value, (samples, length, heads, width), with samples = 1 where lengths differ.

    Where sinks learn, theirs (heads,) is the fourth.
    """
    if attended.leaves:
        found = torch.autograd.grad(attended.kernel[0], attended.leaves, d_out)
        return *(part[None] for part in found[:3]), *found[3:]
    kind, log_sums, *rest = attended.kernel
    of_sinks: tuple[torch.Tensor, ...] = ()
    if attended.sinks is not None:
        sums = log_sums.view(len(lengths), -1, lengths[0]).transpose(0, 1) if kind == "cudnn" else log_sums
        of_sinks = (_sinks_backward(attended.out, d_out, sums.flatten(1), attended.sinks),)
    if kind == "cudnn":
        q, k, v, d, out = (_as_batch(part, lengths) for part in (query, key, value, d_out, attended.out))
        bounds_q, bounds_k, longest_q, longest_k, seed, offset, _mask = rest
        found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            d,
            q,
            k,
            v,
            out,
            log_sums,
            seed,
            offset,
            None,
            bounds_q,
            bounds_k,
            longest_q,
            longest_k,
            0.0,
            True,
            scale=scaling,
        )
        return *(part.transpose(1, 2) for part in found), *of_sinks
    state, unused, _mask = rest
    bounds, longest = _bounds(lengths, query.device), _longest(lengths)
    found = torch.ops.aten._flash_attention_backward(
        d_out,
        query,
        key,
        value,
        attended.out,
        log_sums,
        bounds,
        bounds,
        longest,
        longest,
        0.0,
        True,
        state,
        unused,
        scale=scaling,
        **_sides(None if window is None or window >= max(lengths) else window),
    )
    return *(part[None] for part in found), *of_sinks


def _sinks_backward(
    out: torch.Tensor, d_out: torch.Tensor, log_sums: torch.Tensor, sinks: torch.Tensor
) -> torch.Tensor:
    """(heads,) from out and d_out (tokens, heads, width) and the sums (heads, tokens) with the sinks in them."""
    through = (out.float() * d_out.float()).sum(-1)
    return -(torch.exp(sinks[:, None] - log_sums) * through.t()).sum(1)


def _longest(lengths: tuple[int, ...]) -> int:
    """At least 2: for a single query the kernel turns heads into queries, and its sums come in another order."""
    return max(2, *lengths)


def _sides(window: int | None) -> dict[str, int]:
    """How far to each side flash attention looks."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _has_flash(query: torch.Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


@cache
def _hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index)[0] == 9


def _cudnn_is_faster(query: torch.Tensor) -> bool:
    """On Hopper cuDNN's kernels take 0.6 of the time of flash 2; on Ampere and Ada they are slower.

    Inside `exact` they are not asked: PyTorch has no backward of theirs that gives the same bits each time.
    """
    if torch.are_deterministic_algorithms_enabled():
        return False
    return _hopper(query.device.index or 0) and query.shape[-1] <= 128


def _as_batch(part: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """(tokens, heads, width) of equal samples as (samples, heads, length, width), without a copy."""
    return part.view(len(lengths), lengths[0], *part.shape[1:]).transpose(1, 2)


class _Packed(torch.autograd.Function):
    """`attend` as a node of autograd's graph, for the reference."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...],
        scaling: float, window: int | None, sinks: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        ctx.attended = attend(query, key, value, lengths, scaling, window, sinks)
        ctx.inputs = query, key, value, lengths, scaling, window
        out: torch.Tensor = ctx.attended.out
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[Any, ...]:
        found = attend_backward(ctx.attended, d_out.contiguous(), *ctx.inputs)
        of_sinks = found[3] if len(found) > 3 else None
        return *(part.flatten(0, 1) for part in found[:3]), None, None, None, of_sinks


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # validation may ask first, and a backward use the same
def _bounds(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # validation may ask first, and a backward use the same
def _groups(
    lengths: tuple[int, ...], device: torch.device
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """How tokens are gathered into groups of like length, and put back.

    Each group is (places: (samples, longest) of token places, kept: flat places in it that are no padding).
    A sample joins the group of longer ones while it is at least two thirds as long as the longest.
    """
    starts = [0, *accumulate(lengths)]
    order = sorted(range(len(lengths)), key=lambda sample: -lengths[sample])
    gathered: list[list[int]] = []
    for sample in order:
        if gathered and lengths[sample] * 1.5 >= lengths[gathered[-1][0]]:
            gathered[-1].append(sample)
        else:
            gathered.append([sample])
    groups, tokens = [], []
    for group in gathered:
        longest = lengths[group[0]]
        offsets = torch.arange(longest)
        counts = torch.tensor([lengths[sample] for sample in group])[:, None]
        first = torch.tensor([starts[sample] for sample in group])[:, None]
        places = first + torch.minimum(offsets, counts - 1)
        kept = (offsets < counts).flatten().nonzero().flatten()
        groups.append((places.to(device), kept.to(device)))
        tokens.append(places.flatten()[kept])
    inverse = torch.cat(tokens).argsort()
    return groups, inverse.to(device)


def remember_layout(lengths: tuple[int, ...]) -> None:
    """Work out where samples of these lengths are gathered, off a GPU: tensors without numbers could not."""
    _groups(lengths, torch.device("cpu"))


AttentionInterface.register(NAME, _attend)
