from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnr.evaluation.best_of_n import best_of_n


def over_all_subsets(rewards, values, n):
    rewards = [-np.inf if np.isnan(reward) else reward for reward in rewards]
    chosen = []
    for subset in combinations(range(len(rewards)), n):
        best = max(rewards[i] for i in subset)
        chosen.append(np.mean([values[i] for i in subset if rewards[i] == best]))
    return np.mean(chosen)


samples = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0, 1.5, float("nan")]), st.floats(0, 1, width=32)), min_size=1, max_size=7
)


@given(samples, st.data())
@settings(max_examples=200, deadline=None)
def test_equals_the_mean_over_all_subsets(samples, data):
    n = data.draw(st.integers(1, len(samples)))
    rewards, values = np.array(samples).T
    result = best_of_n(np.stack([rewards, rewards]), np.stack([values, 1 - values]), n)
    expected = over_all_subsets(rewards, values, n)
    assert result == pytest.approx([expected, 1 - expected], abs=1e-12)


@given(st.lists(st.floats(0, 5, width=32), min_size=2, max_size=8))
@settings(max_examples=50, deadline=None)
def test_never_falls_with_n_where_the_reward_is_the_value(rewards):
    rewards_US = np.array([rewards])
    curve = [best_of_n(rewards_US, rewards_US, n)[0] for n in range(1, len(rewards) + 1)]
    assert (np.diff(curve) >= -1e-9).all()
    assert curve[0] == pytest.approx(np.mean(rewards))
    assert curve[-1] == pytest.approx(max(rewards))


def test_judge_failures_are_chosen_only_where_there_is_nothing_else():
    rewards = np.array([[np.nan, 0.0, np.nan], [np.nan, np.nan, np.nan]])
    values = np.array([[1.0, 0.25, 1.0], [0.0, 0.5, 1.0]])
    assert best_of_n(rewards, values, 3).tolist() == pytest.approx([0.25, 0.5])


@pytest.mark.parametrize("n", [0, 4])
def test_more_than_there_are_is_refused(n):
    with pytest.raises(ValueError, match="between 1 and 3"):
        best_of_n(np.zeros((1, 3)), np.zeros((1, 3)), n)
