"""MIND's impression task: its metrics, the order of candidates, and what is known at an impression."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from jaxnr.data.examples import DAY, Example, histories
from jaxnr.data.schema import ARTICLES, EVENTS, REQUESTS, Article, Event, Request, Tables, to_table
from jaxnr.evaluation.impressions import (
    Impression,
    by_popularity,
    by_publish_time,
    by_queries,
    by_scores,
    by_vectors,
    impression_metrics,
    logged_impressions,
    prediction_lines,
)
from jaxnr.evaluation.merging import MERGES
from jaxnr.evaluation.recall_paths import Catalogue, popularity

NOBODY = Example(0, "u", 0, (), (), ())


def impression(clicked, rows=None, order=None, example=NOBODY):
    places = np.arange(len(clicked))
    return Impression(
        "r",
        example,
        places if rows is None else np.array(rows),
        np.array(clicked, bool),
        places if order is None else np.array(order),
    )


def independent(ranks, clicked):
    """The four numbers of one impression from its ranks, one term after the other, and AUC by scikit-learn."""
    in_order = [y for _, y in sorted(zip(ranks, clicked, strict=True))]
    clicks = sum(clicked)

    def dcg(labels, depth):
        return sum((2**y - 1) / math.log2(place + 2) for place, y in enumerate(labels[:depth]))

    best = sorted(in_order, reverse=True)
    return {
        "auc": roc_auc_score(clicked, [1 / rank for rank in ranks]),
        "mrr": sum(y / (place + 1) for place, y in enumerate(in_order)) / clicks,
        "ndcg@5": dcg(in_order, 5) / dcg(best, 5),
        "ndcg@10": dcg(in_order, 10) / dcg(best, 10),
    }


CASES = st.integers(2, 25).flatmap(
    lambda size: st.tuples(
        st.permutations(range(size)),
        st.lists(st.integers(0, 1), min_size=size, max_size=size).filter(lambda labels: 0 < sum(labels) < len(labels)),
    )
)


@settings(deadline=None, max_examples=60)
@given(st.lists(CASES, min_size=1, max_size=6))
def test_metrics_are_those_of_an_independent_computation(cases):
    impressions = [impression(labels) for _, labels in cases]
    values = impression_metrics([np.array(ranking) for ranking, _ in cases], impressions)
    for number, (ranking, labels) in enumerate(cases):
        ranks = (np.argsort(ranking) + 1).tolist()
        for metric, expected in independent(ranks, labels).items():
            assert values[metric][number] == pytest.approx(expected, abs=1e-12)


def test_metrics_by_hand():
    # Ranked: click, no, click, no: pairs (click, no) in order 2 + 1 of 4; (1 + 1/3) / 2; ideal is clicks at 1 and 2.
    values = impression_metrics([np.array([2, 0, 3, 1])], [impression([0, 0, 1, 1])])
    ndcg = (1 + 1 / 2) / (1 + 1 / math.log2(3))
    expected = {"auc": 3 / 4, "mrr": 2 / 3, "ndcg@5": ndcg, "ndcg@10": ndcg}
    assert {name: value[0] for name, value in values.items()} == pytest.approx(expected)
    # The one click is the sixth of seven.
    values = impression_metrics([np.arange(7)], [impression([0, 0, 0, 0, 0, 1, 0])])
    expected = {"auc": 1 / 6, "mrr": 1 / 6, "ndcg@5": 0, "ndcg@10": 1 / math.log2(7)}
    assert {name: value[0] for name, value in values.items()} == pytest.approx(expected)


@pytest.mark.parametrize("clicked", [[0, 0], [1, 1]])
def test_an_impression_without_both_has_no_metrics(clicked):
    assert not impression(clicked).has_both
    with pytest.raises(ValueError, match="has no AUC"):
        impression_metrics([np.arange(2)], [impression(clicked)])


def test_ties_fall_in_the_drawn_order_and_what_has_no_score_comes_last():
    some = impression([0] * 5, order=[3, 1, 4, 0, 2])
    (ranking,) = by_scores([np.array([1.0, 2.0, np.nan, 2.0, np.nan])], [some])
    assert ranking.tolist() == [3, 1, 0, 4, 2]
    (ranking,) = by_scores([np.array([[1, 1, 0, 1, 1], [0, 9, 99, 5, 9]], float)], [some])
    assert ranking.tolist() == [1, 4, 3, 0, 2]


def test_candidates_by_the_nearness_of_their_vectors():
    articles_IE = np.eye(3, dtype=np.float32)
    some = impression([0] * 4, rows=[2, -1, 0, 1])
    (ranking,) = by_vectors(np.array([[0.5, 0.1, 0.9]], np.float32), articles_IE, [some])
    assert ranking.tolist() == [0, 2, 3, 1]


@pytest.mark.parametrize("merge", MERGES)
def test_query_lists_rank_candidates_as_the_merge_ranks_what_they_retrieve(merge):
    rng = np.random.default_rng(0)
    articles_IE = rng.standard_normal((30, 4)).astype(np.float32)
    queries_QE = rng.standard_normal((3, 4)).astype(np.float32)
    rows = rng.permutation(30)[:12]
    some = impression([0] * 12, rows=rows)
    (ranking,) = by_queries([queries_QE], articles_IE, MERGES[merge], [some])
    scores_QC = queries_QE @ articles_IE[rows].T
    best_QC = np.argsort(-scores_QC, axis=1)
    expected = MERGES[merge](rows[best_QC], np.take_along_axis(scores_QC, best_QC, axis=1), np.ones(3, bool))
    assert rows[ranking].tolist() == expected[expected >= 0].tolist()


def test_without_queries_or_article_the_drawn_order_holds():
    articles_IE = np.eye(2, dtype=np.float32)
    some = impression([0] * 4, rows=[-1, 0, 1, -1], order=[3, 2, 0, 1])
    for queries_QE in (np.zeros((0, 2), np.float32), np.zeros((2, 2), np.float32)):
        (ranking,) = by_queries([queries_QE], articles_IE, MERGES["score_sum"], [some])
        assert ranking.tolist() == [3, 2, 0, 1]
    (ranking,) = by_queries([np.float32([[1, 0]])], articles_IE, MERGES["score_sum"], [some])
    assert ranking.tolist() == [1, 2, 3, 0]


USERS = ["u0", "u1", "u2", "u3", "stranger", "u0"]
ARTICLE_LIST = [Article(f"a{number}", number * DAY, f"title {number}") for number in range(6)]


@pytest.fixture(scope="module")
def tables():
    rng = np.random.default_rng(0)
    events = [
        Event(f"u{rng.integers(4)}", int(time), "news", "click", f"title {item}", f"a{item}")
        for time, item in zip(rng.integers(6 * DAY, 12 * DAY, 80), rng.integers(6, size=80), strict=True)
    ]
    events.sort(key=lambda event: (event.user_id, event.timestamp))
    candidates = tuple(f"a{item}" for item in (4, 2, 0, 1, 3, 5, 9))
    requests = [
        Request(f"r{time}", user, time, candidates, ("a2", "a1"))
        for time, user in zip(range(7 * DAY, 13 * DAY, DAY // 2), USERS * 2, strict=True)
    ]
    requests.append(Request("exact", "u3", events[-1].timestamp, candidates, ()))
    return Tables(
        events=to_table(events, EVENTS),
        articles=to_table(ARTICLE_LIST, ARTICLES),
        requests=to_table(requests, REQUESTS),
    )


@pytest.fixture(scope="module")
def logged(tables):
    users, _ = histories(tables)
    return logged_impressions(tables, {user.user_id: user for user in users}, 8 * DAY, max_signals=3, seed=0)


def test_an_impression_knows_what_was_strictly_before_it(tables, logged):
    assert len(logged) == 11  # two of the thirteen are from before
    for some in logged:
        assert some.rows_C.tolist() == [4, 2, 0, 1, 3, 5, -1]
        assert some.example.user_id == "stranger" or 0 < len(some.example.signals) <= 3
        assert all(signal.timestamp < some.example.timestamp for signal in some.example.signals)
    assert not logged[-1].clicked_C.any()
    at_once = tables.events["timestamp"].cast("int64").to_pylist().count(logged[-1].example.timestamp)
    assert at_once == 1  # the event of that very second is there, and not known
    assert logged[0].clicked_C.tolist() == [False, True, False, True, False, False, False]
    assert sorted(logged[0].tie_order_C) == list(range(7))
    assert len({tuple(some.tie_order_C) for some in logged}) > 5


def test_popularity_and_publish_time_order_candidates_as_they_order_the_catalogue(tables, logged):
    catalogue = Catalogue.of(tables.articles)
    expected = popularity([some.example for some in logged], tables.articles, tables.events, depth=6)
    for some, ranking, items in zip(logged, by_popularity(tables, catalogue)(logged), expected, strict=True):
        assert [f"a{row}" for row in some.rows_C[ranking][:-1]] == items
        assert some.rows_C[ranking][-1] == -1
    for some, ranking in zip(logged, by_publish_time(catalogue)(logged), strict=True):
        assert some.rows_C[ranking].tolist() == [5, 4, 3, 2, 1, 0, -1]


def test_a_submission_has_the_rank_of_each_candidate_in_the_order_of_the_log():
    some = [impression([0, 0, 1]), impression([0, 1])]
    text = prediction_lines([np.array([2, 0, 1]), np.array([0, 1])], some, ["1", "2"])
    assert text == "1 [2,3,1]\n2 [1,2]\n"
