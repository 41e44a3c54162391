"""Draws of trials: the first keeps what is given, each depends on seed and number alone."""

import dataclasses

from jaxnr.baselines.run import BASELINES
from jaxnr.baselines.tuning import draw
from jaxnr.config import BaselinesConfig


def test_draws():
    config = BaselinesConfig()
    for name, baseline in BASELINES.items():
        given = getattr(config, name)
        assert draw(given, baseline.space, 0, seed=3) == given
        drawn = [draw(given, baseline.space, trial, seed=3) for trial in range(1, 9)]
        assert drawn == [draw(given, baseline.space, trial, seed=3) for trial in range(1, 9)]
        assert len(set(drawn)) > 4
        for settings in drawn:
            for field in dataclasses.fields(settings):
                choices = baseline.space.get(field.name, (getattr(given, field.name),))
                assert getattr(settings, field.name) in choices
