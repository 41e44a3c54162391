"""CI&T Deskdrop: a year of an internal article-sharing platform, ``users_interactions.csv`` and ``articles.csv``.

Each interaction (view, like, bookmark, follow, comment) is an event in the domain ``news`` with the article's title as
its text, because the platform shows articles only and logs neither queries nor other pages. Interactions with an
article whose text the catalogue lacks are skipped and counted. Times are UTC.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

from jaxnr.data.readers.report import ReadReport, Refused
from jaxnr.data.readers.source import Source, zip_members
from jaxnr.data.readers.tables import Record
from jaxnr.data.schema import Article, Event
from jaxnr.errors import InputError

_ACTIONS = {
    "VIEW": "view",
    "LIKE": "like",
    "BOOKMARK": "bookmark",
    "FOLLOW": "follow",
    "COMMENT CREATED": "comment",
}
_INTERACTION_COLUMNS = ("timestamp", "eventType", "contentId", "personId", "sessionId")
_ARTICLE_COLUMNS = ("timestamp", "eventType", "contentId", "title", "text", "lang")
_ABSTRACT_CHARACTERS = 200
_MAX_FIELD_CHARACTERS = 2**24
"""Whole articles stand in one field; Python's own limit is 2**17."""

Row = dict[str, str | None]


def read_deskdrop(folder: Path, report: ReadReport) -> Iterator[Record]:
    """Streams the articles, then the events, of ``folder``, where each csv may be in a zip.

    Reads the interactions twice, first for the publish times: an article is published when it was shared, or at its
    first interaction where that is earlier. Raises InputError for a missing or damaged file, a missing column and too
    many refused rows.
    """
    articles = _find(folder, "articles.csv", "shared_articles.csv")
    interactions = _find(folder, "users_interactions.csv")
    first_seen = _first_interactions(interactions)
    titles: dict[str, str] = {}
    yield from _articles(articles, first_seen, titles, report)
    yield from _events(interactions, titles, report)


def parse_article(row: Row) -> tuple[Article, list[str]]:
    """The article as it was shared, and the repairs. Raises Refused."""
    if None in row:  # where DictReader puts what no column is for
        raise Refused("too many columns")
    repairs = []
    title = " ".join((row["title"] or "").split())
    if not title:
        raise Refused("blank title")
    if row["lang"] is None:
        repairs.append("row cut short")
    article = Article(
        item_id=_filled(row, "contentId"),
        published_at=_time(row),
        title=title,
        abstract=_abstract(row["text"] or ""),
        language=row["lang"] or None,
    )
    return article, repairs


def parse_interaction(row: Row) -> Event:
    """The event, still without its text. Raises Refused."""
    if None in row or None in row.values():
        raise Refused("wrong number of columns")
    kind = _filled(row, "eventType")
    if kind not in _ACTIONS:
        raise Refused("unknown eventType", f"{kind[:80]!r}, expected one of {', '.join(_ACTIONS)}")
    return Event(
        user_id=_filled(row, "personId"),
        timestamp=_time(row),
        domain="news",
        action=_ACTIONS[kind],
        text="",
        item_id=_filled(row, "contentId"),
        session_id=row["sessionId"] or None,
    )


def _first_interactions(interactions: Source) -> dict[str, int]:
    """Time of the first interaction by article; rows that are refused are left to the pass that counts them."""
    first: dict[str, int] = {}
    for _, row in _csv_rows(interactions, _INTERACTION_COLUMNS):
        try:
            event = parse_interaction(row)
        except Refused:
            continue
        assert event.item_id is not None
        first[event.item_id] = min(event.timestamp, first.get(event.item_id, event.timestamp))
    return first


def _articles(
    source: Source, first_seen: dict[str, int], titles: dict[str, str], report: ReadReport
) -> Iterator[Article]:
    """Each article once; its title goes into ``titles``."""
    with report.rows_of(source) as rows:
        for number, row in _csv_rows(source, _ARTICLE_COLUMNS):
            if row["eventType"] == "CONTENT REMOVED":
                rows.skip(number, "CONTENT REMOVED")
                continue
            try:
                article, repairs = parse_article(row)
            except Refused as refused:
                rows.refuse(number, refused)
                continue
            if article.item_id in titles:
                rows.skip(number, "article shared before")
                continue
            titles[article.item_id] = article.title
            first = first_seen.get(article.item_id, article.published_at)
            if first < article.published_at:
                article = article._replace(published_at=first)
                repairs.append("shared after its first interaction")
            rows.keep(number, repairs)
            yield article


def _events(source: Source, titles: dict[str, str], report: ReadReport) -> Iterator[Event]:
    seen: set[bytes] = set()
    with report.rows_of(source) as rows:
        for number, row in _csv_rows(source, _INTERACTION_COLUMNS):
            try:
                event = parse_interaction(row)
            except Refused as refused:
                rows.refuse(number, refused)
                continue
            digest = hashlib.blake2b(repr(row).encode(), digest_size=16).digest()
            if digest in seen:
                rows.skip(number, "exact duplicate")
                continue
            seen.add(digest)
            title = titles.get(event.item_id or "")
            if title is None:
                rows.skip(number, "on an article without text")
                continue
            rows.keep(number)
            yield event._replace(text=title)


def _csv_rows(source: Source, columns: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    """Number of a row's first line, and its fields by column; None for those that a short row lacks."""
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_FIELD_CHARACTERS))
    with source.open() as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text)
        try:
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(
                    f"{source}: lacks the column {', '.join(missing)}; expected a first line with {', '.join(columns)}."
                )
            first_line = reader.line_num + 1
            for row in reader:
                yield first_line, row
                first_line = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{source}: not CSV in UTF-8 after line {reader.line_num}: {error}.") from error


def _find(folder: Path, *names: str) -> Source:
    """The first of the files that is there, as it is or in a zip called after it."""
    for name in names:
        if (folder / name).exists():
            return Source(folder / name)
        archive = folder / f"{name}.zip"
        if archive.exists():
            for member in zip_members(archive):
                if member.rpartition("/")[2] == name:
                    return Source(archive, member)
            raise InputError(f"{archive}: holds no {name}.")
    raise InputError(f"{folder}: there is no {names[0]}; expected it there, as it is or as {names[0]}.zip.")


def _filled(row: Row, name: str) -> str:
    value = row[name]
    if not value or not value.strip():
        raise Refused(f"blank {name}")
    return value


def _time(row: Row) -> int:
    value = _filled(row, "timestamp")
    if not (value.isascii() and value.isdigit()) or len(value) > 11:
        raise Refused("timestamp is not a time", f"{value[:80]!r}, expected unix seconds")
    return int(value)


def _abstract(text: str) -> str:
    """The first words of a text, as many as fit."""
    flat = " ".join(text.split())
    if len(flat) <= _ABSTRACT_CHARACTERS:
        return flat
    return flat[: _ABSTRACT_CHARACTERS + 1].rpartition(" ")[0] or flat[:_ABSTRACT_CHARACTERS]
