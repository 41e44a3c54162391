"""Uncertainty: bootstrap intervals of a mean over users, and paired tests between methods with Holm's correction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

_MAX_DRAWS = 1 << 22
"""Users drawn at a time by the bootstrap: bounds its memory at 32 MiB of indices, whatever the number of users."""


def mean_interval(values_U: np.ndarray, resamples: int = 2000, seed: int = 0) -> dict[str, float]:
    """``{"mean", "low", "high"}``: the mean over users and its 95 % percentile bootstrap interval, users resampled.

    The same seed draws the same users, so the intervals of two methods on the same users share their resamples.
    Raises ValueError when there is no user.
    """
    values_U = np.asarray(values_U, float)
    users = len(values_U)
    if not users:
        raise ValueError("no user to average over")
    means = [values_U[drawn_RU].mean(axis=1) for drawn_RU in _resamples(users, resamples, seed)]
    return {"mean": float(values_U.mean()), **_percentiles(means)}


def grouped_mean_interval(
    values_N: np.ndarray, user_N: np.ndarray, resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """``mean_interval`` of values of which a user has several: the mean over values, with whole users resampled.

    What one user does is alike; resampling values would give intervals that are too narrow. ``user_N`` says whose each
    value is. With one value a user this is ``mean_interval``. Raises ValueError when there is no value.
    """
    values_N = np.asarray(values_N, float)
    if not len(values_N):
        raise ValueError("no value to average over")
    user_N = np.unique(user_N, return_inverse=True)[1]
    sums_U, counts_U = np.bincount(user_N, values_N), np.bincount(user_N)
    means = [
        sums_U[drawn_RU].sum(axis=1) / counts_U[drawn_RU].sum(axis=1)
        for drawn_RU in _resamples(len(counts_U), resamples, seed)
    ]
    return {"mean": float(values_N.mean()), **_percentiles(means)}


def _resamples(users: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Users drawn with replacement, some resamples [R, U] at a time."""
    generator = np.random.default_rng(seed)
    rows = max(1, _MAX_DRAWS // users)
    for start in range(0, resamples, rows):
        yield generator.integers(users, size=(min(rows, resamples - start), users))


def _percentiles(means: Sequence[np.ndarray]) -> dict[str, float]:
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return {"low": float(low), "high": float(high)}


def compare(
    per_user: Mapping[str, Mapping[str, np.ndarray]], pairs: Sequence[tuple[str, str]], metrics: Sequence[str]
) -> list[dict]:
    """Paired t-tests of method a against b for every pair and metric, Holm-corrected over all of them as one family.

    ``per_user[method][metric]`` is values_U on the same users in the same order. Each entry of the result is
    ``{"a", "b", "metric", "difference", "p_holm", "effect_size"}``: the mean of a - b, the two-sided corrected p-value,
    and Cohen's d of the paired differences (their mean over their standard deviation). Where the differences are the
    same for every user there is no variance to test against: p is 1 and the effect size None.
    """
    results, p_values = [], []
    for a, b in pairs:
        for metric in metrics:
            first_U, second_U = np.asarray(per_user[a][metric], float), np.asarray(per_user[b][metric], float)
            difference_U = first_U - second_U
            varies = np.ptp(difference_U) > 1e-12
            p_values.append(float(stats.ttest_rel(first_U, second_U).pvalue) if varies else 1.0)
            effect = float(difference_U.mean() / difference_U.std(ddof=1)) if varies else None
            results.append(
                {"a": a, "b": b, "metric": metric, "difference": float(difference_U.mean()), "effect_size": effect}
            )
    if not results:
        return []
    corrected = np.asarray(multipletests(p_values, method="holm")[1])
    return [result | {"p_holm": float(p)} for result, p in zip(results, corrected, strict=True)]
