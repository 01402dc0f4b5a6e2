"""A file as blocks of some thousand rows: the raw lines of JSON Lines, and of all else the rows as they are read."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from afina.data.encoding import open_text
from afina.data.lines import ROW_BYTES
from afina.data.row import Row, Shape
from afina.data.rows import rows

CHUNK = 2**20
"""Bytes read at once: a few hundred calls of numpy cost as much for a small block as for a large one."""
ROWS = 2000
"""Rows of a block where they come one by one."""


@dataclass(slots=True)
class Block:
    """Rows in order. `raws`: the text of each. `lines`: its line, `begins`: its first byte, `sizes`: its bytes,
    `numbers`: which row of a document it is, else 0 (int64 all).

    `rows`: as the reader made them, None where the raw text is all there is. `cut`: the last one is longer than a row
    may be. `size`: bytes taken.
    """

    raws: list[bytes]
    lines: np.ndarray
    begins: np.ndarray
    sizes: np.ndarray
    numbers: np.ndarray
    rows: list[Row] | None = None
    cut: bool = False
    size: int = 0
    returns: int = 0
    """Lines that end in CR LF."""
    text: bytes = b""
    """Of rows that are JSON, all of them, each with a line end."""

    @property
    def edges(self) -> np.ndarray:
        """(rows,) int64: where each begins in `text`."""
        return np.asarray(np.cumsum(self.sizes + 1) - self.sizes - 1)


def line_blocks(path: Path, encoding: str) -> Iterator[Block]:
    """JSON Lines, unparsed. A line over ROW_BYTES comes cut and is the last."""
    with open_text(path, encoding) as file:
        number, offset, rest = 1, 0, b""
        while chunk := file.read(CHUNK):
            if len(rest) > ROW_BYTES:
                break
            if b"\n" not in chunk:
                rest += chunk
                continue
            cut = chunk.rfind(b"\n") + 1
            block = _block(rest + chunk[:cut], number, offset)
            rest = chunk[cut:]
            yield block
            number, offset = number + len(block.raws), offset + block.size
        if rest:
            block = _block(rest[:ROW_BYTES] + b"\n", number, offset)
            block.cut = len(rest) > ROW_BYTES
            block.size = len(rest)
            yield block


def _block(text: bytes, number: int, offset: int) -> Block:
    """text: whole lines."""
    raws = text.split(b"\n")
    raws.pop()
    codes = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(codes == ord("\n"))
    begins = np.append(0, ends[:-1] + 1)
    returns = np.count_nonzero(codes[ends - 1] == ord("\r"))
    lines = np.arange(number, number + len(raws))
    return Block(
        raws,
        lines,
        begins + offset,
        ends - begins,
        np.zeros_like(lines),
        size=len(text),
        returns=int(returns),
        text=text,
    )


def row_blocks(path: Path, shape: Shape, form: str) -> Iterator[Block]:
    """Rows of any other form, as data/rows.py reads them."""
    source = rows(path, shape, form)
    at = 0
    while taken := list(islice(source, ROWS)):
        last = taken[-1]
        end = max(last.offset + len(last.raw), at)
        raws = [row.raw for row in taken]
        begins = np.array([row.offset for row in taken], np.int64)
        sizes = np.fromiter(map(len, raws), np.int64, len(raws))
        lines = np.array([row.line for row in taken], np.int64)
        numbers = np.array([row.number for row in taken], np.int64)
        text = b"\n".join([*raws, b""]) if taken[0].is_json else b""
        yield Block(raws, lines, begins, sizes, numbers, taken, size=end - at, text=text)
        at = end
