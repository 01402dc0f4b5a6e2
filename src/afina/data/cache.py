"""Rendered samples kept between runs, so that a second start on the same data does no work twice.

An entry is a sealed folder named after everything that its content depends on: the bytes of the data files, the parts
of the recipe that matter, tokenizer, template, and the code that reads and renders. It appears whole or not at all,
every hash is looked at before it is believed, and what was not used for longest goes first when there is too much.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from afina import durable
from afina.artifact import MANIFEST, open_artifact, seal, sha256, versions
from afina.data.template import Rendered
from afina.data.tokenizer import Tokenizer
from afina.errors import AfinaError

FOLDER = ".cache"
"""Beside the run folders."""
WORTH_S = 2.0
"""What took less to make is not kept: reading and verifying it would take as long."""
MOST_BYTES = 4 * 2**30
"""Entries are removed, the longest unused first, until they take no more."""
KIND = "rendered"


def key_of(files: Sequence[Path], tokenizer: Tokenizer, parts: Mapping[str, Any]) -> str:
    """The name of an entry: a hash of all that decides what rendering makes of these files."""
    said = {
        "files": [[str(file), sha256(file)] for file in files],
        "parts": parts,
        "tokenizer": hashlib.sha256(tokenizer.hf.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": {key: str(text) for key, text in tokenizer.hf.special_tokens_map.items()},
        "template": tokenizer.template,
        "versions": {name: number for name, number in versions().items() if name != "torch"},
        "code": [sha256(file) for file in sorted(Path(__file__).parent.glob("*.py"))],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:32]


def keep(folder: Path, key: str, sets: Mapping[str, Sequence[Rendered]], facts: Mapping[str, Any]) -> None:
    """Write an entry, then prune. A disk that refuses it is no reason to stop: then there is none."""
    try:
        durable.sweep(folder)
        with durable.new_folder(folder / key) as entry:
            columns = {name: _write(entry, name, rows) for name, rows in sets.items()}
            seal(entry, KIND, columns=columns, facts=dict(facts))
        _prune(folder, key)
    except (AfinaError, OSError):
        return


def holds(folder: Path, key: str) -> bool:
    """Whether there is such an entry, not yet looked into."""
    return (folder / key / MANIFEST).is_file()


def kept(folder: Path, key: str) -> tuple[dict[str, list[Rendered]], dict[str, Any]] | None:
    """The sets and facts of an entry; None where there is none. One that is not what it was when written is removed."""
    place = folder / key
    if not holds(folder, key):
        return None
    try:
        entry = open_artifact(place, KIND)
        entry.verify()
        sets = {name: _read(place, name, columns) for name, columns in entry.manifest["columns"].items()}
        os.utime(place / MANIFEST)
    except (AfinaError, OSError, ValueError, KeyError, TypeError):
        durable.remove(place)
        return None
    return sets, entry.manifest["facts"]


def _write(entry: Path, name: str, rows: Sequence[Rendered]) -> dict[str, str]:
    """One file of lengths and one of values for each array that a rendered sample has; the types of the values."""
    types = {}
    for field in fields(Rendered):
        arrays = [getattr(row, field.name) for row in rows]
        there = [array for array in arrays if array is not None]
        types[field.name] = str(there[0].dtype) if there else "bool"
        lengths = np.array([-1 if array is None else array.size for array in arrays], "<i8")
        durable.write_bytes(entry / f"{name}.{field.name}.lengths", lengths.tobytes())
        durable.write_bytes(entry / f"{name}.{field.name}", np.concatenate(there).tobytes() if there else b"")
    return types


def _read(place: Path, name: str, types: Mapping[str, str]) -> list[Rendered]:
    columns: dict[str, list[np.ndarray | None]] = {}
    for field, kind in types.items():
        lengths = np.frombuffer((place / f"{name}.{field}.lengths").read_bytes(), "<i8")
        values = np.frombuffer((place / f"{name}.{field}").read_bytes(), np.dtype(kind))
        ends = np.cumsum(np.maximum(lengths, 0)).tolist()
        columns[field] = [
            None if length < 0 else values[end - length : end]
            for length, end in zip(lengths.tolist(), ends, strict=True)
        ]
    return [Rendered(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]  # type: ignore[arg-type]


def _prune(folder: Path, newest: str) -> None:
    """Remove what was not used for longest, while all entries take too much."""
    sizes = {}
    for manifest in folder.glob(f"*/{MANIFEST}"):
        entry = manifest.parent
        sizes[entry] = (manifest.stat().st_mtime, sum(file.stat().st_size for file in entry.iterdir()))
    total = sum(size for _used, size in sizes.values())
    for entry in sorted(sizes, key=lambda entry: sizes[entry]):
        if total <= MOST_BYTES or entry.name == newest:
            continue
        durable.remove(entry)
        total -= sizes[entry][1]
