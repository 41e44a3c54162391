"""The neutral schema: three tables that every reader produces and everything later on the road reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from jaxnr.errors import InputError

DOMAINS = ("search", "web", "news")


class Event(NamedTuple):
    """One thing a user did. ``timestamp`` is UTC seconds. ``text`` is the query, page title or headline."""

    user_id: str
    timestamp: int
    domain: str
    action: str
    text: str
    item_id: str | None = None
    dwell_s: float | None = None
    session_id: str | None = None
    request_id: str | None = None
    position: int | None = None


class Article(NamedTuple):
    """One news article. Times are UTC seconds; ``expires_at`` None means that it never leaves the catalogue."""

    item_id: str
    published_at: int
    title: str
    abstract: str = ""
    expires_at: int | None = None
    category: str | None = None
    language: str | None = None


class Request(NamedTuple):
    """One logged impression: the candidates in the order shown, and those of them that were clicked."""

    request_id: str
    user_id: str
    timestamp: int
    candidates: tuple[str, ...]
    clicked: tuple[str, ...]


_TIME = pa.timestamp("s", tz="UTC")

EVENTS = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("timestamp", _TIME, nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("action", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("item_id", pa.string()),
        pa.field("dwell_s", pa.float64()),
        pa.field("session_id", pa.string()),
        pa.field("request_id", pa.string()),
        pa.field("position", pa.int32()),
    ]
)
ARTICLES = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("published_at", _TIME, nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("abstract", pa.string(), nullable=False),
        pa.field("expires_at", _TIME),
        pa.field("category", pa.string()),
        pa.field("language", pa.string()),
    ]
)
REQUESTS = pa.schema(
    [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("timestamp", _TIME, nullable=False),
        pa.field("candidates", pa.list_(pa.string()), nullable=False),
        pa.field("clicked", pa.list_(pa.string()), nullable=False),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tables:
    """The three tables of one data set, with the schemas above; events sorted by (user_id, timestamp)."""

    events: pa.Table
    articles: pa.Table
    requests: pa.Table

    def save(self, folder: Path) -> None:
        """Writes events.parquet, articles.parquet and requests.parquet, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("events", "articles", "requests"):
            partial = folder / f"{name}.parquet.partial"
            pq.write_table(getattr(self, name), partial)
            partial.rename(folder / f"{name}.parquet")

    @classmethod
    def load(cls, folder: Path) -> Tables:
        """Reads what ``save`` wrote. Raises InputError naming the file that is missing or unreadable."""
        tables = {}
        for name, schema in (("events", EVENTS), ("articles", ARTICLES), ("requests", REQUESTS)):
            path = folder / f"{name}.parquet"
            try:
                tables[name] = pq.read_table(path, schema=schema)
            except (OSError, pa.ArrowException) as error:
                raise InputError(f"{path}: not a readable {name} table of the neutral schema: {error}") from error
        return cls(**tables)


def document_texts(articles: pa.Table) -> list[str]:
    """What is embedded of each row of an articles table: title and abstract."""
    columns = (articles[name].to_pylist() for name in ("title", "abstract"))
    return [f"{title}. {abstract}".strip() for title, abstract in zip(*columns, strict=True)]


def to_table(records: list, schema: pa.Schema) -> pa.Table:
    """A list of Event, Article or Request as an Arrow table."""
    columns = {
        field.name: pa.array([getattr(record, field.name) for record in records], field.type) for field in schema
    }
    return pa.table(columns, schema=schema)


def to_records(table: pa.Table, record: type) -> list:
    """The rows of a table as ``record`` named tuples, times as UTC seconds."""
    columns = []
    for name in record._fields:
        column = table.column(name)
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.int64())
        values = column.to_pylist()
        columns.append([tuple(value) for value in values] if pa.types.is_list(column.type) else values)
    return [record(*row) for row in zip(*columns, strict=True)]
