"""What rankings are like besides right or wrong: how varied each is, how broad all are together, how fresh."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from jaxnr.evaluation.recall_paths import Catalogue
from jaxnr.retrieval.index import Rows

HOUR = 3600


def beyond_accuracy(
    rankings_US: Sequence[Sequence[Sequence[str]]],
    timestamps_U: Sequence[int],
    articles: pa.Table,
    vectors_IE: Rows,
) -> dict[str, float]:
    """Three numbers for S rankings (article ids) of each of U users who asked at ``timestamps_U``, in UTC seconds.

    - ``diversity``: mean cosine distance of two articles of one ranking, by the unit vectors ``vectors_IE``; the mean
      over rankings of two or more.
    - ``categories``: share of the catalogue's categories that occur in any ranking; left out where articles have none.
    - ``age_hours``: median time since publication of a recommended article.

    Methods that recommend nothing get NaN for what has no value then.
    """
    catalogue = Catalogue.of(articles)
    rows_R = [
        (user, np.array([catalogue.row_of[item] for item in ranking], int))
        for user, rankings_S in enumerate(rankings_US)
        for ranking in rankings_S
    ]
    distances = [_mean_distance(vectors_IE[rows]) for _, rows in rows_R if len(rows) > 1]
    ages = [timestamps_U[user] - catalogue.published_I[rows] for user, rows in rows_R if len(rows)]
    values = {
        "diversity": float(np.mean(distances)) if distances else float("nan"),
        "age_hours": float(np.median(np.concatenate(ages))) / HOUR if ages else float("nan"),
    }
    category_I = np.array(articles["category"].to_pylist(), object)
    known = {category for category in category_I if category is not None}
    if known:
        shown = {category for _, rows in rows_R for category in category_I[rows]}
        values["categories"] = len(shown & known) / len(known)
    return values


def _mean_distance(vectors_KE: np.ndarray) -> float:
    """Mean of 1 − cosine over pairs of unit vectors: (Σv)² holds the K vectors with themselves and every pair twice."""
    K = len(vectors_KE)
    return float(1 - (np.square(vectors_KE.sum(axis=0)).sum() - np.square(vectors_KE).sum()) / (K * (K - 1)))
