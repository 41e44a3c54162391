"""The users of the generated world and the life of their latent interests."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxnr.data.synthetic.clock import DAY
from jaxnr.data.synthetic.parameters import WorldParameters


class Users(NamedTuple):
    """U users with up to M interests each. Times in seconds since the start of the log; -1 marks no interest."""

    joined_U: np.ndarray
    cold_U: np.ndarray
    activity_U: np.ndarray
    subject_UM: np.ndarray
    weight_UM: np.ndarray
    browse_start_UM: np.ndarray
    """From here on the interest shows in searches and pages, ..."""
    news_start_UM: np.ndarray
    """... and from here on in news clicks."""
    end_UM: np.ndarray
    leads_UM: np.ndarray
    """Whether searches and pages were planned to come days before news."""
    stream_UM3: np.ndarray
    """Preference for (search, web, news), mean 1 over the three."""


def generate_users(
    rng: np.random.Generator, parameters: WorldParameters, popularity_S: np.ndarray, topic_of_subject: np.ndarray
) -> Users:
    """Draws users; a user's first interest lasts throughout, later ones may emerge or fade."""
    n_users, n_interests = parameters.n_users, parameters.max_interests
    cold_U = rng.permutation(n_users) < round(parameters.cold_share * n_users)
    joined_U = np.where(
        cold_U, (parameters.days - rng.uniform(1.5, parameters.cold_join_days, n_users)) * DAY, 0.0
    ).astype(np.int64)

    subject_UM = _draw_subjects(rng, parameters, popularity_S, topic_of_subject)
    count_U = rng.integers(parameters.min_interests, n_interests + 1, size=n_users)
    present_UM = np.arange(n_interests) < count_U[:, None]
    weight_UM = np.where(present_UM, rng.gamma(parameters.weight_concentration, size=present_UM.shape), 0.0)
    browse_start_UM, news_start_UM, end_UM, leads_UM = _draw_lives(rng, parameters, joined_U, cold_U)
    streams_UM3 = rng.dirichlet(np.full(3, parameters.stream_concentration), size=present_UM.shape)
    return Users(
        joined_U=joined_U,
        cold_U=cold_U,
        activity_U=rng.lognormal(0.0, parameters.activity_sigma, size=n_users),
        subject_UM=np.where(present_UM, subject_UM, -1),
        weight_UM=weight_UM / weight_UM.sum(axis=1, keepdims=True),
        browse_start_UM=browse_start_UM,
        news_start_UM=news_start_UM,
        end_UM=end_UM,
        leads_UM=leads_UM & present_UM,
        stream_UM3=3.0 * streams_UM3,
    )


def _draw_subjects(
    rng: np.random.Generator, parameters: WorldParameters, popularity_S: np.ndarray, topic_of_subject: np.ndarray
) -> np.ndarray:
    """Distinct subjects [U, M], the first two of different topics: the Gumbel trick draws without replacement."""
    shape = (parameters.n_users, len(popularity_S))
    n_topics = topic_of_subject.max() + 1
    home_UH = rng.random((parameters.n_users, n_topics)).argsort(axis=1)[:, : parameters.home_topics]
    at_home_US = (home_UH[:, :, None] == topic_of_subject).any(axis=1)
    keys_US = np.log(popularity_S) + np.log(parameters.home_topic_boost) * at_home_US + rng.gumbel(size=shape)
    first_U = keys_US.argmax(axis=1)
    same_topic_US = topic_of_subject == topic_of_subject[first_U][:, None]
    second_U = np.where(same_topic_US, -np.inf, keys_US).argmax(axis=1)
    rows = np.arange(parameters.n_users)
    keys_US[rows, first_U], keys_US[rows, second_U] = np.inf, np.finfo(float).max
    return (-keys_US).argsort(axis=1)[:, : parameters.max_interests]


def _draw_lives(
    rng: np.random.Generator, parameters: WorldParameters, joined_U: np.ndarray, cold_U: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Start in searches and pages, start in news, end (seconds), and whether the former leads, each [U, M]."""
    shape = (len(joined_U), parameters.max_interests)
    later_UM = np.broadcast_to(np.arange(shape[1]) > 0, shape) & ~cold_U[:, None]
    emerges_UM = later_UM & (rng.random(shape) < parameters.emerge_share)
    leads_UM = emerges_UM & (rng.random(shape) < parameters.lead_share)
    fades_UM = later_UM & ~emerges_UM & (rng.random(shape) < parameters.fade_share)

    start_UM = np.where(emerges_UM, rng.uniform(0.5, parameters.last_start, shape), joined_U[:, None] / DAY)
    lead_UM = rng.uniform(parameters.min_lead, parameters.max_lead, shape)
    follow_UM = rng.uniform(0.5, parameters.news_lead, shape)
    browse_UM = start_UM + np.where(emerges_UM & ~leads_UM, follow_UM, 0.0)
    news_UM = start_UM + np.where(leads_UM, lead_UM, 0.0)
    end_UM = np.where(fades_UM, rng.uniform(0.3, 0.85, shape) * parameters.days, float(parameters.days))
    seconds = [(times * DAY).astype(np.int64) for times in (browse_UM, news_UM, end_UM)]
    return seconds[0], seconds[1], seconds[2], leads_UM
