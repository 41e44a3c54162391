"""The catalogue of the generated world: which subject is written about, when and how well."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxnr.data.synthetic.clock import DAY, PUBLISHING, seconds_of_day
from jaxnr.data.synthetic.lexicon import Lexicon
from jaxnr.data.synthetic.parameters import WorldParameters
from jaxnr.data.synthetic.text import write_abstracts, write_headlines


class Catalogue(NamedTuple):
    """Articles in order of publication; times in seconds since the start of the log (negative: before it)."""

    published_I: np.ndarray
    expires_I: np.ndarray
    subject_I: np.ndarray
    topic_I: np.ndarray
    quality_I: np.ndarray
    titles: list[str]
    abstracts: list[str]


def popularity(rng: np.random.Generator, n_subjects: int, skew: float) -> np.ndarray:
    """Probability of each subject: Zipf with the given exponent over a random order."""
    weights = 1.0 / np.arange(1, n_subjects + 1) ** skew
    return rng.permutation(weights / weights.sum())


def generate_catalogue(
    rng: np.random.Generator, parameters: WorldParameters, lexicon: Lexicon, popularity_S: np.ndarray
) -> Catalogue:
    """Publication days are uniform, hours follow the newsroom; a breaking subject crowds out others for a day."""
    n = parameters.n_articles
    first_day = -int(np.ceil(parameters.backlog_days))
    day_I = rng.integers(first_day, parameters.days, size=n)
    published_I = day_I * DAY + seconds_of_day(rng, PUBLISHING, n)
    published_I = np.sort(published_I)
    day_I = published_I // DAY

    n_days = parameters.days - first_day
    bursts = rng.random((n_days, len(popularity_S))) < parameters.burst_share
    rates = popularity_S * np.where(bursts, parameters.burst_factor, 1.0)
    thresholds = np.cumsum(rates / rates.sum(axis=1, keepdims=True), axis=1)
    subject_I = (rng.random((n, 1)) >= thresholds[day_I - first_day]).sum(axis=1).clip(max=len(popularity_S) - 1)

    life_I = parameters.article_life_days * DAY * rng.uniform(0.8, 1.2, size=n)
    subjects = [lexicon.subjects[row] for row in subject_I]
    return Catalogue(
        published_I=published_I,
        expires_I=published_I + life_I.astype(np.int64),
        subject_I=subject_I,
        topic_I=lexicon.topic_of_subject[subject_I],
        quality_I=rng.lognormal(0.0, parameters.quality_sigma, size=n),
        titles=write_headlines(rng, subjects),
        abstracts=write_abstracts(rng, subjects),
    )
