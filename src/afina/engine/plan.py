"""What waits where, chosen by bytes and microseconds: the fastest way of running a micro-batch that fits into a GPU.

Candidates are counted, not tried: tokens at once, how many layers let go of how much, and whether both ends of the
model leave the GPU. Two rates are measured on the spot, that of products and that of copies to the computer's memory.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from afina.engine.block import HERE, Placement
from afina.engine.head import LOGITS_AT_ONCE, VOCABULARY_AT_ONCE

if TYPE_CHECKING:
    from afina.engine.block import Block
    from afina.engine.engine import Engine

LAYER_US = 700
"""Microseconds in which Python can launch a layer's forward and backward: no micro-batch is faster than that."""
OVERHEAD = 0.1
"""Of that time comes on top whatever is computed: the more tokens at once, the better."""
ROWS_AT_ONCE = 4096
"""Tokens that go through the widest products together where their output is not kept."""
OFTEN = 1.05
"""A copy slows what computes meanwhile: its time beyond the computation counts in full, within it a twentieth."""


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
    """How a micro-batch of `tokens` is run, the `bytes` it takes beside the weights and the time it should take."""

    tokens: int
    placements: list[Placement]
    rows_at_once: int
    host: bool
    bytes: int
    microseconds: float


@dataclass(frozen=True)
class Rates:
    """Multiply-adds of a product and bytes of a copy, in a microsecond."""

    products: float
    copies: float


def choose(engine: "Engine", tokens: int, least: int, free_bytes: int, rates: Rates | None = None) -> Plan:
    """The plan with the least time per token of those that fit into `free_bytes`; the smallest where none fits."""
    rates = rates or measure(engine)
    plans = list(_candidates(engine, tokens, least, rates))
    fitting = [plan for plan in plans if plan.bytes <= free_bytes]
    if not fitting:
        return min(plans, key=lambda plan: plan.bytes)
    return min(fitting, key=lambda plan: (plan.microseconds / plan.tokens, plan.bytes))


def _candidates(engine: "Engine", tokens: int, least: int, rates: Rates) -> Iterator[Plan]:
    layers, levels = len(engine.blocks), ladder(frozenset(engine.blocks[0].saves(1)))
    on_gpu = engine.device.type == "cuda"
    if not on_gpu:  # nothing can wait anywhere else
        levels = [level for level in levels if not level.away]
    while True:
        for host in (False, True) if on_gpu and not engine.ends.learnt else (False,):
            for low, high in pairwise(levels):
                for count in range(layers + 1):
                    placements = spread(high, count, low, layers)
                    yield count_up(engine, Plan(tokens, placements, 0, host, 0, 0.0), rates)
        if tokens // 2 < least:
            return
        tokens //= 2


def spread(some: Placement, count: int, others: Placement, layers: int) -> list[Placement]:
    """`count` of the layers, evenly spread so that copies have time, from the first on."""
    chosen = [(n + 1) * count // layers > n * count // layers for n in range(layers)]
    return [some if here else others for here in reversed(chosen)]


def count_up(engine: "Engine", plan: Plan, rates: Rates) -> Plan:
    """The plan with its bytes and microseconds."""
    tokens, element = plan.tokens, engine.dtype.itemsize
    block, ends = engine.blocks[0], engine.ends
    sizes = {name: size * element for name, size in block.saves(tokens).items()}
    kept = moved = 0
    again = 0.0
    for placement in plan.placements:
        away = sum(sizes[name] for name in placement.away)
        kept += sum(sizes.values()) - away - sum(sizes[name] for name in placement.again)
        moved += away
        again += sum(_made_again(name, block) for name in placement.again) * tokens
    lows = sum(product.r for product in block.products) * element * len(engine.blocks)
    widest = max(product.n for product in block.products)
    waiting = {name for placement in plan.placements for name in placement.away}
    cut = all(placement.again for placement in plan.placements) and tokens > ROWS_AT_ONCE and "gate_up" in sizes
    rows = ROWS_AT_ONCE if cut else tokens
    hidden = block.products[0].k
    work = rows * (2 * widest + 2 * block.last.k) + tokens * (2 * block.attention.columns + 6 * hidden)
    work += 2 * sum(size // element for name, size in sizes.items() if name in waiting)
    vocabulary = ends.weight.shape[0]
    if plan.host:
        head = tokens * (VOCABULARY_AT_ONCE * (8 + element) + 4 * hidden) + 2 * VOCABULARY_AT_ONCE * hidden * element
        saved = element * hidden * vocabulary * (1 if ends.tied else 2)
    else:
        head, saved = min(tokens * vocabulary, LOGITS_AT_ONCE) * (4 + element), 0
    needed = kept + tokens * lows + max(work * element, head + 2 * tokens * hidden * element) - saved
    passes = 3 if ends.learnt else 2
    base = sum(product.n * product.k for product in block.products) * len(engine.blocks) * tokens
    of_head = vocabulary * hidden * tokens
    forward = (base + of_head) / rates.products
    backward = ((passes - 1) * (base + of_head) + again) / rates.products
    copying = moved / rates.copies
    microseconds = max(forward, copying) + max(backward, copying) + (OFTEN - 1) * 2 * copying
    if plan.host:
        microseconds += 2 * vocabulary * hidden * element / rates.copies
    launching = LAYER_US * len(engine.blocks)
    microseconds = max(microseconds, launching) + OVERHEAD * launching
    return replace(plan, rows_at_once=rows if cut else 0, bytes=int(needed), microseconds=microseconds)


def _made_again(name: str, block: "Block") -> int:
    """Multiply-adds for a token."""
    product = block.products[{"gate_up": -2, "z": 0, "qkv": 0, "h": 1}[name]]
    return product.n * product.k


def measure(engine: "Engine") -> Rates:
    """Some milliseconds of the widest product, and of a copy to pinned memory; off a GPU no rates are needed."""
    if engine.device.type != "cuda":
        return Rates(1.0, 1.0)
    product = max(engine.blocks[0].products, key=lambda product: product.n * product.k)
    weight = torch.zeros(product.n, product.k, dtype=engine.dtype, device=engine.device)
    x = torch.zeros(2048, product.k, dtype=engine.dtype, device=engine.device)
    host = torch.empty(2**25, dtype=torch.uint8, pin_memory=True)
    here = torch.empty(2**25, dtype=torch.uint8, device=engine.device)

    def microseconds(call: Callable[[], object]) -> float:
        call()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _turn in range(3):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / 3 * 1e6

    products = x.shape[0] * weight.numel() / microseconds(lambda: torch.mm(x, weight.t()))
    return Rates(products, here.numel() / microseconds(lambda: host.copy_(here, non_blocking=True)))
