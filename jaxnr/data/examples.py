"""From the three tables to examples: a user, a request time, the clean signals before it, the clicks after it.

One global time splits the log (docs/evaluation.md): train < t1 ≤ validation < t2 ≤ test. Whatever an example shows of
a user happened strictly before its request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxnr.config import DataConfig
from jaxnr.data.cleaning import CleaningReport, clean_histories
from jaxnr.data.schema import Tables
from jaxnr.errors import InputError

DAY = 86_400
Clean = Callable[[Sequence, Sequence[str], Sequence[str]], tuple[list[str | None], CleaningReport]]
"""(users, domains, texts) as ``clean_histories`` takes and returns them."""
_NEVER = np.iinfo(np.int64).max


class Signal(NamedTuple):
    """One clean thing that a user did. ``timestamp`` is UTC seconds; ``item_id`` is the article's, in the news."""

    timestamp: int
    domain: str
    text: str
    item_id: str | None


class Example(NamedTuple):
    """One request for news: what was known of the user before it, and what the user clicked after it."""

    example_id: int
    """Unique over all splits, in [0, 2**31)."""
    user_id: str
    timestamp: int
    """Of the request, UTC seconds."""
    signals: tuple[Signal, ...]
    """Clean, strictly before the request, oldest first."""
    relevant: tuple[str, ...]
    """Articles that could have been recalled at the request and were clicked after it; empty in train."""
    seen: tuple[str, ...]
    """Articles clicked strictly before the request, by first click."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClickReport:
    """What became of the distinct articles that users clicked at or after their request, in one evaluation split.

    Counted over every user with a request in the window, before users are skipped or drawn.
    """

    relevant: int = 0
    repeated: int = 0
    """Clicked before the request already: not a candidate."""
    not_yet_published: int = 0
    """Published after the request: nothing could have recalled it."""
    expired: int = 0
    """Out of the catalogue at the request."""

    @property
    def recallable_share(self) -> float | None:
        """Share of all these articles that are relevant: the most that recall over all later clicks can be."""
        clicked = self.relevant + self.repeated + self.not_yet_published + self.expired
        return self.relevant / clicked if clicked else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleSplits:
    """The examples of a data set, and what was left out on the way.

    ``skipped`` counts users by split and reason, such as ``test_no_relevant``; for each split the users with an example
    and those skipped add up to all users of the log.
    """

    train: list[Example]
    valid: list[Example]
    test: list[Example]
    skipped: dict[str, int]
    cleaning: CleaningReport
    clicks: dict[str, ClickReport]
    """By evaluation split: valid, test."""


class User(NamedTuple):
    """One user's history, oldest first."""

    user_id: str
    signals: list[Signal]
    signal_times: np.ndarray
    event_times: np.ndarray
    clicks: list[str]
    """The articles clicked (catalogue only), with ``click_times`` and their rows in the catalogue."""
    click_times: np.ndarray
    click_rows: np.ndarray
    request_times: np.ndarray
    """Logged requests and news events: the times at which the user was there to read news."""


class _Catalogue(NamedTuple):
    published: np.ndarray
    expires: np.ndarray


def split_times(tables: Tables, cfg: DataConfig) -> tuple[int, int]:
    """(t1, t2) in UTC seconds: the test window is [t2, end of the log], the validation window [t1, t2)."""
    if tables.events.num_rows == 0:
        raise InputError("The log has no events, so there is nothing to split into train, validation and test.")
    end = int(_seconds(tables.events.column("timestamp")).max())
    t2 = end - round(cfg.test_days * DAY)
    return t2 - round(cfg.valid_days * DAY), t2


def build_examples(tables: Tables, cfg: DataConfig, seed: int, clean: Clean = clean_histories) -> ExampleSplits:
    """Training prompts and one validation and test request a user; the same seed gives the same examples.

    A click is a news event on an article of the catalogue. Raises InputError where a split comes out empty.
    """
    t1, t2 = split_times(tables, cfg)
    users, cleaning = histories(tables, clean)
    catalogue = _catalogue(tables.articles)
    rng = np.random.default_rng(seed)
    skipped: dict[str, int] = {}
    train = _train_examples(users, cfg, t1, rng, skipped)
    valid, valid_clicks = _requests(users, catalogue, cfg, t1, t2, "valid", skipped)
    test, test_clicks = _requests(users, catalogue, cfg, t2, _NEVER, "test", skipped)
    if cfg.max_test_users:
        valid = _draw(valid, max(1, cfg.max_test_users // 2), rng, "valid", skipped)
        test = _draw(test, cfg.max_test_users, rng, "test", skipped)

    start, end = (int(bound(_seconds(tables.events.column("timestamp")))) for bound in (np.min, np.max))
    for name, examples, window in (
        ("train", train, (start, t1)),
        ("valid", valid, (t1, t2)),
        ("test", test, (t2, end)),
    ):
        if not examples:
            raise InputError(_empty_split(name, window, cfg, skipped, len(users)))
    ids = iter(range(2**31))
    train, valid, test = (
        [example._replace(example_id=next(ids)) for example in examples] for examples in (train, valid, test)
    )
    return ExampleSplits(
        train=train,
        valid=valid,
        test=test,
        skipped=dict(sorted(skipped.items())),
        cleaning=cleaning,
        clicks={"valid": valid_clicks, "test": test_clicks},
    )


def current_example(
    tables: Tables, user_id: str, timestamp: int, max_signals: int, clean: Clean = clean_histories
) -> Example:
    """What is known of one user strictly before ``timestamp``, as an example without relevant articles.

    Raises InputError where the log does not have the user, or no clean signal of that user.
    """
    events = tables.events.filter(pc.field("user_id") == user_id)
    if events.num_rows == 0:
        raise InputError(f"There is no event of user {user_id!r} in the log.")
    users, _ = histories(dataclasses.replace(tables, events=events), clean)
    example = next(example_at(user, timestamp, max_signals) for user in users if user.user_id == user_id)
    if not example.signals:
        raise InputError(f"None of the {events.num_rows} events of user {user_id!r} is a clean signal to write from.")
    return example


def _train_examples(
    users: list[User], cfg: DataConfig, t1: int, rng: np.random.Generator, skipped: dict[str, int]
) -> list[Example]:
    """Up to ``train_prompts_per_user`` requests a user, uniform over the points in time that show different signals.

    The points are the times of the user's own events, as validation and test requests are, and the last second before
    t1.
    """
    examples = []
    for user in users:
        times = np.append(user.event_times[user.event_times < t1 - 1], t1 - 1)
        known = np.searchsorted(user.signal_times, times, side="left")
        known, first = np.unique(known, return_index=True)
        times = times[first[known >= cfg.min_signals]]
        if not len(times):
            _count(skipped, "train_too_few_signals")
            continue
        chosen = rng.choice(times, min(cfg.train_prompts_per_user, len(times)), replace=False)
        examples += [example_at(user, int(time), cfg.max_signals) for time in np.sort(chosen)]
    return examples


def _requests(
    users: list[User],
    catalogue: _Catalogue,
    cfg: DataConfig,
    start: int,
    end: int,
    split: str,
    skipped: dict[str, int],
) -> tuple[list[Example], ClickReport]:
    """One example a user: its first request in [start, end), with the articles clicked from then on to the end."""
    examples = []
    totals = ClickReport()
    for user in users:
        at = int(np.searchsorted(user.request_times, start, side="left"))
        if at == len(user.request_times) or user.request_times[at] >= end:
            _count(skipped, f"{split}_no_request")
            continue
        example = example_at(user, int(user.request_times[at]), cfg.max_signals)
        relevant, report = _relevant(user, example, catalogue, end)
        totals = ClickReport(
            **{name: value + getattr(report, name) for name, value in dataclasses.asdict(totals).items()}
        )
        if np.searchsorted(user.signal_times, example.timestamp, side="left") < cfg.min_signals:
            _count(skipped, f"{split}_too_few_signals")
        elif not relevant:
            _count(skipped, f"{split}_no_relevant")
        else:
            examples.append(example._replace(relevant=relevant))
    return examples, totals


def _relevant(user: User, example: Example, catalogue: _Catalogue, end: int) -> tuple[tuple[str, ...], ClickReport]:
    """The articles clicked in [request, end) that were candidates at the request, by first click."""
    window = slice(*np.searchsorted(user.click_times, [example.timestamp, end], side="left"))
    rows = dict(zip(user.clicks[window], user.click_rows[window].tolist(), strict=True))
    seen = set(example.seen)
    relevant, repeated, unpublished, expired = [], 0, 0, 0
    for item_id, row in rows.items():
        if item_id in seen:
            repeated += 1
        elif catalogue.published[row] > example.timestamp:
            unpublished += 1
        elif catalogue.expires[row] <= example.timestamp:
            expired += 1
        else:
            relevant.append(item_id)
    report = ClickReport(relevant=len(relevant), repeated=repeated, not_yet_published=unpublished, expired=expired)
    return tuple(relevant), report


def example_at(user: User, timestamp: int, max_signals: int) -> Example:
    """What was known of the user strictly before the timestamp; the number and the relevant articles come later."""
    known = int(np.searchsorted(user.signal_times, timestamp, side="left"))
    clicked = int(np.searchsorted(user.click_times, timestamp, side="left"))
    return Example(
        example_id=0,
        user_id=user.user_id,
        timestamp=timestamp,
        signals=tuple(user.signals[max(0, known - max_signals) : known]),
        relevant=(),
        seen=tuple(dict.fromkeys(user.clicks[:clicked])),
    )


def _draw(
    examples: list[Example], count: int, rng: np.random.Generator, split: str, skipped: dict[str, int]
) -> list[Example]:
    """A random part of the examples, in their order."""
    if len(examples) <= count:
        return examples
    skipped[f"{split}_not_drawn"] = len(examples) - count
    return [examples[i] for i in np.sort(rng.choice(len(examples), count, replace=False))]


def histories(tables: Tables, clean: Clean = clean_histories) -> tuple[list[User], CleaningReport]:
    """Every user's history, users in the order of their ids. Each column is sorted and cut once for all users."""
    users_of_events = tables.events.column("user_id").to_pylist()
    user_ids = sorted(set(users_of_events))
    user_of = _places(users_of_events, user_ids)
    order = np.lexsort((_seconds(tables.events.column("timestamp")), user_of))
    events = tables.events.take(pa.array(order))
    user_of = user_of[order]
    times = _seconds(events.column("timestamp"))
    domains = events.column("domain").to_pylist()
    item_ids = events.column("item_id").to_pylist()
    rows = _places(item_ids, tables.articles.column("item_id").to_pylist())
    titles = tables.articles.column("title").to_pylist()
    # A click logged without text says what its article says.
    texts = [
        titles[row] if row >= 0 and not text.strip() else text
        for text, row in zip(events.column("text").to_pylist(), rows, strict=True)
    ]
    cleaned, cleaning = clean(user_of.tolist(), domains, texts)
    kept = np.array([text is not None for text in cleaned], dtype=bool)
    in_news = np.array([domain == "news" for domain in domains], dtype=bool)
    request_user, request_times = _request_times(tables.requests, user_ids, user_of[in_news], times[in_news])
    bounds = np.searchsorted(user_of, np.arange(len(user_ids) + 1))
    request_bounds = np.searchsorted(request_user, np.arange(len(user_ids) + 1))
    users = []
    for i, user_id in enumerate(user_ids):
        start, stop = int(bounds[i]), int(bounds[i + 1])
        signal_rows = start + np.flatnonzero(kept[start:stop])
        click_rows = start + np.flatnonzero(in_news[start:stop] & (rows[start:stop] >= 0))
        user = User(
            user_id=user_id,
            signals=[Signal(int(times[j]), domains[j], cleaned[j] or "", item_ids[j]) for j in signal_rows],
            signal_times=times[signal_rows],
            event_times=times[start:stop],
            clicks=[item_ids[j] for j in click_rows],
            click_times=times[click_rows],
            click_rows=rows[click_rows],
            request_times=request_times[request_bounds[i] : request_bounds[i + 1]],
        )
        users.append(user)
    return users, cleaning


def _request_times(
    requests: pa.Table, user_ids: list[str], news_user: np.ndarray, news_times: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Users and times at which they were there to read news, sorted: logged requests, and news events.

    The two together serve logs with impressions, logs without, and users of whom only clicks were logged.
    """
    logged = _places(requests.column("user_id").to_pylist(), user_ids)
    users = np.concatenate([logged[logged >= 0], news_user])
    times = np.concatenate([_seconds(requests.column("timestamp"))[logged >= 0], news_times])
    order = np.lexsort((times, users))
    return users[order], times[order]


def _catalogue(articles: pa.Table) -> _Catalogue:
    expires = articles.column("expires_at").cast(pa.int64()).fill_null(_NEVER)
    return _Catalogue(_seconds(articles.column("published_at")), expires.to_numpy())


def _places(values: list, among: list[str]) -> np.ndarray:
    """The place of each value in the list; -1 where it is not there."""
    place = {value: i for i, value in enumerate(among)}
    return np.fromiter((place.get(value, -1) for value in values), np.int64, len(values))


def _seconds(times: pa.ChunkedArray) -> np.ndarray:
    return times.cast(pa.int64()).to_numpy()


def _count(counts: dict[str, int], reason: str) -> None:
    counts[reason] = counts.get(reason, 0) + 1


def _empty_split(split: str, window: tuple[int, int], cfg: DataConfig, skipped: dict[str, int], users: int) -> str:
    """The message for a split without examples: its window, why users fell away, and the settings that help."""
    first, last = (datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M") for time in window)
    reasons = ", ".join(
        f"{count} for {reason.removeprefix(split + '_').replace('_', ' ')}"
        for reason, count in sorted(skipped.items())
        if reason.startswith(split + "_")
    )
    advice = {
        "train": "shorten data.valid_days and data.test_days so that more of the log is left for training, or lower "
        f"data.min_signals (now {cfg.min_signals})",
        "valid": f"lengthen data.valid_days (now {cfg.valid_days:g}) or lower data.min_signals (now {cfg.min_signals})",
        "test": f"lengthen data.test_days (now {cfg.test_days:g}) or lower data.min_signals (now {cfg.min_signals})",
    }[split]
    return (
        f"The {split} split, {first} to {last} UTC, is empty: of {users} users in the log none is left "
        f"({reasons or 'no reason counted'}). To fill it, {advice}."
    )
