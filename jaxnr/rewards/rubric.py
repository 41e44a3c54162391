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

_PAIRS = 20_000
_USERS = 1_000
_SAME_TEXT = 0.999
_LEAST_RAMP = 0.1


class Calibration(NamedTuple):
    """What cosines mean with this embedder: its scale differs from one to the next, so it is measured, not guessed."""

    background: float
    """95th percentile of the cosine between signals of different users: up to here texts are related by chance."""
    match: float
    """Median, over signals, of the best cosine to another signal of the same user that is not the same text."""


class Rubric(NamedTuple):
    """Coverage criteria of a user. Facets are unit vectors; padding is zero, and so is its weight."""

    facets_JE: np.ndarray
    weights_J: np.ndarray


def calibrate(embeddings_ME: np.ndarray, user_index_M: np.ndarray, seed: int) -> Calibration:
    """Measures the thresholds on the training signals, unit rows of M; a sample of pairs and users, drawn by seed.

    ``match`` is kept 0.1 above ``background`` at least, so that the ramp between them is one. Raises InputError where
    there is nothing to measure: no two users, or no user with two different signals.
    """
    known_M = np.abs(embeddings_ME).max(axis=1) > 0
    embeddings_ME, user_index_M = embeddings_ME[known_M], np.asarray(user_index_M)[known_M]
    rng = np.random.default_rng(seed)
    left, right = rng.integers(0, max(len(embeddings_ME), 1), (2, _PAIRS)) if len(embeddings_ME) else ((), ())
    different = user_index_M[list(left)] != user_index_M[list(right)]
    chance = np.einsum("pe,pe->p", embeddings_ME[list(left)][different], embeddings_ME[list(right)][different])
    users = rng.permutation(np.unique(user_index_M))[:_USERS]
    best = np.concatenate([np.zeros(0), *(_best_cosines(embeddings_ME[user_index_M == user]) for user in users)])
    if not len(chance) or not len(best):
        raise InputError(
            f"The judge's thresholds cannot be measured on {len(embeddings_ME)} training signals of {len(users)} "
            "users: expected two users at least, and one with two different signals."
        )
    background = float(np.percentile(chance, 95))
    return Calibration(background, max(float(np.median(best)), background + _LEAST_RAMP))


def build_rubric(signals_ME: np.ndarray, calibration: Calibration, max_facets: int) -> Rubric:
    """The facets of a user's signals (unit rows, oldest first; zero rows are left out), the best supported first.

    Signals are clustered by average linkage down to ``background``: only what is related by chance stays apart (on the
    validation users of the generated world, facets cut there retrieve best of those tried up to ``match``). A facet is the mean
    direction of its members, its weight log2(1 + members). Facets of a single signal count only where there are fewer
    than two others, the latest first.
    """
    signals_ME = signals_ME[np.abs(signals_ME).max(axis=1) > 0]
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
        weights_J[row] = np.log2(1 + len(members))
    return Rubric(facets_JE, weights_J)


def _clusters(signals_ME: np.ndarray, least_cosine: float) -> list[np.ndarray]:
    """Rows of each cluster, rising; average linkage merges while two clusters' mean cosine reaches the cut."""
    if len(signals_ME) < 2:
        return [np.arange(len(signals_ME))] if len(signals_ME) else []
    distances_MM = np.clip(1.0 - signals_ME @ signals_ME.T, 0.0, 2.0).astype(np.float64)
    np.fill_diagonal(distances_MM, 0.0)
    tree = linkage(squareform(distances_MM, checks=False), method="average")
    label_M = fcluster(tree, t=1.0 - least_cosine, criterion="distance")
    return [np.flatnonzero(label_M == label) for label in np.unique(label_M)]


def _best_cosines(signals_ME: np.ndarray) -> np.ndarray:
    """Each signal's best cosine to another one of the user, same texts aside; those without another are left out."""
    cosine_MM = signals_ME @ signals_ME.T
    best_M = np.where(cosine_MM < _SAME_TEXT, cosine_MM, -np.inf).max(axis=1)
    return best_M[np.isfinite(best_M)]
