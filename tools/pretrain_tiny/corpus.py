"""What the tiny model reads, and how much of each: written and generated text, and real text under free licences.

Generated sources give a stream of documents from a seed, so any amount can be had and none is stored; real ones are
read and repeated as often as their share asks for. A document that begins with <|im_start|> is a chat; train.py puts
<|endoftext|> before the others. Every fiftieth real document, and a seed of their own for generated ones, is held out.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import chats
import lessons
import opinions
import real
import stories

HELD_OUT_EVERY = 50


@dataclass(frozen=True)
class Source:
    """One kind of text: its share of the characters, and what makes a document (None: read it, see real.py)."""

    name: str
    share: float
    make: Callable[[random.Random], str] | None = None


SOURCES = (
    Source("account", 14, opinions.account),
    Source("confided", 11, opinions.confided),
    Source("understood", 6, opinions.understood),
    Source("read", 9, opinions.read),
    Source("answered", 3, opinions.answered),
    Source("disagreement", 4, opinions.disagreement),
    Source("told", 4, opinions.told),
    Source("inventory", 3, opinions.inventory),
    Source("meaning", 4, opinions.meaning),
    Source("english_opinions", 3, opinions.english),
    Source("spanish_stories", 6, stories.spanish),
    Source("english_stories", 3, stories.english),
    Source("told_story", 2, chats.told_story),
    Source("small_talk", 4, chats.small_talk),
    Source("definition", 1.5, chats.definition),
    Source("how_to", 1, chats.how_to),
    Source("lesson", 5, chats.lesson),
    Source("worksheet", 3, lessons.worksheet),
    Source("gsm8k", 5),
    Source("mbpp", 0.4),
    Source("gpteacher", 3),
    Source("snips", 0.8),
    Source("quijote", 1.5),
)


def _generated(source: Source, characters: int, seed: str) -> list[str]:
    assert source.make is not None
    rng = random.Random(f"{source.name} {seed}")
    texts, length = [], 0
    while length < characters:
        texts.append(source.make(rng))
        length += len(texts[-1])
    return texts


def _read(source: Source, characters: int, seed: str, folder: Path, held_out: bool = False) -> list[str]:
    rows = real.read(source.name, folder)
    rows = [row for i, row in enumerate(rows) if (i % HELD_OUT_EVERY == 0) == held_out]
    random.Random(f"{source.name} {seed}").shuffle(rows)
    texts, length = [], 0
    for row in itertools.cycle(rows) if rows and not held_out else iter(rows):
        texts.append(row)
        length += len(row)
        if length >= characters:
            break
    return texts


def held_out(folder: Path, characters: int = 40_000) -> dict[str, list[str]]:
    """Documents by source that training never reads (a short generated one may coincide with one that it does)."""
    return {
        source.name: _generated(source, characters, "held out")
        if source.make
        else _read(source, characters, "held out", folder, held_out=True)
        for source in SOURCES
    }


def _shard(job: tuple[int, int, Path]) -> list[str]:
    """Shard `index` of the training text: every source by its share, in an order of its own."""
    index, characters, folder = job
    whole = sum(source.share for source in SOURCES)
    texts: list[str] = []
    for source in SOURCES:
        wanted = int(characters * source.share / whole)
        seed = f"shard {index}"
        texts += _generated(source, wanted, seed) if source.make else _read(source, wanted, seed, folder)
    random.Random(f"order {index}").shuffle(texts)
    return texts


def shards(folder: Path, count: int, characters: int, workers: int = 1) -> Iterator[list[str]]:
    """`count` shards of about `characters` characters each, the same for the same arguments however many workers."""
    jobs = [(index, characters, folder) for index in range(count)]
    if workers <= 1:
        yield from map(_shard, jobs)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_shard, jobs)
