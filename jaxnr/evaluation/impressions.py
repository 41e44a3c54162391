"""MIND's impression task (Wu et al., ACL 2020): rank the candidates that one logged impression showed.

Each method orders the candidates of each impression; AUC, MRR, nDCG@5 and nDCG@10 are those of MIND's ``evaluate.py``,
of each impression and then averaged. Nothing is retrieved, so these numbers are no recall.

Ties, and candidates that a method cannot score, which come last, fall in an order drawn by seed for each impression,
the same for all methods. The order in which candidates were shown would favour what was shown first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxnr.data.examples import DAY, Example, User, example_at
from jaxnr.data.schema import Request, Tables, to_records
from jaxnr.evaluation.merging import Merge
from jaxnr.evaluation.recall_paths import Catalogue, clicks_of
from jaxnr.retrieval.index import Rows

IMPRESSION_METRICS = ("auc", "mrr", "ndcg@5", "ndcg@10")


class Impression(NamedTuple):
    """C candidates, and what was known of the user before them."""

    request_id: str
    example: Example
    """With ``timestamp`` that of the impression; neither relevant nor seen articles are filled in."""
    rows_C: np.ndarray
    """Of the catalogue; -1 for an article that it lacks."""
    clicked_C: np.ndarray
    tie_order_C: np.ndarray
    """The candidates' places in the order in which ties fall."""

    @property
    def has_both(self) -> bool:
        """Whether something was clicked and something was not: AUC is defined for no other impression."""
        return 0 < self.clicked_C.sum() < len(self.clicked_C)


Ranker = Callable[[Sequence[Impression]], list[np.ndarray]]
"""For each impression its candidates' places, the best first [C]."""


def logged_impressions(
    tables: Tables, users: Mapping[str, User], since: int, max_signals: int, seed: int
) -> list[Impression]:
    """The logged impressions from a time on (UTC seconds), in the order of the log.

    Each is a request of its own: the latest ``max_signals`` clean signals strictly before it are known.
    """
    row_of = Catalogue.of(tables.articles).row_of
    rng = np.random.default_rng(seed)
    impressions = []
    for request in to_records(tables.requests, Request):
        if request.timestamp < since or not request.candidates:
            continue
        user = users.get(request.user_id)  # who did nothing but be shown news is not in the log of events
        if user is None:
            example = Example(0, request.user_id, request.timestamp, (), (), ())
        else:
            example = example_at(user, request.timestamp, max_signals)._replace(seen=())
        clicked = set(request.clicked)
        impressions.append(
            Impression(
                request.request_id,
                example,
                np.array([row_of.get(item, -1) for item in request.candidates], np.int64),
                np.array([item in clicked for item in request.candidates], bool),
                rng.permutation(len(request.candidates)),
            )
        )
    return impressions


def impression_metrics(rankings: Sequence[np.ndarray], impressions: Sequence[Impression]) -> dict[str, np.ndarray]:
    """Metric name to values_N, one an impression, in [0, 1], as MIND's ``evaluate.py`` gives them for these ranks.

    ``mrr`` is the sum over all clicked candidates of 1 / rank, divided by their number. Raises ValueError for an
    impression without a click, or with nothing but clicks.
    """
    if not all(impression.has_both for impression in impressions):
        raise ValueError("an impression without a click, or with nothing but clicks, has no AUC")
    clicked = [impression.clicked_C[ranking] for impression, ranking in zip(impressions, rankings, strict=True)]
    sizes_N = np.array([len(clicked_C) for clicked_C in clicked])
    starts_N = np.cumsum(sizes_N) - sizes_N
    y_X = np.concatenate(clicked).astype(float)  # X: the candidates of all impressions, each's best first
    rank_X = np.arange(len(y_X)) - np.repeat(starts_N, sizes_N) + 1
    discount_X = np.log2(rank_X + 1)

    def total(values_X: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values_X, starts_N)

    clicks_N = total(y_X)
    before_X = np.cumsum(y_X) - np.repeat(np.cumsum(clicks_N) - clicks_N, sizes_N)  # clicks up to and with this rank
    wrong_X = y_X * (rank_X - before_X)  # not clicked, ranked above a click
    values = {
        "auc": 1 - total(wrong_X) / (clicks_N * (sizes_N - clicks_N)),
        "mrr": total(y_X / rank_X) / clicks_N,
    }
    for depth in (5, 10):
        ideal_X = rank_X <= np.repeat(clicks_N, sizes_N)
        dcg, ideal = (total(np.where(rank_X <= depth, hit_X / discount_X, 0)) for hit_X in (y_X, ideal_X))
        values[f"ndcg@{depth}"] = dcg / ideal
    return values


def by_scores(scores: Sequence[np.ndarray], impressions: Sequence[Impression]) -> list[np.ndarray]:
    """Rankings by scores [C], or by the first of several [K, C] that differs; the highest first, NaN last."""
    rankings = []
    for scores_KC, impression in zip(scores, impressions, strict=True):
        worst_last_KC = -np.nan_to_num(np.atleast_2d(scores_KC)[:, impression.tie_order_C], nan=-np.inf)
        rankings.append(impression.tie_order_C[np.lexsort(worst_last_KC[::-1])])
    return rankings


def by_vectors(users_UE: np.ndarray, articles_IE: Rows, impressions: Sequence[Impression]) -> list[np.ndarray]:
    """Rankings by the inner product of a user's vector and an article's."""
    scores = [
        np.where(impression.rows_C >= 0, articles_IE[impression.rows_C] @ user_E, np.nan)
        for user_E, impression in zip(users_UE, impressions, strict=True)
    ]
    return by_scores(scores, impressions)


def by_queries(
    queries: Sequence[np.ndarray], articles_IE: Rows, merge: Merge, impressions: Sequence[Impression]
) -> list[np.ndarray]:
    """Each of a user's queries [Q, E] ranks all candidates, and ``merge`` makes one ranking of these lists.

    So candidates stand as they would among the articles retrieved, had each query found them all. A query of zeros
    ranks nothing.
    """
    rankings = []
    for queries_QE, impression in zip(queries, impressions, strict=True):
        order_C = impression.tie_order_C
        known_K = order_C[impression.rows_C[order_C] >= 0]
        queries_QE = queries_QE[queries_QE.any(axis=-1)]
        if len(queries_QE) and len(known_K):
            scores_QK = queries_QE @ articles_IE[impression.rows_C[known_K]].T
            best_QK = np.argsort(-scores_QK, axis=-1, kind="stable")
            merged_M = merge(
                known_K[best_QK], np.take_along_axis(scores_QK, best_QK, axis=-1), np.ones(len(queries_QE), bool)
            )
            merged_K = merged_M[merged_M >= 0]
            order_C = np.concatenate([merged_K, order_C[impression.rows_C[order_C] < 0]])
        rankings.append(order_C)
    return rankings


def by_publish_time(catalogue: Catalogue) -> Ranker:
    """The candidates published last, first."""

    def rank(impressions: Sequence[Impression]) -> list[np.ndarray]:
        return by_scores(list(_published(catalogue, impressions)), impressions)

    return rank


def by_popularity(tables: Tables, catalogue: Catalogue, window_days: float = 3.0) -> Ranker:
    """Most clicks of all users in the days before the impression, its own second excluded; then by publish time."""
    times_N, rows_N = clicks_of(tables.events, catalogue)
    start = int(times_N[0]) if len(times_N) else 0
    span = int(times_N[-1]) - start + 1 if len(times_N) else 1
    keys_N = np.sort(rows_N * span + (times_N - start))  # by article, then by time

    def clicks_before(rows_C: np.ndarray, time: float) -> np.ndarray:
        return np.searchsorted(keys_N, rows_C * span + np.clip(np.ceil(time) - start, 0, span), side="left")

    def rank(impressions: Sequence[Impression]) -> list[np.ndarray]:
        scores = []
        for impression, published_C in zip(impressions, _published(catalogue, impressions), strict=True):
            rows_C, now = np.maximum(impression.rows_C, 0), impression.example.timestamp
            clicks_C = clicks_before(rows_C, now) - clicks_before(rows_C, now - window_days * DAY)
            scores.append(np.stack([np.where(impression.rows_C >= 0, clicks_C, np.nan), published_C]))
        return by_scores(scores, impressions)

    return rank


def _published(catalogue: Catalogue, impressions: Sequence[Impression]) -> Iterator[np.ndarray]:
    for impression in impressions:
        yield np.where(impression.rows_C >= 0, catalogue.published_I[impression.rows_C], np.nan)


def prediction_lines(rankings: Sequence[np.ndarray], impressions: Sequence[Impression], ids: Sequence[str]) -> str:
    """A submission to MIND: ``ImpressionId [rank,rank,...]``, the candidates in the order of the log, best is 1."""
    lines = []
    for impression_id, ranking, impression in zip(ids, rankings, impressions, strict=True):
        ranks_C = np.empty(len(ranking), np.int64)
        ranks_C[ranking] = np.arange(1, len(impression.rows_C) + 1)
        lines.append(f"{impression_id} [{','.join(map(str, ranks_C))}]\n")
    return "".join(lines)
