"""Diversity, breadth and freshness of rankings, against values worked out by hand and by brute force."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxnr.data.schema import ARTICLES
from jaxnr.evaluation.beyond_accuracy import HOUR, beyond_accuracy


def articles(categories):
    rows = [
        {"item_id": f"N{i}", "published_at": HOUR * i, "title": "", "abstract": "", "category": category}
        for i, category in enumerate(categories)
    ]
    return pa.Table.from_pylist(rows, schema=ARTICLES)


def test_the_three_numbers_by_hand():
    vectors = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    rankings = [[["N0", "N1"], ["N0", "N2"]], [["N2"], []]]  # distances 0 and 1; single articles have no pair
    values = beyond_accuracy(rankings, [10 * HOUR, 4 * HOUR], articles(["a", "a", "b", "c"]), vectors)
    assert values["diversity"] == pytest.approx(0.5)
    assert values["categories"] == pytest.approx(2 / 3)
    assert values["age_hours"] == pytest.approx(np.median([10, 9, 10, 8, 2]))


def test_a_catalogue_without_categories_and_a_method_without_recommendations():
    values = beyond_accuracy([[[]]], [0], articles([None, None]), np.eye(2, dtype=np.float32))
    assert values.keys() == {"diversity", "age_hours"}
    assert all(np.isnan(value) for value in values.values())


@given(st.integers(0, 2**16), st.integers(2, 6))
def test_diversity_is_the_mean_over_pairs(seed, count):
    vectors = np.random.default_rng(seed).normal(size=(count, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [1 - vectors[i] @ vectors[j] for i, j in itertools.combinations(range(count), 2)]
    values = beyond_accuracy([[[f"N{i}" for i in range(count)]]], [HOUR], articles(["a"] * count), vectors)
    assert values["diversity"] == pytest.approx(np.mean(pairs), abs=1e-6)
