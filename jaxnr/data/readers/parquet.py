"""Parquet files as a stream of batches or rows, with times as unix seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxnr.data.readers.source import unreadable
from jaxnr.errors import InputError


def parquet_batches(
    path: Path, columns: Sequence[str], required: Sequence[str], batch_rows: int = 8192
) -> Iterator[pa.RecordBatch]:
    """Batches of those of the ``columns`` that the file has; times, in lists too, are whole unix seconds.

    A time without zone is read as UTC. Raises InputError for a file that is missing, damaged or no Parquet, and for one
    that lacks a ``required`` column.
    """
    with unreadable(path), pq.ParquetFile(path) as file:
        present = set(file.schema_arrow.names)
        if missing := set(required) - present:
            raise InputError(
                f"{path}: lacks the column {', '.join(sorted(missing))}; "
                f"expected at least {', '.join(sorted(required))}."
            )
        read = [name for name in columns if name in present]
        for batch in file.iter_batches(batch_rows, columns=read):
            yield pa.RecordBatch.from_pydict({name: _seconds(batch.column(name)) for name in read})


def numbered_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row numbers from 1, and values by column."""
    return enumerate((values for batch in batches for values in batch.to_pylist()), start=1)


def _seconds(column: pa.Array) -> pa.Array:
    """A column of times as unix seconds; any other as it is."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        return column.cast(pa.timestamp("s", tz=kind.tz), safe=False).cast(pa.int64())
    if pa.types.is_date(kind):
        return column.cast(pa.timestamp("s")).cast(pa.int64())
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_timestamp(kind.value_type):
        whole = column.cast(pa.list_(pa.timestamp("s", tz=kind.value_type.tz)), safe=False)
        return whole.cast(pa.list_(pa.int64()))
    return column
