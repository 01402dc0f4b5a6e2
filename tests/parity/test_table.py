"""docs/methods.md is the table of what was measured, no pair is missing or fails, and each method is measured again.

Which family a method is measured on again depends on the code, so that it is another one after every change.
AFINA_PARITY=all measures every pair, some minutes.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from families import NAMED, build
from parity.ours import METHODS, Measured, measure

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "docs" / "methods.json").read_text("utf-8"))
SOURCES = sorted([*(ROOT / "src/afina/model").glob("*.py"), *(ROOT / "src/afina/train").glob("*.py")])


def again() -> list[tuple[str, str]]:
    """Pairs to measure: each method on one family."""
    if os.environ.get("AFINA_PARITY") == "all":
        return [(name, family) for name in METHODS for family in NAMED]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).digest()
    families = list(NAMED)
    return [(name, families[digest[place % 32] % len(families)]) for place, name in enumerate(METHODS)]


def test_the_page_is_what_was_measured():
    command = [sys.executable, str(ROOT / "tools" / "methods_table.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run tools/methods_table.py"


def test_no_pair_is_missing_or_fails():
    assert RECORD["pairs"].keys() == NAMED.keys()
    for family, row in RECORD["pairs"].items():
        assert list(row) == list(METHODS), family
        for name, found in row.items():
            figures = {key: value for key, value in found.items() if key != "holds"}
            assert Measured(**figures).holds() and found["holds"], (family, name)


@pytest.mark.parametrize("name, family", again())
def test_a_pair_is_as_the_page_says(name, family, tmp_path):
    if METHODS[name].model.quantization != "none":
        pytest.importorskip("bitsandbytes")
    build(family).save_pretrained(tmp_path)
    found, told = measure(tmp_path, METHODS[name]), RECORD["pairs"][family][name]
    assert found.holds(), found
    assert (found.packed, found.engine is None, found.merged is None) == (
        told["packed"],
        told["engine"] is None,
        told["merged"] is None,
    )
