"""Logged news requests: a plain recommender makes slates, a position-biased reader clicks.

The recommender sees publication times, categories and earlier clicks, and what readers follow on the site: a noisy
view of their interests, since a fifth of the followed part is a section picked for no reason, and most of the slate is
not about what the reader follows at all. Clicks follow the examination model: P(click) = P(look at the position) x
attraction(reader, article).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxnr.data.synthetic.articles import Catalogue
from jaxnr.data.synthetic.clock import DAY, READING, seconds_of_day
from jaxnr.data.synthetic.log import NEWS, Log, make_log
from jaxnr.data.synthetic.parameters import WorldParameters
from jaxnr.data.synthetic.users import Users
from jaxnr.errors import InputError

LONGEST_VISIT_S = 900
"""Reading down a slate ends before this; a second visit on a day comes later."""


class Requests(NamedTuple):
    """R logged requests with slates of K articles, in the order shown."""

    user_R: np.ndarray
    time_R: np.ndarray
    slate_RK: np.ndarray
    clicked_RK: np.ndarray


class Visits(NamedTuple):
    """R readers who open the news at given times; a reader occurs once."""

    user_R: np.ndarray
    time_R: np.ndarray


class Site(NamedTuple):
    """What stays the same while requests are generated: S subjects with their topics, articles and readers."""

    parameters: WorldParameters
    topic_S: np.ndarray
    catalogue: Catalogue
    users: Users


def generate_requests(rng: np.random.Generator, site: Site) -> Requests:
    """Day by day, and per day the first and then the second visit: a slate reacts to clicks before it, never after."""
    clicked_UI = np.zeros((len(site.users.joined_U), len(site.catalogue.published_I)), bool)
    parts = []
    for day in range(site.parameters.days):
        popularity_I = clicked_UI.sum(axis=0)  # of earlier days only
        for visits in _visits(rng, site, day):
            weight_RI, first = _slate_weights(rng, site, visits, clicked_UI[visits.user_R], popularity_I)
            slate_RK = first + _draw_slates(rng, weight_RI, site.parameters.slate_size)
            clicks_RK = _draw_clicks(rng, site, visits, slate_RK)
            row, position = np.nonzero(clicks_RK)
            clicked_UI[visits.user_R[row], slate_RK[row, position]] = True
            parts.append(Requests(*visits, slate_RK, clicks_RK))
    joined = Requests(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    order = np.lexsort((joined.user_R, joined.time_R))
    return Requests(*(column[order] for column in joined))


def click_log(rng: np.random.Generator, site: Site, requests: Requests) -> Log:
    """The clicks of the requests as news events; a request is a session."""
    request, position = np.nonzero(requests.clicked_RK)
    catalogue, end = site.catalogue, site.parameters.days * DAY
    user, item = requests.user_R[request], requests.slate_RK[request, position]
    subject = catalogue.subject_I[item]
    interested = (site.users.subject_UM[user] == subject[:, None]).any(axis=1)
    dwell = rng.lognormal(np.where(interested, 4.2, 3.3), 0.7)
    time = requests.time_R[request] + 10 + 45 * position + rng.integers(0, 40, len(request))
    return make_log(
        user=user,
        time=np.minimum(time, end - 1),
        domain=np.full(len(user), NEWS),
        text=[catalogue.titles[row] for row in item],
        dwell=dwell.round(1),
        session=request,
        label=np.zeros(len(user), int),
        subject=subject,
        item=item,
        request=request,
        position=position,
    )


def _visits(rng: np.random.Generator, site: Site, day: int) -> tuple[Visits, Visits]:
    """The first visits of a day, and the second ones, each later than the first one's clicks."""
    parameters, users = site.parameters, site.users
    reads_U = users.joined_U <= day * DAY
    reads_U &= ~users.cold_U | (day >= parameters.days - parameters.cold_news_days)
    rate_U = np.where(users.cold_U, parameters.cold_visits_per_day, parameters.news_visits_per_day) * users.activity_U
    first_U = reads_U & (rng.random(len(rate_U)) < np.minimum(rate_U, 0.97))
    first_time_U, second_time_U = np.sort(day * DAY + seconds_of_day(rng, READING, (2, len(rate_U))), axis=0)
    apart_U = second_time_U - first_time_U > LONGEST_VISIT_S
    second_U = first_U & apart_U & (rng.random(len(rate_U)) < parameters.second_visit)
    return (
        Visits(np.flatnonzero(first_U), first_time_U[first_U]),
        Visits(np.flatnonzero(second_U), second_time_U[second_U]),
    )


def _slate_weights(
    rng: np.random.Generator, site: Site, visits: Visits, clicked_RI: np.ndarray, popularity_I: np.ndarray
) -> tuple[np.ndarray, int]:
    """Weights [R, window] of the articles that can be shown, and the index of the window's first article."""
    parameters, catalogue = site.parameters, site.catalogue
    oldest = visits.time_R.min(initial=0) - 1.3 * parameters.article_life_days * DAY
    first = int(np.searchsorted(catalogue.published_I, oldest))
    last = int(np.searchsorted(catalogue.published_I, visits.time_R.max(initial=0), side="right"))
    window = slice(first, last)
    topic_I = catalogue.topic_I[window]
    time_R1 = visits.time_R[:, None]
    age_RI = (time_R1 - catalogue.published_I[window]).astype(np.float32) / DAY
    live_RI = (age_RI >= 0) & (catalogue.expires_I[window] > time_R1) & ~clicked_RI[:, window]

    topic_SC = np.eye(site.topic_S.max() + 1, dtype=np.float32)[site.topic_S]
    follows_RS = _followed_subjects(site, visits)
    sections_RC = follows_RS @ topic_SC
    stray_RC = np.eye(topic_SC.shape[1], dtype=np.float32)[rng.integers(0, topic_SC.shape[1], len(time_R1))]
    taste_RC = clicked_RI[:, window] @ np.eye(topic_SC.shape[1], dtype=np.float32)[topic_I]
    followed = parameters.followed_share
    stray = 1.0 - parameters.follow_subject - parameters.follow_topic
    parts = (
        (parameters.popular_share, (popularity_I[window] + 1) * np.exp(-age_RI / parameters.popular_age)),
        (parameters.category_share, taste_RC[:, topic_I] * np.exp(-age_RI / parameters.category_age)),
        (parameters.explore_share, np.float32(1.0)),
        (followed * parameters.follow_subject, follows_RS[:, catalogue.subject_I[window]]),
        (followed * parameters.follow_topic, sections_RC[:, topic_I]),
        (followed * stray, stray_RC[:, topic_I]),
    )
    weight_RI = np.zeros(live_RI.shape, np.float32)
    for share, part_RI in parts:
        weight_RI += share * _normalise(live_RI * part_RI)
    return weight_RI, first


def _followed_subjects(site: Site, visits: Visits) -> np.ndarray:
    """How much each reader wants to read about each subject now [R, S]."""
    follows_RS = np.zeros((len(visits.user_R), len(site.topic_S) + 1), np.float32)  # the last column is for no interest
    subject_RM = site.users.subject_UM[visits.user_R]
    follows_RS[np.arange(len(subject_RM))[:, None], subject_RM] = _news_weights(site.users, visits)
    return follows_RS[:, :-1]


def _news_weights(users: Users, visits: Visits) -> np.ndarray:
    """How much each interest draws its reader to news at the time [R, M]; 0 where it is not alive in news."""
    user_R, time_R1 = visits.user_R, visits.time_R[:, None]
    alive_RM = (users.news_start_UM[user_R] <= time_R1) & (time_R1 < users.end_UM[user_R])
    return np.where(alive_RM, users.weight_UM[user_R] * users.stream_UM3[user_R, :, 2], 0.0).astype(np.float32)


def _normalise(weight_RI: np.ndarray) -> np.ndarray:
    return weight_RI / np.maximum(weight_RI.sum(axis=1, keepdims=True), 1e-9)


def _draw_slates(rng: np.random.Generator, weight_RI: np.ndarray, size: int) -> np.ndarray:
    """Without replacement, heavier ones tend to come first: the smallest of exponential times with these rates.

    Raises InputError where fewer than ``size`` articles have a weight.
    """
    shown_RI = weight_RI > 0
    if shown_RI.sum(axis=1).min(initial=size) < size:
        raise InputError(
            f"WorldParameters: a news request found fewer than slate_size = {size} unread articles in the catalogue; "
            "raise n_articles or article_life_days, or lower slate_size."
        )
    waiting_RI = rng.standard_exponential(weight_RI.shape, dtype=np.float32)
    arrival_RI = np.divide(waiting_RI, weight_RI, out=np.full_like(waiting_RI, np.inf), where=shown_RI)
    nearest_RK = np.argpartition(arrival_RI, size - 1, axis=1)[:, :size]
    order_RK = np.take_along_axis(arrival_RI, nearest_RK, axis=1).argsort(axis=1)
    return np.take_along_axis(nearest_RK, order_RK, axis=1)


def _draw_clicks(rng: np.random.Generator, site: Site, visits: Visits, slate_RK: np.ndarray) -> np.ndarray:
    """Which articles of the slates are clicked [R, K], by position and attraction."""
    parameters, catalogue = site.parameters, site.catalogue
    want_RS = _followed_subjects(site, visits)
    rows_R1 = np.arange(len(slate_RK))[:, None]
    pull_RK = want_RS[rows_R1, catalogue.subject_I[slate_RK]]
    relative_RK = pull_RK / np.maximum(want_RS.max(axis=1, keepdims=True, initial=0.0), 1e-9)
    subject_RM = site.users.subject_UM[visits.user_R]
    topic_RM = np.where(subject_RM < 0, -1, site.topic_S[subject_RM])
    same_topic_RK = (topic_RM[:, None, :] == catalogue.topic_I[slate_RK][:, :, None]).any(axis=2)

    attract_RK = np.where(same_topic_RK, parameters.attract_topic, parameters.attract_other)
    attract_RK = np.where(pull_RK > 0, parameters.attract_interest * (0.5 + 0.5 * relative_RK), attract_RK)
    look_K = 1.0 / (1.0 + parameters.position_decay * np.arange(slate_RK.shape[1]))
    return rng.random(slate_RK.shape) < look_K * np.minimum(attract_RK * catalogue.quality_I[slate_RK], 0.9)
