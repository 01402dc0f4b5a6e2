"""Parquet to rows, a few at a time. Strings that a file holds once and names often are not multiplied in memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from afina.data.lines import FREE_BYTES, RATIO
from afina.data.rows import Row
from afina.errors import DataError, ResourceError
from afina.language import _

BATCH_BYTES = 2**22
"""Rows are decoded in batches of about so much."""
BATCH_ROWS = 1024
FOOTER = 2**24
"""No name or statistic of the footer is longer, and it lists no more parts."""


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows in order; `line` is the number of the row. Raises DataError, and ResourceError without pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ResourceError(
            _("The package pyarrow is needed to read Parquet files."),
            hint=_('Run: pip install "afina[parquet]", or convert the file to JSON Lines.'),
        ) from error
    limits = {"thrift_string_size_limit": FOOTER, "thrift_container_size_limit": FOOTER, "pre_buffer": False}
    made, number = 0, 0
    try:
        packed = path.stat().st_size
        with parquet.ParquetFile(path, **limits) as file:
            texts = [file.schema.column(n).path for n in range(len(file.schema)) if _is_text(file.schema.column(n))]
            size = _batch_rows(file.metadata, path)
        with parquet.ParquetFile(path, read_dictionary=texts, buffer_size=2**16, **limits) as file:
            for batch in file.iter_batches(batch_size=size, use_threads=False):
                for value in (batch.slice(place, 1).to_pylist()[0] for place in range(batch.num_rows)):
                    number += 1
                    made += _size(value)
                    if made > FREE_BYTES and made > RATIO * packed:
                        raise _bomb(path)
                    yield Row(value, number)
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        raise DataError(
            _("The Parquet file cannot be read: {reason}.").format(reason=str(error).split("\n")[0].rstrip(".")),
            file=path,
            line=number + 1,
            hint=_("Fetch it again, or convert it to JSON Lines."),
        ) from error


def _is_text(column: Any) -> bool:
    return str(column.physical_type) == "BYTE_ARRAY"


def _batch_rows(metadata: Any, path: Path) -> int:
    """Rows to a batch, by what the footer says of their size. Raises DataError for what no data set is like."""
    made = packed = 0
    for group in range(metadata.num_row_groups):
        part = metadata.row_group(group)
        for column in range(part.num_columns):
            chunk = part.column(column)
            made, packed = made + chunk.total_uncompressed_size, packed + chunk.total_compressed_size
    if made > FREE_BYTES and made > RATIO * packed:
        raise _bomb(path)
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
