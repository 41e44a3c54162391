"""Streamed records into the three tables."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from jaxnr.data.schema import ARTICLES, EVENTS, REQUESTS, Article, Event, Request, Tables, to_table

_BATCH_ROWS = 65_536
_SCHEMAS = {Event: EVENTS, Article: ARTICLES, Request: REQUESTS}

Record = Event | Article | Request


def collect(records: Iterable[Record]) -> Tables:
    """Tables of a mixed stream of records; at no time are more than a batch of each kind Python objects."""
    pending: dict[type, list] = {kind: [] for kind in _SCHEMAS}
    batches: dict[type, list[pa.Table]] = {kind: [schema.empty_table()] for kind, schema in _SCHEMAS.items()}
    for record in records:
        kind = type(record)
        pending[kind].append(record)
        if len(pending[kind]) == _BATCH_ROWS:
            batches[kind].append(to_table(pending[kind], _SCHEMAS[kind]))
            pending[kind] = []
    for kind, rows in pending.items():
        batches[kind].append(to_table(rows, _SCHEMAS[kind]))
    tables = {kind: pa.concat_tables(parts) for kind, parts in batches.items()}
    return Tables(events=by_user_and_time(tables[Event]), articles=tables[Article], requests=tables[Request])


def by_user_and_time(events: pa.Table) -> pa.Table:
    """Events sorted by (user_id, timestamp); events of one second keep their order."""
    order = pc.sort_indices(events, sort_keys=[("user_id", "ascending"), ("timestamp", "ascending")])  # pyright: ignore[reportAttributeAccessIssue]
    # take() may join the chunks of a column first; beyond 2 GiB that overflows a string column, not a large_string one.
    wide = pa.schema(
        [field.with_type(pa.large_string()) if pa.types.is_string(field.type) else field for field in events.schema]
    )
    events = events.cast(wide)
    parts = [events.take(order.slice(start, _BATCH_ROWS)).cast(EVENTS) for start in range(0, len(order), _BATCH_ROWS)]
    return pa.concat_tables(parts) if parts else EVENTS.empty_table()
