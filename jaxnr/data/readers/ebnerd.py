"""EB-NeRD (Ekstra Bladet, RecSys Challenge 2024): ``articles.parquet``, and a folder a split with ``behaviors.parquet``
and ``history.parquet``.

What a user read is told several times over, and this is what counts:

- The clicks of an impression are events (action ``click``). Its ``article_id``, the page that it was shown on, is none:
  it is the click or the reading before it once more, some seconds later.
- A history lists what the user had read in the weeks before the split, with times (action ``history``). That of a later
  split overlaps the splits before it; of it counts what these have not told of the user.
- An article is published at ``published_time``, or when it was first shown or read where that is earlier.
- Clocks have no zone and are read as UTC.

Rows ``is_beyond_accuracy`` share one list of candidates that nobody was shown; they are left out.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute

from jaxnr.data.readers.fields import Fields
from jaxnr.data.readers.parquet import numbered_rows, parquet_batches
from jaxnr.data.readers.report import ReadReport, Refused
from jaxnr.data.readers.tables import Record
from jaxnr.data.schema import Article, Event, Request
from jaxnr.errors import InputError

_ARTICLES, _BEHAVIORS, _HISTORY = "articles.parquet", "behaviors.parquet", "history.parquet"
_SPLIT_ORDER = ("train", "validation", "test")
_REQUIRED = {
    _ARTICLES: ("article_id", "title", "published_time"),
    _BEHAVIORS: ("impression_id", "impression_time", "article_ids_inview", "user_id"),
    _HISTORY: ("user_id", "impression_time_fixed", "article_id_fixed"),
}
_OPTIONAL = {
    _ARTICLES: ("subtitle", "category_str"),
    _BEHAVIORS: ("article_ids_clicked", "session_id", "next_read_time", "is_beyond_accuracy"),
    _HISTORY: ("read_time_fixed",),
}
"""Columns that a file may lack: those of the test split what was clicked, the others ``is_beyond_accuracy``."""
_WHOLE_NUMBERS = {"article_id", "published_time", "impression_id", "impression_time", "user_id", "session_id"}
_LISTS_OF_WHOLE_NUMBERS = {"article_ids_inview", "article_ids_clicked", "impression_time_fixed", "article_id_fixed"}
pc: Any = pyarrow.compute
"""Its functions are made when it is imported, so type checkers do not know them."""
_BATCH_ROWS = 1024
"""Of a few hundred articles each."""

Reads = defaultdict[int, "array[int]"]
"""By user, the articles that the splits read so far say were read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """One behaviors.parquet with its history.parquet. ``name`` is unique in the data set; "" for a lone split without a
    folder of its own."""

    name: str
    behaviors: Path
    history: Path


def read_ebnerd(folder: Path, report: ReadReport) -> Iterator[Record]:
    """Streams the articles, then split by split the histories and the requests with their clicks.

    Reads the splits twice, first for the times. Holds the titles, a time for each article, and eight bytes for each
    article that a user has read. Raises InputError for a missing or damaged file, a missing column or one of another
    type, and too many refused rows.
    """
    articles, splits = find_files(folder)
    first_seen = scan_times(splits)
    titles: dict[int, str] = {}
    for path in articles:
        yield from _articles(path, first_seen, titles, report)
    known: Reads = defaultdict(lambda: array("q"))
    for split in splits:
        yield from _histories(split, titles, known, report)
        yield from _requests_and_clicks(split, titles, known, report)


def find_files(folder: Path) -> tuple[list[Path], list[Split]]:
    """The article files and the splits in a folder or up to two folders down, train first.

    Raises InputError where one is missing, where a split lacks its history, and where two splits have one name.
    """
    if folder.suffix == ".zip" or (folder.is_dir() and not _find(folder, _BEHAVIORS) and any(folder.glob("*.zip"))):
        raise InputError(f"{folder}: EB-NeRD is read unpacked; unzip it and give the folder.")
    articles, behaviors = (_find(folder, name) for name in (_ARTICLES, _BEHAVIORS))
    for name, found in ((_ARTICLES, articles), (_BEHAVIORS, behaviors)):
        if not found:
            raise InputError(f"{folder}: there is no {name}; expected {_ARTICLES}, and {_BEHAVIORS} in train/ or such.")
    splits: dict[str, Split] = {}
    for path in behaviors:
        at = path.parent
        if not (at / _HISTORY).exists():
            raise InputError(f"{at}: there is no {_HISTORY}; expected it beside {_BEHAVIORS}.")
        name = at.name if at.name in _SPLIT_ORDER else "" if at == folder else at.relative_to(folder).as_posix()
        if name in splits:
            raise InputError(f"{folder}: has two splits {name!r}: {splits[name].behaviors} and {path}.")
        splits[name] = Split(name=name, behaviors=path, history=at / _HISTORY)
    rank = {name: number for number, name in enumerate(_SPLIT_ORDER)}
    return articles, sorted(splits.values(), key=lambda split: (rank.get(split.name, len(rank)), split.name))


def scan_times(splits: list[Split]) -> dict[int, int]:
    """When each article was first shown or read, in UTC seconds. Rows that are refused are passed over."""
    first: dict[int, int] = {}
    for split in splits:
        for batch in _batches(split.behaviors):
            if "is_beyond_accuracy" in batch.schema.names:
                batch = batch.filter(pc.invert(batch["is_beyond_accuracy"].fill_null(False)))
            lists = batch["article_ids_inview"]
            times = batch["impression_time"].take(pc.list_parent_indices(lists))
            _keep_earliest(first, pc.list_flatten(lists), times)
        for batch in _batches(split.history):
            lengths = (pc.list_value_length(batch[name]) for name in ("article_id_fixed", "impression_time_fixed"))
            batch = batch.filter(pc.equal(*lengths))  # a null is no row
            _keep_earliest(
                first, pc.list_flatten(batch["article_id_fixed"]), pc.list_flatten(batch["impression_time_fixed"])
            )
    return first


def _keep_earliest(first: dict[int, int], article_ids: pa.Array, times: pa.Array) -> None:
    table = pa.table({"article": article_ids, "time": times}).group_by("article").aggregate([("time", "min")])
    for article_id, time in zip(table["article"].to_pylist(), table["time_min"].to_pylist(), strict=True):
        if article_id is not None and time is not None:
            first[article_id] = min(int(time), first.get(article_id, int(time)))


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The columns of use of one of the three files. Raises InputError for one of a type that is not the format's."""
    required = _REQUIRED[path.name]
    for batch in parquet_batches(path, (*required, *_OPTIONAL[path.name]), required, _BATCH_ROWS):
        for field in batch.schema:
            kind, wanted = field.type, "whole numbers or times"
            if field.name in _LISTS_OF_WHOLE_NUMBERS:
                wanted = f"lists of {wanted}"
                kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else pa.string()
            elif field.name not in _WHOLE_NUMBERS:
                continue
            if not (pa.types.is_integer(kind) or pa.types.is_null(field.type)):
                raise InputError(f"{path}: the column {field.name} holds {field.type}, expected {wanted}.")
        yield batch


def _articles(path: Path, first_seen: dict[int, int], titles: dict[int, str], report: ReadReport) -> Iterator[Article]:
    """The articles that ``titles`` does not have yet; their titles go there."""
    with report.rows_of(path) as rows:
        for number, row in numbered_rows(_batches(path)):
            try:
                article_id = _present(row, "article_id")
                if article_id in titles:
                    rows.skip(number, "article id seen before")
                    continue
                article, repairs = _article(article_id, row, first_seen.get(article_id))
            except Refused as refused:
                rows.refuse(number, refused)
                continue
            titles[article_id] = article.title
            rows.keep(number, repairs)
            yield article


def _article(article_id: int, row: dict[str, Any], first_seen: int | None) -> tuple[Article, list[str]]:
    """The article, and the repairs. Raises Refused."""
    repairs = []
    title, subtitle, category = (_text(row, name) for name in ("title", "subtitle", "category_str"))
    if not title and subtitle:
        title, subtitle = subtitle, ""
        repairs.append("subtitle in place of a blank title")
    if not title:
        raise Refused("blank title")
    published_at = row["published_time"]
    if published_at is None:
        if first_seen is None:
            raise Refused("no published_time", "and no impression or history has the article")
        repairs.append("no published_time")
    elif first_seen is not None and first_seen < published_at:
        repairs.append("shown or read before published_time")
    times = [time for time in (published_at, first_seen) if time is not None]
    article = Article(str(article_id), _time(min(times)), title, subtitle, category=category or None, language="da")
    return article, repairs


def _histories(split: Split, titles: dict[int, str], known: Reads, report: ReadReport) -> Iterator[Event]:
    """What the users had read before the split, less what ``known`` has of them; it goes there."""
    with report.rows_of(split.history) as rows:
        for number, row in numbered_rows(_batches(split.history)):
            try:
                user_id, reads = _parse_history(row)
            except Refused as refused:
                rows.refuse(number, refused)
                continue
            told = set(known.get(user_id, ()))
            reads = [read for read in reads if read[1] not in told]
            known[user_id].extend({article_id for _, article_id, _ in reads})
            rows.keep(number, _without_article((article_id for _, article_id, _ in reads), titles))
            for time, article_id, dwell_s in reads:
                if article_id in titles:
                    yield _event(user_id, time, "history", article_id, titles, dwell_s)


def _parse_history(row: dict[str, Any]) -> tuple[int, list[tuple[int, int, float | None]]]:
    """The user, and what was read: (UTC seconds, article id, seconds spent). Raises Refused."""
    user_id = _present(row, "user_id")
    times, article_ids = _list(row, "impression_time_fixed"), _list(row, "article_id_fixed")
    spent = row.get("read_time_fixed")
    if spent is None:
        spent = [None] * len(times)
    if not len(times) == len(article_ids) == len(spent):
        raise Refused("lists of different lengths", f"{len(times)} times, {len(article_ids)} articles")
    reads = zip(map(_time, times), article_ids, map(_dwell, spent), strict=True)
    return user_id, list(reads)


def _requests_and_clicks(
    split: Split, titles: dict[int, str], known: Reads, report: ReadReport
) -> Iterator[Request | Event]:
    """The impressions, with a click of each article clicked there; these go to ``known``."""
    with report.rows_of(split.behaviors) as rows:
        for number, row in numbered_rows(_batches(split.behaviors)):
            if row.get("is_beyond_accuracy"):
                rows.skip(number, "is_beyond_accuracy")
                continue
            try:
                user_id, time = _present(row, "user_id"), _time(_present(row, "impression_time"))
                request_id = "-".join(filter(None, (split.name, str(_present(row, "impression_id")))))
                candidates = _list(row, "article_ids_inview")
                clicked = [] if row.get("article_ids_clicked") is None else _list(row, "article_ids_clicked")
                if not candidates:
                    raise Refused("no articles in view")
                if strangers := set(clicked).difference(candidates):
                    raise Refused("clicked article that is not in view", str(min(strangers)))
            except Refused as refused:
                rows.refuse(number, refused)
                continue
            known[user_id].extend(clicked)
            rows.keep(number, _without_article(clicked, titles))
            yield Request(request_id, str(user_id), time, tuple(map(str, candidates)), tuple(map(str, clicked)))
            # What comes next was one article's only where one was clicked.
            dwell_s = _dwell(row.get("next_read_time")) if len(clicked) == 1 else None
            for article_id in clicked:
                if article_id in titles:
                    event = _event(user_id, time, "click", article_id, titles, dwell_s)
                    session_id = row.get("session_id")
                    yield event._replace(
                        request_id=request_id, session_id=None if session_id is None else str(session_id)
                    )


def _event(
    user_id: int, time: int, action: str, article_id: int, titles: dict[int, str], dwell_s: float | None
) -> Event:
    return Event(str(user_id), time, "news", action, titles[article_id], str(article_id), dwell_s=dwell_s)


def _without_article(article_ids: Iterable[int], titles: dict[int, str]) -> list[str]:
    """The repairs of a row on which these were read."""
    return [] if all(map(titles.__contains__, article_ids)) else [f"reads left out on articles that {_ARTICLES} lacks"]


def _find(folder: Path, name: str) -> list[Path]:
    return [path for pattern in (name, f"*/{name}", f"*/*/{name}") for path in sorted(folder.glob(pattern))]


def _present(row: dict[str, Any], name: str) -> int:
    if row[name] is None:
        raise Refused(f"no {name}")
    return row[name]


def _list(row: dict[str, Any], name: str) -> list[int]:
    values = row[name]
    if values is None:
        raise Refused(f"no {name}")
    if None in values:
        raise Refused(f"gap in {name}", f"at place {values.index(None) + 1} of {len(values)}")
    return values


def _text(row: dict[str, Any], name: str) -> str:
    """The text of a field, "" where there is none."""
    return " ".join(Fields(row).text(name).split()) if row.get(name) is not None else ""


def _time(seconds: int) -> int:
    return Fields({"time": seconds}).time("time")


def _dwell(seconds: float | None) -> float | None:
    """Seconds spent; None for a gap, which some writers make NaN."""
    return seconds if seconds is not None and seconds >= 0 else None
