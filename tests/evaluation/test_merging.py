import time
from typing import get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnr.config import RetrievalConfig
from jaxnr.evaluation.merging import MERGES as BY_NAME
from jaxnr.evaluation.merging import max_score, reciprocal_rank, round_robin, score_sum, to_item_ids

MERGES = (reciprocal_rank, round_robin, max_score, score_sum)


def merge_plainly(merge, rows_QK, scores_QK, query_mask_Q):
    """The definition, one user and one article at a time, in exact arithmetic where ranks are added."""
    from fractions import Fraction

    merits, first_turn = {}, {}
    Q, K = rows_QK.shape
    for k in range(K):
        for q in range(Q):
            row = int(rows_QK[q, k])
            if row < 0 or not query_mask_Q[q]:
                continue
            first_turn.setdefault(row, len(first_turn))
            merits.setdefault(row, []).append((Fraction(1, 61 + k), scores_QK[q, k]))
    if merge is reciprocal_rank:
        merit = {row: sum(part for part, _ in parts) for row, parts in merits.items()}
    elif merge is score_sum:  # scores of quarters add up exactly
        merit = {row: sum(score for _, score in parts) for row, parts in merits.items()}
    elif merge is max_score:
        merit = {row: max(score for _, score in parts) for row, parts in merits.items()}
    else:
        merit = dict.fromkeys(merits, 0)
    return sorted(merits, key=lambda row: (-merit[row], first_turn[row]))


@st.composite
def retrieved(draw):
    """[users, queries, articles] with few articles and coarse scores, so that overlaps and ties are common."""
    U, Q, K = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = np.stack([[rng.permutation(7)[:K] for _ in range(Q)] for _ in range(U)]).astype(np.int32)
    rows[np.arange(K) >= rng.integers(0, K + 1, (U, Q))[..., None]] = -1
    scores = -np.sort(-rng.integers(0, 4, (U, Q, K)), axis=-1).astype(np.float32) / 4
    return rows, scores, rng.random((U, Q)) < 0.8


@pytest.mark.parametrize("merge", MERGES)
@given(retrieved())
@settings(max_examples=150, deadline=None)
def test_equals_the_definition_for_every_user(merge, case):
    rows_UQK, scores_UQK, mask_UQ = case
    ranking_UM = merge(rows_UQK, scores_UQK, mask_UQ)
    assert ranking_UM.shape == (len(rows_UQK), rows_UQK.shape[1] * rows_UQK.shape[2])
    for ranking, rows, scores, mask in zip(ranking_UM, rows_UQK, scores_UQK, mask_UQ, strict=True):
        expected = merge_plainly(merge, rows, scores, mask)
        assert ranking[: len(expected)].tolist() == expected
        assert (ranking[len(expected) :] == -1).all()
        assert np.array_equal(ranking, merge(rows, scores, mask))  # alone and in a batch alike


def test_the_merges_differ_as_they_should():
    rows = np.array([[0, 1, 2], [3, 1, 4]])
    scores = np.array([[0.9, 0.8, 0.7], [0.5, 0.4, 0.3]])
    mask = np.array([True, True])
    assert reciprocal_rank(rows, scores, mask)[:5].tolist() == [1, 0, 3, 2, 4]  # 2/62 > 1/61 > 1/63
    assert round_robin(rows, scores, mask)[:5].tolist() == [0, 3, 1, 2, 4]
    assert max_score(rows, scores, mask)[:5].tolist() == [0, 1, 2, 3, 4]
    assert score_sum(rows, scores, mask)[:5].tolist() == [1, 0, 2, 3, 4]  # 0.8 + 0.4 > 0.9


@pytest.mark.parametrize("merge", MERGES)
def test_nothing_retrieved_is_an_empty_ranking(merge):
    ranking = merge(np.full((2, 3, 4), -1), np.zeros((2, 3, 4)), np.ones((2, 3), bool))
    assert to_item_ids(ranking, np.array(["a"])) == [[], []]


def test_every_name_of_the_configuration_is_its_merge():
    names = get_args(get_type_hints(RetrievalConfig)["merge"])
    assert {name: BY_NAME[name].__name__ for name in names} == {name: name for name in BY_NAME}


def test_rows_become_ids_and_padding_disappears():
    assert to_item_ids(np.array([[1, 0, -1], [2, -1, -1]]), np.array(["a", "b", "c"])) == [["b", "a"], ["c"]]


@pytest.mark.parametrize("merge", MERGES)
def test_a_test_split_merges_in_well_under_a_second(merge):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 2000, (400, 8, 6, 20), dtype=np.int32)
    scores = rng.random(rows.shape, dtype=np.float32)
    start = time.process_time()
    ranking = merge(rows, scores, np.ones((400, 8, 6), bool))
    assert ranking.shape == (400, 8, 120)
    assert time.process_time() - start < 2.0  # 0.2 s here; a loop over users and articles takes several
