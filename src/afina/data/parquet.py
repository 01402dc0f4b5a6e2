"""Parquet to rows, a few at a time.

Pages and footers are decoded in a process of its own (worker.py): one that lies about its sizes ends that process.
What comes back is a batch of rows in Arrow's own form, looked through there; here it becomes values, row by row.
"""

import json
from base64 import b64decode, b64encode
from collections.abc import Generator, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from afina.data.lines import FREE_BYTES, RATIO
from afina.data.row import Row
from afina.data.worker import READER, Act, Overrun
from afina.errors import DataError, ResourceError
from afina.language import _

BATCH_BYTES = 2**22
"""Rows come over in batches of about so much."""
BATCH_ROWS = 128
"""Rows that are decoded at once: few, as a file may hold a text once and name it in all of them. Arrow's own way with
these, read_dictionary, hands over with each batch all texts of the row group so far."""
FOOTER = 2**24
"""No name or statistic of the footer is longer, and it lists no more parts."""
CLOSE, BOMB = -1, "bomb"
"""Asked for instead of a batch: let go of the file. Answered: it grows too much."""
_OPENED = count()


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows in order; `line` is the number of the row. Raises DataError, and ResourceError without pyarrow."""
    try:
        from pyarrow import ipc
    except ImportError as error:
        raise ResourceError(
            _("The package pyarrow is needed to read Parquet files."),
            hint=_('Run: pip install "afina[parquet]", or convert the file to JSON Lines.'),
        ) from error
    opened = json.dumps([str(path.absolute()), next(_OPENED)])
    made, number, packed = 0, 0, path.stat().st_size
    try:
        for place in count():
            text = _batch(path, opened, place, number + 1)
            if text == BOMB:
                raise _bomb(path)
            if not text:
                return
            with ipc.open_stream(b64decode(text)) as stream:
                batch = stream.read_next_batch()
            for value in batch.to_pylist():
                number += 1
                made += _size(value)
                if made > FREE_BYTES and made > RATIO * packed:
                    raise _bomb(path)
                yield Row(value, number)
    finally:
        if READER.running:
            with suppress(Overrun):
                READER.ask("parquet", opened, [CLOSE])


def _batch(path: Path, opened: str, place: int, line: int) -> str:
    try:
        status, text = READER.ask("parquet", opened, [place])[0]
    except Overrun as error:
        status, text = "refused", error.message
    if status != "made":
        raise DataError(
            _("The Parquet file cannot be read: {reason}.").format(reason=text.split("\n")[0].rstrip(".")),
            file=path,
            line=line,
            hint=_("Fetch it again, or convert it to JSON Lines."),
        )
    return text


def prepare() -> None:
    """What the process needs before its memory is counted. Raises ImportError without pyarrow."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # the others ask for gigabytes ahead
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)


def batches(definition: str) -> Act:
    """In the process: the file of a definition, [path, number], as an act that makes a text of its n-th batch.

    Batches are asked for in order, from 0. "" is said after the last; BOMB of what no data set is like.
    """
    source = _batches(json.loads(definition)[0])
    expected = count()

    def batch(place: Any) -> str:
        if place == CLOSE:
            source.close()
        elif place != next(expected):
            raise ValueError(f"batch {place} is not the next one: the process was begun anew")
        return next(source, "")

    return batch


def _batches(path: str) -> Generator[str, None, None]:
    import pyarrow
    from pyarrow import ipc, parquet

    limits = {"thrift_string_size_limit": FOOTER, "thrift_container_size_limit": FOOTER, "pre_buffer": False}
    try:
        with parquet.ParquetFile(path, **limits) as file:
            size = _batch_rows(file.metadata)
        if not size:
            yield BOMB
            return
        with parquet.ParquetFile(path, buffer_size=2**16, **limits) as file:
            for batch in file.iter_batches(batch_size=size, use_threads=False):
                batch.validate(full=True)
                for part in _parts(batch):
                    sink = pyarrow.BufferOutputStream()
                    with ipc.new_stream(sink, part.schema) as stream:
                        stream.write_batch(part)
                    yield b64encode(sink.getvalue()).decode("ascii")
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, MemoryError):
            raise
        raise ValueError(str(error)) from error


def _parts(batch: Any) -> Iterator[Any]:
    """A batch in halves, as often as it takes: what is small in the file may be large once it is decoded."""
    if batch.nbytes <= BATCH_BYTES or batch.num_rows == 1:
        yield batch
        return
    half = batch.num_rows // 2
    yield from _parts(batch.slice(0, half))
    yield from _parts(batch.slice(half))


def _batch_rows(metadata: Any) -> int:
    """Rows to a batch, by what the footer says of their size; 0 for what no data set is like."""
    made = packed = 0
    for group in range(metadata.num_row_groups):
        part = metadata.row_group(group)
        for column in range(part.num_columns):
            chunk = part.column(column)
            made, packed = made + chunk.total_uncompressed_size, packed + chunk.total_compressed_size
    if made > FREE_BYTES and made > RATIO * packed:
        return 0
    return int(max(1, min(BATCH_ROWS, BATCH_BYTES * max(metadata.num_rows, 1) // max(made, 1))))


def _size(value: Any) -> int:
    """About how many bytes a row takes."""
    if isinstance(value, dict):
        return 64 + sum(_size(one) for one in value.values())
    if isinstance(value, list):
        return 64 + sum(_size(one) for one in value)
    return len(value) if isinstance(value, str | bytes) else 8


def _bomb(path: Path) -> DataError:
    return DataError(
        _("The compressed file grows over {ratio} times, which no data set does.").format(ratio=RATIO),
        file=path,
        hint=_("Decompress it yourself if you trust it."),
    )
