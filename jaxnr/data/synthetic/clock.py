"""When things happen: the rhythm of the day, in seconds since the start of the log."""

from __future__ import annotations

import numpy as np

DAY = 86_400
# Relative rate an hour, 0 to 23. Readers: breakfast, lunch, and most of all the evening. Newsrooms: office hours.
READING = np.array([1, 1, 1, 1, 1, 2, 5, 9, 9, 7, 6, 6, 8, 7, 6, 6, 6, 7, 8, 10, 11, 10, 6, 3], float)
PUBLISHING = np.array([1, 1, 1, 1, 2, 5, 8, 9, 9, 9, 8, 8, 8, 8, 8, 8, 7, 6, 5, 4, 3, 2, 2, 1], float)


def seconds_of_day(rng: np.random.Generator, rhythm: np.ndarray, shape: int | tuple[int, ...]) -> np.ndarray:
    """Times within a day that follow the hourly rhythm."""
    hours = rng.choice(24, size=shape, p=rhythm / rhythm.sum())
    return (hours * 3600 + rng.integers(0, 3600, size=shape)).astype(np.int64)
