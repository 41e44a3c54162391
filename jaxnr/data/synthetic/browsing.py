"""Searches and page visits: short sessions, each about one interest that is alive at the time."""

from __future__ import annotations

import numpy as np

from jaxnr.data.synthetic.clock import DAY, READING, seconds_of_day
from jaxnr.data.synthetic.lexicon import Lexicon
from jaxnr.data.synthetic.log import SEARCH, WEB, Log, make_log
from jaxnr.data.synthetic.parameters import WorldParameters
from jaxnr.data.synthetic.text import write_pages, write_queries
from jaxnr.data.synthetic.users import Users

LONGEST_SESSION = 4
"""Events; longer ones would let a single evening fill a prompt."""


def generate_browsing(rng: np.random.Generator, parameters: WorldParameters, lexicon: Lexicon, users: Users) -> Log:
    """All clean searches and pages, sessions numbered from 0."""
    user_N, time_N, interest_N = _sessions(rng, parameters, users)
    length_N = np.minimum(rng.geometric(1.0 - parameters.session_continue, size=len(user_N)), LONGEST_SESSION)
    session = np.repeat(np.arange(len(user_N)), length_N)
    step = np.arange(len(session)) - np.repeat(np.cumsum(length_N) - length_N, length_N)
    time = time_N[session] + step * rng.integers(60, 240, size=len(session))
    time = np.minimum(time, parameters.days * DAY - 1)

    user, interest = user_N[session], interest_N[session]
    searching, paging, _ = users.stream_UM3[user, interest].T
    searches = rng.random(len(user)) < searching / (searching + paging)
    subject = users.subject_UM[user, interest]
    domain = np.where(searches, SEARCH, WEB)
    dwell = np.where(searches, rng.lognormal(2.5, 0.6, len(user)), rng.lognormal(4.0, 0.8, len(user)))
    return make_log(
        user=user,
        time=time,
        domain=domain,
        text=write_texts(rng, lexicon, subject, searches),
        dwell=dwell.round(1),
        session=session,
        label=np.zeros(len(user), int),
        subject=subject,
    )


def write_texts(rng: np.random.Generator, lexicon: Lexicon, subject: np.ndarray, searches: np.ndarray) -> np.ndarray:
    """A query where ``searches``, else a page title, for each subject index."""
    texts = np.empty(len(subject), dtype=object)
    for rows, write in ((searches, write_queries), (~searches, write_pages)):
        texts[rows] = write(rng, [lexicon.subjects[index] for index in subject[rows]])
    return texts


def _sessions(
    rng: np.random.Generator, parameters: WorldParameters, users: Users
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User, time and interest of each session: everyday ones, and the one in which a leading interest first shows."""
    end = parameters.days * DAY
    rate_U = parameters.browse_sessions_per_day * users.activity_U * (end - users.joined_U) / DAY
    count_U = np.where(users.cold_U, 1 + rng.poisson(parameters.cold_browse_sessions, len(rate_U)), rng.poisson(rate_U))
    user = np.repeat(np.arange(len(count_U)), count_U)
    day = rng.integers(users.joined_U[user] // DAY, parameters.days)
    time = day * DAY + seconds_of_day(rng, READING, len(user))
    time = np.maximum(time, users.joined_U[user])

    weight = users.weight_UM[user] * users.stream_UM3[user, :, :2].sum(axis=2)
    age = (time[:, None] - users.browse_start_UM[user]) / DAY
    fresh = (users.browse_start_UM[user] > users.joined_U[user][:, None]) & (age < parameters.fresh_days)
    weight = weight * np.where(fresh, parameters.fresh_factor, 1.0)
    weight = np.where((age >= 0) & (time[:, None] < users.end_UM[user]), weight, 0.0)
    thresholds = weight.cumsum(axis=1)
    interest = (rng.random((len(user), 1)) * thresholds[:, -1:] >= thresholds).sum(axis=1)

    first_user, first_interest = np.nonzero(users.leads_UM)
    first_time = users.browse_start_UM[first_user, first_interest] + rng.integers(0, DAY // 2, len(first_user))
    return (
        np.concatenate([user, first_user]),
        np.concatenate([time, first_time]),
        np.concatenate([interest, first_interest]),
    )
