"""Trials: the settings of each are drawn by seed, and recall on the validation users chooses among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

Settings = TypeVar("Settings", bound=Any)


def draw(settings: Settings, space: Mapping[str, tuple], trial: int, seed: int) -> Settings:
    """The settings of a trial: the given ones for the first, then one value of each setting in ``space`` at random.

    A draw depends on seed and trial alone, so that more trials begin with the same ones.
    """
    if trial == 0:
        return settings
    rng = np.random.default_rng([seed, trial])
    drawn = {name: values[rng.integers(len(values))] for name, values in space.items()}
    return dataclasses.replace(settings, **drawn)
