"""Recall paths that learn nothing: what is popular, what is new, and plain text retrieval from the user's own signals.

Each returns one ranking an example (article ids, best first, at most ``depth``) over the candidates of the protocol:
the articles published at or before the request and not expired, minus those that the user has already clicked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxnr.data.examples import DAY, Example
from jaxnr.evaluation.merging import Merge, to_item_ids

if TYPE_CHECKING:
    from jaxnr.retrieval.embedder import Embedder
    from jaxnr.retrieval.index import ArticleIndex

_USERS_AT_ONCE = 64
"""Users a search takes at once: bounds the score matrix at 64 × queries × articles."""


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """The articles as columns, in the order of the articles table, whose rows the index returns."""

    item_ids_I: np.ndarray
    published_I: np.ndarray
    """UTC seconds."""
    expires_I: np.ndarray
    """UTC seconds; the largest integer for articles that never expire."""
    row_of: dict[str, int]

    @classmethod
    def of(cls, articles: pa.Table) -> Catalogue:
        """From an articles table of the neutral schema."""
        item_ids = articles.column("item_id").to_pylist()
        never = pa.scalar(np.iinfo(np.int64).max, pa.int64())
        expires = pc.fill_null(articles.column("expires_at").cast(pa.int64()), never)
        return cls(
            np.array(item_ids, object),
            articles.column("published_at").cast(pa.int64()).to_numpy(),
            expires.to_numpy(),
            {item_id: row for row, item_id in enumerate(item_ids)},
        )

    def seen_rows(self, example: Example) -> list[int]:
        """Rows of the articles that the user has already clicked."""
        return [self.row_of[item_id] for item_id in example.seen if item_id in self.row_of]

    def is_candidate_I(self, example: Example) -> np.ndarray:
        """Which articles the protocol ranks for this example."""
        candidate_I = (self.published_I <= example.timestamp) & (self.expires_I > example.timestamp)
        candidate_I[self.seen_rows(example)] = False
        return candidate_I


def recent(examples: Sequence[Example], articles: pa.Table, *, depth: int) -> list[list[str]]:
    """The candidates published last; equal times in the order of the table."""
    catalogue = Catalogue.of(articles)
    newest_I = np.argsort(-catalogue.published_I, kind="stable")
    rankings = []
    for example in examples:
        rows = newest_I[catalogue.is_candidate_I(example)[newest_I]]
        rankings.append(catalogue.item_ids_I[rows[:depth]].tolist())
    return rankings


def popularity(
    examples: Sequence[Example], articles: pa.Table, events: pa.Table, *, depth: int, window_days: float = 3.0
) -> list[list[str]]:
    """The candidates with most clicks of all users in the ``window_days`` before each request, the request excluded.

    A click is a news event on an article of the catalogue. Equal counts, none at all among them, go by publish time,
    latest first.
    """
    catalogue = Catalogue.of(articles)
    newest_I = np.argsort(-catalogue.published_I, kind="stable")
    click_times, click_rows = clicks_of(events, catalogue)
    rankings = []
    for example in examples:
        window = (example.timestamp - window_days * DAY, example.timestamp)
        first, last = np.searchsorted(click_times, window, side="left")
        clicks_I = np.bincount(click_rows[first:last], minlength=len(newest_I))
        rows = newest_I[catalogue.is_candidate_I(example)[newest_I]]
        rows = rows[np.argsort(-clicks_I[rows], kind="stable")]
        rankings.append(catalogue.item_ids_I[rows[:depth]].tolist())
    return rankings


def signals(
    examples: Sequence[Example],
    articles: pa.Table,
    embedder: Embedder,
    index: ArticleIndex,
    *,
    max_queries: int,
    articles_per_query: int,
    merge: Merge,
    depth: int,
) -> list[list[str]]:
    """The user's latest signals as queries, latest first, as many different texts as a list may have queries.

    They retrieve and are merged exactly as a model's queries are. A signal without a known word retrieves nothing.
    """
    catalogue = Catalogue.of(articles)
    texts = [latest_texts(example, max_queries) for example in examples]
    queries_UQE = np.zeros((len(examples), max_queries, embedder.size), np.float32)
    for user, vectors_QE in enumerate(embed_each(texts, embedder)):
        queries_UQE[user, : len(vectors_QE)] = vectors_QE
    scores_UQK, rows_UQK = search(examples, catalogue, queries_UQE, index, articles_per_query)
    ranking_UM = merge(rows_UQK, scores_UQK, (queries_UQE != 0).any(axis=-1))
    return to_item_ids(ranking_UM[:, :depth], catalogue.item_ids_I)


def content(
    examples: Sequence[Example], articles: pa.Table, embedder: Embedder, index: ArticleIndex, *, depth: int
) -> list[list[str]]:
    """The articles nearest to the mean embedding of all the signals of the example."""
    catalogue = Catalogue.of(articles)
    mean_UE = mean_signals(examples, embedder)
    _, rows_U1K = search(examples, catalogue, mean_UE[:, None], index, depth)
    rows_UK = np.where(mean_UE.any(axis=-1, keepdims=True), rows_U1K[:, 0], -1)
    return to_item_ids(rows_UK, catalogue.item_ids_I)


def latest_texts(example: Example, count: int) -> list[str]:
    """The texts of the user's latest signals, latest first, ``count`` different ones at most."""
    return list(dict.fromkeys(signal.text for signal in reversed(example.signals)))[:count]


def mean_signals(examples: Sequence[Example], embedder: Embedder) -> np.ndarray:
    """The direction of the mean embedding of each example's signals [U, E]; zero where they have no known word."""
    mean_UE = np.zeros((len(examples), embedder.size), np.float32)
    texts = [[signal.text for signal in example.signals] for example in examples]
    for user, vectors_NE in enumerate(embed_each(texts, embedder)):
        mean_UE[user] = vectors_NE.sum(axis=0)
    norm_U1 = np.linalg.norm(mean_UE, axis=-1, keepdims=True)
    return mean_UE / np.where(norm_U1 > 0, norm_U1, 1)


def clicks_of(events: pa.Table, catalogue: Catalogue) -> tuple[np.ndarray, np.ndarray]:
    """Times (UTC seconds, ascending) and article rows of all clicks in the log."""
    news = events.filter(pc.field("domain") == "news")
    item_ids = news.column("item_id").to_pylist()
    rows = np.array([catalogue.row_of.get(item_id, -1) for item_id in item_ids], np.int64)
    times = news.column("timestamp").cast(pa.int64()).to_numpy()
    times, rows = times[rows >= 0], rows[rows >= 0]
    order = np.argsort(times, kind="stable")
    return times[order], rows[order]


def embed_each(texts: Sequence[Sequence[str]], embedder: Embedder) -> Iterator[np.ndarray]:
    """Vectors [texts of the user, E] of one user after the other; every different text is embedded once."""
    row_of = {text: row for row, text in enumerate(dict.fromkeys(text for user in texts for text in user))}
    vectors_NE = embedder.embed_queries(list(row_of)) if row_of else np.zeros((0, embedder.size), np.float32)
    for user in texts:
        yield vectors_NE[[row_of[text] for text in user]]


def search(
    examples: Sequence[Example], catalogue: Catalogue, queries_UQE: np.ndarray, index: ArticleIndex, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(scores_UQK, rows_UQK) among each example's candidates; blocks of users of one shape, so it compiles once."""
    U, Q, E = queries_UQE.shape
    times_U = np.array([example.timestamp for example in examples], np.int64)
    seen = [catalogue.seen_rows(example) for example in examples]
    seen_UX = np.full((U, max([1, *map(len, seen)])), -1, np.int32)
    for user, rows in enumerate(seen):
        seen_UX[user, : len(rows)] = rows

    scores_UQK, rows_UQK = np.zeros((U, Q, k), np.float32), np.full((U, Q, k), -1, np.int32)
    for start in range(0, U, _USERS_AT_ONCE):
        users = np.arange(start, start + _USERS_AT_ONCE).clip(max=U - 1)  # the last block repeats the last user
        found = index.search(
            queries_UQE[users].reshape(-1, E), np.repeat(times_U[users], Q), k, np.repeat(seen_UX[users], Q, axis=0)
        )
        count = min(_USERS_AT_ONCE, U - start)
        for whole, part in zip((scores_UQK, rows_UQK), found, strict=True):
            whole[start : start + count] = np.asarray(part).reshape(_USERS_AT_ONCE, Q, k)[:count]
    return scores_UQK, rows_UQK
