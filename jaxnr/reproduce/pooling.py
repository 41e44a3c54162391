"""Numbers of one method from the runs of several seeds: pooled over users, with intervals and paired tests."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxnr.evaluation.significance import compare, mean_interval

RESAMPLES = 2000

PerUser = Mapping[str, Sequence]
"""``user_id`` and each metric, aligned: what a run's per_user.json has for one method."""


class Pooled(NamedTuple):
    """Each metric's value of each user, over the seeds."""

    users: list[Hashable]
    values: dict[str, np.ndarray]
    """Metric to values_U."""
    by_seed: dict[str, list[float]]
    """Metric to the mean of each seed, in the order of the seeds."""

    def interval(self, metric: str) -> dict[str, float]:
        """Mean and 95 % interval over users."""
        return mean_interval(self.values[metric], RESAMPLES)


def pool(by_seed: Mapping[int, PerUser], metrics: Sequence[str], same_users: bool) -> Pooled:
    """The method's values over all seeds.

    Where a seed is another world (``same_users`` false) its users are people of their own; where the log is the same,
    a user's value is the mean over the seeds, so that nobody counts more than once.
    """
    values: dict[Hashable, list[list[float]]] = {}
    for seed, scores in by_seed.items():
        rows = zip(*(scores[metric] for metric in metrics), strict=True)
        for user, row in zip(scores["user_id"], rows, strict=True):
            values.setdefault(user if same_users else (seed, user), []).append(list(row))
    means_UM = np.array([np.mean(rows, axis=0) for rows in values.values()])
    return Pooled(
        list(values),
        {metric: means_UM[:, column] for column, metric in enumerate(metrics)},
        {metric: [float(np.mean(scores[metric])) for scores in by_seed.values()] for metric in metrics},
    )


def paired_tests(methods: Mapping[str, Pooled], pairs: Sequence[tuple[str, str]], metrics: Sequence[str]) -> list[dict]:
    """``compare`` on the users whom all methods of ``pairs`` were measured on, with their number as ``users``."""
    named = list(dict.fromkeys(name for pair in pairs for name in pair))
    common = set.intersection(*(set(methods[name].users) for name in named)) if named else set()
    users = [user for user in methods[named[0]].users if user in common] if named else []
    per_user = {}
    for name in named:
        row_of = {user: row for row, user in enumerate(methods[name].users)}
        rows = [row_of[user] for user in users]
        per_user[name] = {metric: methods[name].values[metric][rows] for metric in metrics}
    return [test | {"users": len(users)} for test in compare(per_user, pairs, metrics)]
