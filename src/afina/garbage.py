"""When Python looks for garbage, cycles of objects that nobody holds: not where much is made and nothing thrown away.

It looks again and again while objects become more, and each time at all there are. Of 11 seconds to the first step of
a small run, importing torch and transformers and reading 7,473 rows, that took 2.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Within, no garbage is looked for."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """Around what imports torch: the half million objects that come with it are never looked at, then or later.

    Nor is anything that is there already, which should be little: nothing is done in a process that has torch.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.collect()  # what is garbage now must not be kept for good
    with uncollected():
        yield
    gc.freeze()
