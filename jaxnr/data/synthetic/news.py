"""Logged news requests: a plain recommender makes slates, a position-biased reader clicks.

The recommender sees publication times, categories and earlier clicks, and what readers follow on the site: a noisy
view of their interests, since a fifth of the followed part is a section picked for no reason and half of the rest of
the slate is not about the reader at all. Clicks follow the examination model: P(click) = P(look at the position) x
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


class Requests(NamedTuple):
    """R logged requests with slates of K articles, in the order shown."""

    user_R: np.ndarray
    time_R: np.ndarray
    slate_RK: np.ndarray
    clicked_RK: np.ndarray


def generate_requests(
    rng: np.random.Generator, parameters: WorldParameters, catalogue: Catalogue, users: Users
) -> Requests:
    """Day by day, and per day the first and then the second visit: a slate reacts to clicks before it, never after."""
    clicked_UI = np.zeros((parameters.n_users, parameters.n_articles), bool)
    parts = []
    for day in range(parameters.days):
        popularity_I = clicked_UI.sum(axis=0)  # of earlier days only
        for user_R, time_R in _visits(rng, parameters, users, day):
            weight_RI, first = _slate_weights(parameters, catalogue, users, user_R, time_R, clicked_UI, popularity_I)
            slate_RK = first + _draw_slates(rng, weight_RI, parameters.slate_size)
            clicks_RK = _draw_clicks(rng, parameters, catalogue, users, user_R, time_R, slate_RK)
            row, position = np.nonzero(clicks_RK)
            clicked_UI[user_R[row], slate_RK[row, position]] = True
            parts.append(Requests(user_R, time_R, slate_RK, clicks_RK))
    joined = Requests(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    order = np.lexsort((joined.user_R, joined.time_R))
    return Requests(*(column[order] for column in joined))


def click_log(rng: np.random.Generator, catalogue: Catalogue, users: Users, requests: Requests, end: int) -> Log:
    """The clicks of the requests as news events; a request is a session."""
    request, position = np.nonzero(requests.clicked_RK)
    user, item = requests.user_R[request], requests.slate_RK[request, position]
    subject = catalogue.subject_I[item]
    interested = (users.subject_UM[user] == subject[:, None]).any(axis=1)
    dwell = rng.lognormal(np.where(interested, 4.2, 3.3), 0.7)
    time = requests.time_R[request] + 10 + 45 * position + rng.integers(0, 30, len(request))
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


def _visits(
    rng: np.random.Generator, parameters: WorldParameters, users: Users, day: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(users, times) of the first visits of a day and of the second ones."""
    reads_U = users.joined_U < day * DAY
    reads_U &= ~users.cold_U | (day >= parameters.days - parameters.cold_news_days)
    reads_U |= ~users.cold_U
    rate_U = np.where(users.cold_U, parameters.cold_visits_per_day, parameters.news_visits_per_day)
    first_U = reads_U & (rng.random(len(rate_U)) < np.minimum(rate_U * users.activity_U, 0.97))
    second_U = first_U & (rng.random(len(rate_U)) < parameters.second_visit * rate_U)
    times_U2 = day * DAY + np.sort(seconds_of_day(rng, READING, (len(rate_U), 2)), axis=1)
    # A visit may last a quarter of an hour: the second one begins after the first one's clicks.
    late_U = np.minimum(times_U2[:, 0] + 1800, (day + 1) * DAY - 1)
    second_U &= late_U > times_U2[:, 0] + 900
    times_U2[:, 1] = np.maximum(times_U2[:, 1], late_U)
    return [(np.flatnonzero(chosen), times_U2[chosen, visit]) for visit, chosen in enumerate((first_U, second_U))]


def _slate_weights(
    parameters: WorldParameters,
    catalogue: Catalogue,
    users: Users,
    user_R: np.ndarray,
    time_R: np.ndarray,
    clicked_UI: np.ndarray,
    popularity_I: np.ndarray,
) -> tuple[np.ndarray, int]:
    """Weights [R, window] of the articles that can be shown, and the index of the window's first article."""
    first = np.searchsorted(catalogue.published_I, time_R.min(initial=0) - 1.3 * parameters.article_life_days * DAY)
    last = np.searchsorted(catalogue.published_I, time_R.max(initial=0), side="right")
    window = slice(int(first), int(last))
    topic_I, subject_I = catalogue.topic_I[window], catalogue.subject_I[window]
    age_RI = (time_R[:, None] - catalogue.published_I[window]).astype(np.float32) / DAY
    live_RI = (age_RI >= 0) & (catalogue.expires_I[window] > time_R[:, None]) & ~clicked_UI[user_R, window]
    n_topics = catalogue.topic_I.max() + 1

    taste_RC = clicked_UI[user_R].astype(np.float32) @ np.eye(n_topics, dtype=np.float32)[catalogue.topic_I]
    weight_RM = _news_weights(users, user_R, time_R)
    follows_RI = np.zeros(live_RI.shape, np.float32)
    sections_RI = np.zeros(live_RI.shape, np.float32)
    topic_of_subject = _topic_of_subject(catalogue, users)
    for interest in range(weight_RM.shape[1]):
        subject_R = users.subject_UM[user_R, interest, None]
        follows_RI += weight_RM[:, interest, None] * (subject_R == subject_I)
        sections_RI += weight_RM[:, interest, None] * (topic_of_subject[subject_R] == topic_I)
    # The section picked for no reason stays the same for a user and a day.
    section_R = (user_R * 7 + time_R // DAY * 5) % n_topics
    followed = parameters.followed_share
    other = 1.0 - parameters.follow_subject - parameters.follow_topic
    parts = (
        (parameters.popular_share, (popularity_I[window] + 1) * np.exp(-age_RI / parameters.popular_age)),
        (parameters.category_share, taste_RC[:, topic_I] * np.exp(-age_RI / parameters.category_age)),
        (parameters.explore_share, np.float32(1.0)),
        (followed * parameters.follow_subject, follows_RI),
        (followed * parameters.follow_topic, sections_RI),
        (followed * other, (section_R[:, None] == topic_I).astype(np.float32)),
    )
    weight_RI = sum(share * _normalise(live_RI * part) for share, part in parts)
    return weight_RI, window.start


def _topic_of_subject(catalogue: Catalogue, users: Users) -> np.ndarray:
    """Topic of each subject that articles are about; -2, which matches nothing, for the others and for index -1."""
    topics = np.full(max(catalogue.subject_I.max(), users.subject_UM.max()) + 2, -2)
    topics[catalogue.subject_I] = catalogue.topic_I
    return topics


def _news_weights(users: Users, user_R: np.ndarray, time_R: np.ndarray) -> np.ndarray:
    """How much each interest draws its reader to news at the time [R, M]; 0 where it is not alive in news."""
    time_R1 = time_R[:, None]
    alive_RM = (users.news_start_UM[user_R] <= time_R1) & (time_R1 < users.end_UM[user_R])
    return np.where(alive_RM, users.weight_UM[user_R] * users.stream_UM3[user_R, :, 2], 0.0).astype(np.float32)


def _normalise(weight_RI: np.ndarray) -> np.ndarray:
    return weight_RI / np.maximum(weight_RI.sum(axis=1, keepdims=True), 1e-9)


def _draw_slates(rng: np.random.Generator, weight_RI: np.ndarray, size: int) -> np.ndarray:
    """Without replacement, heavier ones tend to come first: the smallest of exponential times with these rates."""
    with np.errstate(divide="ignore"):
        arrival_RI = rng.standard_exponential(weight_RI.shape, dtype=np.float32) / weight_RI
    nearest_RK = np.argpartition(arrival_RI, size, axis=1)[:, :size]
    order_RK = np.take_along_axis(arrival_RI, nearest_RK, axis=1).argsort(axis=1)
    return np.take_along_axis(nearest_RK, order_RK, axis=1)


def _draw_clicks(
    rng: np.random.Generator,
    parameters: WorldParameters,
    catalogue: Catalogue,
    users: Users,
    user_R: np.ndarray,
    time_R: np.ndarray,
    slate_RK: np.ndarray,
) -> np.ndarray:
    """Which articles of the slates are clicked [R, K], by position and attraction."""
    weight_RM = _news_weights(users, user_R, time_R)
    topic_RM = _topic_of_subject(catalogue, users)[users.subject_UM[user_R]]
    relative_RM = np.minimum(weight_RM / np.maximum(weight_RM.max(axis=1, keepdims=True), 1e-9), 1.0)
    same_RKM = users.subject_UM[user_R][:, None, :] == catalogue.subject_I[slate_RK][:, :, None]
    pull_RK = (same_RKM * (weight_RM > 0)[:, None, :] * (0.5 + 0.5 * relative_RM)[:, None, :]).max(axis=2)
    same_topic_RK = (topic_RM[:, None, :] == catalogue.topic_I[slate_RK][:, :, None]).any(axis=2)
    attract_RK = np.where(same_topic_RK, parameters.attract_topic, parameters.attract_other)
    attract_RK = np.maximum(attract_RK, parameters.attract_interest * pull_RK) * catalogue.quality_I[slate_RK]
    look_K = 1.0 / (1.0 + parameters.position_decay * np.arange(slate_RK.shape[1]))
    return rng.random(slate_RK.shape) < look_K * np.minimum(attract_RK, 0.9)
