"""What choosing the best of n sampled lists by reward is worth, exactly, from S ≥ n samples a user."""

from __future__ import annotations

import numpy as np
from scipy.special import comb


def best_of_n(rewards_US: np.ndarray, values_US: np.ndarray, n: int) -> np.ndarray:
    """values_U: the expected value of the sample with the best reward among n drawn without replacement from the S.

    That is the mean over all subsets of n samples, in closed form. With s samples of lower reward and t of equal
    reward (itself included), a sample is the one chosen in (C(s+t, n) - C(s, n)) / t of the C(S, n) subsets, where a
    tie at the top goes to each of its members equally. A reward of NaN (the judge failed) ranks below every number.
    Raises ValueError unless 1 ≤ n ≤ S.
    """
    S = rewards_US.shape[1]
    if not 1 <= n <= S:
        raise ValueError(f"best of {n} needs between 1 and {S} samples, the number there are")
    rewards_US = np.where(np.isnan(rewards_US), -np.inf, rewards_US)
    lower_US = (rewards_US[:, None, :] < rewards_US[:, :, None]).sum(axis=2)
    equal_US = (rewards_US[:, None, :] == rewards_US[:, :, None]).sum(axis=2)
    chosen_US = (comb(lower_US + equal_US, n) - comb(lower_US, n)) / (equal_US * comb(S, n))
    return (chosen_US * values_US).sum(axis=1)
