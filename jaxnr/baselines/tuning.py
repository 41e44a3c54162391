"""Trials: the settings of each are drawn by seed, and recall on the validation users chooses among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

Settings = TypeVar("Settings")


def draw(settings: Settings, space: Mapping[str, tuple], trial: int, seed: int) -> Settings:
    """The settings of a trial: the given ones for the first, then one value of each key of ``space`` at random.

    A draw depends on seed and trial alone, so that more trials begin with the same ones.
    """
    if trial == 0:
        return settings
    rng = np.random.default_rng([seed, trial])
    for key, values in space.items():
        settings = with_value(settings, key, values[rng.integers(len(values))])
    return settings


def with_value(settings: Any, key: str, value: Any) -> Any:
    """``settings`` with another value at a dotted key."""
    name, _, rest = key.partition(".")
    return dataclasses.replace(settings, **{name: with_value(getattr(settings, name), rest, value) if rest else value})
