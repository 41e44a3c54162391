"""The rubric of a user: which interests a list has to cover, read from the user's clean signals alone.

Rubrics as Rewards (arXiv 2507.17746) with atomic criteria a user: each facet of the signals is one criterion. Facets
are clusters of signals, so an interest that shows in a search, a page and a click is asked for once, with the weight of
its evidence, and a one-off event is not asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from jaxnr.errors import InputError

_PAIRS = 50_000
_MOST_BACKGROUND = 0.95  # so that the judge's ramp up to 1 keeps a width


FACET_WORDS = 4
"""A signal counts by its telling words, at most so many: facets of whole texts are partly facets of page templates."""


class Calibration(NamedTuple):
    """What cosines mean with this embedder: its scale differs from one to the next, so it is measured, not guessed."""

    background: float
    """95th percentile of the cosine between signals of different users: up to here texts are related by chance."""


class Rubric(NamedTuple):
    """Coverage criteria of a user. Facets are unit vectors; padding is zero, and so is its weight."""

    facets_JE: np.ndarray
    weights_J: np.ndarray
    members: tuple[tuple[int, ...], ...]
    """Of each facet that is no padding, the rows of its signals, rising."""


def calibrate(embeddings_ME: np.ndarray, user_index_M: np.ndarray, seed: int) -> Calibration:
    """Measures the threshold on random pairs of the training signals (unit rows, zero ones left out), drawn by seed.

    Raises InputError where no pair of different users is found.
    """
    known_M = np.flatnonzero(np.abs(embeddings_ME).max(axis=1) > 0)
    user_index_M = np.asarray(user_index_M)[known_M]
    pairs_2P = np.random.default_rng(seed).integers(0, max(len(known_M), 1), (2, _PAIRS if len(known_M) else 0))
    left, right = pairs_2P[:, user_index_M[pairs_2P[0]] != user_index_M[pairs_2P[1]]]
    if not len(left):
        raise InputError(
            f"The judge's threshold cannot be measured on {len(known_M)} training signals of "
            f"{len(np.unique(user_index_M))} users: expected signals of two users at least."
        )
    cosines = np.einsum("pe,pe->p", embeddings_ME[known_M[left]], embeddings_ME[known_M[right]])
    return Calibration(float(np.clip(np.percentile(cosines, 95), 0.0, _MOST_BACKGROUND)))


def build_rubric(signals_ME: np.ndarray, calibration: Calibration, max_facets: int) -> Rubric:
    """The facets of a user's signals (unit rows, oldest first; zero rows are left out), the best supported first.

    Signals are clustered by average linkage down to ``background``: only what is related by chance stays apart. A facet
    is the mean direction of its members. Its weight is the number of pairs of signals that agree on it, members², each
    one with itself too: one event may be an accident, agreement is evidence. Facets of a single signal count only where
    there are fewer than two others, the latest first.
    """
    known_M = np.flatnonzero(np.abs(signals_ME).max(axis=1) > 0)
    signals_ME = signals_ME[known_M]
    clusters = _clusters(signals_ME, calibration.background)
    supported = [members for members in clusters if len(members) > 1]
    if len(supported) < 2:
        supported = clusters
    supported = sorted(supported, key=lambda members: (len(members), members[-1]), reverse=True)[:max_facets]
    facets_JE = np.zeros((max_facets, signals_ME.shape[1]), np.float32)
    weights_J = np.zeros(max_facets, np.float32)
    for row, members in enumerate(supported):
        mean_E = signals_ME[members].mean(axis=0)
        facets_JE[row] = mean_E / np.maximum(np.linalg.norm(mean_E), 1e-6)
        weights_J[row] = len(members) ** 2
    return Rubric(facets_JE, weights_J, tuple(tuple(known_M[members].tolist()) for members in supported))


def in_article_words(rubric: Rubric, nearest_JKE: np.ndarray) -> Rubric:
    """The facets, each moved half-way to the mean of its nearest articles (``nearest_JKE``, zero rows for none).

    Searches and pages say an interest in other words than the news does. A facet of signals alone is covered best by
    copying them; this one (pseudo-relevance feedback, Rocchio 1971) by saying what the news calls the same thing.
    """
    articles_JE = _unit(nearest_JKE.mean(axis=1))
    return rubric._replace(facets_JE=np.where(rubric.weights_J[:, None] > 0, _unit(rubric.facets_JE + articles_JE), 0))


def _unit(vectors_JE: np.ndarray) -> np.ndarray:
    return vectors_JE / np.maximum(np.linalg.norm(vectors_JE, axis=-1, keepdims=True), 1e-6)


def _clusters(signals_ME: np.ndarray, least_cosine: float) -> list[np.ndarray]:
    """Rows of each cluster, rising; average linkage merges while two clusters' mean cosine reaches the cut."""
    if len(signals_ME) < 2:
        return [np.arange(len(signals_ME))] if len(signals_ME) else []
    distances_MM = np.clip(1.0 - signals_ME @ signals_ME.T, 0.0, 2.0).astype(np.float64)
    np.fill_diagonal(distances_MM, 0.0)
    tree = linkage(squareform(distances_MM, checks=False), method="average")
    label_M = fcluster(tree, t=1.0 - least_cosine, criterion="distance")
    return [np.flatnonzero(label_M == label) for label in np.unique(label_M)]
