"""Several queries, one ranking: how the article lists of one user's queries are merged.

Each merge takes ``(rows_QK, scores_QK, query_mask_Q)`` as the index returns them, best article first, with any leading
axes (users, samples) before Q. It returns ``ranking_M`` with the same leading axes and M = Q·K: every article row once,
best first, then -1. Entries with row -1 and queries that are masked out do not count. Ties go to the article that comes
first when the lists are read in turns (all first places, then all second places, ...), so a ranking depends on nothing
but its input.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Merge = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

RECIPROCAL_RANK_OFFSET = 60
"""The constant k of reciprocal rank fusion, as Cormack, Clarke and Büttcher (SIGIR 2009) set it."""


def reciprocal_rank(rows_QK: np.ndarray, scores_QK: np.ndarray, query_mask_Q: np.ndarray) -> np.ndarray:
    """Reciprocal rank fusion: an article's merit is the sum over queries of 1 / (60 + its rank, from 1)."""
    del scores_QK
    merit_K = 1.0 / (RECIPROCAL_RANK_OFFSET + 1.0 + np.arange(rows_QK.shape[-1]))
    return _merge(rows_QK, np.broadcast_to(merit_K, rows_QK.shape), query_mask_Q, np.add)


def round_robin(rows_QK: np.ndarray, scores_QK: np.ndarray, query_mask_Q: np.ndarray) -> np.ndarray:
    """One article of each query in turn, in the order of the queries; an article that was already taken is dropped."""
    del scores_QK
    return _merge(rows_QK, np.zeros(rows_QK.shape), query_mask_Q, np.maximum)


def max_score(rows_QK: np.ndarray, scores_QK: np.ndarray, query_mask_Q: np.ndarray) -> np.ndarray:
    """An article's merit is its best similarity to any of the queries."""
    return _merge(rows_QK, scores_QK, query_mask_Q, np.maximum)


def score_sum(rows_QK: np.ndarray, scores_QK: np.ndarray, query_mask_Q: np.ndarray) -> np.ndarray:
    """CombSUM (Fox and Shaw, TREC-2 1993): an article's merit is the sum of its similarities to the queries it is among
    the results of. What several queries find comes first."""
    return _merge(rows_QK, np.maximum(scores_QK, 0), query_mask_Q, np.add)


MERGES: dict[str, Merge] = {
    "reciprocal_rank": reciprocal_rank,
    "round_robin": round_robin,
    "max_score": max_score,
    "score_sum": score_sum,
}
"""The merges by the names that ``retrieval.merge`` takes."""


def _merge(rows_QK: np.ndarray, merits_QK: np.ndarray, query_mask_Q: np.ndarray, combine: np.ufunc) -> np.ndarray:
    """Combines the merits of equal rows of one user by ``combine`` and sorts each user's rows by them, best first."""
    rows_QK, merits_QK, query_mask_Q = np.asarray(rows_QK), np.asarray(merits_QK), np.asarray(query_mask_Q)
    *leading, Q, K = rows_QK.shape
    valid_QK = query_mask_Q[..., None] & (rows_QK >= 0)

    def in_turns(array_QK: np.ndarray) -> np.ndarray:
        return array_QK.swapaxes(-1, -2).reshape(-1, K * Q)  # [users, M]: first places, then second places, ...

    rows_UM, merits_UM, valid_UM = in_turns(rows_QK), in_turns(merits_QK), in_turns(valid_QK)
    ranking_UM = np.full(rows_UM.shape, -1, np.int32)
    user, turn = np.nonzero(valid_UM)
    if user.size:
        row, merit = rows_UM[user, turn].astype(np.int64), merits_UM[user, turn]
        # A stable sort leaves the entries of one article in rank order: equal sets of ranks add up to equal bits.
        key = user * (row.max() + 1) + row
        order = np.argsort(key, kind="stable")
        start = np.flatnonzero(np.diff(key[order], prepend=-1))
        merit = combine.reduceat(merit[order], start)
        user, row, turn = (column[order[start]] for column in (user, row, turn))
        order = np.lexsort((turn, -merit, user))
        place = np.arange(user.size) - np.searchsorted(user, user)
        ranking_UM[user, place] = row[order]
    return ranking_UM.reshape(*leading, K * Q)


def to_item_ids(ranking_UM: np.ndarray, item_ids_I: np.ndarray) -> list[list[str]]:
    """Rankings of article rows, -1 at their end, as lists of article ids (strings)."""
    return [item_ids_I[ranking_M[ranking_M >= 0]].tolist() for ranking_M in ranking_UM]
