"""Ranking metrics per user, computed by ``ir-measures`` (trec_eval's definitions)."""

from __future__ import annotations

from collections.abc import Sequence

import ir_measures
import numpy as np
from ir_measures import RR, Qrel, R, ScoredDoc, nDCG

_MEASURES = {"recall@5": R @ 5, "recall@10": R @ 10, "ndcg@5": nDCG @ 5, "ndcg@10": nDCG @ 10, "mrr": RR}
_NAMES = {measure: name for name, measure in _MEASURES.items()}

METRICS = tuple(_MEASURES)
"""The five numbers of the paper's tables. ``mrr`` is the reciprocal rank of the first hit."""


def evaluate_rankings(rankings: Sequence[Sequence[str]], relevant: Sequence[tuple[str, ...]]) -> dict[str, np.ndarray]:
    """Metric name to values_U, one a user, in [0, 1]; a user whose ranking is empty scores 0.

    ``rankings`` are article ids, best first, aligned with ``relevant``. ``mrr`` looks at a whole ranking, so rankings
    that are to be compared have to be cut at one depth. Raises ValueError for a user without relevant articles (the
    metrics are undefined: skip and count such users before) and for a ranking that names an article twice.
    """
    _check(rankings, relevant)
    # ir-measures breaks ties by document id; scores made from ranks leave it nothing to break.
    qrels = [Qrel(str(user), item, 1) for user, items in enumerate(relevant) for item in items]
    run = [
        ScoredDoc(str(user), item, float(-rank))
        for user, ranking in enumerate(rankings)
        for rank, item in enumerate(ranking)
    ]
    values = {name: np.zeros(len(relevant)) for name in METRICS}
    if run:
        for metric in ir_measures.iter_calc(list(_MEASURES.values()), qrels, run):
            values[_NAMES[metric.measure]][int(metric.query_id)] = metric.value
    return values


def evaluate_samples(
    rankings_US: Sequence[Sequence[Sequence[str]]], relevant: Sequence[tuple[str, ...]]
) -> dict[str, np.ndarray]:
    """Metric name to values_US for S sampled rankings of each user; a user's own value is the mean over S.

    Raises ValueError where users differ in their number of samples, and as ``evaluate_rankings`` does.
    """
    samples = {len(rankings_S) for rankings_S in rankings_US}
    if len(samples) > 1:
        raise ValueError(f"every user needs the same number of sampled rankings, found {sorted(samples)}")
    S = samples.pop() if samples else 0
    flat = evaluate_rankings(
        [ranking for rankings_S in rankings_US for ranking in rankings_S],
        [items for items in relevant for _ in range(S)],
    )
    return {name: values.reshape(len(relevant), S) for name, values in flat.items()}


def _check(rankings: Sequence[Sequence[str]], relevant: Sequence[tuple[str, ...]]) -> None:
    if len(rankings) != len(relevant):
        raise ValueError(f"{len(rankings)} rankings for {len(relevant)} users")
    for user, (ranking, items) in enumerate(zip(rankings, relevant, strict=True)):
        if not items:
            raise ValueError(f"user {user} has no relevant article: recall and NDCG are undefined")
        if len(set(ranking)) < len(ranking):
            raise ValueError(f"the ranking of user {user} names an article twice")
