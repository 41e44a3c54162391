"""MIND (Wu et al., ACL 2020): ``news.tsv`` and ``behaviors.tsv``, in a folder or a zip, one split or several.

MIND leaves three times out, and this is what stands for them:

- A history has no times. It is taken from the user's earliest impression, once, since later rows repeat it. Its events
  (action ``history``) end one second before that impression, oldest first, one second apart. So their order is real and
  their times are upper bounds.
- An article has no publish time. It is the first time an impression shows the article, or an event on it where that is
  earlier; for news that is only in histories, or nowhere, the first impression of the log.
- Clocks have no zone and are read as UTC.

The order of an impression's candidates was shuffled by the publisher, so events carry no ``position``.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from jaxnr.data.readers.report import ReadReport, Refused
from jaxnr.data.readers.source import Source, decode, zip_members
from jaxnr.data.readers.tables import Record
from jaxnr.data.schema import Article, Event, Request
from jaxnr.errors import InputError

_NEWS, _BEHAVIORS = "news.tsv", "behaviors.tsv"
_NEWS_COLUMNS = "id, category, subcategory, title, abstract, url, title entities, abstract entities"
_BEHAVIOR_COLUMNS = "impression id (may be left out), user, time, history, impressions"
_CLOCK = re.compile(r"(\d{1,2})/(\d{1,2})/(\d{4}) (\d{1,2}):(\d\d):(\d\d) (AM|PM)")
_SPLIT_NAME = re.compile(r"(?:^|[_-])(train|dev|valid|test)$", re.IGNORECASE)
_SPLIT_ORDER = ("train", "dev", "valid", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """One news.tsv with its behaviors.tsv. ``name`` is unique in the data set; "" for a lone split without a name."""

    name: str
    news: Source
    behaviors: Source


class Behavior(NamedTuple):
    """One row of behaviors.tsv; ``clicked`` is empty in the test split, which hides the clicks."""

    impression_id: str | None
    user_id: str
    timestamp: int
    history: tuple[str, ...]
    candidates: tuple[str, ...]
    clicked: tuple[str, ...]


@dataclasses.dataclass(kw_only=True)
class LogTimes:
    """What one pass over all impressions tells about times (UTC seconds)."""

    start: int | None = None
    first_impression: dict[str, int] = dataclasses.field(default_factory=dict)
    """By user."""
    first_shown: dict[str, int] = dataclasses.field(default_factory=dict)
    """By news id, in impressions."""
    first_history: dict[str, int] = dataclasses.field(default_factory=dict)
    """By news id, in histories."""

    def published_at(self, news_id: str) -> int:
        """No later than any event on the article."""
        shown = self.first_shown.get(news_id, self.start or 0)
        return min(shown, self.first_history.get(news_id, shown))


def read_mind(path: Path, report: ReadReport) -> Iterator[Record]:
    """Streams the articles, then the requests with the events, of all splits at ``path``.

    Reads each behaviors.tsv twice, first for the times. Holds the titles, and a time for each user and article.
    Raises InputError for a missing or damaged file and too many refused rows.
    """
    splits = find_splits(path)
    times = scan_times(splits)
    titles: dict[str, str] = {}
    for split in splits:
        yield from _articles(split, times, titles, report)
    for split in splits:
        yield from _requests_and_events(split, times, titles, report)


def find_splits(path: Path) -> list[Split]:
    """The splits in a folder, in its subfolders, or in zips there; in a zip, at any depth. Train comes first.

    A zip is left out where its unpacked folder stands beside it. Raises InputError if there is none, if one lacks a
    file, and if two have the same name.
    """
    groups = _group_files(path)
    if not groups:
        raise InputError(
            f"{path}: there is no {_NEWS} and no {_BEHAVIORS}; expected them there, in a subfolder, or in a zip."
        )
    splits: dict[str, Split] = {}
    for folder, files in groups.items():
        for name in (_NEWS, _BEHAVIORS):
            if name not in files:
                raise InputError(f"{folder}: there is no {name}; expected {_NEWS} and {_BEHAVIORS} side by side.")
        name = _split_name(folder, path)
        if name in splits:
            raise InputError(f"{path}: has two splits {name!r}: {splits[name].behaviors} and {files[_BEHAVIORS]}.")
        splits[name] = Split(name=name, news=files[_NEWS], behaviors=files[_BEHAVIORS])
    rank = {name: number for number, name in enumerate(_SPLIT_ORDER)}
    return sorted(splits.values(), key=lambda split: (rank.get(split.name, len(rank)), split.name))


def scan_times(splits: list[Split]) -> LogTimes:
    """One pass over all impressions; rows that are refused are left to the pass that counts them."""
    times = LogTimes()
    for split in splits:
        for _, line in split.behaviors.lines():
            try:
                row = parse_behavior(line)
            except Refused:
                continue
            now = row.timestamp
            times.start = now if times.start is None else min(times.start, now)
            times.first_impression[row.user_id] = min(now, times.first_impression.get(row.user_id, now))
            for news_id in row.candidates:
                times.first_shown[news_id] = min(now, times.first_shown.get(news_id, now))
            for clicked_at, news_id in _dated_history(row):
                times.first_history[news_id] = min(clicked_at, times.first_history.get(news_id, clicked_at))
    return times


def parse_news(line: bytes) -> tuple[str, str, str, str]:
    """(id, category, title, abstract) of a row of news.tsv. Raises Refused."""
    columns = decode(line).split("\t")  # no quoting: a bare " is part of the text
    if len(columns) != 8:
        raise Refused("wrong number of columns", f"{len(columns)}, expected 8: {_NEWS_COLUMNS}")
    news_id, category, _, title, abstract, *_ = columns
    for name, value in (("id", news_id), ("title", title)):
        if not value.strip():
            raise Refused(f"blank {name}")
    return news_id, category, title, abstract


def parse_behavior(line: bytes) -> Behavior:
    """A row of behaviors.tsv, from the right, since some copies lack the impression id. Raises Refused."""
    columns = decode(line).split("\t")
    if len(columns) not in (4, 5):
        raise Refused("wrong number of columns", f"{len(columns)}, expected 5: {_BEHAVIOR_COLUMNS}")
    user_id, clock, history, impressions = columns[-4:]
    timestamp = _seconds(clock)
    if not user_id.strip():
        raise Refused("blank user")
    candidates, clicked = _parse_impressions(impressions)
    impression_id = columns[0] if len(columns) == 5 and columns[0] else None
    return Behavior(impression_id, user_id, timestamp, tuple(history.split()), candidates, clicked)


def _parse_impressions(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(candidates, clicked) of ``N1-1 N2-0``, or of ``N1 N2`` as in MINDlarge_test."""
    items = text.split()
    if not items:
        raise Refused("no impressions")
    labelled = [item.rpartition("-") for item in items]  # the last "-": an id may hold one
    with_label = sum(label in ("0", "1") and bool(news_id) for news_id, _, label in labelled)
    if with_label == 0:
        return tuple(items), ()
    if with_label < len(items):
        raise Refused("impressions with and without a click label", f"{with_label} of {len(items)} end in -0 or -1")
    clicked = tuple(news_id for news_id, _, label in labelled if label == "1")
    return tuple(news_id for news_id, _, _ in labelled), clicked


def _seconds(clock: str) -> int:
    """UTC seconds of ``11/11/2019 9:05:58 AM``; strptime would depend on the locale and take ten times as long."""
    match = _CLOCK.fullmatch(clock)
    if match is None or not 1 <= int(match[4]) <= 12:
        raise Refused("not a time", f"{clock[:80]!r}, expected month/day/year hour:minute:second AM or PM")
    month, day, year, hour, minute, second = map(int, match.groups()[:6])
    hour = hour % 12 + (12 if match[7] == "PM" else 0)
    try:
        seconds = int(datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp())
    except ValueError as error:
        raise Refused("not a time", f"{clock[:80]!r}: {error}") from error
    if seconds < 0:
        raise Refused("not a time", f"{clock[:80]!r} is before 1970")
    return seconds


def _dated_history(row: Behavior) -> Iterator[tuple[int, str]]:
    """(UTC seconds, news id), oldest first, the last one a second before the impression."""
    return (
        (row.timestamp - before, news_id)
        for before, news_id in zip(range(len(row.history), 0, -1), row.history, strict=True)
    )


def _articles(split: Split, times: LogTimes, titles: dict[str, str], report: ReadReport) -> Iterator[Article]:
    """The articles that ``titles`` does not have yet; their titles go there."""
    with report.rows_of(split.news) as rows:
        for number, line in split.news.lines():
            try:
                news_id, category, title, abstract = parse_news(line)
            except Refused as refused:
                rows.refuse(number, refused)
                continue
            if news_id in titles:
                rows.skip(number, "news id seen before")
                continue
            titles[news_id] = title
            rows.keep(number)
            published_at = times.published_at(news_id)
            yield Article(news_id, published_at, title, abstract, category=category or None, language="en")


def _requests_and_events(
    split: Split, times: LogTimes, titles: dict[str, str], report: ReadReport
) -> Iterator[Request | Event]:
    with report.rows_of(split.behaviors) as rows:
        for number, line in split.behaviors.lines():
            try:
                row = parse_behavior(line)
            except Refused as refused:
                rows.refuse(number, refused)
                continue
            repairs = [] if row.impression_id else ["missing impression id"]
            # Impression ids count from 1 in each split.
            request_id = "-".join(filter(None, (split.name, row.impression_id or f"line{number}")))
            dated = [(row.timestamp, news_id, "click", request_id) for news_id in row.clicked]
            if times.first_impression.get(row.user_id) == row.timestamp:
                del times.first_impression[row.user_id]  # the history counts once
                dated += [(time, news_id, "history", None) for time, news_id in _dated_history(row)]
            if any(news_id not in titles for _, news_id, _, _ in dated):
                repairs.append("clicks left out on news that news.tsv lacks")
            rows.keep(number, repairs)
            yield Request(request_id, row.user_id, row.timestamp, row.candidates, row.clicked)
            for time, news_id, action, request in dated:
                if news_id in titles:
                    yield Event(row.user_id, time, "news", action, titles[news_id], news_id, request_id=request)


def _group_files(path: Path) -> dict[Path, dict[str, Source]]:
    """news.tsv and behaviors.tsv by the folder they are in, which in a zip is a path within the zip."""
    groups: dict[Path, dict[str, Source]] = defaultdict(dict)
    if path.is_dir():
        for pattern in ("*.tsv", "*/*.tsv", "*/*/*.tsv"):
            for file in sorted(path.glob(pattern)):
                if file.name in (_NEWS, _BEHAVIORS):
                    groups[file.parent][file.name] = Source(file)
        zips = sorted([*path.glob("*.zip"), *path.glob("*/*.zip")])
        zips = [file for file in zips if not any(file.with_suffix("") in (at, *at.parents) for at in groups)]
    else:
        zips = [path]
    for file in zips:
        for member in zip_members(file):
            inner = PurePosixPath(member)
            if inner.name in (_NEWS, _BEHAVIORS):
                groups[file / inner.parent][inner.name] = Source(file, member)
    return dict(groups)


def _split_name(folder: Path, root: Path) -> str:
    """train, dev, valid or test, from the innermost folder or zip called so; else the path below ``root``."""
    names = [folder.name, *(parent.name for parent in folder.parents if parent == root or root in parent.parents)]
    for name in names:
        match = _SPLIT_NAME.search(name.removesuffix(".zip"))
        if match:
            return match[1].lower()
    return "" if folder == root else folder.relative_to(root).as_posix()
