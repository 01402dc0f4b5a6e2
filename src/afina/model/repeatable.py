"""The same bits each time, on a GPU too, where threads add up what others made in whatever order they come.

torch has one switch for the whole process. Where it is on, torch takes an order that does not change. The backward of
attention, which is where the bits differ (the gradient of the queries, by flash and by cuDNN), does so only for those
who want an error rather than a warning, which others' operations could not stand.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def same_bits(on: bool = True) -> Iterator[None]:
    """Inside the block the same computation gives the same bits, as far as torch knows how; `on`: or as before."""
    if not on:
        yield
        return
    settings: Any = torch.utils.deterministic
    filling = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False  # nothing here reads what it has not written
    try:
        with _switched(warn_only=True):
            yield
    finally:
        settings.fill_uninitialized_memory = filling


@contextmanager
def in_order() -> Iterator[None]:
    """Around the backward of attention: sums in a fixed order inside `same_bits`, else as it likes."""
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    with _switched(warn_only=False):
        yield


def strict(on: bool) -> None:
    """As `in_order`, inside `exact` and from now on: for those who cannot put a block around what they mean."""
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(True, warn_only=not on)


@contextmanager
def _switched(*, warn_only: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
