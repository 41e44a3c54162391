import numpy as np
import pytest
from scipy import stats

from jaxnr.evaluation.significance import compare, grouped_mean_interval, mean_interval


def test_interval_is_the_normal_one_for_many_users():
    values = np.random.default_rng(0).random(2000)
    interval = mean_interval(values, resamples=4000, seed=1)
    error = 1.96 * values.std(ddof=1) / np.sqrt(2000)
    assert interval["mean"] == pytest.approx(values.mean())
    assert interval["low"] == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert interval["high"] == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_about_95_percent_of_intervals_cover_the_truth():
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(300):
        interval = mean_interval(rng.random(60) < 0.3, resamples=400, seed=seed)
        inside += interval["low"] <= 0.3 <= interval["high"]
    assert 0.90 <= inside / 300 <= 0.98


def test_interval_depends_on_the_seed_alone_and_chunking_changes_nothing(monkeypatch):
    values = np.random.default_rng(0).random(50)
    whole = mean_interval(values, resamples=101, seed=3)
    assert whole == mean_interval(values, resamples=101, seed=3)
    assert whole != mean_interval(values, resamples=101, seed=4)
    monkeypatch.setattr("jaxnr.evaluation.significance._MAX_DRAWS", 500)
    assert mean_interval(values, resamples=101, seed=3) == pytest.approx(whole)


def test_constant_values_have_a_point_interval_and_no_values_are_refused():
    assert mean_interval(np.full(7, 0.25)) == {"mean": 0.25, "low": 0.25, "high": 0.25}
    with pytest.raises(ValueError, match="no user"):
        mean_interval(np.array([]))


def test_values_of_one_user_are_resampled_together():
    rng = np.random.default_rng(0)
    own = rng.random(60)
    single = grouped_mean_interval(own, np.arange(60)[::-1], resamples=200, seed=1)
    assert single == pytest.approx(mean_interval(own[::-1], resamples=200, seed=1))
    # Twenty times the same value of each user say no more than one of each.
    many = grouped_mean_interval(np.repeat(own, 20), np.repeat(np.arange(60), 20), resamples=200, seed=1)
    assert many == pytest.approx(mean_interval(own, resamples=200, seed=1))
    # A user with more values weighs more, in the mean and in each resample.
    uneven = grouped_mean_interval(np.array([1.0, 1.0, 1.0, 0.0]), np.array(["a", "a", "a", "b"]), resamples=200)
    assert uneven == {"mean": 0.75, "low": 0.0, "high": 1.0}
    with pytest.raises(ValueError, match="no value"):
        grouped_mean_interval(np.array([]), np.array([]))


@pytest.fixture
def per_user():
    rng = np.random.default_rng(0)
    base = rng.random(200)
    return {
        "teacher": {"recall@10": base + 0.05 + 0.1 * rng.standard_normal(200), "mrr": base},
        "prompt_only": {"recall@10": base, "mrr": base + 0.01 * rng.standard_normal(200)},
        "recent": {"recall@10": base - 0.3, "mrr": base},
    }


def test_paired_t_tests_with_holm_over_the_whole_family(per_user):
    entries = compare(per_user, [("teacher", "prompt_only"), ("prompt_only", "teacher")], ["recall@10", "mrr"])
    raw = [stats.ttest_rel(per_user[e["a"]][e["metric"]], per_user[e["b"]][e["metric"]]).pvalue for e in entries]
    order = np.argsort(raw)
    stepped = np.maximum.accumulate(np.array(raw)[order] * (4 - np.arange(4))).clip(max=1)
    assert [entries[i]["p_holm"] for i in order] == pytest.approx(stepped.tolist())
    difference = per_user["teacher"]["recall@10"] - per_user["prompt_only"]["recall@10"]
    assert entries[0]["difference"] == pytest.approx(difference.mean()) == pytest.approx(-entries[2]["difference"])
    assert entries[0]["effect_size"] == pytest.approx(difference.mean() / difference.std(ddof=1))
    assert [(e["a"], e["metric"]) for e in entries[:2]] == [("teacher", "recall@10"), ("teacher", "mrr")]


def test_differences_without_variance_give_p_one_and_no_effect_size(per_user):
    same, shifted = compare(per_user, [("teacher", "recent"), ("prompt_only", "recent")], ["mrr", "recall@10"])[0::3]
    assert (same["difference"], same["p_holm"], same["effect_size"]) == (0.0, 1.0, None)
    assert (shifted["p_holm"], shifted["effect_size"]) == (1.0, None)
    assert shifted["difference"] == pytest.approx(0.3)


def test_no_pairs_give_no_entries(per_user):
    assert compare(per_user, [], ["mrr"]) == []
