"""The generated world as the neutral tables, and its planted truth as tables of their own.

The truth is for tests, for reading about what happened, and for the labels of a classifier of events that is asked to
learn from them (``cleaning.labels``): no reward and no prompt reads it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxnr.data.schema import ARTICLES, DOMAINS, EVENTS, REQUESTS, Tables
from jaxnr.data.synthetic.articles import Catalogue, generate_catalogue, popularity
from jaxnr.data.synthetic.browsing import generate_browsing
from jaxnr.data.synthetic.lexicon import Lexicon, load_lexicon
from jaxnr.data.synthetic.log import LABELS, Log, join_logs
from jaxnr.data.synthetic.news import Requests, Site, click_log, generate_requests
from jaxnr.data.synthetic.noise import generate_noise
from jaxnr.data.synthetic.parameters import WorldParameters
from jaxnr.data.synthetic.users import Users, generate_users

__all__ = ["Truth", "World", "WorldParameters", "generate_world"]

_DEFAULT = WorldParameters()
_TIME = pa.timestamp("s", tz="UTC")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Truth:
    """What the generator knows and the tables do not say.

    ``users``: user_id, cold, and aligned lists with one entry an interest: interests, weights, starts (in searches and
    pages), news_starts, ends, leads (planned to show there days before news), first_stream (where it did show first;
    null if never).
    ``events``: user_id, timestamp, domain, label (clean, navigational, malformed, spam or one_off) and subject (null
    for noise without one), row by row with the events table. A news click is clean whatever it is about.
    ``articles``: item_id, subject, quality.
    """

    users: pa.Table
    events: pa.Table
    articles: pa.Table

    def save(self, folder: Path) -> None:
        """Writes truth_users.parquet, truth_events.parquet and truth_articles.parquet, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        for field in dataclasses.fields(self):
            partial = folder / f"truth_{field.name}.parquet.partial"
            pq.write_table(getattr(self, field.name), partial)
            partial.rename(folder / f"truth_{field.name}.parquet")


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """The tables that everything reads, and the truth beside them."""

    tables: Tables
    truth: Truth


def generate_world(seed: int, parameters: WorldParameters = _DEFAULT) -> World:
    """The world of this seed: the same seed and parameters give the same tables."""
    lexicon = load_lexicon()
    of_popularity, of_articles, of_users, of_browsing, of_requests, of_clicks, of_noise = np.random.default_rng(
        seed
    ).spawn(7)
    popularity_S = popularity(of_popularity, len(lexicon.subjects), parameters.subject_skew)
    catalogue = generate_catalogue(of_articles, parameters, lexicon, popularity_S)
    users = generate_users(of_users, parameters, popularity_S, lexicon.topic_of_subject)
    browsing = generate_browsing(of_browsing, parameters, lexicon, users)
    site = Site(parameters, lexicon.topic_of_subject, catalogue, users)
    requests = generate_requests(of_requests, site)
    clicks = click_log(of_clicks, site, requests)
    clean_events_U = np.bincount(np.concatenate([browsing.user, clicks.user]), minlength=parameters.n_users)
    noise = generate_noise(of_noise, parameters, lexicon, users, clean_events_U)

    log = join_logs(_number_sessions([browsing, clicks, noise]))
    names = _Names.of(parameters, len(requests.user_R))
    tables = Tables(
        events=_events_table(log, names, parameters.start),
        articles=_articles_table(catalogue, lexicon, names, parameters.start),
        requests=_requests_table(requests, names, parameters.start),
    )
    truth = Truth(
        users=_truth_users(users, log, lexicon, names, parameters.start),
        events=_truth_events(log, lexicon, tables.events),
        articles=pa.table(
            {
                "item_id": names.items,
                "subject": _subject_names(lexicon).take(pa.array(catalogue.subject_I)),
                "quality": catalogue.quality_I,
            }
        ),
    )
    return World(tables=tables, truth=truth)


@dataclasses.dataclass(frozen=True)
class _Names:
    """Identifiers by index."""

    users: pa.Array
    items: pa.Array
    requests: pa.Array

    @classmethod
    def of(cls, parameters: WorldParameters, n_requests: int) -> _Names:
        sizes = (("u", parameters.n_users), ("a", parameters.n_articles), ("r", n_requests))
        return cls(*(pa.array([f"{letter}{index:05d}" for index in range(size)]) for letter, size in sizes))


def _number_sessions(logs: list[Log]) -> list[Log]:
    """Sessions of the second log come after those of the first, and so on."""
    numbered, offset = [], 0
    for log in logs:
        numbered.append(log._replace(session=log.session + offset))
        offset += int(log.session.max(initial=-1)) + 1
    return numbered


def _times(seconds: np.ndarray, start: int) -> pa.Array:
    return pa.array(seconds + start, pa.int64()).cast(_TIME)


def _named(names: pa.Array, index: np.ndarray) -> pa.Array:
    """The names at the indices, null at -1."""
    return names.take(pa.array(index, pa.int64(), mask=index < 0))


def _lists(values: pa.Array, lengths: np.ndarray) -> pa.ListArray:
    """Consecutive values cut into lists of the given lengths."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _subject_names(lexicon: Lexicon) -> pa.Array:
    return pa.array([subject.name for subject in lexicon.subjects])


def _events_table(log: Log, names: _Names, start: int) -> pa.Table:
    n_sessions = int(log.session.max(initial=-1)) + 1
    columns = {
        "user_id": names.users.take(pa.array(log.user)),
        "timestamp": _times(log.time, start),
        "domain": pa.array(DOMAINS).take(pa.array(log.domain)),
        "action": pa.array(["query", "view", "click"]).take(pa.array(log.domain)),
        "text": pa.array(log.text, pa.string()),
        "item_id": _named(names.items, log.item),
        "dwell_s": pa.array(log.dwell, pa.float64(), mask=np.isnan(log.dwell)),
        "session_id": pa.array([f"s{index:06d}" for index in range(n_sessions)]).take(pa.array(log.session)),
        "request_id": _named(names.requests, log.request),
        "position": pa.array(log.position, pa.int32(), mask=log.position < 0),
    }
    return pa.table(columns, schema=EVENTS)


def _articles_table(catalogue: Catalogue, lexicon: Lexicon, names: _Names, start: int) -> pa.Table:
    topics = pa.array([topic.name for topic in lexicon.topics])
    columns = {
        "item_id": names.items,
        "published_at": _times(catalogue.published_I, start),
        "title": pa.array(catalogue.titles),
        "abstract": pa.array(catalogue.abstracts),
        "expires_at": _times(catalogue.expires_I, start),
        "category": topics.take(pa.array(catalogue.topic_I)),
        "language": pa.array(["en"] * len(catalogue.titles)),
    }
    return pa.table(columns, schema=ARTICLES)


def _requests_table(requests: Requests, names: _Names, start: int) -> pa.Table:
    slate_RK, clicked_RK = requests.slate_RK, requests.clicked_RK
    candidates = names.items.take(pa.array(slate_RK.ravel()))
    clicked = names.items.take(pa.array(slate_RK[clicked_RK]))
    columns = {
        "request_id": names.requests,
        "user_id": names.users.take(pa.array(requests.user_R)),
        "timestamp": _times(requests.time_R, start),
        "candidates": _lists(candidates, np.full(len(slate_RK), slate_RK.shape[1])),
        "clicked": _lists(clicked, clicked_RK.sum(axis=1)),
    }
    return pa.table(columns, schema=REQUESTS)


def _truth_users(users: Users, log: Log, lexicon: Lexicon, names: _Names, start: int) -> pa.Table:
    present_UM = users.subject_UM >= 0
    lengths = present_UM.sum(axis=1)
    columns = {
        "interests": _named(_subject_names(lexicon), users.subject_UM[present_UM]),
        "weights": pa.array(users.weight_UM[present_UM]),
        "starts": _times(users.browse_start_UM[present_UM], start),
        "news_starts": _times(users.news_start_UM[present_UM], start),
        "ends": _times(users.end_UM[present_UM], start),
        "leads": pa.array(users.leads_UM[present_UM]),
        "first_stream": _named(pa.array(DOMAINS), _first_stream(users, log, len(lexicon.subjects))[present_UM]),
    }
    lists = {name: _lists(values, lengths) for name, values in columns.items()}
    return pa.table({"user_id": names.users, "cold": users.cold_U, **lists})


def _first_stream(users: Users, log: Log, n_subjects: int) -> np.ndarray:
    """Domain of the first clean event about each interest [U, M]; -1 where there is none."""
    first_US = np.full((len(users.subject_UM), n_subjects), -1)
    rows = np.flatnonzero(log.label == 0)[::-1]  # in reverse, so that the earliest is written last
    first_US[log.user[rows], log.subject[rows]] = log.domain[rows]
    return np.take_along_axis(first_US, np.maximum(users.subject_UM, 0), axis=1)


def _truth_events(log: Log, lexicon: Lexicon, events: pa.Table) -> pa.Table:
    return pa.table(
        {
            **{name: events.column(name) for name in ("user_id", "timestamp", "domain")},
            "label": pa.array(LABELS).take(pa.array(log.label)),
            "subject": _named(_subject_names(lexicon), log.subject),
        }
    )
