"""Garbage is looked for again afterwards, whatever happened; what comes with torch is not looked at any more."""

import gc
import subprocess
import sys

import pytest

from afina.garbage import importing, uncollected


def test_it_is_looked_for_again_after_an_error_too():
    with uncollected(), uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="no"), uncollected():
        raise ValueError("no")
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled(), "who had turned it off finds it so"
    finally:
        gc.enable()


def test_what_comes_with_torch_is_not_looked_at_again():
    """In a process of its own. Garbage of before is gone first; and where torch is there already, nothing is done."""
    code = """
import gc, weakref
from afina.garbage import importing
class Node: pass
node = Node(); node.itself = node; seen = weakref.ref(node); del node
with importing():
    import torch
frozen = gc.get_freeze_count()
print(seen() is None, frozen > 50_000, gc.isenabled())
with importing():
    assert gc.isenabled()
    kept = [[] for _ in range(1000)]
print(gc.get_freeze_count() == frozen)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["True"] * 4


def test_in_a_process_with_torch_nothing_is_frozen():
    import torch  # noqa: F401

    before = gc.get_freeze_count()
    with importing():
        pass
    assert gc.get_freeze_count() == before
