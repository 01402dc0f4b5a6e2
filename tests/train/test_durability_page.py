"""docs/durability.md names tests that exist, at least one a promise, and the numbers that they use."""

import ast
import re
from pathlib import Path

from train import test_checkpoint, test_kill

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "durability.md").read_text("utf-8")
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_test_that_the_page_names_exists():
    found = NAMED.findall(PAGE)
    for file, name in found:
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
    assert len(found) > 20


def test_each_promise_has_a_test_and_a_figure():
    rows = dict(re.findall(r"^\| (P\d) \|(.*)$", PAGE, re.M))
    assert sorted(rows) == [f"P{number}" for number in range(1, 9)]
    for promise, row in rows.items():
        assert NAMED.search(row), promise
        assert re.search(r"\d|same", row.rstrip(" |").rpartition("|")[2]), promise


def test_the_figures_are_those_of_the_tests():
    assert f"{test_checkpoint.CORRUPTIONS:,} corruptions" in PAGE
    assert f"{test_checkpoint.SIZES} of {test_checkpoint.SIZES} sizes" in PAGE
    assert f"{test_kill.KILLS * len(test_kill.QUICK)} kills" in PAGE
