"""Facets of a user's signals, and the threshold they are judged by."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnr.errors import InputError
from jaxnr.rewards.rubric import Calibration, build_rubric, calibrate

E = 16
CALIBRATION = Calibration(0.3)
AXES = np.eye(E, dtype=np.float32)


def around(axis: int, count: int, seed: int = 0, spread: float = 0.1) -> np.ndarray:
    """Unit vectors near an axis."""
    vectors = AXES[axis] + spread * np.random.default_rng([seed, axis]).normal(size=(count, E))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_planted_clusters_are_the_facets_by_support():
    signals = np.concatenate([around(0, 2), around(1, 5), around(2, 3), around(3, 1)])
    rubric = build_rubric(signals, CALIBRATION, max_facets=6)
    assert rubric.facets_JE.shape == (6, E)
    np.testing.assert_allclose(rubric.weights_J, [25, 9, 4, 0, 0, 0], rtol=1e-6)
    assert rubric.facets_JE[:3].argmax(axis=1).tolist() == [1, 2, 0]
    np.testing.assert_allclose(np.linalg.norm(rubric.facets_JE[:3], axis=1), 1.0, rtol=1e-5)
    assert not rubric.facets_JE[3:].any()


def test_single_signals_count_where_there_is_little_else_the_latest_first():
    rubric = build_rubric(np.concatenate([AXES[4:5], around(0, 2), AXES[5:6]]), CALIBRATION, max_facets=3)
    assert rubric.facets_JE.argmax(axis=1).tolist() == [0, 5, 4]
    np.testing.assert_allclose(rubric.weights_J, [4, 1, 1], rtol=1e-6)


def test_members_are_the_rows_of_the_signals_unknown_ones_counted():
    signals = np.concatenate([AXES[:1] * 0, around(0, 2), AXES[:1] * 0, around(1, 3)])
    assert build_rubric(signals, CALIBRATION, max_facets=4).members == ((4, 5, 6), (1, 2))
    assert build_rubric(signals, CALIBRATION, max_facets=1).members == ((4, 5, 6),)


def test_only_the_best_supported_facets_are_kept():
    signals = np.concatenate([around(axis, axis + 2) for axis in range(5)])
    rubric = build_rubric(signals, CALIBRATION, max_facets=2)
    assert rubric.facets_JE.argmax(axis=1).tolist() == [4, 3]


@pytest.mark.parametrize("signals", [np.zeros((0, E), np.float32), np.zeros((3, E), np.float32)])
def test_no_usable_signals_no_facets(signals):
    rubric = build_rubric(signals, CALIBRATION, max_facets=4)
    assert not rubric.weights_J.any()
    assert not rubric.facets_JE.any()
    assert rubric.members == ()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_order_of_the_signals_matters_only_for_ties(seed, count):
    rng = np.random.default_rng(seed)
    signals = rng.normal(size=(count, E)).astype(np.float32)
    signals /= np.linalg.norm(signals, axis=1, keepdims=True)
    before = build_rubric(signals, CALIBRATION, max_facets=12)
    after = build_rubric(signals[rng.permutation(count)], CALIBRATION, max_facets=12)
    np.testing.assert_allclose(before.weights_J, after.weights_J)
    cosine_JJ = before.facets_JE @ after.facets_JE.T
    assert np.all(cosine_JJ.max(axis=1)[before.weights_J > 0] > 0.999)


def planted_signals(users: int = 40, each: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Each user reads about one random direction."""
    rng = np.random.default_rng(0)
    interests = np.repeat(rng.normal(size=(users, E)), each, axis=0)
    signals = interests + 0.5 * rng.normal(size=interests.shape)
    signals /= np.linalg.norm(signals, axis=1, keepdims=True)
    return signals.astype(np.float32), np.repeat(np.arange(users), each)


def test_background_is_the_cosine_of_chance():
    signals, users = planted_signals()
    background = calibrate(signals, users, seed=0).background
    cosine, different = signals @ signals.T, users[:, None] != users[None]
    assert background == pytest.approx(np.percentile(cosine[different], 95), abs=0.02)
    assert background < np.median(cosine[~different])


def test_same_seed_same_threshold():
    signals, users = planted_signals()
    assert calibrate(signals, users, seed=3) == calibrate(signals, users, seed=3)


def test_unknown_texts_are_left_out():
    signals, users = planted_signals()
    padded = np.concatenate([signals, np.zeros((2000, E), np.float32)])
    background = calibrate(padded, np.concatenate([users, np.arange(2000)]), seed=0).background
    assert background == pytest.approx(calibrate(signals, users, seed=0).background, abs=0.02)


def test_background_leaves_the_ramp_a_width():
    assert calibrate(np.repeat(AXES[:1], 6, axis=0), np.arange(6), seed=0).background < 1


@pytest.mark.parametrize(
    ("signals", "users"),
    [
        (np.zeros((0, E), np.float32), []),
        (AXES[:3], [0, 0, 0]),
        (np.zeros((4, E), np.float32), [0, 0, 1, 1]),
    ],
)
def test_nothing_to_measure_is_an_input_error(signals, users):
    with pytest.raises(InputError, match="threshold cannot be measured"):
        calibrate(signals, np.array(users, int), seed=0)
