"""The neutral schema as JSON lines or Parquet: how users bring streams of their own.

A folder with ``events``, ``articles`` and optionally ``requests``, each as ``.jsonl``, ``.jsonl.gz`` or ``.parquet``,
with the field names of ``jaxnr.data.schema``. Times are unix seconds or ISO 8601, where a time without zone is UTC.
Optional fields may be missing or null; fields that the schema does not know are ignored.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from jaxnr.data.readers.fields import Fields
from jaxnr.data.readers.parquet import numbered_rows, parquet_batches
from jaxnr.data.readers.report import ReadReport, Refused
from jaxnr.data.readers.source import Source, decode
from jaxnr.data.readers.tables import Record, collect
from jaxnr.data.schema import ARTICLES, DOMAINS, EVENTS, REQUESTS, Article, Event, Request
from jaxnr.errors import InputError

_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_MAX_POSITION = 2**31 - 1
_HAS_DEFAULT = {"abstract", "action"}
"""Never null in the schema, yet with a default where the file has none."""
_ACTIONS = {"search": "query", "web": "view", "news": "click"}
"""The action of an event without that field, by domain."""


def read_events(folder: Path, report: ReadReport) -> Iterator[Record]:
    """Streams the articles, requests and events of ``folder``; of articles with one id, the first.

    Raises InputError for a missing or damaged file, a Parquet file without a required column, and too many refused
    rows.
    """
    articles, events, requests = (_files(folder, name) for name in ("articles", "events", "requests"))
    for name, files in (("articles", articles), ("events", events)):
        if not files:
            expected = ", ".join(f"{name}{suffix}" for suffix in _SUFFIXES)
            raise InputError(f"{folder}: there are no {name}; expected a file {expected}.")
    for path in articles:
        yield from _records(path, ARTICLES, article_of, report)
    for path in requests:
        yield from _records(path, REQUESTS, request_of, report)
    for path in events:
        yield from _records(path, EVENTS, event_of, report)


def read_event_file(path: Path) -> pa.Table:
    """The events table of one file, every row of which has to be good.

    Raises InputError for a missing or damaged file, a refused row, and a file without events.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; expected events as {', '.join(_SUFFIXES)}.")
    report = ReadReport(max_refused_share=None)
    events = collect(_records(path, EVENTS, event_of, report)).events
    if not events.num_rows:
        raise InputError(f"{path}: there is no event in it. {report.summary()}")
    return events


def stream_events(path: Path, report: ReadReport) -> Iterator[Event]:
    """The events of one file, row by row.

    Raises InputError for a missing or damaged file, and too many refused rows.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; expected events as {', '.join(_SUFFIXES)}.")
    yield from cast(Iterator[Event], _records(path, EVENTS, event_of, report))


def read_labels(path: Path) -> dict[tuple[str, int, str], deque[str]]:
    """(user, time, stream) to the labels of those events, in the order of the file, in small letters.

    Reads the columns `user_id`, `timestamp`, `domain` and `label`; a row without a label is passed over. Raises
    InputError naming the row that is not so.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file of labels; expected {', '.join(_SUFFIXES)}.")
    labels: dict[tuple[str, int, str], deque[str]] = {}
    for line, values in _rows(path, _LABELS, _LABELS):
        try:
            if isinstance(values, Refused):
                raise values
            if values.get("label") is not None:
                row = Fields(values)
                key = (row.identifier("user_id"), row.time("timestamp"), row.text("domain"))
                labels.setdefault(key, deque()).append(str(values["label"]).lower())
        except Refused as refused:
            raise InputError(f"{path}:{line}: {refused.reason}; expected user_id, timestamp, domain, label.") from None
    return labels


_LABELS = ("user_id", "timestamp", "domain", "label")


def read_article_file(path: Path) -> pa.Table:
    """The articles table of one file, every row of which has to be good and every id unique.

    Raises InputError for a missing or damaged file, a refused row, an id that stands twice, and no articles at all.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; expected articles as {', '.join(_SUFFIXES)}.")
    report = ReadReport(max_refused_share=None)
    articles = collect(_records(path, ARTICLES, article_of, report)).articles
    if report.skipped.rows:
        raise InputError(
            f"{report.skipped.examples[0]} ({report.skipped.rows:,} such rows in all); expected every item_id once."
        )
    if not articles.num_rows:
        raise InputError(f"{path}: there is no article in it. {report.summary()}")
    return articles


def event_of(row: Fields) -> Event:
    """Raises Refused."""
    domain = row.text("domain")
    if domain not in DOMAINS:
        raise Refused("unknown domain", f"{domain[:80]!r}, expected one of {', '.join(DOMAINS)}")
    return Event(
        user_id=row.identifier("user_id"),
        timestamp=row.time("timestamp"),
        domain=domain,
        action=row.filled_text("action") if "action" in row.values else _ACTIONS[domain],
        text=row.text("text"),
        item_id=row.optional("item_id", row.identifier),
        dwell_s=row.optional("dwell_s", row.number),
        session_id=row.optional("session_id", row.identifier),
        request_id=row.optional("request_id", row.identifier),
        position=row.optional("position", lambda name: row.whole_number(name, _MAX_POSITION)),
    )


def article_of(row: Fields) -> Article:
    """Raises Refused."""
    article = Article(
        item_id=row.identifier("item_id"),
        published_at=row.time("published_at"),
        title=row.filled_text("title"),
        abstract="" if row.values.get("abstract") is None else row.text("abstract"),
        expires_at=row.optional("expires_at", row.time),
        category=row.optional("category", row.text),
        language=row.optional("language", row.text),
    )
    if article.expires_at is not None and article.expires_at < article.published_at:
        raise Refused("expires before it is published", f"{article.expires_at} < {article.published_at}")
    return article


def request_of(row: Fields) -> Request:
    """Raises Refused."""
    request = Request(
        request_id=row.identifier("request_id"),
        user_id=row.identifier("user_id"),
        timestamp=row.time("timestamp"),
        candidates=row.identifiers("candidates"),
        clicked=row.identifiers("clicked"),
    )
    strangers = set(request.clicked).difference(request.candidates)
    if strangers:
        raise Refused("clicked article that is no candidate", sorted(strangers)[0][:80])
    return request


def _files(folder: Path, name: str) -> list[Path]:
    """The one file of a table, or none. Raises InputError if it is there twice."""
    found = [path for suffix in _SUFFIXES if (path := folder / f"{name}{suffix}").exists()]
    if len(found) > 1:
        raise InputError(f"{folder}: has {' and '.join(path.name for path in found)}; expected one file of {name}.")
    return found


def _rows(
    path: Path, columns: Sequence[str], required: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any] | Refused]]:
    """Numbered rows of a Parquet file, or of one with JSON lines, whose columns are seen to row by row."""
    if path.suffix == ".parquet":
        return numbered_rows(parquet_batches(path, columns, required))
    return _json_rows(path)


def _records(
    path: Path, schema: pa.Schema, convert: Callable[[Fields], Record], report: ReadReport
) -> Iterator[Record]:
    required = [field.name for field in schema if not field.nullable and field.name not in _HAS_DEFAULT]
    article_ids: set[str] = set()
    with report.rows_of(path) as rows:
        for line, values in _rows(path, schema.names, required):
            try:
                if isinstance(values, Refused):
                    raise values
                fields = Fields(values)
                record = convert(fields)
            except Refused as refused:
                rows.refuse(line, refused)
                continue
            if isinstance(record, Article):
                if record.item_id in article_ids:
                    rows.skip(line, "article id seen before")
                    continue
                article_ids.add(record.item_id)
            rows.keep(line, fields.repairs)
            yield record


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | Refused]]:
    """Line numbers and JSON objects; a line that is none comes as the Refused that says so."""
    for number, line in Source(path).lines():
        try:
            values = json.loads(decode(line))
        except Refused as refused:
            yield number, refused
        except (ValueError, RecursionError) as error:
            yield number, Refused("not JSON", str(error))
        else:
            known = isinstance(values, dict)
            yield number, values if known else Refused("not a JSON object", repr(values)[:80])
