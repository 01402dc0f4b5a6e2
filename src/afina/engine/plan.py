"""What waits where, chosen by bytes and microseconds: the fastest way of running a micro-batch that fits into a GPU.

Candidates are counted, not tried: tokens at once, how many layers let go of how much, and whether both ends of the
model leave the GPU. Rates are measured on the spot: of a layer's products and of exact ones, of copies to the
computer's memory and of reading and writing the GPU's own.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations, product
from typing import TYPE_CHECKING

import torch

from afina.engine.block import HERE, Placement
from afina.engine.head import LOGITS_AT_ONCE, VOCABULARY_AT_ONCE, Host
from afina.engine.offload import LAYERS_AT_ONCE
from afina.engine.products import Product

if TYPE_CHECKING:
    from afina.engine.block import Block
    from afina.engine.engine import Engine

LAYER_US, AWAY_US = 2800, 150
"""Microseconds in which Python on a server's slow core launches a layer's forward and backward, and sends a tensor away
and brings it back: no micro-batch is faster than that."""
OVERHEAD = 0.1
"""Of that time comes on top whatever is computed: the more tokens at once, the better."""
ROWS_AT_ONCE = 4096
"""Tokens that go through the widest products together where their output is not kept."""
MEANWHILE = 0.04
"""A copy slows what computes meanwhile: beyond the computation its time counts in full, within it so much."""
PASSED = frozenset({"gate_up", "h"})
"""Gone from the GPU when a layer's backward has come to its attention."""
KNOWN = 1.05
"""A plan that was carried out before may take so much more than a new one."""
LAST = 3
"""Layers that keep the most, where some do: what they fetch or make again would lie beside all that is saved."""
PASSES = 9
"""Times that what products read and write passes through the GPU's memory besides, forward and backward: norms, gates,
angles, sums, low-rank terms. Steps of an 8B on an H200 were 9.3 in bf16 and 9.0 in e4m3."""
ATTENTION = 3.5 / 0.47
"""How often a forward's scores and sums are multiplied in all, over the share of a product's rate they are done at."""
WORKSPACE = 96 * 2**20
"""Bytes that cuBLAS and cuDNN take for themselves."""


def ladder(names: frozenset[str]) -> list[Placement]:
    """Placements of a layer that saves `names`, each with less on the GPU than the one before."""
    widest = frozenset({"gate_up", "z"}) & names
    smaller = names - widest
    remade = smaller - {"x", "out"}
    return [
        HERE,
        Placement(away=widest),
        Placement(again=widest),
        Placement(away=smaller, again=widest),
        Placement(away=smaller - remade, again=widest | remade),
    ]


@dataclass(frozen=True)
class Plan:
    """How a micro-batch of `tokens` is run, the `bytes` it takes beside the weights and the time it should take.

    held: so many of the last layers keep their four-bit weights unpacked. Of the bytes, `saved` wait for the backward
    on the GPU and `head` are the loss's own; `away` more wait in the computer's memory.
    """

    tokens: int
    placements: list[Placement]
    rows_at_once: int = 0
    host: Host = "neither"
    bytes: int = 0
    microseconds: float = 0.0
    held: int = 0
    saved: int = 0
    head: int = 0
    away: int = 0

    @property
    def arithmetic(self) -> str:
        """What of it last bits depend on: where tensors wait, or that they are made again, changes none."""
        head = "in parts" if self.host == "both" else "whole"
        return f"{self.rows_at_once or 'all'} rows at once, head {head}"


@dataclass(frozen=True)
class Rates:
    """In a microsecond: multiply-adds of a layer's products, bytes of a copy to the computer's memory, bytes read and
    written in the GPU's, multiply-adds of an exact product. Off a GPU there is nothing to choose by them."""

    products: float = 1.0
    copies: float = 1.0
    memory: float = math.inf
    exact: float = 1.0


def choose(
    engine: "Engine", tokens: int, least: int, free_bytes: int, rates: Rates | None = None, longest: int | None = None
) -> Plan:
    """The plan with the least time per token of those that fit into `free_bytes`; the smallest where none fits.

    In `free_bytes` there is no room for gradients yet: they come to be while saved tensors go. least: so many tokens
    at once at least; longest: of a sample, unset `least`.
    """
    rates, longest = rates or measure(engine), longest or least
    whole = count_up(engine, Plan(tokens, [HERE] * len(engine.blocks)), rates, longest)
    if whole.bytes <= free_bytes:
        each = engine.blocks[0].unpacked * engine.dtype.itemsize
        held = min(len(engine.blocks), (free_bytes - whole.bytes) // each) if each else 0
        spared = held * engine.blocks[0].moved / rates.memory
        return replace(whole, bytes=whole.bytes + held * each, microseconds=whole.microseconds - spared, held=held)
    plans = list(_candidates(engine, tokens, least, longest, rates))
    fitting = [plan for plan in plans if plan.bytes <= free_bytes]
    if not fitting:
        return min(plans, key=lambda plan: plan.bytes)
    return min(fitting, key=lambda plan: (plan.microseconds / plan.tokens, plan.bytes))


def _candidates(engine: "Engine", tokens: int, least: int, longest: int, rates: Rates) -> Iterator[Plan]:
    layers, rungs = len(engine.blocks), ladder(frozenset(engine.blocks[0].saves(1)))
    on_gpu = engine.device.type in ("cuda", "meta")  # tensors without memory stand for a GPU's, see forecast/
    usable = [number for number, rung in enumerate(rungs) if on_gpu or not rung.away]
    mixes = {mix for low, high in combinations(usable, 2) for mix in _mixes((low, high), layers, len(rungs))}
    if on_gpu:  # some layers wait, as many as copies have time for; some are made again
        mixes |= set(_mixes((0, 1, 2), layers, len(rungs)))
    hosts: list[Host] = ["neither"]
    if on_gpu and not engine.ends.learnt:
        hosts = ["neither", "both"] if engine.ends.tied else ["neither", "embedding", "both"]
    while True:
        same = _Same(engine, tokens, rates, longest)
        for host in hosts:
            for mix in mixes:
                yield count_up(engine, Plan(tokens, spread(rungs, mix), host=host), rates, longest, same)
        if tokens // 2 < least:
            return
        tokens //= 2


def _mixes(chosen: tuple[int, ...], layers: int, rungs: int) -> Iterator[tuple[int, ...]]:
    """How many layers stand on each rung, in every way that uses the chosen ones alone."""
    for upper in product(range(layers + 1), repeat=len(chosen) - 1):
        if sum(upper) <= layers:
            counts = dict(zip(chosen, (layers - sum(upper), *upper), strict=True))
            yield tuple(counts.get(rung, 0) for rung in range(rungs))


def spread(rungs: Sequence[Placement], counts: Sequence[int]) -> list[Placement]:
    """So many layers on each rung, evenly mixed, so that copies have time.

    The last layers stand on the lowest: their backward comes first, when all that is saved is still there.
    """
    layers, lowest = sum(counts), next(rung for rung, count in enumerate(counts) if count)
    end = min(counts[lowest], LAST)
    counts = [count - (end if rung == lowest else 0) for rung, count in enumerate(counts)]
    places = sorted(((position + 0.5) / count, -rung) for rung, count in enumerate(counts) for position in range(count))
    return [rungs[-rung] for _place, rung in places][:layers] + [rungs[lowest]] * end


class _Same:
    """What all plans of an engine have in common that compute so many tokens at once: see _between and _weigh."""

    def __init__(self, engine: "Engine", tokens: int, rates: Rates, longest: int | None) -> None:
        self.between = _between(engine, tokens, longest, rates)
        self.gradients = sum(by.numel() * by.element_size() for by in engine.blocks[0].parameters())
        self.weight = cache(partial(_weigh, engine.blocks[0], tokens))


def count_up(engine: "Engine", plan: Plan, rates: Rates, longest: int | None = None, same: _Same | None = None) -> Plan:
    """The plan with its bytes and microseconds: what lies on the GPU at the head and in each layer's backward.

    longest: tokens of a sample, unset all; rows of shorter ones take less time.
    """
    same = same or _Same(engine, plan.tokens, rates, longest)
    tokens, element, layers = plan.tokens, engine.dtype.itemsize, len(engine.blocks)
    block, ends = engine.blocks[0], engine.ends
    cut = tokens > ROWS_AT_ONCE and "gate_up" in block.saves(1) and all(one.again for one in plan.placements)
    hidden, vocabulary = block.products[0].k, ends.weight.shape[0]
    rungs = [same.weight(placement, ROWS_AT_ONCE if cut else tokens) for placement in plan.placements]
    of_head = 4 * vocabulary * hidden if ends.learnt else 0
    saved = standing = sum(rung.kept for rung in rungs) * element
    at_head = of_head + ends.at_work(tokens, plan.host) + 4 * tokens * hidden * element
    needed = saved + at_head
    behind = 0
    for number, rung in enumerate(rungs):
        settled = number == layers - 1 and not rung.away  # else what two layers send is still leaving
        leaving = 0 if settled else sum(before.away for before in rungs[max(0, number - LAYERS_AT_ONCE) : number])
        needed = max(needed, (behind + leaving + rung.forward) * element)
        behind += rung.kept
    for number in range(layers - 1, -1, -1):
        here = rungs[number].away + (rungs[number - 1].away if number else 0) + rungs[number].work
        needed = max(needed, standing + here * element + of_head + same.gradients * (layers - number))
        standing -= rungs[number].kept * element
    needed += WORKSPACE + engine.to_come - ends.spared(plan.host)
    away = sum(rung.away for rung in rungs) * element
    copying = away / rates.copies
    passes = 3 if ends.learnt else 2
    base = (block.multiply_adds() * layers / rates.products + vocabulary * hidden / rates.exact) * tokens
    again, between = sum(rung.again for rung in rungs) / rates.products, same.between
    forward, backward = base + between / 3, (passes - 1) * base + again + between * 2 / 3
    microseconds = max(forward, copying) + max(backward, copying) + MEANWHILE * 2 * copying
    if plan.host == "both":
        times = -(-tokens * VOCABULARY_AT_ONCE // (4 * LOGITS_AT_ONCE))
        microseconds += vocabulary * hidden * (2 * times * element / rates.copies + tokens / rates.exact)
    launching = LAYER_US * layers + AWAY_US * sum(len(placement.away) for placement in plan.placements)
    microseconds = max(microseconds, launching) + OVERHEAD * launching
    return replace(plan, rows_at_once=ROWS_AT_ONCE if cut else 0, bytes=int(needed), microseconds=microseconds,
                   saved=saved, head=at_head, away=away)  # fmt: skip


def _between(engine: "Engine", tokens: int, longest: int | None, rates: Rates) -> float:
    """Microseconds of attention, of what passes through memory between the products, and of weights that do."""
    multiplied, passing = 0, 0
    for block in engine.blocks:
        attention, length = block.attention, min(tokens, longest or tokens)
        seen = length if attention.window is None else min(length, 2 * attention.window)
        multiplied += tokens * seen * attention.heads[0] * attention.width
        passing += block.moved + tokens * PASSES * block.passing * engine.dtype.itemsize
    return multiplied * ATTENTION / rates.exact + passing / rates.memory


@dataclass(frozen=True)
class _Weight:
    """Of a layer on a rung, in elements: what stays, what waits away, what its backward has beside that at the most,
    all that its forward has; and the multiply-adds of what is made again."""

    kept: int
    away: int
    work: int
    forward: int
    again: int


def _weigh(block: "Block", tokens: int, rung: Placement, rows: int) -> _Weight:
    """rows: how many tokens go through the widest products at once."""
    sizes, attention = block.saves(tokens), block.attention
    made = {name: size * rows // tokens if name == "gate_up" else size for name, size in sizes.items()}
    away, again = (sum(sizes[name] for name in names) for names in (rung.away, rung.again))
    lows = tokens * sum(part.used for part in block.products)
    hidden, wide = block.products[0].k, attention.heads[0] * attention.width
    of_mlp = block.at_work(rows) + sum(made[name] for name in rung.again)
    repeated = 3 if attention.heads[0] == attention.heads[1] else 5  # sums in fp32, gradients of each query's own key
    of_attention = tokens * (attention.columns * (1 if attention.norms is None else 2) + repeated * wide)
    of_attention += sum(made[name] for name in rung.again - PASSED)
    of_attention -= sum(size for name, size in sizes.items() if name in PASSED - rung.again)
    work = 2 * tokens * (hidden + block.extra) + max(of_mlp, of_attention)
    multiplied = sum(block.multiply_adds(name) for name in rung.again) * tokens
    forward = lows + sum(made.values()) + block.at_work(rows) + tokens * hidden
    return _Weight(sum(sizes.values()) + lows - away - again, away, work, forward, multiplied)


def measure(engine: "Engine") -> Rates:
    """Some milliseconds of the widest product, in bf16 too, and of copies; off a GPU no rates are needed."""
    if engine.device.type != "cuda":
        return Rates()
    widest = max(engine.blocks[0].products, key=lambda product: product.n * product.k)
    host = torch.empty(2**25, dtype=torch.uint8, pin_memory=True)
    here = torch.empty(2**25, dtype=torch.uint8, device=engine.device)

    def microseconds(call: Callable[[], object]) -> float:
        """As the GPU counts them: its clock does not wait for Python."""
        call()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _turn in range(4):
            call()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 4 * 1e3

    plain = Product.trial(widest, 2048)
    products, exact = (2048 * widest.n * widest.k / microseconds(trial) for trial in (widest.trial(2048), plain))
    copies = here.numel() / microseconds(lambda: host.copy_(here, non_blocking=True))
    large = torch.empty(2, 2**26, dtype=torch.uint8, device=engine.device)  # beyond what its caches hold
    return Rates(products, copies, large.numel() / microseconds(lambda: large[0].copy_(large[1])), exact)
