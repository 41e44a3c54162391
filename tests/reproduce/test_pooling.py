"""Numbers of several seeds: who counts as one user, and what is compared with what."""

import numpy as np
import pytest

from jaxnr.reproduce.pooling import paired_tests, pool

METRICS = ("recall@10",)


def scores(users, values):
    return {"user_id": users, "recall@10": values}


def test_users_of_different_worlds_are_different_people():
    pooled = pool({0: scores(["a", "b"], [0.0, 1.0]), 1: scores(["a"], [0.4])}, METRICS, same_users=False)
    assert pooled.users == [(0, "a"), (0, "b"), (1, "a")]
    np.testing.assert_allclose(pooled.values["recall@10"], [0.0, 1.0, 0.4])
    assert pooled.by_seed == {"recall@10": [0.5, 0.4]}


def test_a_user_of_one_log_counts_once_with_the_mean_of_the_seeds():
    pooled = pool({0: scores(["a", "b"], [0.0, 1.0]), 1: scores(["b", "a"], [0.5, 0.2])}, METRICS, same_users=True)
    assert pooled.users == ["a", "b"]
    np.testing.assert_allclose(pooled.values["recall@10"], [0.1, 0.75])


def test_the_interval_holds_the_mean_and_is_that_of_the_users():
    values = np.random.default_rng(0).random(400)
    interval = pool({0: scores(list(range(400)), values)}, METRICS, same_users=True).interval("recall@10")
    assert interval["mean"] == pytest.approx(values.mean())
    standard_error = values.std() / 20
    assert interval["low"] == pytest.approx(values.mean() - 1.96 * standard_error, abs=0.3 * standard_error)
    assert interval["high"] == pytest.approx(values.mean() + 1.96 * standard_error, abs=0.3 * standard_error)


def test_methods_are_compared_on_the_users_that_both_were_measured_on():
    generator = np.random.default_rng(1)
    users = [f"u{number}" for number in range(50)]
    worse = dict(zip(users, generator.random(50), strict=True))
    better = {user: value + 0.3 + 0.01 * generator.random() for user, value in worse.items()}
    order = [*reversed(users[10:]), "stranger"]
    methods = {
        "better": pool({0: scores(order, [*(better[user] for user in order[:-1]), -100.0])}, METRICS, True),
        "worse": pool({0: scores(users, list(worse.values()))}, METRICS, True),
    }
    (test,) = paired_tests(methods, [("better", "worse")], METRICS)
    assert test["users"] == 40
    assert test["difference"] == pytest.approx(np.mean([better[user] - worse[user] for user in users[10:]]))
    assert test["p_holm"] < 1e-6
