import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnr.evaluation.metrics import METRICS, evaluate_rankings, evaluate_samples

ITEMS = [f"N{i}" for i in range(14)]


def test_by_hand():
    values = evaluate_rankings([["x", "a", "y", "b"]], [("a", "b", "c")])
    dcg, ideal = 1 / np.log2(3) + 1 / np.log2(5), 1 + 1 / np.log2(3) + 1 / np.log2(4)
    assert values["recall@5"] == pytest.approx([2 / 3])
    assert values["ndcg@10"] == pytest.approx([dcg / ideal])
    assert values["mrr"] == pytest.approx([1 / 2])


def test_a_hit_at_rank_six_counts_at_ten_and_not_at_five():
    values = evaluate_rankings([[*"uvwxy", "a"]], [("a",)])
    assert {name: value.tolist() for name, value in values.items()} == {
        "recall@5": [0.0],
        "recall@10": [1.0],
        "ndcg@5": [0.0],
        "ndcg@10": pytest.approx([1 / np.log2(7)]),
        "mrr": pytest.approx([1 / 6]),
    }


def test_a_user_with_nothing_retrieved_scores_zero_and_stays():
    values = evaluate_rankings([[], ["a"], []], [("a",), ("a",), ("b",)])
    assert all(values[name].tolist() == [0.0, 1.0, 0.0] for name in METRICS)
    nobody = evaluate_rankings([[], []], [("a",), ("b",)])
    assert all(nobody[name].tolist() == [0.0, 0.0] for name in METRICS)


def test_no_users_give_empty_arrays():
    assert all(values.shape == (0,) for values in evaluate_rankings([], []).values())


def plain_metrics(ranking, relevant):
    hits = [item in relevant for item in ranking]
    result = {"mrr": next((1 / (rank + 1) for rank, hit in enumerate(hits) if hit), 0.0)}
    for k in (5, 10):
        gains = sum(1 / np.log2(rank + 2) for rank, hit in enumerate(hits[:k]) if hit)
        ideal = sum(1 / np.log2(rank + 2) for rank in range(min(k, len(relevant))))
        result |= {f"recall@{k}": sum(hits[:k]) / len(relevant), f"ndcg@{k}": gains / ideal}
    return result


user = st.tuples(
    st.permutations(ITEMS).flatmap(lambda items: st.integers(0, 14).map(lambda n: items[:n])),
    st.sets(st.sampled_from(ITEMS), min_size=1).map(lambda items: tuple(sorted(items))),
)


@given(st.lists(user, min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_equals_the_definitions_in_the_order_given(users):
    values = evaluate_rankings([ranking for ranking, _ in users], [items for _, items in users])
    for row, (ranking, items) in enumerate(users):
        expected = plain_metrics(ranking, items)
        assert {name: values[name][row] for name in METRICS} == pytest.approx(expected)


def test_samples_keep_their_places():
    rankings = [[["a"], []], [["x", "b"], ["b"]]]
    values = evaluate_samples(rankings, [("a",), ("b",)])
    assert values["mrr"].tolist() == [[1.0, 0.0], [0.5, 1.0]]
    assert values["mrr"].mean(axis=1).tolist() == [0.5, 0.75]


@pytest.mark.parametrize(
    ("rankings", "relevant", "message"),
    [
        ([["a"]], [()], "user 0 has no relevant"),
        ([["b"], ["a", "a"]], [("a",), ("a",)], "user 1 names an article twice"),
        ([["a"]], [("a",), ("b",)], "1 rankings for 2 users"),
    ],
)
def test_undefined_input_is_refused(rankings, relevant, message):
    with pytest.raises(ValueError, match=message):
        evaluate_rankings(rankings, relevant)


def test_unequal_samples_are_refused():
    with pytest.raises(ValueError, match="same number of sampled rankings"):
        evaluate_samples([[["a"]], [["a"], ["b"]]], [("a",), ("b",)])


def test_a_test_split_is_scored_in_seconds():
    rng = np.random.default_rng(0)
    rankings = [[[f"N{i}" for i in rng.permutation(200)[:40]] for _ in range(8)] for _ in range(400)]
    start = time.process_time()
    values = evaluate_samples(rankings, [("N1", "N2", "N3")] * 400)
    assert values["recall@10"].shape == (400, 8)
    assert time.process_time() - start < 5.0
